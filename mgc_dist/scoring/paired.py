"""Two runs on the same tracks: exact McNemar, and a bootstrap that draws for both alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgc_dist.scoring import intervals
from mgc_dist.scoring.intervals import Resampled
from mgc_dist.scoring.metrics import confusion_of, figures_of, precision_recall_f1
from mgc_dist.scoring.results import Result, refuse_different

Report = dict[str, Any]


def compare(a: Result, b: Result, name: str, *, resamples: int, seed: int) -> Report:
    """Every difference, B minus A, as JSON.

    Args:
        a: predictions of one run.
        b: predictions of the other.
        name: of the evaluation.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: the two were not measured on the same tracks.
    """
    refuse_different(a, b)
    right_a, right_b = a.guess == a.label, b.guess == b.label
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    groups = [one or other for one, other in zip(a.groups, b.groups, strict=True)]
    known = len({group for group in groups if group is not None})
    clusters = {"tracks": np.arange(len(a.label)), "groups": intervals.clusters_of(groups)}
    unit = "groups" if known and len(np.unique(clusters["groups"])) > 1 else "tracks"
    drawn = {
        name: _draw(a, b, cluster, resamples, seed)
        for name, cluster in clusters.items()
        if name in ("tracks", unit)
    }
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
            "resamples": resamples,
            "seed": seed,
            "known_groups": known,
            "groups": None,
            **{name: _differences(*two) for name, two in drawn.items()},
        },
        "unit": unit,
        "per_genre": _per_genre(a, b, *drawn[unit]),
        "subgroups": _subgroups(a, b, clusters[unit], resamples, seed),
    }


def _draw(
    a: Result, b: Result, cluster: NDArray[np.int64], resamples: int, seed: int
) -> tuple[Resampled, Resampled]:
    first, second = intervals.resample(
        a.label,
        [a.guess, b.guess],
        cluster,
        genres=len(a.genres),
        resamples=resamples,
        seed=seed,
    )
    return first, second


def _figures(a: Result, b: Result) -> Report:
    first, second = (figures_of(confusion_of(a.label, one.guess, len(a.genres))) for one in (a, b))
    return {name: _difference(float(first[name]), float(second[name])) for name in first}


def _difference(a: float | None, b: float | None) -> Report:
    known = a is not None and b is not None
    return {"a": a, "b": b, "difference": b - a if known else None}  # type: ignore[operator]


def _differences(a: Resampled, b: Resampled) -> dict[str, list[float]]:
    return {
        name: list(intervals.percentile(drawn - a.figures[name]))
        for name, drawn in b.figures.items()
    }


def _interval(drawn: NDArray[np.float64]) -> list[float] | None:
    """Percentile interval; None where all tracks agree: resamples cannot tell how sure that is."""
    low, high = intervals.percentile(drawn)
    return [low, high] if low < high else None


def _per_genre(a: Result, b: Result, drawn_a: Resampled, drawn_b: Resampled) -> Report:
    confusions = [confusion_of(a.label, one.guess, len(a.genres)) for one in (a, b)]
    recalls = [precision_recall_f1(confusion)[1] for confusion in confusions]
    rows = {}
    for label, genre in enumerate(a.genres):
        support = int(confusions[0][label].sum())
        share: Sequence[float | None] = (
            [float(recall[label]) for recall in recalls] if support else (None, None)
        )
        drawn = drawn_b.recall[:, label] - drawn_a.recall[:, label]
        interval = _interval(drawn) if support else None
        rows[genre] = {"support": support} | _difference(*share) | {"interval": interval}
    return rows


def _subgroups(
    a: Result, b: Result, cluster: NDArray[np.int64], resamples: int, seed: int
) -> Report | None:
    """Accuracy in the subgroups that both runs were measured with; null where they differ."""
    names = sorted({name for name in a.subgroups if name is not None})
    if a.subgroups != b.subgroups or not names:
        return None
    rows = {}
    for name in names:
        inside = np.array([found == name for found in a.subgroups])
        first, second = intervals.resample(
            a.label[inside],
            [a.guess[inside], b.guess[inside]],
            cluster[inside],
            genres=len(a.genres),
            resamples=resamples,
            seed=seed,
        )
        shares = [float((one.guess == one.label)[inside].mean()) for one in (a, b)]
        rows[name] = {
            "count": int(inside.sum()),
            **_difference(shares[0], shares[1]),
            "interval": _interval(second.figures["accuracy"] - first.figures["accuracy"]),
        }
    return rows
