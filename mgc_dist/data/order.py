"""The order in which rows are visited: a pure function of one integer.

Position t of a run lies in epoch t // n, at place p = bijection(t mod n) of the training
rows; a keyed bijection of [0, n) replaces the shuffled list. The global batch G is what the
user sets: step s covers positions [sG, (s + 1)G) on any machine. A step has at most as many micro
batches of m rows as hold G; `world` ranks take them in turn, in `accumulation` micro steps, and

    slot = (micro_step * world + rank) * m + k      holds position      s G + slot.

Slots past G, like positions past the end of the run, are padding: place -1, weight 0. So every
row comes exactly once per epoch at any world size, all ranks take equal steps, and a given G
means the same rows in the same step on 1, 3 or 64 ranks. Example: G = 4, world = 3, m = 1
gives accumulation 2; step 0 is

    rank 0: positions 0, 3     rank 1: positions 1, padding     rank 2: positions 2, padding

For disks that dislike jumps, `window_shards` = W keeps an epoch's reads within W shards at a
time: shards come in a keyed order of their own, W of them make a window, and the bijection
runs inside each window. It is still a pure function of the position.

The state of a run is `samples_seen`, the number of positions consumed; resuming from it is
O(1) and needs nothing else, whatever the world size becomes. Where a run goes on with more
epochs or another G, its steps are counted anew from there: a plan may begin at any position.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mgc_dist.errors import UserError

ORDER_VERSION = 1
"""Changes whenever the order does; golden vectors in the tests freeze it."""
DRAW_VERSION = 2
"""Changes whenever the random numbers of rows do. Version 0.1.0 drew masks by rank."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8
_POSITIONS_AT_ONCE = 4096
"""Positions that are mapped to places in one go; 0.3 us each, 10 us each alone."""


