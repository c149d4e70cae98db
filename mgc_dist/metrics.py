"""Figures of a classifier from log-probabilities and labels, in float64.

The unit is the track: segments of a track are averaged before anything is counted.
Own arithmetic on a confusion matrix; scikit-learn is the reference in the tests.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def track_probabilities(
    probabilities: NDArray[np.float64], track: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Mean probability over the segments of each track.

    Args:
        probabilities: float64 [N, K] of segments.
        track: int64 [N], the track of each segment, in any order.

    Returns:
        The tracks, ascending, int64 [M], and their probabilities, float64 [M, K].
    """
    tracks, inverse, counts = np.unique(track, return_inverse=True, return_counts=True)
    sums = np.zeros((len(tracks), probabilities.shape[1]))
    np.add.at(sums, inverse, probabilities)
    return tracks, sums / counts[:, None]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Figures over M items (tracks or segments).

    Attributes:
        count: M.
        accuracy: share of items whose most probable genre is the true one.
        balanced_accuracy: mean recall over the genres that occur.
        macro_f1: mean F1 over all K genres; one that neither occurs nor is predicted counts 0.
        nll: mean negative log-probability of the truth, in nats.
        confusion: int64 [K, K], rows are the truth.
    """

    count: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    nll: float
    confusion: NDArray[np.int64]

    def per_genre(self) -> list[dict[str, float]]:
        """Precision, recall, F1 and support of each genre, in label order."""
        precision, recall, f1 = _precision_recall_f1(self.confusion)
        support = self.confusion.sum(axis=1)
        return [
            {
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "support": int(support[k]),
            }
            for k in range(len(self.confusion))
        ]

    def summary(self) -> dict[str, float]:
        """The scalar figures by name."""
        return {
            "count": self.count,
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "nll": self.nll,
        }


def scores(probabilities: NDArray[np.float64], label: NDArray[np.int64]) -> Scores:
    """Figures of probabilities [M, K] against labels int64 [M]; M is at least 1."""
    genres = probabilities.shape[1]
    confusion = np.zeros((genres, genres), np.int64)
    np.add.at(confusion, (label, probabilities.argmax(axis=1)), 1)
    _, recall, f1 = _precision_recall_f1(confusion)
    truth = probabilities[np.arange(len(label)), label]
    return Scores(
        count=len(label),
        accuracy=float(np.trace(confusion) / len(label)),
        balanced_accuracy=float(recall[confusion.sum(axis=1) > 0].mean()),
        macro_f1=float(f1.mean()),
        nll=float(-np.log(np.maximum(truth, np.finfo(np.float64).tiny)).mean()),
        confusion=confusion,
    )


def expected_calibration_error(
    probabilities: NDArray[np.float64], label: NDArray[np.int64], bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence, 0 to 1.

    Args:
        probabilities: float64 [M, K].
        label: int64 [M].
        bins: of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == label
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.zeros(bins)
    np.add.at(gap, bin_of, confidence - right)
    return float(np.abs(gap).sum() / len(label))


def effective_sample_size(weight: NDArray[np.float64]) -> float:
    """(sum w)^2 / sum w^2: how many equal rows the weights are worth (Kish 1965)."""
    total = float(np.square(weight).sum())
    return float(weight.sum()) ** 2 / total if total > 0 else 0.0


def _precision_recall_f1(
    confusion: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    hit = np.diag(confusion).astype(np.float64)
    truth, guess = confusion.sum(axis=1), confusion.sum(axis=0)
    recall = hit / np.maximum(truth, 1)
    precision = hit / np.maximum(guess, 1)
    return precision, recall, 2 * hit / np.maximum(truth + guess, 1)
