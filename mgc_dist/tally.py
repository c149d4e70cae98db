"""What a step reports: its loss and the stop flag over all ranks, and the speed of the run."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mgc_dist.data import Reader
from mgc_dist.plan import Plan
from mgc_dist.ranks import Ranks


class NonFiniteLoss(RuntimeError):
    """The loss of a step was NaN or infinite; nothing was saved after it."""


@dataclass(frozen=True, kw_only=True)
class _Pending:
    packed: Tensor
    work: Any
    copied: torch.cuda.Event | None
    step: int
    plan: Plan


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

    def add(self, loss_sum: Tensor) -> None:
        """Add the loss sum of a micro batch: a scalar on the device."""
        self._sum = loss_sum if self._sum is None else self._sum + loss_sum

    def reduce(self, step: int, plan: Plan, signal: int) -> bool:
        """Start this step's reduction; returns whether the step before it asked for a stop.

        Args:
            step: that has just been taken.
            plan: of the run.
            signal: that this rank has received, 0 for none.

        Raises:
            NonFiniteLoss: the step before had a loss that is NaN or infinite.
        """
        assert self._sum is not None
        self._settle()
        stopping, self._stopping = self._stopping, False
        flag = torch.full((), float(bool(signal)), dtype=torch.float64, device=self._sum.device)
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
        self._pending = _Pending(packed=packed, work=work, copied=copied, step=step, plan=plan)
        return stopping

    def latest(self) -> float:
        """Mean loss over the true rows of the step just taken (waits for the device).

        Raises:
            NonFiniteLoss: it is NaN or infinite.
        """
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
        total, flag = pending.packed.tolist()
        self._stopping = flag > 0
        step, plan = pending.step, pending.plan
        self._loss = total / plan.true_rows(step)
        if not math.isfinite(self._loss):
            positions = np.arange(step * plan.global_batch, plan.seen_after(step))
            places = plan.places(positions)
            raise NonFiniteLoss(
                f"loss of step {step + 1} is {self._loss}; its training rows are "
                f"{', '.join(map(str, places[:64]))}{', ...' if len(places) > 64 else ''}"
            )


class Meter:
    """Segments per second and share of waiting for data, with the clock stopped in pauses.

    Args:
        reader: whose waiting counts.
        samples_seen: at the start.
    """

    def __init__(self, reader: Reader, samples_seen: int) -> None:
        self._reader = reader
        self._samples_seen = samples_seen
        self._since = time.perf_counter()
        self._wait_s = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    def read(self, samples_seen: int) -> tuple[float, float]:
        """Segments per second and waiting share since the last reading; starts a new window."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rate = (samples_seen - self._samples_seen) / seconds
        wait = (self._reader.wait_s - self._wait_s) / seconds
        self._since, self._samples_seen, self._wait_s = now, samples_seen, self._reader.wait_s
        return rate, min(wait, 1.0)
