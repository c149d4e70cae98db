"""A run beside those that it was compared with: what the same tracks say, and what validation does.

`compare A B` leaves its figures in B's folder. Without plain cross-entropy beside it, nothing on a
page says whether a loss has helped.
"""

from typing import Any

from mgc_dist import cli
from mgc_dist.report.dossier import Dossier
from mgc_dist.report.gallery import cell
from mgc_dist.report.section import Section, Table
from mgc_dist.report.tables import by_unit
from mgc_dist.scoring.metrics import METRICS

_HARDER = (
    "Tracks that the bias model gets wrong are harder for any model: that accuracy is lower there "
    "says nothing about the loss, without the same figures of plain cross-entropy."
)
_LIMIT = (
    "A debiasing loss is known to be a good choice only against a known shortcut, and judged on a "
    "test set without it."
)


def section(dossier: Dossier) -> Section | None:
    """Both runs' figures in two columns; for a debiased run alone, how to get the other one."""
    title = "Beside other runs"
    if not dossier.comparisons:
        if dossier.main is None or not _is_debiased(dossier):
            return None
        note = (
            "Nothing here says whether the loss helped. That takes the same run with --loss ce, "
            f"evaluated, and {cli.launched('compare')} RUN-CE {dossier.run}."
        )
        return Section(title=title, notes=(note, _HARDER, _LIMIT))
    tables, told = [], []
    for pair, other in dossier.comparisons:
        names = (_named(other), _named(dossier))
        tables.append(_table(pair, names, dossier, other))
        told.append(_told(pair, names, dossier, other))
    told += [_LIMIT] if _is_debiased(dossier) else []
    return Section(title=title, tables=tuple(tables), paragraphs=tuple(told))


def with_ce(dossier: Dossier) -> dict[str, Any] | None:
    """The comparison of a debiased run with plain cross-entropy, if one was made."""
    found = [pair for pair, other in dossier.comparisons if _is_plain(other)]
    return found[0] if found and _is_debiased(dossier) else None


def accuracy_bounds(pair: dict[str, Any]) -> tuple[float, float, str]:
    """The interval of a comparison's difference in accuracy, all of it if unknown; its unit."""
    unit, bounds = by_unit(pair["intervals"])[0]
    low, high = bounds.get("accuracy") or (-1.0, 1.0)
    return low, high, unit


def _is_debiased(dossier: Dossier) -> bool:
    return dossier.config is not None and dossier.config.objective.needs_bias


def _is_plain(dossier: Dossier) -> bool:
    return dossier.config is not None and not dossier.config.objective.needs_bias


def _named(dossier: Dossier) -> str:
    name = dossier.run.resolve().name
    return f"{name} ({dossier.config.objective.loss})" if dossier.config else name


def _table(pair: dict[str, Any], names: tuple[str, str], dossier: Dossier, other: Dossier) -> Table:
    unit, bounds = by_unit(pair["intervals"])[0]
    rows = [
        (f"{pair['name']}, {metric.head}", *_cells(pair[key], bounds.get(key)))
        for key, metric in METRICS.items()
        if metric.leads
    ]
    for name, row in (pair["subgroups"] or {}).items():
        rows.append((f"accuracy of {name} ({row['count']})", *_cells(row, row["interval"])))
    mine, theirs = dossier.best, other.best
    if mine and theirs:
        each = {"accuracy": (theirs.track_accuracy, mine.track_accuracy)}
        if mine.track_nll is not None and theirs.track_nll is not None:
            each["NLL"] = (theirs.track_nll, mine.track_nll)
        for head, (a, b) in each.items():
            rows.append((f"validation, {head}", cell(a), cell(b), f"{b - a:+.3f}", "-"))
    columns = ("figure", *names, "difference", f"95 % {unit}")
    return Table(label=f"{names[1]} beside {names[0]}", columns=columns, rows=tuple(rows))


def _cells(of: dict[str, Any], interval: list[float] | None) -> tuple[str, str, str, str]:
    span = f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else "-"
    change = "-" if of["difference"] is None else f"{of['difference']:+.3f}"
    return cell(of["a"]), cell(of["b"]), change, span


def _told(pair: dict[str, Any], names: tuple[str, str], dossier: Dossier, other: Dossier) -> str:
    low, high, unit = accuracy_bounds(pair)
    better = names[1] if low > 0 else names[0] if high < 0 else None
    told = (
        f"On {pair['count']} tracks, {better} is more often right"
        if better
        else f"On {pair['count']} tracks, no difference in accuracy is shown"
    )
    return (
        f"{told} (interval {low:+.3f} to {high:+.3f} {unit}). {_preferred(names, dossier, other)}"
    )


def _preferred(names: tuple[str, str], dossier: Dossier, other: Dossier) -> str:
    """Which of two runs their validation tracks like better, by their NLL."""
    mine, theirs = dossier.best, other.best
    same_data = dossier.environment.get("dataset_id") == other.environment.get("dataset_id")
    if not (mine and theirs and same_data) or None in (mine.track_nll, theirs.track_nll):
        return "What validation prefers is not known: not the same data, or no NLL."
    a, b = theirs.track_nll or 0.0, mine.track_nll or 0.0
    return (
        f"Validation prefers {names[int(b < a)]} (NLL {a:.3f} and {b:.3f}), where "
        "the same shortcuts lie as in training."
    )
