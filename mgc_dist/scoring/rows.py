"""One pass over splits that fills a folder of rows, on all ranks, however often it is cut.

Batch b holds the same rows whoever computes it, so the bytes are the same on any number of ranks,
and in a pass that was cut. Rank 0 writes for all, so that the folder may be on a disk of its own.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.data.reader import Batch, ShardSet
from mgc_dist.data.rowstore import RowFile, RowsOf, RowStore
from mgc_dist.errors import UserError
from mgc_dist.scoring.walk import Outputs, all_batches

log = logging.getLogger(__name__)

_AT_ONCE_BYTES = 64 << 20
"""Values that are summed over ranks and written at a time, in float32."""


def all_fill(
    store: RowStore,
    folder: Path,
    of: RowsOf,
    forward: Callable[[Tensor], Tensor],
    shards: ShardSet,
    peers: Ranks,
    *,
    batch: int,
    splits: tuple[str, ...],
    work: Mapping[str, object],
    title: str,
    flag: str,
    progress: Callable[[str, int, Iterator[Batch]], Iterator[Batch]],
    stopped: Callable[[], bool] | None = None,
) -> bool:
    """Compute what is missing of a folder of rows, until it is whole (a collective).

    Args:
        store: the kind of folder.
        folder: is made.
        of: what the rows are of.
        forward: int16 [B, T] on the device -> float [B, ...] as `of.shape` has it.
        shards: the data set.
        peers: who takes part.
        batch: B.
        splits: whose rows they are, in row order.
        work: what else the digits depend on.
        title: of the pass, in the log.
        flag: that names the model, in messages.
        progress: wraps the stream of a split's batches, given its name and number of turns.
        stopped: whether this rank has been asked to stop.

    Returns:
        False if a rank was asked to stop meanwhile: what is done is kept.

    Raises:
        UserError: a value is not finite.
        RuntimeError: a row was not visited exactly once.
    """
    with ExitStack() as held:
        files: list[RowFile] = []  # one, on rank 0

        def begin() -> dict[str, list[int]]:
            files.append(held.enter_context(store.begin(folder, of, work)))
            bounds = (shards.manifest.splits[split] for split in splits)
            counts = [math.ceil((stop - first) / batch) for first, stop in bounds]
            missing = {
                split: [n for n in range(count) if not files[0].holds(f"{split} {n}")]
                for split, count in zip(splits, counts, strict=True)
            }
            left = sum(map(len, missing.values()))
            log.info("%s: %d of %d batches to go", title, left, sum(counts))
            return missing

        def put(split: str, group: list[Outputs]) -> None:
            for found in group:
                _refuse_not_finite(found, store.noun, flag)
                files[0].put(f"{split} {found.number}", found.first, found.values)

        row_bytes = 4 * math.prod(of.shape[1:])
        at_once = max(peers.world, _AT_ONCE_BYTES // (row_bytes * batch))
        for split, numbers in peers.all_decide(begin).items():
            turns = math.ceil(len(numbers) / peers.world)
            groups = all_batches(
                forward,
                shards,
                split,
                peers,
                batch=batch,
                numbers=numbers,
                at_once=at_once,
                progress=partial(progress, split, turns),
            )
            for group in groups:
                peers.all_decide(partial(put, split, group))
                if stopped is not None and any(peers.all_gather(stopped())):
                    return False
        peers.all_decide(lambda: store.finish(files[0], folder, of))
    return True


def _refuse_not_finite(outputs: Outputs, noun: str, flag: str) -> None:
    bad = np.flatnonzero(~np.isfinite(outputs.values).all(axis=(1, 2)))
    if len(bad):
        raise UserError(
            flag,
            got=f"{noun} of row {outputs.first + bad[0]} that are not finite",
            expected="numbers",
            cure="the model's weights are damaged, or overflow: choose another one",
        )
