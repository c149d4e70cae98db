"""A model and a split to figures: segments walked, tracks judged."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from mgc_dist.data import Batch, ShardSet
from mgc_dist.infer import all_rows
from mgc_dist.metrics import Scores, scores, track_probabilities
from mgc_dist.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class SplitScores:
    """Figures of one split.

    Attributes:
        split: its name.
        track: over tracks, the unit that counts.
        segment: over segments, for comparison.
        tracks: positions in the manifest's list, ascending, int64 [M].
        probabilities: float64 [M, K], mean over each track's segments.
        labels: int64 [M].
    """

    split: str
    track: Scores
    segment: Scores
    tracks: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    labels: NDArray[np.int64]


def all_score(
    forward: Callable[[Tensor], Tensor],
    shards: ShardSet,
    split: str,
    ranks: Ranks,
    *,
    batch: int,
    progress: Callable[[Iterator[Batch]], Iterator[Batch]] = lambda batches: batches,
) -> SplitScores:
    """Walk a split and judge it; the same digits on every rank and at any world size.

    Args:
        forward: int16 [B, T] on the device -> logits [B, K], in eval mode.
        shards: the data set.
        split: train, validation or test.
        ranks: who takes part (a collective).
        batch: B.
        progress: wraps the stream of batches, to show how far it is.
    """
    first, stop = shards.rows_of(split)
    genres = len(shards.manifest.genres)
    logits = all_rows(forward, shards, split, ranks, batch=batch, width=genres, progress=progress)
    return judge(logits, shards.labels[first:stop], shards.tracks[first:stop], split)


def judge(
    logits: NDArray[np.float32],
    label: NDArray[np.int64],
    track: NDArray[np.int64],
    split: str,
) -> SplitScores:
    """Figures of a split from its rows' logits.

    Args:
        logits: float32 [rows, K].
        label: int64 [rows].
        track: int64 [rows], position of each row's track in the manifest.
        split: name to record.
    """
    probabilities = softmax(logits.astype(np.float64), axis=1)  # [rows, K]
    tracks, of_track = track_probabilities(probabilities, track)
    first_row = np.searchsorted(track, tracks, sorter=np.argsort(track, kind="stable"))
    labels = label[np.argsort(track, kind="stable")[first_row]]
    return SplitScores(
        split=split,
        track=scores(of_track, labels),
        segment=scores(probabilities, label),
        tracks=tracks,
        probabilities=of_track,
        labels=labels,
    )
