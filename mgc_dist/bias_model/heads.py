"""Linear heads on pooled hidden states, cross-fitted so that no row judges itself.

Standardisation, heads and temperature are fitted on training rows only; changing a
validation or test label changes no number here.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from mgc_dist.errors import UserError
from mgc_dist.scoring.calibration import fit_temperature


@dataclass(frozen=True, kw_only=True)
class Head:
    """A standardised linear classifier.

    Attributes:
        mean, scale: float64 [D] of the rows that it was fitted on.
        weight: float64 [K, D].
        intercept: float64 [K].
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weight: NDArray[np.float64]
    intercept: NDArray[np.float64]

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float64]:
        """[M, D] -> [M, K]."""
        return ((hidden - self.mean) / self.scale) @ self.weight.T + self.intercept


def head_hash(heads: Sequence[Head]) -> str:
    """sha256 of the numbers of all heads."""
    digest = hashlib.sha256()
    for head in heads:
        for array in (head.mean, head.scale, head.weight, head.intercept):
            digest.update(array.tobytes())
    return digest.hexdigest()


def fit_head(hidden: NDArray[np.float32], label: NDArray[np.int64], genres: int, c: float) -> Head:
    """Multinomial logistic regression with an L2 penalty of strength 1 / c.

    Args:
        hidden: float32 [M, D].
        label: int64 [M]; a genre that is absent gets the logit of one row in M + 1.
        genres: K.
        c: inverse penalty, as scikit-learn's.
    """
    mean, scale = hidden.mean(axis=0, dtype=np.float64), hidden.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-8, scale, 1.0)
    present = np.unique(label)
    weight = np.zeros((genres, hidden.shape[1]))
    intercept = np.full(genres, -np.log(len(label) + 1.0))
    if len(present) == 1:
        intercept[present] = 0.0
        return Head(mean=mean, scale=scale, weight=weight, intercept=intercept)
    from sklearn.linear_model import LogisticRegression  # a second that training does not need

    model = LogisticRegression(C=c, max_iter=2000, tol=1e-6)
    model.fit((hidden - mean) / scale, label)
    if len(present) == 2:  # scikit-learn folds two classes into one row of weights
        weight[present[1]], intercept[present] = model.coef_[0], (0.0, model.intercept_[0])
    else:
        weight[present], intercept[present] = model.coef_, model.intercept_
    return Head(mean=mean, scale=scale, weight=weight, intercept=intercept)


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """Calibrated log-probabilities of every row.

    Attributes:
        log_probability: float32 [N, K].
        temperature: fitted on the out-of-fold training logits.
        heads: one a fold.
    """

    log_probability: NDArray[np.float32]
    temperature: float
    heads: list[Head]


def cross_fit(
    hidden: NDArray[np.float32],
    label: NDArray[np.int64],
    fold: NDArray[np.int64],
    *,
    folds: int,
    genres: int,
    c: float,
) -> CrossFit:
    """Fit one head a fold on the other folds' training rows, then calibrate.

    Args:
        hidden: float32 [N, D].
        label: int64 [N]; read for training rows only.
        fold: int64 [N], 0 .. folds - 1 for a training row, -1 for any other.
        folds: k.
        genres: K.
        c: inverse penalty of the heads.

    Returns:
        For a training row the log-probabilities of the head that has not seen its fold; for
        any other row the log of the mean probability of all heads.

    Raises:
        UserError: a fold holds all or none of the training rows.
    """
    training = fold >= 0
    refuse_empty_folds(np.bincount(fold[training], minlength=folds), folds)
    fits = [
        fit_head(hidden[training & (fold != k)], label[training & (fold != k)], genres, c)
        for k in range(folds)
    ]
    logits = np.zeros((len(hidden), genres))
    for k, head in enumerate(fits):
        logits[fold == k] = head.logits(hidden[fold == k])
    temperature = fit_temperature(logits[training], label[training])
    log_probability = log_softmax(logits / temperature, axis=1)
    if not training.all():
        rest = hidden[~training]
        each = np.stack([log_softmax(head.logits(rest) / temperature, axis=1) for head in fits])
        log_probability[~training] = log_softmax(np.logaddexp.reduce(each, axis=0), axis=1)
    return CrossFit(
        log_probability=log_probability.astype(np.float32), temperature=temperature, heads=fits
    )


def refuse_empty_folds(sizes: Sequence[int] | NDArray[np.int64], folds: int) -> None:
    """Look at what each of the k folds holds.

    Raises:
        UserError: one holds nothing.
    """
    used = int(np.count_nonzero(sizes))
    if used < folds:
        raise UserError(
            f"--folds {folds}",
            got=f"{used} non-empty folds",
            expected="a group in every fold",
            cure="use fewer folds or another --seed",
        )
