"""How far a figure may be off: bootstrap over tracks or artists, Wilson, McNemar, Student's t.

A resample draws clusters with replacement: tracks, or whole groups (artists) where they are
known, because tracks of one artist are right or wrong together. All that is resampled is which
cells of a confusion matrix are counted how often, so a bootstrap is one matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mgc_dist.scoring.metrics import figures_of, precision_recall_f1

LEVEL = 0.95
"""Of every interval."""
_BLOCK = 4_000_000
"""Draws that are held at a time: 32 MB."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Figures of R resamples of one model's predictions.

    Attributes:
        figures: of every metric that follows from a confusion matrix, float64 [R].
        recall: float64 [R, K]; NaN where a resample holds no track of the genre.
    """

    figures: dict[str, NDArray[np.float64]]
    recall: NDArray[np.float64]

    def intervals(self) -> dict[str, list[float]]:
        """Percentile intervals of the figures, by name."""
        return {name: list(percentile(drawn)) for name, drawn in self.figures.items()}


def resample(
    label: NDArray[np.int64],
    guesses: Sequence[NDArray[np.int64]],
    cluster: NDArray[np.int64],
    *,
    genres: int,
    resamples: int,
    seed: int,
) -> list[Resampled]:
    """Figures of bootstrap resamples, the same draws for every model.

    Args:
        label: int64 [M].
        guesses: predictions of each model, int64 [M].
        cluster: int64 [M], any numbers; items of equal number are drawn together.
        genres: K.
        resamples: R.
        seed: of the draws.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 8.
    """
    _, place = np.unique(cluster, return_inverse=True)
    clusters, cells = int(place.max()) + 1, genres * genres
    tables = []  # of each model float64 [C, K * K]: what a cluster adds to the confusion matrix
    for guess in guesses:
        table = np.zeros((clusters, cells))
        np.add.at(table, (place, label * genres + guess), 1)
        tables.append(table)
    rng = np.random.default_rng(seed)
    confusions: list[list[NDArray[np.float64]]] = [[] for _ in guesses]
    done = 0
    while done < resamples:
        size = min(resamples - done, max(1, _BLOCK // clusters))
        drawn = rng.integers(0, clusters, (size, clusters)) + clusters * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters)
        for table, kept in zip(tables, confusions, strict=True):
            kept.append(times.astype(np.float64) @ table)  # [r, K * K], whole numbers: exact
        done += size
    return [_figures(np.concatenate(kept).reshape(-1, genres, genres)) for kept in confusions]


def _figures(confusion: NDArray[np.float64]) -> Resampled:
    counts = confusion.astype(np.int64)  # [R, K, K]
    _, recall, _ = precision_recall_f1(counts)
    recall[counts.sum(axis=2) == 0] = np.nan
    return Resampled(figures=figures_of(counts), recall=recall)


def percentile(values: NDArray[np.float64], level: float = LEVEL) -> Interval:
    """Percentile interval of resampled values [R]; NaN values are left out."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(hits: int, count: int, level: float = LEVEL) -> Interval | None:
    """Interval of a share; None of nothing.

    Source: Wilson, J. Am. Stat. Assoc. 22(158), 1927, eq. 7.
    """
    if not count:
        return None
    z = float(stats.norm.ppf((1 + level) / 2))
    share, spread = hits / count, z * z / count
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


def student(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """t-interval of the mean of independent values (seeds); None of fewer than two."""
    if len(values) < 2:
        return None
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * deviation / len(values) ** 0.5
    return mean - half, mean + half


def clusters_of(groups: Sequence[str | None]) -> NDArray[np.int64]:
    """A number for each track, int64 [M]: equal within a group; unknown ones are alone."""
    numbers: dict[str, int] = {}
    known = [None if group is None else numbers.setdefault(group, len(numbers)) for group in groups]
    return np.array(
        [len(numbers) + place if number is None else number for place, number in enumerate(known)],
        np.int64,
    )
