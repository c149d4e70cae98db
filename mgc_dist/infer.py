"""One walk over a split in eval mode: every row once, the same digits at any world size.

The bias pass, validation and evaluation all walk this way.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgc_dist.data import Batch, Reader, ShardSet
from mgc_dist.plan import sweep_batches
from mgc_dist.ranks import Ranks


def all_rows(
    forward: Callable[[Tensor], Tensor],
    shards: ShardSet,
    split: str,
    ranks: Ranks,
    *,
    batch: int,
    width: int,
    progress: Callable[[Iterator[Batch]], Iterator[Batch]] = lambda batches: batches,
) -> NDArray[np.float32]:
    """Outputs of every row of a split, on every rank (a collective).

    Args:
        forward: int16 [B, T] on the device -> [B, width]; called equally often on all ranks.
        shards: the data set.
        split: train, validation or test.
        ranks: who takes part.
        batch: B.
        width: of the outputs (K or D).
        progress: wraps the stream of batches, to show how far it is.

    Returns:
        float32 [rows of the split, width], in row order.

    Raises:
        RuntimeError: a row was not visited exactly once.
    """
    first, stop = shards.rows_of(split)
    outputs = torch.zeros((stop - first, width), dtype=torch.float32)  # [rows, width]
    visits = torch.zeros(stop - first, dtype=torch.int32)
    plan = sweep_batches(stop - first, batch, ranks.world, ranks.rank)
    pin = ranks.device.type == "cuda"
    # no_grad, not inference_mode: ZeRO-3 keeps parameters that it gathers here for training
    with torch.no_grad(), Reader(shards, split, plan, read_ahead=4, pin=pin) as reader:
        for item in progress(iter(reader)):
            out = forward(item.wave.to(ranks.device, non_blocking=True)).float().cpu()
            true = item.row >= 0
            place = item.row[true] - first
            outputs[place] = out[true]
            visits[place] += 1
    outputs = ranks.all_sum(outputs.to(ranks.device)).cpu()
    visits = ranks.all_sum(visits.to(ranks.device)).cpu()
    if not bool((visits == 1).all()):
        row = int(torch.nonzero(visits != 1)[0]) + first
        raise RuntimeError(f"row {row} was visited {int(visits[row - first])} times, expected 1")
    return outputs.numpy()
