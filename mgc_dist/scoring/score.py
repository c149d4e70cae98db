"""A model and a split to figures: segments walked, tracks judged.

A track's genre comes from its segments in one of three ways: `mean-prob`, the mean of their
probabilities; `mean-logit`, the softmax of the mean of their logits; `vote`, the share of
segments that each genre wins, a tie going to the genre of the higher mean probability.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.config import Aggregate, Select
from mgc_dist.data.features import Features
from mgc_dist.data.reader import Batch, ShardSet
from mgc_dist.scoring.calibration import best_temperature, is_at_bound
from mgc_dist.scoring.intervals import clusters_of
from mgc_dist.scoring.metrics import Scores, scores, track_labels, track_means
from mgc_dist.scoring.shared_genres import SharedGenres
from mgc_dist.scoring.walk import all_rows

TEMPERATURE_FOLDS = 5
"""Parts of the validation groups, each of which is left out once."""


@dataclass(frozen=True, kw_only=True)
class SplitScores:
    """Figures of one split.

    Attributes:
        split: its name.
        aggregate: how segments were made into tracks.
        aggregates: figures over tracks for each of the three ways.
        segment: over segments, for comparison.
        tracks: positions in the manifest's list, ascending, int64 [M].
        probabilities: float64 [M, K] of the chosen way.
        guesses: int64 [M], the predicted labels.
        labels: int64 [M].
        logits: float32 [rows of the split, K], in row order.
        row_label, row_track: int64 [rows of the split].
    """

    split: str
    aggregate: Aggregate
    aggregates: dict[Aggregate, Scores]
    segment: Scores
    tracks: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    guesses: NDArray[np.int64]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    row_label: NDArray[np.int64]
    row_track: NDArray[np.int64]

    @property
    def track(self) -> Scores:
        """Over tracks, the unit that counts, in the chosen way."""
        return self.aggregates[self.aggregate]

    @property
    def rows_not_finite(self) -> int:
        """Segments with a logit that is no number, or infinite: a model that has diverged."""
        return int((~np.isfinite(self.logits)).any(axis=1).sum())

    def loss_by(self, select: Select) -> float:
        """What `--select` compares models by: the smaller, the better."""
        by = {"nll": self.track.nll, "macro-f1": -self.track.macro_f1, "last": 0.0}
        return by[select]


def all_score(
    forward: Callable[[Tensor], Tensor],
    shards: ShardSet,
    split: str,
    ranks: Ranks,
    *,
    batch: int,
    aggregate: Aggregate = "mean-prob",
    progress: Callable[[Iterator[Batch]], Iterator[Batch]] = lambda batches: batches,
    features: Features | None = None,
    shared: SharedGenres | None = None,
) -> SplitScores:
    """Walk a split and judge it; the same digits on every rank and at any world size.

    Args:
        forward: int16 [B, T] on the device -> logits [B, K], in eval mode.
        shards: the data set.
        split: train, validation or test.
        ranks: who takes part (a collective).
        batch: B.
        aggregate: how segments are made into tracks.
        progress: wraps the stream of batches, to show how far it is.
        features: given to `forward` in place of waves.
        shared: genres in common, to which all is restricted; None where model and data set have
            the same genres.
    """
    first, stop = shards.rows_of(split)
    label, track = shards.labels[first:stop], shards.tracks[first:stop]
    genres = len(shared.model if shared else shards.manifest.genres)
    logits = all_rows(
        forward,
        shards,
        split,
        ranks,
        batch=batch,
        width=genres,
        progress=progress,
        features=features,
    )
    if shared:
        kept = shared.kept(label)
        logits, track = logits[kept][:, shared.labels], track[kept]  # [rows, N]
        label = shared.labels_of(label[kept])
    return judge(logits, label, track, split, aggregate)


def judge(
    logits: NDArray[np.float32],
    label: NDArray[np.int64],
    track: NDArray[np.int64],
    split: str,
    aggregate: Aggregate = "mean-prob",
) -> SplitScores:
    """Figures of a split from its rows' logits.

    Args:
        logits: float32 [rows, K].
        label: int64 [rows].
        track: int64 [rows], position of each row's track in the manifest.
        split: name to record.
        aggregate: how segments are made into tracks.
    """
    labels = track_labels(label, track)
    ways: dict[Aggregate, tuple[NDArray[np.float64], NDArray[np.int64]]] = {
        "mean-prob": mean_probability(logits, track),
        "mean-logit": _mean_logit(logits, track),
        "vote": _vote(logits, track),
    }
    aggregates = {name: scores(given, labels, guess) for name, (given, guess) in ways.items()}
    # a genre without a vote has probability 0: there is no likelihood
    vote = aggregates["vote"]
    aggregates["vote"] = replace(vote, figures=vote.figures | {"nll": float("nan")})
    probabilities, guesses = ways[aggregate]
    return SplitScores(
        split=split,
        aggregate=aggregate,
        aggregates=aggregates,
        segment=scores(softmax(logits.astype(np.float64), axis=1), label),
        tracks=np.unique(track),
        probabilities=probabilities,
        guesses=guesses,
        labels=labels,
        logits=logits,
        row_label=label,
        row_track=track,
    )


def mean_probability(
    logits: NDArray[np.float32], track: NDArray[np.int64], temperature: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean over each track's segments of softmax(logits / temperature), and the best label.

    Args:
        logits: float32 [rows, K].
        track: int64 [rows].
        temperature: T.

    Returns:
        float64 [M, K] and int64 [M], tracks ascending.
    """
    mean = track_means(softmax(logits.astype(np.float64) / temperature, axis=1), track)[1]
    return mean, mean.argmax(axis=1)


