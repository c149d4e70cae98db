"""Faults 12, 13, 24: ranks that hang, lag, or run out of memory."""

import io
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import (
    Job,
    Patch,
    assert_survived,
    at_step,
    both,
    slow_steps,
    start,
    steps_taken,
    until,
    weights_hash,
)
from trainings import config

from mgc_dist.cluster import watch
from mgc_dist.config import EngineConfig
from mgc_dist.data import reader as data
from mgc_dist.training import engine, engine_state

KNOBS: dict[str, Any] = {"checkpoint_every_epochs": 0.3, "resume": "auto"}


def quick_beats(rank: int) -> None:
    watch.BEAT_S = 0.3


def wait_for_the_other(job: Job) -> None:
    """Rank 1 is stopped: rank 0 ends by itself, then rank 1 is removed."""
    first = os.waitpid(job.pids[0], 0)[1]
    job.signal(1, signal.SIGKILL)
    second = os.waitpid(job.pids[1], 0)[1]
    job.codes = [os.waitstatus_to_exitcode(first), os.waitstatus_to_exitcode(second)]


def test_a_rank_stands_still(shards: Path, noisy: Path, undisturbed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    patch = both(quick_beats, slow_steps(0.1))
    settings = config(shards, noisy, run, hang_timeout_s=4.0, **KNOBS)
    job = start(settings, tmp_path, patch=patch)
    until(lambda: steps_taken(run) >= 3)
    job.signal(1, signal.SIGSTOP)
    wait_for_the_other(job)
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=[75, -9], message="rank 1 (process")
    assert "is silent, last seen at step" in job.said
    assert "Thread" in job.said, "the stacks of all threads"
    assert "in reduce" in job.said or "all_reduce" in job.said or "backward" in job.said


def test_a_rank_hangs_in_reading(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def stuck(rank: int) -> None:
        read = data.ShardSet.read_batch
        calls = iter(range(1000))

        def hanging(self: Any, *args: Any) -> None:
            if rank == 1 and next(calls) == 9:
                time.sleep(60)
            read(self, *args)

        data.ShardSet.read_batch = hanging  # type: ignore[method-assign]

    settings = config(shards, noisy, run, hang_timeout_s=4.0, **KNOBS)
    job = start(settings, tmp_path, patch=both(quick_beats, stuck))
    job.wait()
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=[75, 75], message="(reading)")
    assert "has come no further for" in job.said


def slow_disk(rank: int) -> None:
    """Each file of a checkpoint takes 9 s, in slices."""

    def save(content: Any, file: Any) -> None:
        whole = io.BytesIO()
        torch_save(content, whole)
        view = whole.getbuffer()
        for k in range(30):
            file.write(view[len(view) * k // 30 : len(view) * (k + 1) // 30])
            file.flush()
            time.sleep(0.3)

    torch_save = torch.save
    engine_state.torch.save = save


def test_a_save_longer_than_the_time_out(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = config(shards, noisy, run, hang_timeout_s=6.0, resume="auto")
    settings = replace(settings, output=replace(settings.output, checkpoint_every_epochs=9.0))
    job = start(settings, tmp_path, patch=slow_disk)
    assert job.wait() == [0, 0], job.said
    assert weights_hash(run) == undisturbed


def test_a_rank_hangs_while_deepspeed_starts(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    # its process groups would wait half an hour: found by the soak
    run = tmp_path / "run"

    def stopped(rank: int) -> None:
        EngineConfig.group_timeout_s = property(lambda config: 8.0)  # type: ignore[assignment]
        imported = engine._import_deepspeed

        def stop_here(ranks: Any) -> Any:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            return imported(ranks)

        engine._import_deepspeed = stop_here

    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=stopped)
    wait_for_the_other(job)
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    message = "rank 0 has waited 8 s for the other ranks to start"
    assert_survived(job, run, undisturbed, codes=[75, -9], message=message)
    assert "deepspeed" in job.said, "the stacks of all threads"


def test_a_slow_rank_is_named_and_left_alone(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def slow(rank: int) -> None:
        read = data.ShardSet.read_batch

        def napping(self: Any, *args: Any) -> None:
            time.sleep(0.5 if rank == 1 else 0.0)  # more than a busy machine adds
            read(self, *args)

        data.ShardSet.read_batch = napping  # type: ignore[method-assign]

    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=slow)
    job.wait()
    assert_survived(job, run, undisturbed, codes=[0, 0], message="rank 1 is slow: ")
    assert "rank 0 is slow" not in job.said


def short_of_memory() -> None:
    """From now on this rank may have hardly more than it has."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    torch.empty(2**30)


def killed_for_memory() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "codes", "message"),
    [
        (short_of_memory, {2}, "lower it: --global-batch stays as it is"),
        (killed_for_memory, {75, -9}, "is gone, last seen at step"),
    ],
)
def test_memory_runs_out(
    fault: Any,
    codes: set[int],
    message: str,
    shards: Path,
    noisy: Path,
    undisturbed: str,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    patch: Patch = at_step(4, 1, fault)
    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=patch)
    job.wait()
    assert set(job.codes) == codes, job.said
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=job.codes, message=message)
