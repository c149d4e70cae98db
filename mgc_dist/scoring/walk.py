"""One walk over a split in eval mode: every row once, the same digits at any world size.

The bias pass, validation and evaluation all walk this way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.data.features import Features
from mgc_dist.data.order import sweep_batches
from mgc_dist.data.reader import Batch, Reader, ShardSet

_LOGITS_AT_ONCE = 1024
"""Batches of logits that are summed over ranks at a time: 1.3 MB at B 32 and K 10."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a batch of rows gave.

    Attributes:
        number: b, the batch holds rows [bB, (b + 1)B) of its split.
        first: its first row, counted over the data set.
        values: float32 [rows, ...], without padding.
    """

    number: int
    first: int
    values: NDArray[np.float32]


def all_rows(
    forward: Callable[[Tensor], Tensor],
    shards: ShardSet,
    split: str,
    ranks: Ranks,
    *,
    batch: int,
    width: int,
    progress: Callable[[Iterator[Batch]], Iterator[Batch]] = lambda batches: batches,
    features: Features | None = None,
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> NDArray[np.float32]:
    """Outputs of every row of a split, on every rank (a collective).

    Args:
        forward: int16 [B, T] on the device -> [B, width]; called equally often on all ranks.
        shards: the data set.
        split: train, validation or test.
        ranks: who takes part.
        batch: B, but no more than the split has rows.
        width: of the outputs (K).
        progress: wraps the stream of batches, to show how far it is.
        features: given to `forward` in place of waves.
        change: waves int16 [B, T] and their rows int64 [B], -1 for padding, on the device -> waves.

    Returns:
        float32 [rows of the split, width], in row order.

    Raises:
        RuntimeError: a row was not visited exactly once.
    """
    first, stop = shards.rows_of(split)
    batch = min(batch, stop - first)
    outputs = np.empty((stop - first, width), np.float32)
    numbers = range(math.ceil((stop - first) / batch))
    for group in all_batches(
        forward,
        shards,
        split,
        ranks,
        batch=batch,
        numbers=numbers,
        at_once=_LOGITS_AT_ONCE,
        progress=progress,
        features=features,
        change=change,
    ):
        for found in group:
            place = found.first - first
            outputs[place : place + len(found.values)] = found.values
    return outputs


def all_batches(
    forward: Callable[[Tensor], Tensor],
    shards: ShardSet,
    split: str,
    ranks: Ranks,
    *,
    batch: int,
    numbers: Sequence[int],
    at_once: int,
    progress: Callable[[Iterator[Batch]], Iterator[Batch]] = lambda batches: batches,
    features: Features | None = None,
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[list[Outputs]]:
    """Outputs of some batches of a split, on every rank, a few at a time (a collective).

    Memory does not grow with the split. A batch's digits do not depend on which others are
    visited, so a walk that was cut off goes on with the batches that it lacks.

    Args:
        forward: int16 [B, T] on the device -> [B, ...]; called equally often on all ranks.
        shards: the data set.
        split: train, validation or test.
        ranks: who takes part.
        batch: B.
        numbers: of the batches to visit, ascending, the same on all ranks.
        at_once: batches that are summed over ranks at a time, and held in memory.
        progress: wraps the stream of batches, to show how far it is.
        features: given to `forward` in place of waves.
        change: waves int16 [B, T] and their rows int64 [B], -1 for padding, on the device -> waves.

    Yields:
        The next batches, in the order of `numbers`, the same on every rank.

    Raises:
        RuntimeError: a row was not visited exactly once.
    """
    first, stop = shards.rows_of(split)
    plan = sweep_batches(stop - first, batch, ranks.world, ranks.rank, numbers)
    steps, left = max(1, at_once // ranks.world), list(numbers)
    pin = ranks.device.type == "cuda"
    # no_grad, not inference_mode: ZeRO-3 keeps parameters that it gathers here for training
    reader = Reader(shards, split, plan, read_ahead=4, pin=pin, features=features)
    with torch.no_grad(), reader:
        turns: list[tuple[Tensor, Tensor]] = []
        last = math.ceil(len(left) / ranks.world) - 1
        for step, item in enumerate(progress(iter(reader))):
            given = item.input.to(ranks.device, non_blocking=True)
            given = change(given, item.row.to(ranks.device)) if change else given
            out = forward(given).float()  # [B, ...]
            turns.append((item.row, out))
            if len(turns) < steps and step < last:
                continue
            rows, values = _all_gathered(turns, ranks)  # [turns x world, B], [.., B, ...]
            count = min(len(left), len(rows))
            yield [
                _outputs(left[k], rows[k], values[k], first=first, stop=stop) for k in range(count)
            ]
            turns, left = [], left[count:]


def _all_gathered(
    turns: list[tuple[Tensor, Tensor]], ranks: Ranks
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows int64 [M, B] (-1: padding) and outputs float32 [M, B, ...] of all ranks' turns.

    Zeros are summed over the ranks that do not have a batch: x + 0 is x, but for -0, which
    becomes 0, on one rank as well so that the bytes are the same.
    """
    row, out = (torch.stack(part) for part in zip(*turns, strict=True))
    rows = row.new_zeros((len(turns), ranks.world, *row.shape[1:]))
    values = out.new_zeros((len(turns), ranks.world, *out.shape[1:]))
    rows[:, ranks.rank] = row + 1  # what no rank adds to stays 0: padding
    values[:, ranks.rank] += out
    rows = ranks.all_sum(rows.to(ranks.device)).cpu() - 1
    values = ranks.all_sum(values).cpu()
    return rows.flatten(0, 1).numpy(), values.flatten(0, 1).numpy()


def _outputs(
    number: int, row: NDArray[np.int64], values: NDArray[np.float32], *, first: int, stop: int
) -> Outputs:
    """A batch without its padding, once each of its rows is seen to be there exactly once."""
    start = first + number * len(row)
    for expected in range(start, min(start + len(row), stop)):
        visits = int(np.count_nonzero(row == expected))
        if visits != 1 or row[expected - start] != expected:
            raise RuntimeError(f"row {expected} was visited {visits} times, expected 1")
    count = min(len(row), stop - start)
    return Outputs(number=number, first=start, values=values[:count])
