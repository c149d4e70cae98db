"""Fault 4: signals to one, some or all ranks, once or twice, at any time; and the time limit."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from harness import (
    assert_survived,
    at_step,
    attempts_of,
    slow,
    slow_steps,
    start,
    steps_taken,
    until,
)
from trainings import config

from mgc_dist.journal import read_status
from mgc_dist.training import checkpoint, engine

KNOBS: dict[str, Any] = {"checkpoint_every_epochs": 0.5, "resume": "auto"}


@pytest.mark.parametrize(
    ("number", "ranks", "times"),
    [
        slow(signal.SIGTERM, (0,), 1),
        slow(signal.SIGTERM, (0, 1), 1),
        (signal.SIGINT, (0, 1), 2),
        (signal.SIGUSR1, (1,), 2),
    ],
)
def test_ranks_are_signalled(
    number: int,
    ranks: tuple[int, ...],
    times: int,
    shards: Path,
    noisy: Path,
    undisturbed: str,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=slow_steps(0.2))
    until(lambda: steps_taken(run) >= 2)
    for _ in range(times):
        for rank in ranks:
            job.signal(rank, number)
            time.sleep(0.05)
    job.wait()
    assert read_status(run)["state"] == "stopped"
    assert read_status(run)["exit_code"] == 0
    assert (run / "REQUEUE").exists()
    assert not (run / "DONE").exists()
    seen = read_status(run)["samples_seen"]
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    name = signal.Signals(number).name if 0 in ranks else "a signal to another rank"
    assert_survived(job, run, undisturbed, codes=[0, 0], message=f"{name} after step")
    starts = [line["samples_seen"] for line in attempts_of(run) if line["event"] == "start"]
    assert starts == [0, seen], "one agreed checkpoint, and it was resumed from"
    assert not (run / "REQUEUE").exists()


def test_a_signal_during_a_save(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def in_save(rank: int) -> None:
        write = checkpoint._write_manifest

        def signalled(*args: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            write(*args)

        if rank == 0:
            checkpoint._write_manifest = signalled

    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=in_save)
    job.wait()
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=[0, 0], message="stopped by SIGTERM after step")


def test_a_signal_during_the_start(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def in_start(rank: int) -> None:
        load = engine._import_deepspeed

        def signalled(*args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGUSR1)
            return load(*args)

        if rank == 1:
            engine._import_deepspeed = signalled

    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=in_start)
    job.wait()
    assert read_status(run)["samples_seen"] == 20  # agreed with the first step, read after the next
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=[0, 0], message="after step 2, saved")


def test_a_signal_at_the_last_step_ends_as_usual(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    patch = at_step(13, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=patch)
    job.wait()
    assert_survived(job, run, undisturbed, codes=[0, 0], message="done; the best model")
    assert (run / "DONE").exists()


def test_the_time_limit(shards: Path, noisy: Path, undisturbed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(shards, noisy, run, time_limit_s=45.0, hang_timeout_s=600.0, **KNOBS)
    job = start(settings, tmp_path, patch=slow_steps(6.0))  # all 13 would take 78 s
    job.wait()
    assert read_status(run)["state"] == "stopped"
    # on however slow a machine: 7 steps of 10 segments before the limit, and the one under way
    assert 0 < int(str(read_status(run)["samples_seen"])) <= 90
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=[0, 0], message="stopped by the time limit")