def _mean_logit(
    logits: NDArray[np.float32], track: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    mean = softmax(track_means(logits.astype(np.float64), track)[1], axis=1)
    return mean, mean.argmax(axis=1)


def _vote(
    logits: NDArray[np.float32], track: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    share = track_means(np.eye(logits.shape[1])[logits.argmax(axis=1)], track)[1]  # [M, K]
    mean, _ = mean_probability(logits, track)
    tied = share == share.max(axis=1, keepdims=True)
    return share, np.where(tied, mean, -1.0).argmax(axis=1)


def fit_temperature(
    logits: NDArray[np.float32],
    label: NDArray[np.int64],
    track: NDArray[np.int64],
    groups: Sequence[str | None],
) -> float | None:
    """The scalar T with the best likelihood of the tracks, if it also helps tracks it has not seen.

    It minimises the mean over tracks of the negative log of the truth's mean probability,
    the mean over the track's segments of softmax(logits / T). To be accepted, temperatures that
    were fitted without some of the groups must give those groups a better likelihood than T = 1.

    Args:
        logits: float32 [rows, K] of the validation split.
        label: int64 [rows].
        track: int64 [rows].
        groups: of the tracks, ascending; None where unknown: the track is then its own group.

    Returns:
        T between 0.05 and 20; None where T = 1 is better. That is so where all tracks are right:
        the likelihood then grows as T falls (at 0.05 a test accuracy of 0.85 had an NLL of 13
        instead of 0.95). At a bound the logits tell nothing.

    Source: Guo et al., ICML 2017, section 4.2, with tracks in the place of images.
    """
    truth = track_labels(label, track)
    _, cluster = np.unique(clusters_of(groups), return_inverse=True)
    fold = cluster % TEMPERATURE_FOLDS  # [M]

    def losses(temperature: float) -> NDArray[np.float64]:
        mean, _ = mean_probability(logits, track, temperature)
        given = mean[np.arange(len(truth)), truth]
        return -np.log(np.maximum(given, np.finfo(np.float64).tiny))  # [M]

    right = mean_probability(logits, track)[1] == truth

    def fitted(seen: NDArray[np.bool_]) -> float | None:
        if right[seen].all():
            return None
        temperature = best_temperature(lambda t: float(losses(t)[seen].mean()))
        return None if is_at_bound(temperature) else temperature

    whole = fitted(np.ones(len(truth), bool))
    if whole is None or cluster.max() == 0:
        return None
    plain = losses(1.0)
    unseen = plain.copy()
    for k in np.unique(fold):
        without = fitted(fold != k)
        if without is not None:
            unseen[fold == k] = losses(without)[fold == k]
    return whole if unseen.mean() < plain.mean() else None
