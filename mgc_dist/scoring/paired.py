"""Two runs on the same tracks: exact McNemar, and intervals that leave artists out of both."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgc_dist.scoring import intervals
from mgc_dist.scoring.intervals import LeftOut
from mgc_dist.scoring.metrics import confusion_of, figures_of, precision_recall_f1
from mgc_dist.scoring.results import Result, refuse_different

Report = dict[str, Any]


def compare(a: Result, b: Result, name: str) -> Report:
    """Every difference, B minus A, as JSON.

    Args:
        a: predictions of one run.
        b: predictions of the other.
        name: of the evaluation.

    Raises:
        UserError: the two were not measured on the same tracks.
    """
    refuse_different(a, b)
    right_a, right_b = a.guess == a.label, b.guess == b.label
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    groups = [one or other for one, other in zip(a.groups, b.groups, strict=True)]
    units = intervals.units_of(groups)
    unit = next(iter(units))
    left_out = {name: _left_out(a, b, cluster) for name, cluster in units.items()}
    return {
        "mode": "pair",
        "a": str(a.run),
        "b": str(b.run),
        "name": name,
        "dataset_id": a.dataset_id,
        "aggregate": a.aggregate,
        "in_common": a.in_common,
        "count": len(a.label),
        **_figures(a, b),
        "mcnemar": {
            "only_a": only_a,
            "only_b": only_b,
            "both": int((right_a & right_b).sum()),
            "neither": int((~right_a & ~right_b).sum()),
            "p": intervals.mcnemar(only_a, only_b),
        },
        "intervals": {
            "level": intervals.LEVEL,
            "known_groups": len({group for group in groups if group is not None}),
            "groups": None,
            **{name: _differences(a, b, *two) for name, two in left_out.items()},
        },
        "detectable": _detectable(*left_out[unit]),
        "unit": unit,
        "per_genre": _per_genre(a, b, *left_out[unit]),
        "subgroups": _subgroups(a, b, units[unit]),
    }


def _left_out(a: Result, b: Result, cluster: NDArray[np.int64]) -> tuple[LeftOut, LeftOut]:
    first, second = (
        intervals.leave_out(one.label, one.guess, cluster, genres=len(a.genres)) for one in (a, b)
    )
    return first, second


def _figures(a: Result, b: Result) -> Report:
    return {
        name: _difference(first, second)
        for (name, first), second in zip(_values(a).items(), _values(b).values(), strict=True)
    }


def _values(one: Result) -> dict[str, float]:
    confusion = confusion_of(one.label, one.guess, len(one.genres))
    return {name: float(value) for name, value in figures_of(confusion).items()}


def _difference(a: float | None, b: float | None) -> Report:
    known = a is not None and b is not None
    return {"a": a, "b": b, "difference": b - a if known else None}  # type: ignore[operator]


def _differences(a: Result, b: Result, out_a: LeftOut, out_b: LeftOut) -> Report:
    before, after = _values(a), _values(b)
    return {
        name: _interval(after[name] - before[name], out_b.figures[name] - out_a.figures[name])
        for name in before
    }


def _interval(difference: float, without: NDArray[np.float64]) -> list[float] | None:
    error = intervals.deviation(without)
    found = intervals.of_difference(difference, error, clusters=len(without))
    return found and list(found)


def _detectable(a: LeftOut, b: LeftOut) -> Report:
    """The difference of each figure that would be seen four times in five."""
    return {
        name: intervals.detectable(
            intervals.deviation(b.figures[name] - values), max(1, len(values) - 1)
        )
        for name, values in a.figures.items()
    }


def _per_genre(a: Result, b: Result, out_a: LeftOut, out_b: LeftOut) -> Report:
    confusions = [confusion_of(a.label, one.guess, len(a.genres)) for one in (a, b)]
    recalls = [precision_recall_f1(confusion)[1] for confusion in confusions]
    rows = {}
    for label, genre in enumerate(a.genres):
        support = int(confusions[0][label].sum())
        share: Sequence[float | None] = (
            [float(recall[label]) for recall in recalls] if support else (None, None)
        )
        found = _difference(*share)
        held = out_a.holds[:, label]
        without = (out_b.recall - out_a.recall)[held, label]
        interval = _interval(found["difference"], without) if support else None
        rows[genre] = {"support": support} | found | {"interval": interval}
    return rows


def _subgroups(a: Result, b: Result, cluster: NDArray[np.int64]) -> Report | None:
    """Accuracy in the subgroups that both runs were measured with; null where they differ."""
    names = sorted({name for name in a.subgroups if name is not None})
    if a.subgroups != b.subgroups or not names:
        return None
    rows = {}
    for name in names:
        inside = np.array([found == name for found in a.subgroups])
        first, second = (
            intervals.leave_out(
                one.label[inside], one.guess[inside], cluster[inside], genres=len(a.genres)
            )
            for one in (a, b)
        )
        shares = [float((one.guess == one.label)[inside].mean()) for one in (a, b)]
        without = second.figures["accuracy"] - first.figures["accuracy"]
        rows[name] = {
            "count": int(inside.sum()),
            **_difference(shares[0], shares[1]),
            "interval": _interval(shares[1] - shares[0], without),
        }
    return rows
