"""A rank as a process of its own that may use the GPU: what it prints, and what it ends with."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from conftest import afresh
from harness import Job, Patch, be_a_rank, prepare

from mgc_dist.config import TrainConfig

T = TypeVar("T")
Tell = Callable[[str], None]


def limit_s(device: str) -> float:
    """Seconds that a test waits for its processes.

    On a GPU less than the 90 s of a visit, so that a test tells itself what was late.
    """
    return 80.0 if device == "cuda" else 400.0


def at_once(*runs: Callable[[], T]) -> list[T]:
    """What runs give that share the GPU: each starts in seconds and computes little."""
    afresh()
    with ThreadPoolExecutor(len(runs)) as pool:
        started = [pool.submit(run) for run in runs]
    return [run.result() for run in started]


def train_alone(settings: TrainConfig, work: Path, *, patch: Patch | None = None) -> Job:
    """Run the train command on one rank to its end; a patch must be importable there."""
    file, (environment,) = prepare(settings, work)
    out = file.with_name("rank0.txt")
    late_s = limit_s(settings.engine.device)
    code = run_alone(be_a_rank, out, out, environment, file, patch, timeout_s=late_s)
    return Job(folder=file.parent, pids=[], codes=[code])


def run_alone(body: Callable[..., Any], out: Path, *args: Any, timeout_s: float) -> int | None:
    """Exit code of a process that calls body(*args) and prints into a file; None: it was late."""
    context: Any = multiprocessing.get_context(afresh())
    process = context.Process(target=_into, args=(out, body, args))
    process.start()
    process.join(timeout_s)
    code: int | None = process.exitcode
    process.kill()
    process.join()
    return code


def _into(out: Path, body: Callable[..., Any], args: Any) -> None:
    handle = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    body(*args)
