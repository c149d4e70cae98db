"""What steps report: loss and stop flag over all ranks, speed, and who has had a gradient."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.data.reader import Reader
from mgc_dist.errors import UserError

CENSUS_STEPS = 3
"""Steps in which every trained parameter must have had a gradient; one is nearly always enough."""
_EXEMPT = ("k_proj.bias",)
"""Their true gradient is zero: softmax does not see what is added to all keys."""


@dataclass(frozen=True, kw_only=True)
class _Pending:
    packed: Tensor
    work: Any
    copied: torch.cuda.Event | None


class Tally:
    """Loss and stop flag of a step, summed over ranks without making the host wait.

    One packed all-reduce a step; its result is copied while the next step computes and read
    one step late, on all ranks alike, so a stop takes effect one step after the signal.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sum: Tensor | None = None
        self._pending: _Pending | None = None
        self._loss = math.nan
        self._stopping = False

    @property
    def note(self) -> str:
        """The last loss that is known, for a progress bar."""
        return f"loss {self._loss:.3f}"

    def add(self, share: Tensor) -> None:
        """Add a micro batch's share of the step's loss: a scalar on the device."""
        self._sum = share if self._sum is None else self._sum + share

    def reduce(self, stop_asked: bool) -> bool:
        """Start this step's reduction; returns whether the step before it asked for a stop.

        Args:
            stop_asked: whether this rank has been told to stop.
        """
        assert self._sum is not None
        self._settle()
        stopping, self._stopping = self._stopping, False
        flag = torch.full((), float(stop_asked), dtype=torch.float64, device=self._sum.device)
        packed = torch.stack([self._sum.double(), flag])
        self._sum = None
        work = dist.all_reduce(packed, async_op=True) if self._ranks.world > 1 else None
        copied = None
        if packed.is_cuda:
            if work is not None:
                work.wait()  # orders the streams, the host goes on
                work = None
            host = torch.empty(2, dtype=torch.float64, pin_memory=True)
            packed = host.copy_(packed, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._pending = _Pending(packed=packed, work=work, copied=copied)
        return stopping

    def latest(self) -> float:
        """Loss of the step just taken, over all ranks (waits for the device)."""
        self._settle()
        return self._loss

    def _settle(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.work is not None:
            pending.work.wait()
        if pending.copied is not None:
            pending.copied.synchronize()
        self._loss, flag = pending.packed.tolist()
        self._stopping = flag > 0


@dataclass(frozen=True, kw_only=True)
class Window:
    """The speed between two log lines.

    Attributes:
        segments_per_s: of all ranks, padding not counted.
        step_s: mean seconds of an optimizer step.
        wait_share: of the time this rank waited for data, 0 to 1.
        own_s: seconds in which this rank waited for no other.
    """

    segments_per_s: float
    step_s: float
    wait_share: float
    own_s: float


class Meter:
    """The speed of steps, with the clock stopped in pauses.

    Args:
        reader: whose waiting counts.
        samples_seen: at the start.
        step: optimizer steps taken at the start.
    """

    def __init__(self, reader: Reader, samples_seen: int, step: int) -> None:
        self._reader = reader
        self._samples_seen, self._step = samples_seen, step
        self._since = time.perf_counter()
        self._wait_s = self._own_s = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """A block in which this rank waits for no other: what tells a slow rank from the rest."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._own_s += time.perf_counter() - started

    def read(self, samples_seen: int, step: int) -> Window:
        """The speed since the last reading; starts a new window.

        Args:
            samples_seen: now.
            step: optimizer steps taken by now.
        """
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        waited_s = self._reader.wait_s - self._wait_s
        window = Window(
            segments_per_s=(samples_seen - self._samples_seen) / seconds,
            step_s=seconds / max(1, step - self._step),
            wait_share=min(waited_s / seconds, 1.0),
            own_s=self._own_s + waited_s,
        )
        self._since, self._samples_seen, self._step = now, samples_seen, step
        self._wait_s, self._own_s = self._reader.wait_s, 0.0
        return window


class Laggards:
    """Names ranks that are slow for several windows in a row; it does not stop them.

    On a GPU a forward pass is only launched here: reading and a slow host are seen, a slow GPU not.
    """

    FACTOR = 1.5
    """Own time over the median of all ranks that counts as slow."""
    WINDOWS = 3
    """In a row, before a rank is named."""

    def __init__(self) -> None:
        self._slow: dict[int, int] = {}

    def all_look(self, own_s: float, ranks: Ranks) -> str:
        """Compare the ranks' own seconds in this window (a collective).

        Returns:
            A sentence that names the slow ones; "" if there are none.
        """
        seconds = ranks.all_gather(own_s)
        median = statistics.median_low(seconds)
        named = []
        for rank, own in enumerate(seconds):
            slow = own > self.FACTOR * median
            self._slow[rank] = self._slow.get(rank, 0) + 1 if slow else 0
            if self._slow[rank] >= self.WINDOWS:
                named.append(f"rank {rank} is slow: {own:.2f} s of reading and forward passes")
        return f"{'; '.join(named)}, median {median:.2f} s" if named else ""


class Census:
    """Which trained parameters have had a gradient that is not zero.

    Some combinations of model, ZeRO stage and compiler lose gradients without a word, while the
    loss looks right: ZeRO-3 with torch.compile lost 103 of 105 (docs/design.md).

    Args:
        model: the main model, before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._steps = 0
        self._missing = {
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.endswith(_EXEMPT)
        }

    @property
    def is_open(self) -> bool:
        """Whether gradients are still wanted."""
        return bool(self._missing) and self._steps < CENSUS_STEPS

    def add(self, grads: Iterable[tuple[str, Tensor]]) -> None:
        """Look at the gradients of a step; one that is not finite makes it a step that counts not.

        Args:
            grads: of the whole global batch, by parameter name; all are taken.

        Raises:
            UserError: a trained parameter has had none by then, or a frozen one has one.
        """
        found = {name: (bool(grad.isfinite().all()), bool(grad.any())) for name, grad in grads}
        if not all(finite for finite, _ in found.values()):
            return
        self._steps += 1
        self._missing -= {name for name, (_, learns) in found.items() if learns}
        if self._missing and self._steps == CENSUS_STEPS:
            self._refuse(
                f"no gradient for {len(self._missing)}, such as {min(self._missing)}",
                "a gradient for every trained parameter",
            )
        touched = [
            name
            for name, parameter in self._model.named_parameters()
            if not parameter.requires_grad and parameter.grad is not None
        ]
        if touched:
            self._refuse(f"a gradient for the frozen {touched[0]}", "none for frozen parameters")

    def _refuse(self, got: str, expected: str) -> None:
        raise UserError(
            f"gradients of the first {self._steps} steps",
            got=got,
            expected=expected,
            cure="freeze what the model does not use, or try --zero-stage 2 without --compile",
        )
