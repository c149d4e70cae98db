"""Work spread over processes, with results in the order of the items."""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar, cast

from mgc_dist.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 8
"""Items that a process may be ahead of the one that is awaited."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def spread(work: Callable[[T], R], items: Iterable[T], jobs: int) -> Iterator[R]:
    """Call `work` on every item, in `jobs` processes.

    Args:
        work: a picklable function; sent to each process once.
        items: read ahead of the results by a few items a process.
        jobs: processes, 0 for one a core, 1 for this process.

    Yields:
        The results, in the order of the items.

    Raises:
        UserError: a process was killed; whatever `work` raises.
    """
    jobs = jobs or cores()
    if jobs == 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_start, initargs=(work, os.getpid())
    )
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_call, item))
            if len(pending) > _AHEAD * jobs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process",
            got="its sudden end",
            expected="to finish",
            cure="the kernel ends processes when memory runs out: try fewer --jobs",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def keep_memory(largest: int = 1 << 30) -> None:
    """Let malloc keep what is freed: a new page costs 1 to 4 us, and buffers here are large.

    Packing took a third more CPU with glibc's defaults, which give every array of a track back
    to the kernel (docs/design.md). Nothing happens where the C library is another one.

    Args:
        largest: bytes of a block from which on it is given back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in (
            (_M_MMAP_THRESHOLD, largest),
            (_M_TRIM_THRESHOLD, 1 << 30),
            (_M_TOP_PAD, 1 << 26),
        ):
            mallopt(parameter, value)


_assigned: list[Callable[[Any], Any]] = []


def _start(work: Callable[[Any], Any], parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # else orphans write on
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    keep_memory()
    _assigned[:] = [work]


def _call(item: T) -> R:  # type: ignore[type-var]
    return cast(R, _assigned[0](item))
