"""Figures as tables on the terminal: of an evaluation, of two runs, of settings and seeds.

They are given as the JSON that is written, so that both say the same.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mgc_dist.scoring import shared_genres
from mgc_dist.scoring.metrics import METRICS
from mgc_dist.scoring.written import Bounds, EvaluationFigures, Intervals, SubgroupFigures


def evaluation(figures: EvaluationFigures) -> None:
    """Print an evaluation: tracks, segments, aggregates, intervals, genres, subgroups."""
    console = _console()
    title = f"{figures['run']}: {figures['name']}, data set {figures['dataset_id'][:12]}"
    columns = {name: metric.head for name, metric in METRICS.items() if not metric.aside}
    shown = _table(title, ("tracks by", "count", *columns.values()))
    ways = [(figures["aggregate"], figures["track"])]
    ways += [each for each in figures["aggregates"].items() if each[0] != figures["aggregate"]]
    for way, each in [*ways, ("(segments)", figures["segment"])]:
        shown.add_row(way, str(each["count"]), *(_cell(each[name]) for name in columns))
    console.print(shown)
    if sentence := shared_genres.told(figures):
        console.print(f"All of it {sentence}.")
    found = figures["intervals"]
    for unit, bounds in by_unit(found):
        named = (f"{METRICS[name].head} {_range(each)}" for name, each in bounds.items())
        console.print(f"95 % {unit}: {', '.join(named)}")
    tempered = figures["temperature"]
    if tempered:
        without = tempered["without"]
        console.print(
            f"all of it with temperature {tempered['value']:.3f}, fitted on validation tracks; "
            f"without it: NLL {_cell(without['nll'])}, ECE {_cell(without['ece'])}"
        )
    track = figures["track"]
    console.print(
        f"ECE of a perfectly calibrated model of this size: {_cell(track['ece_floor'])}; mean "
        f"confidence less accuracy: {_signed(track['overconfidence'])}"
    )
    genres = _table("by genre, over tracks", ("genre", "precision", "recall", "95 %", "F1", "n"))
    for genre, row in figures["per_genre"].items():
        cells = (row["precision"], row["recall"], row["recall_interval"], row["f1"])
        genres.add_row(genre, *map(_cell, cells), str(row["support"]))
    console.print(genres)
    worst = figures["worst_genre"]
    console.print(f"worst genre: {worst['name']}, recall {worst['recall']:.3f}")
    if figures["subgroups"]:
        _subgroups(console, figures["subgroups"])


def by_unit(intervals: Intervals) -> list[tuple[str, Bounds]]:
    """Intervals with the words that say what was drawn, the one that counts first.

    Tracks of one artist are right or wrong together. So whole artists are drawn where they are
    known; over tracks alone, a nominal 95 % interval covered 64 % (docs/log.md, 2026-11-26).

    Args:
        intervals: of an evaluation or a comparison, as it is written.
    """
    tracks, groups = intervals["tracks"], intervals.get("groups")
    if groups:
        return [("over artists", groups), ("over tracks", tracks)]
    return [("by track; artists unknown, so too narrow", tracks)]


def _subgroups(console: Console, subgroups: SubgroupFigures) -> None:
    columns = ("subgroup", "tracks", "accuracy", "95 %", "segments", "accuracy")
    shown = _table(f"by subgroup: {subgroups['source']}", columns)
    for name, each in subgroups["groups"].items():
        segment = subgroups["segment"].get(name, {"count": 0, "accuracy": None})
        cells = (each["count"], each["accuracy"], each["interval"])
        shown.add_row(name, *map(_cell, (*cells, segment["count"], segment["accuracy"])))
    console.print(shown)
    worst = subgroups["worst_group"]
    if worst:
        console.print(
            f"worst subgroup: {worst['name']}, accuracy {worst['accuracy']:.3f} over "
            f"{worst['count']} tracks"
        )


def pair(comparison: dict[str, Any]) -> None:
    """Print the comparison of two runs."""
    console = _console()
    title = f"A {comparison['a']}, B {comparison['b']}: {comparison['name']}"
    title += f", {comparison['count']} tracks"
    if comparison["in_common"]:
        console.print(f"All of it {comparison['in_common']}.")
    units = by_unit(comparison["intervals"])
    known = len(units) > 1
    heads = ("95 % over artists", "over tracks") if known else ("95 % by track",)
    shown = _table(title, ("figure", "A", "B", "B - A", *heads))
    for name, metric in METRICS.items():
        if not metric.leads:
            continue
        each = comparison[name]
        ranges = (_signed_range(bounds[name]) for _, bounds in units)
        cells = (_cell(each["a"]), _cell(each["b"]), _signed(each["difference"]), *ranges)
        shown.add_row(metric.head, *cells)
    console.print(shown)
    test = comparison["mcnemar"]
    console.print(
        f"McNemar, exact: right in A only {test['only_a']}, in B only {test['only_b']}, both "
        f"{test['both']}, neither {test['neither']}; p = {test['p']:.4g}"
    )
    seen = ", ".join(
        f"{METRICS[name].head} {value:.3f}"
        for name, value in comparison["detectable"].items()
        if METRICS[name].leads
    )
    console.print(f"A difference that would be seen four times in five: {seen}.")
    if not known:
        console.print(f"Intervals {units[0][0]}.")
    unit = "artists" if known else "tracks"
    for title, rows, count in (
        ("recall by genre", comparison["per_genre"], "support"),
        ("accuracy by subgroup", comparison["subgroups"] or {}, "count"),
    ):
        if rows:
            each = _table(title, ("name", "tracks", "A", "B", "B - A", f"95 % over {unit}"))
            for name, row in rows.items():
                before = (str(row[count]), _cell(row["a"]), _cell(row["b"]))
                after = (_signed(row["difference"]), _signed_range(row["interval"]))
                each.add_row(name, *before, *after)
            console.print(each)


def seeds(comparison: dict[str, Any]) -> None:
    """Print settings over seeds, and their gains over the baseline."""
    console = _console()
    if comparison["in_common"]:
        console.print(f"All of it {comparison['in_common']}.")
    shown = _table(
        f"{comparison['name']}, over seeds", ("settings", "n", "mean", "sd", "min", "max")
    )
    gains = _table(
        f"gain over {comparison['baseline']}, paired by seed",
        ("settings", "gain", "95 %", "p", "gained"),
    )
    units: set[str] = set()
    least: list[str] = []
    for label, condition in comparison["conditions"].items():
        shown.add_row(label)
        for name, each in condition["figures"].items():
            cells = (_cell(each[key]) for key in ("mean", "sd", "min", "max"))
            shown.add_row(f"  {_words(name)}", str(len(each["values"])), *cells)
        shown.add_section()
        if condition["gain"]:
            gains.add_row(label)
            for name, each in condition["gain"].items():
                sure = (_signed(each["mean"]), _signed_range(each["interval"]))
                gained = f"{each['gained']} of {len(each['values'])}"
                gains.add_row(f"  {_words(name)}", *sure, _cell(each.get("p_corrected")), gained)
            accuracy = condition["gain"]["accuracy"]
            units.add(accuracy["unit"])
            least.append(f"{label}: {_cell(accuracy['detectable'])}")
            gains.add_section()
    console.print(shown)
    if not gains.row_count:
        return
    console.print(gains)
    console.print(
        f"Intervals and p, from three seeds on, are over {' or '.join(sorted(units))}, jointly; p "
        f"is corrected for {comparison['tries']} comparisons with the baseline (Holm). A gain in "
        f"accuracy that is seen four times in five: {'; '.join(least)}."
    )


def _words(name: str) -> str:
    return name.replace("_f1", "-F1").replace("_", " ")


def _console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    return table


def _cell(value: float | list[float] | None) -> str:
    if isinstance(value, list):
        return _range(value)
    return str(value) if isinstance(value, int) else "-" if value is None else f"{value:.3f}"


def _range(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _signed_range(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:+.3f} to {value[1]:+.3f}"