def bijection(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """A keyed one-to-one map of [0, size): a balanced Feistel network with cycle walking.

    Own integer arithmetic, because numpy promises no stable random streams across versions.

    Args:
        index: int64 [...], values in [0, size).
        size: of the set, at least 1.
        key: any 64-bit integer.

    Returns:
        int64 of index's shape, values in [0, size), all different for different indices.

    Source: Feistel cipher with splitmix64's finaliser as round function (Steele et al.,
    OOPSLA 2014); cycle walking after Black and Rogaway, CT-RSA 2002.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    with np.errstate(over="ignore"):
        base = np.uint64(key & 0xFFFFFFFFFFFFFFFF)
        keys = _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN + base)
        values = np.array(index, dtype=np.uint64)
        outside = np.ones(values.shape, dtype=bool)
        while outside.any():
            left, right = values[outside] >> half, values[outside] & mask
            for round_key in keys:
                left, right = right, left ^ (_mix(right + round_key) & mask)
            values[outside] = (left << half) | right
            outside[outside] = values[outside] >= np.uint64(size)
    return values.astype(np.int64)


def key_of(*numbers: int) -> int:
    """A 64-bit key that depends on each of the numbers and on their order."""
    key = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            key = _mix(key * _GOLDEN + np.uint64(number & 0xFFFFFFFFFFFFFFFF) + _GOLDEN)
    return int(key[0])


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a global batch is laid over ranks.

    Attributes:
        world: number of ranks.
        global_batch: G, rows of an optimizer step.
        micro_batch: m, rows of one forward pass of one rank.
        accumulation: micro steps of an optimizer step.
    """

    world: int
    global_batch: int
    micro_batch: int
    accumulation: int

    @property
    def slots(self) -> int:
        """Rows of a step including padding: what DeepSpeed is told."""
        return self.world * self.micro_batch * self.accumulation

    @property
    def waste(self) -> float:
        """Share of the slots that are padding, 0 to 1."""
        return 1 - self.global_batch / self.slots


def lay_out(*, global_batch: int, world: int, largest_micro_batch: int) -> Layout:
    """The layout with the fewest micro batches, and among those the least padding.

    Dropout is drawn for micro batches, so their size does not depend on the number of ranks; only
    where there are more ranks than micro batches, these get smaller.

    Args:
        global_batch: G.
        world: number of ranks.
        largest_micro_batch: what fits a rank's memory.

    Raises:
        UserError: fewer rows than ranks, so that a rank would only ever see padding.
    """
    if global_batch < world:
        raise UserError(
            f"--global-batch {global_batch} on {world} ranks",
            got=f"{global_batch} rows for {world} ranks",
            expected="at least one row a rank",
            cure=f"use --global-batch {world} or more, or fewer ranks",
        )
    micro_batches = max(math.ceil(global_batch / largest_micro_batch), world)
    return Layout(
        world=world,
        global_batch=global_batch,
        micro_batch=math.ceil(global_batch / micro_batches),
        accumulation=math.ceil(micro_batches / world),
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of a run.

    Attributes:
        rows: n, training rows.
        total: positions of the run (epochs x n, rounded).
        global_batch: G.
        seed: of the order.
        window_shards: W, shards that are read from at a time; 0 for all.
        shard_rows: rows of each training shard, in row order; needed with a window only.
        first_position, first_step: from where steps of G positions are counted.
    """

    rows: int
    total: int
    global_batch: int
    seed: int
    window_shards: int = 0
    shard_rows: tuple[int, ...] = ()
    first_position: int = 0
    first_step: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, those before this plan began among them."""
        return self.first_step + math.ceil((self.total - self.first_position) / self.global_batch)

    def start_of(self, step: int) -> int:
        """First position of an optimizer step, counted from 0."""
        return self.first_position + (step - self.first_step) * self.global_batch

    def places(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place in [0, n) of each position; -1 for a position outside the run.

        Args:
            positions: int64 [...].
        """
        places = np.full(positions.shape, -1, np.int64)
        inside = (positions >= 0) & (positions < self.total)
        epochs = positions // self.rows
        shuffle = self._windowed if self.window_shards else self._shuffled
        for epoch in np.unique(epochs[inside]).tolist():
            here = inside & (epochs == epoch)
            places[here] = shuffle(positions[here] % self.rows, epoch)
        return places

    def draws(self, positions: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """A random number of (seed, position, row), for what is drawn row by row.

        Args:
            positions: int64 [...].
            places: of them, int64 [...].
        """
        key = np.uint64(key_of(DRAW_VERSION, self.seed))
        with np.errstate(over="ignore"):
            mixed = _mix(positions.astype(np.uint64) * _GOLDEN + key)
            mixed = _mix(places.astype(np.uint64) * _GOLDEN + mixed)
        return mixed.astype(np.int64)

    def _shuffled(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        return bijection(index, self.rows, key_of(ORDER_VERSION, self.seed, epoch))

    def _windowed(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """As `_shuffled`, shard after shard in a keyed order, W at a time."""
        rows = np.array(self.shard_rows, np.int64)
        key = key_of(ORDER_VERSION, self.seed, epoch)
        order = bijection(np.arange(len(rows)), len(rows), key)  # [shards]
        first_row = (np.cumsum(rows) - rows)[order]
        ends = np.cumsum(rows[order])  # in the order of this epoch
        window_ends = ends[self.window_shards - 1 :: self.window_shards]
        if len(window_ends) == 0 or window_ends[-1] != ends[-1]:
            window_ends = np.append(window_ends, ends[-1])
        window = np.searchsorted(window_ends, index, side="right")
        places = np.empty_like(index)
        for number in np.unique(window).tolist():
            start = int(window_ends[number - 1]) if number else 0
            here, size = window == number, int(window_ends[number]) - start
            mixed = bijection(index[here] - start, size, key_of(key, number)) + start
            shard = np.searchsorted(ends, mixed, side="right")
            places[here] = first_row[shard] + mixed - (ends - rows[order])[shard]
        return places

    def seen_after(self, step: int) -> int:
        """samples_seen after optimizer step `step` (counted from 0)."""
        return min(self.start_of(step + 1), self.total)

    def true_rows(self, step: int) -> int:
        """D: rows of a step that are not padding, over all ranks; no collective is needed."""
        return self.seen_after(step) - self.start_of(step)

    def due(self, every: float, step: int) -> bool:
        """Whether an event that is due every `every` positions fires after this step.

        It fires after the first step with samples_seen >= k * every, and after the last step.
        """
        before, after = self.start_of(step), self.seen_after(step)
        return after // every > before // every or after == self.total

    def step_of(self, samples_seen: int) -> int:
        """The next optimizer step of a run that has consumed `samples_seen` positions.

        Raises:
            UserError: samples_seen is not the end of a step of this plan.
        """
        step, rest = divmod(samples_seen - self.first_position, self.global_batch)
        if samples_seen == self.total:
            return self.steps
        if rest or step < 0 or samples_seen > self.total:
            raise UserError(
                "samples_seen of the checkpoint",
                got=samples_seen,
                expected=f"the end of a step of {self.global_batch} rows, up to {self.total}",
                cure="give more --epochs, with --change epochs",
            )
        return self.first_step + step


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one rank reads for one forward pass.

    Attributes:
        step: optimizer step (batch number for a sweep).
        micro_step: 0 .. accumulation - 1.
        number: of the micro batch in its step, over all ranks.
        place: int64 [B], place in the split; -1 is padding.
        draw: int64 [B], a random number of each row's position, for masks; 0 in a sweep.
    """

    step: int
    micro_step: int
    number: int
    place: NDArray[np.int64]
    draw: NDArray[np.int64]


def training_batches(
    plan: Plan, layout: Layout, rank: int, first_step: int
) -> Iterator[MicroBatch]:
    """The micro batches of a rank, from `first_step` to the end of the run."""
    micro, accumulation = layout.micro_batch, layout.accumulation
    first_slot = (np.arange(accumulation) * layout.world + rank) * micro
    slot = first_slot[:, None] + np.arange(micro)  # [accumulation, B]
    at_once = max(1, _POSITIONS_AT_ONCE // slot.size)
    for start in range(first_step, plan.steps, at_once):
        steps = np.arange(start, min(start + at_once, plan.steps))
        starts = np.array([plan.start_of(step) for step in steps.tolist()])
        positions = starts[:, None, None] + slot  # [steps, accumulation, B]
        places = plan.places(np.where(slot < plan.global_batch, positions, -1))
        draws = plan.draws(positions, places)
        for step, of_step, drawn in zip(steps.tolist(), places, draws, strict=True):
            for micro_step, (place, draw) in enumerate(zip(of_step, drawn, strict=True)):
                number = micro_step * layout.world + rank
                yield MicroBatch(
                    step=step, micro_step=micro_step, number=number, place=place, draw=draw
                )


def sweep_batches(
    rows: int, batch: int, world: int, rank: int, numbers: Sequence[int] | None = None
) -> Iterator[MicroBatch]:
    """Every place in [0, rows) once, in order, in equal numbers of batches on all ranks.

    Batch b holds places [bB, (b + 1)B); rank r takes every world-th of them, so that a row meets
    the same neighbours, and gets the same digits, at any world size.

    Args:
        rows: to sweep over.
        batch: B.
        world: number of ranks.
        rank: whose batches are wanted.
        numbers: the batches to visit, ascending, where some are done already; all by default.
    """
    lane = np.arange(batch, dtype=np.int64)
    todo = range(math.ceil(rows / batch)) if numbers is None else numbers
    for step in range(math.ceil(len(todo) / world)):
        turn = step * world + rank
        place = (todo[turn] * batch if turn < len(todo) else rows) + lane
        place = np.where(place < rows, place, -1)
        yield MicroBatch(
            step=step, micro_step=0, number=turn, place=place, draw=np.zeros_like(place)
        )
