"""One fold of a data set that was packed for cross-validation: split `kfold`.

Such a data set has splits fold0 to foldN-1 in place of train, validation and test, and one packing
and one pass of the bias model serve all folds. Of fold I, fold I is test, the one before it is
validation, and the N - 2 others are train. Rows are numbered anew from the fold after I on, round
the circle, so that training rows come first, then validation, then test, as everywhere else.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.data.manifest import Manifest, Tracks
from mgc_dist.data.tracks import SPLITS, folds_of
from mgc_dist.errors import UserError


def of_fold(folder: Path, packed: Manifest, fold: int | None) -> Manifest:
    """A data set as one fold sees it, with a data-set id of its own; without folds, as it is.

    Args:
        folder: of the shards, for messages.
        packed: its manifest.
        fold: I, from 0; None for none.

    Raises:
        UserError: it has folds and none is named, or there is no such fold.
    """
    folds = folds_of(packed.splits)
    if not folds and fold is None:
        return packed
    if fold is None or fold not in range(folds):
        raise UserError(
            f"data set {folder}",
            got="no --fold" if fold is None else f"--fold {fold}",
            expected=f"--fold 0 to {folds - 1}" if folds else "no --fold: it has splits",
            cure=f"add --fold 0, and later do the same for the other {folds - 1} folds"
            if folds
            else "leave --fold out, or pack with --split kfold",
        )
    return _turned(packed, [(fold + 1 + step) % folds for step in range(folds)])


def turned(index: NDArray[np.void], packed: Manifest, seen: Manifest) -> NDArray[np.void]:
    """The index of a data set as a fold sees it.

    Args:
        index: INDEX_DTYPE [N] of the packed data set.
        packed: its manifest.
        seen: what `of_fold` made of it.

    Returns:
        INDEX_DTYPE [N]; row r is row (r + first_row) % N of the packed data set.
    """
    if seen is packed:
        return index
    index = np.roll(index, -first_row(packed, seen))
    skipped = packed.shards.index(seen.shards[0])
    index["shard"] = (index["shard"].astype(np.int64) - skipped) % len(packed.shards)
    return index


def first_row(packed: Manifest, seen: Manifest) -> int:
    """Row of the packed data set that is the first training row of a fold."""
    return sum(shard.rows for shard in packed.shards[: packed.shards.index(seen.shards[0])])


def _turned(packed: Manifest, order: list[int]) -> Manifest:
    """With the folds in this order: the last one is test, the one before it validation."""
    train, validation, test = SPLITS
    new = {f"fold{number}": train for number in order}
    new |= {f"fold{order[-2]}": validation, f"fold{order[-1]}": test}
    rows = dict.fromkeys(SPLITS, 0)
    for name, (start, stop) in packed.splits.items():
        rows[new[name]] += stop - start
    stops = np.cumsum(list(rows.values())).tolist()
    starts = np.cumsum([0, *(shard.rows for shard in packed.shards)]).tolist()
    skipped = starts.index(packed.splits[f"fold{order[0]}"][0])
    identity = f"{packed.dataset_id} fold {order[-1]} of {len(order)}"
    return replace(
        packed,
        dataset_id=hashlib.sha256(identity.encode()).hexdigest(),
        settings=packed.settings | {"fold": order[-1]},
        splits={name: (end - rows[name], end) for name, end in zip(rows, stops, strict=True)},
        tracks=Tracks(lambda: (replace(t, split=new[t.split]) for t in packed.tracks)),
        shards=packed.shards[skipped:] + packed.shards[:skipped],
    )
