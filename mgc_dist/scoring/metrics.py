"""Figures of a classifier from log-probabilities and labels, in float64.

The unit is the track: segments of a track are aggregated before anything is counted.
Own arithmetic on a confusion matrix; scikit-learn is the reference in the tests.
A new metric is an entry of METRICS: files, tables, intervals and comparisons follow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mgc_dist.scoring.written import GenreFigures

BINS = 15
"""Of confidence, as in Guo et al. (ICML 2017)."""
_EXACT = 500
"""Items of a bin up to which its mean deviation is exact; beyond, that of a normal distribution."""


def track_means(
    values: NDArray[np.float64], track: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Mean over the segments of each track.

    Args:
        values: float64 [N, K] of segments.
        track: int64 [N], the track of each segment, in any order.

    Returns:
        The tracks, ascending, int64 [M], and their means, float64 [M, K].
    """
    tracks, inverse, counts = np.unique(track, return_inverse=True, return_counts=True)
    sums = np.zeros((len(tracks), values.shape[1]))
    np.add.at(sums, inverse, values)
    return tracks, sums / counts[:, None]


def track_labels(label: NDArray[np.int64], track: NDArray[np.int64]) -> NDArray[np.int64]:
    """Label of each track, ascending, int64 [M], from those of its segments int64 [N]."""
    _, first = np.unique(track, return_index=True)
    return label[first]


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Confidence and accuracy over equal-width bins of confidence.

    Attributes:
        edges: float64 [bins + 1], 0 to 1.
        count: int64 [bins].
        confidence: float64 [bins], mean probability of the prediction; NaN where empty.
        accuracy: float64 [bins], share that is right; NaN where empty.
    """

    edges: NDArray[np.float64]
    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error: mean gap, each bin by its count.

        Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
        """
        gap = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((gap * self.count).sum() / self.count.sum())


@dataclass(frozen=True, kw_only=True)
class Metric:
    """An entry.

    Attributes:
        head: a word or two for columns.
        of_confusion: from confusion matrices, int64 [..., K, K] -> float64 [...]. Such a metric is
            resampled: it has intervals, and runs are compared by it.
        of_probabilities: from probabilities float64 [M, K], labels and predictions int64 [M].
        leads: whether it is shown where there is room for few.
        aside: whether it is told below a table in place of a column, on the terminal.
    """

    head: str
    of_confusion: Callable[[NDArray[np.int64]], NDArray[np.float64]] | None = None
    of_probabilities: (
        Callable[[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]], float] | None
    ) = None
    leads: bool = False
    aside: bool = False


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Figures over M items (tracks or segments).

    Attributes:
        count: M.
        figures: the value of each of METRICS; NaN where not defined.
        reliability: by bins of confidence.
        confusion: int64 [K, K], rows are the truth.
    """

    count: int
    figures: dict[str, float]
    reliability: Reliability
    confusion: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Share of items whose predicted genre is the true one."""
        return self.figures["accuracy"]

    @property
    def macro_f1(self) -> float:
        """Mean F1 over all K genres."""
        return self.figures["macro_f1"]

    @property
    def nll(self) -> float:
        """Mean negative log-probability of the truth, in nats; NaN of votes."""
        return self.figures["nll"]

    @property
    def ece(self) -> float:
        """Expected calibration error."""
        return self.figures["ece"]

    def per_genre(self) -> list[GenreFigures]:
        """Precision, recall, F1 and support of each genre, in label order; no interval yet."""
        precision, recall, f1 = precision_recall_f1(self.confusion)
        support = self.confusion.sum(axis=1)
        return [
            {
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "support": int(support[k]),
                "recall_interval": None,
            }
            for k in range(len(self.confusion))
        ]

    def summary(self) -> dict[str, float]:
        """The scalar figures by name."""
        return {"count": self.count, **self.figures}


def scores(
    probabilities: NDArray[np.float64],
    label: NDArray[np.int64],
    guess: NDArray[np.int64] | None = None,
) -> Scores:
    """Figures of predictions.

    Args:
        probabilities: float64 [M, K]; M is at least 1.
        label: int64 [M].
        guess: int64 [M], the predicted labels; the most probable ones by default.
    """
    if guess is None:
        guess = probabilities.argmax(axis=1)
    confusion = confusion_of(label, guess, probabilities.shape[1])
    figures = {name: float(value) for name, value in figures_of(confusion).items()}
    for name, metric in METRICS.items():
        if metric.of_probabilities:
            figures[name] = metric.of_probabilities(probabilities, label, guess)
    return Scores(
        count=len(label),
        figures={name: figures[name] for name in METRICS},
        reliability=reliability(probabilities, label, guess),
        confusion=confusion,
    )


def confusion_of(
    label: NDArray[np.int64], guess: NDArray[np.int64], genres: int
) -> NDArray[np.int64]:
    """Counts int64 [K, K] of (truth, prediction)."""
    confusion = np.zeros((genres, genres), np.int64)
    np.add.at(confusion, (label, guess), 1)
    return confusion


def figures_of(confusion: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Every metric of confusion matrices by name, int64 [..., K, K] -> float64 [...]."""
    return {
        name: metric.of_confusion(confusion)
        for name, metric in METRICS.items()
        if metric.of_confusion
    }


def _accuracy(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    hits = np.trace(confusion, axis1=-2, axis2=-1)
    return np.asarray(hits / np.maximum(confusion.sum(axis=(-2, -1)), 1))


def _balanced_accuracy(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean recall over the genres that occur."""
    _, recall, _ = precision_recall_f1(confusion)
    occurs = confusion.sum(axis=-1) > 0  # [..., K]
    return np.asarray((recall * occurs).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1))


