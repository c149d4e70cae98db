"""How far a figure may be off: leaving clusters out, Wilson, McNemar, Student's t.

Clusters are artists where they are known, else tracks: tracks of one artist are right or wrong
together. Each is left out in turn (the jackknife), which tells the standard error of any figure of
a confusion matrix, without a random number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mgc_dist.scoring.metrics import figures_of, precision_recall_f1

LEVEL = 0.95
"""Of every interval."""
POWER = 0.8
"""How often a difference that is called detectable would be seen."""
_CELLS = 4_000_000
"""Cells of confusion matrices that are held at a time: 32 MB."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Figures of one model without each of C clusters.

    Attributes:
        figures: of every metric that follows from a confusion matrix, float64 [C].
        recall, f1: of each genre, float64 [C, K].
        holds: whether a cluster has a track of a genre, bool [C, K].
    """

    figures: dict[str, NDArray[np.float64]]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    holds: NDArray[np.bool_]

    def of_genre(
        self, genre: int, recall: float, f1: float, items: int
    ) -> tuple[Interval | None, Interval | None]:
        """Intervals of a genre's recall and F1; None where fewer than two clusters have it.

        How many artists a genre has is given, so they and the others vary apart.

        Args:
            genre: its label.
            recall: of all clusters.
            f1: of all clusters.
            items: of the genre.
        """
        held, of_f1 = self.holds[:, genre], self.f1[:, genre]
        clusters = int(held.sum())
        if clusters < 2:
            return None, None
        errors = (
            deviation(self.recall[held, genre]),
            float(np.hypot(deviation(of_f1[held]), deviation(of_f1[~held]))),
        )
        first, second = (
            of_figure(value, error, clusters=clusters, items=items)
            for value, error in zip((recall, f1), errors, strict=True)
        )
        return first, second


def leave_out(
    label: NDArray[np.int64],
    guess: NDArray[np.int64],
    cluster: NDArray[np.int64],
    *,
    genres: int,
) -> LeftOut:
    """Figures without each cluster in turn.

    Args:
        label: int64 [M].
        guess: predictions, int64 [M].
        cluster: int64 [M], any numbers; items of equal number are one cluster.
        genres: K.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.
    """
    _, place = np.unique(cluster, return_inverse=True)
    clusters = int(place.max()) + 1
    whole = np.zeros((genres, genres), np.int64)
    np.add.at(whole, (label, guess), 1)
    size = max(1, _CELLS // genres**2)
    parts = []
    for first in range(0, clusters, size):
        inside = (place >= first) & (place < first + size)
        table = np.zeros((min(size, clusters - first), genres, genres), np.int64)
        np.add.at(table, (place[inside] - first, label[inside], guess[inside]), 1)
        _, recall, f1 = precision_recall_f1(whole - table)
        parts.append((figures_of(whole - table), recall, f1, table.sum(axis=2) > 0))
    figures, recalls, f1s, holds = zip(*parts, strict=True)
    return LeftOut(
        figures={name: np.concatenate([each[name] for each in figures]) for name in figures[0]},
        recall=np.concatenate(recalls),
        f1=np.concatenate(f1s),
        holds=np.concatenate(holds),
    )


def deviation(without: NDArray[np.float64]) -> float:
    """Standard error of a figure from its values without each cluster, float64 [C]."""
    if not len(without):
        return 0.0
    spread = np.square(without - without.mean()).sum()
    return float(np.sqrt((len(without) - 1) / len(without) * spread))


def of_figure(value: float, error: float, *, clusters: int, items: int) -> Interval | None:
    """Interval of a figure; None of fewer than two clusters.

    A figure between 0 and 1 has Wilson's interval of a share, with as many independent items as
    would have its standard error, and with Student's t. Where nothing varies (all tracks are
    right), the clusters count as items. Over artists it covers 94 to 97 % where the bootstrap's
    percentiles covered 62 to 98 % (docs/design.md).

    Args:
        value: of the figure.
        error: its standard error.
        clusters: that it was measured on.
        items: that it was measured on; clusters are no better than as many items.

    Source: Dean and Pagano, "Evaluating confidence interval methods for binomial proportions in
    clustered surveys", J. Survey Statistics and Methodology 3(4), 2015.
    """
    if clusters < 2:
        return None
    quantile = _quantile((1 + LEVEL) / 2, clusters - 1)
    if not 0 <= value <= 1:
        return value - quantile * error, value + quantile * error
    spread = value * (1 - value)
    count = min(spread / error**2, items) if error > 0 and spread > 0 else clusters
    return _wilson(value, count, quantile)


def of_share(right: NDArray[np.bool_], cluster: NDArray[np.int64]) -> Interval | None:
    """Interval of the share of items that are right, bool [M]; None of fewer than two clusters."""
    if not len(right):
        return None
    _, place = np.unique(cluster, return_inverse=True)
    items, hits = np.bincount(place), np.bincount(place, right)
    if len(items) < 2:
        return None
    without = (hits.sum() - hits) / (items.sum() - items)
    error = deviation(without)
    return of_figure(float(right.mean()), error, clusters=len(items), items=len(right))


def p_above(right: NDArray[np.bool_], cluster: NDArray[np.int64], level: float) -> float:
    """One-sided p-value that the share of right items, bool [M], is not above a level.

    The normal test of a share whose interval is Wilson's, as `of_figure` has it: with as many
    independent items as would have the share's standard error, and Student's t. 1 of fewer than
    two clusters.
    """
    _, place = np.unique(cluster, return_inverse=True)
    items, hits = np.bincount(place), np.bincount(place, right)
    share, clusters = float(right.mean()), len(items)
    if clusters < 2:
        return 1.0
    error = deviation((hits.sum() - hits) / (items.sum() - items))
    spread = share * (1 - share)
    count = min(spread / error**2, len(right)) if error > 0 and spread > 0 else clusters
    return float(stats.t.sf((share - level) / (level * (1 - level) / count) ** 0.5, clusters - 1))


def of_difference(difference: float, error: float, *, clusters: int) -> Interval | None:
    """Interval of a difference; None where all clusters agree, which says nothing of others."""
    if clusters < 2 or error == 0:
        return None
    half = _quantile((1 + LEVEL) / 2, clusters - 1) * error
    return difference - half, difference + half


def detectable(error: float, freedom: float) -> float:
    """The difference that would be seen, at LEVEL, with the probability POWER.

    Args:
        error: standard error of the difference.
        freedom: its degrees of freedom.
    """
    return error * (_quantile((1 + LEVEL) / 2, freedom) + _quantile(POWER, freedom))


def _quantile(share: float, freedom: float) -> float:
    return float(stats.t.ppf(share, freedom))


def _wilson(share: float, count: float, z: float) -> Interval:
    """Source: Wilson, J. Am. Stat. Assoc. 22(158), 1927, eq. 7."""
    spread = z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * float(np.sqrt(share * (1 - share) / count + spread / count / 4))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two models err equally often.

    Args:
        only_first: items that only the first model gets right.
        only_second: items that only the second one does.

    Source: McNemar, Psychometrika 12(2), 1947, with the binomial distribution instead of its
    normal approximation.
    """
    discordant = only_first + only_second
    tail = stats.binom.cdf(min(only_first, only_second), discordant, 0.5)
    return min(1.0, 2 * float(tail))


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How sure a mean gain over seeds is.

    Attributes:
        interval: low and high.
        p: two-sided, that there is no gain.
        detectable: the gain that would be seen with the probability POWER.
    """

    interval: Interval
    p: float
    detectable: float


def over_seeds(
    gains: NDArray[np.float64], without: NDArray[np.float64] | None = None
) -> Gain | None:
    """How sure the mean of gains is, over other seeds and, with `without`, other clusters jointly.

    Both are taken as drawn at random: a gain of 5 seeds on one test set would not say what happens
    on other artists. None of fewer than three seeds, and where nothing varies.

    Args:
        gains: one a seed, float64 [S].
        without: the same without each cluster, float64 [S, C]; None where each seed has tracks of
            its own, so that its spread is already of both.

    Source: two crossed random factors, as in Searle, Casella and McCulloch, Variance Components,
    1992, chapter 4, on pseudo-values; degrees of freedom by Satterthwaite, Biometrics Bulletin
    2(6), 1946.
    """
    seeds = len(gains)
    if seeds < 3:
        return None
    if without is None or without.shape[1] < 2:
        variance, freedom = float(np.var(gains, ddof=1)) / seeds, float(seeds - 1)
    else:
        variance, freedom = _of_two_factors(gains, without)
    if variance <= 0:
        return None
    mean, error = float(gains.mean()), variance**0.5
    half = error * _quantile((1 + LEVEL) / 2, freedom)
    return Gain(
        interval=(mean - half, mean + half),
        p=float(2 * stats.t.sf(abs(mean) / error, freedom)),
        detectable=detectable(error, freedom),
    )


def _of_two_factors(
    gains: NDArray[np.float64], without: NDArray[np.float64]
) -> tuple[float, float]:
    """Variance of the mean, and its degrees of freedom."""
    seeds, clusters = without.shape
    pseudo = clusters * gains[:, None] - (clusters - 1) * without  # [S, C]
    mean, row, column = pseudo.mean(), pseudo.mean(axis=1), pseudo.mean(axis=0)
    rest = pseudo - row[:, None] - column + mean
    free = np.array([seeds - 1, clusters - 1, (seeds - 1) * (clusters - 1)], np.float64)
    squares = np.array(
        [
            clusters * np.square(row - mean).sum(),
            seeds * np.square(column - mean).sum(),
            np.square(rest).sum(),
        ]
    )
    of_seeds, of_clusters, of_both = squares / free
    whole = max(of_seeds + of_clusters - of_both, of_seeds, of_clusters)
    if whole <= 0:
        return 0.0, 1.0
    freedom = whole**2 / float((np.square([of_seeds, of_clusters, of_both]) / free).sum())
    return float(whole) / (seeds * clusters), freedom


def holm(values: Sequence[float]) -> list[float]:
    """P-values of several comparisons, corrected for their number.

    Source: Holm, Scandinavian Journal of Statistics 6(2), 1979.
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def clusters_of(groups: Sequence[str | None]) -> NDArray[np.int64]:
    """A number for each track, int64 [M]: equal within a group; unknown ones are alone."""
    numbers: dict[str, int] = {}
    known = [None if group is None else numbers.setdefault(group, len(numbers)) for group in groups]
    return np.array(
        [len(numbers) + place if number is None else number for place, number in enumerate(known)],
        np.int64,
    )


def units_of(groups: Sequence[str | None]) -> dict[str, NDArray[np.int64]]:
    """Clusters int64 [M] by the unit, the one that counts first: groups (artists), and tracks."""
    clusters = clusters_of(groups)
    several = any(group is not None for group in groups) and len(np.unique(clusters)) > 1
    return ({"groups": clusters} if several else {}) | {"tracks": np.arange(len(groups))}