def _macro_f1(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean F1 over all K genres; one that neither occurs nor is predicted counts 0."""
    return np.asarray(precision_recall_f1(confusion)[2].mean(axis=-1))


def _nll(
    probabilities: NDArray[np.float64], label: NDArray[np.int64], guess: NDArray[np.int64]
) -> float:
    truth = probabilities[np.arange(len(label)), label]
    return float(-np.log(np.maximum(truth, np.finfo(np.float64).tiny)).mean())


def _brier(
    probabilities: NDArray[np.float64], label: NDArray[np.int64], guess: NDArray[np.int64]
) -> float:
    """Mean squared distance of the probabilities from the truth's one-hot, 0 to 2.

    Source, for several classes: Brier, Monthly Weather Review 78(1), 1950.
    """
    onehot = np.eye(probabilities.shape[1])[label]
    return float(np.square(probabilities - onehot).sum(axis=1).mean())


def precision_recall_f1(
    confusion: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of each genre, [..., K, K] -> three times [..., K]; 0 where nothing can be counted."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    truth, guess = confusion.sum(axis=-1), confusion.sum(axis=-2)
    recall = hit / np.maximum(truth, 1)
    precision = hit / np.maximum(guess, 1)
    return precision, recall, 2 * hit / np.maximum(truth + guess, 1)


def reliability(
    probabilities: NDArray[np.float64],
    label: NDArray[np.int64],
    guess: NDArray[np.int64],
    bins: int = BINS,
) -> Reliability:
    """Confidence against accuracy.

    Args:
        probabilities: float64 [M, K].
        label: int64 [M].
        guess: int64 [M], the predicted labels.
        bins: of equal width.
    """
    confidence = _confidence(probabilities, guess)
    bin_of = _bins_of(confidence, bins)
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):  # an empty bin has no mean: NaN
        return Reliability(
            edges=np.linspace(0, 1, bins + 1),
            count=count,
            confidence=np.bincount(bin_of, confidence, bins) / count,
            accuracy=np.bincount(bin_of, guess == label, bins) / count,
        )


def ece_floor(confidence: NDArray[np.float64], bins: int = BINS) -> float:
    """The mean expected calibration error of a model that is right as often as it says.

    An error above 0 is no fault by itself: in a bin of few items, the share that is right is never
    exactly their confidence. Items are taken for independent.

    Args:
        confidence: float64 [M], probability of each prediction.
        bins: of equal width.

    Returns:
        0 to 1; NaN where there is no item, or a confidence is NaN.

    Source: Broecker and Smith, "Increasing the Reliability of Reliability Diagrams", Weather and
    Forecasting 22, 2007, for comparing with a calibrated forecast of the same size.
    """
    if not len(confidence) or not np.isfinite(confidence).all():
        return float("nan")
    chance, bin_of = np.minimum(confidence, 1), _bins_of(confidence, bins)  # 1 + 1e-8, by rounding
    total = sum(_mean_deviation(chance[bin_of == k]) for k in np.unique(bin_of))
    return float(total) / len(confidence)


def _overconfidence(
    probabilities: NDArray[np.float64], label: NDArray[np.int64], guess: NDArray[np.int64]
) -> float:
    """Mean confidence less accuracy: below 0 where the model is right more often than it says."""
    return float(_confidence(probabilities, guess).mean() - (guess == label).mean())


def _confidence(
    probabilities: NDArray[np.float64], guess: NDArray[np.int64]
) -> NDArray[np.float64]:
    return probabilities[np.arange(len(guess)), guess]


def _bins_of(confidence: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    # a model that has diverged gives NaN: the lowest bin
    return np.minimum((np.nan_to_num(confidence) * bins).astype(np.int64), bins - 1)


def _mean_deviation(chance: NDArray[np.float64]) -> float:
    """E |S - E S| of a sum of independent Bernoulli draws with these chances, [n]."""
    if len(chance) > _EXACT:
        return float(np.sqrt(2 / np.pi * (chance * (1 - chance)).sum()))
    share = np.ones(1)  # P(S = 0), P(S = 1), ...
    for each in chance:
        share = np.convolve(share, (1 - each, each))
    return float((share * np.abs(np.arange(len(share)) - chance.sum())).sum())


METRICS: dict[str, Metric] = {
    "accuracy": Metric(head="accuracy", of_confusion=_accuracy, leads=True),
    "balanced_accuracy": Metric(head="balanced", of_confusion=_balanced_accuracy),
    "macro_f1": Metric(head="macro-F1", of_confusion=_macro_f1, leads=True),
    "nll": Metric(head="NLL", of_probabilities=_nll),
    "brier": Metric(head="Brier", of_probabilities=_brier),
    "ece": Metric(
        head="ECE",
        of_probabilities=lambda given, label, guess: reliability(given, label, guess).error,
    ),
    "ece_floor": Metric(
        head="ECE floor",
        of_probabilities=lambda given, label, guess: ece_floor(_confidence(given, guess)),
        aside=True,
    ),
    "overconfidence": Metric(head="overconfidence", of_probabilities=_overconfidence, aside=True),
}
"""Figures by the name that they have in files."""


def effective_sample_size(weight: NDArray[np.float64]) -> float:
    """(sum w)^2 / sum w^2: how many equal rows the weights are worth (Kish 1965)."""
    total = float(np.square(weight).sum())
    return float(weight.sum()) ** 2 / total if total > 0 else 0.0
