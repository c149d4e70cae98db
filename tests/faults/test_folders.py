"""Faults 16, 17, 23: two runs on one folder, stale locks, crash loops."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import (
    assert_survived,
    at_step,
    both,
    die,
    slow,
    slow_steps,
    start,
    steps_taken,
    until,
)
from trainings import config

from mgc_dist.cluster import lease, watch

KNOBS: dict[str, Any] = {"checkpoint_every_epochs": 0.3, "resume": "auto"}


def quick(rank: int) -> None:
    watch.BEAT_S = 0.3
    lease.acquire.__kwdefaults__["stale_s"] = 2.0


def test_the_older_of_two_runs_cannot_commit(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    older = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=both(quick, slow_steps(0.2)))
    until(lambda: steps_taken(run) >= 3)
    for pid in older.pids:  # cut off from the world, as by a broken network
        os.kill(pid, signal.SIGSTOP)
    newer = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=both(quick, slow_steps(0.2)))
    until(lambda: "resuming from" in newer.said)
    for pid in older.pids:
        os.kill(pid, signal.SIGCONT)
    older.wait()
    assert newer.wait() == [0, 0], newer.said
    assert "taking over" in newer.said
    assert 2 in older.codes
    assert 0 not in older.codes
    assert_survived(older, run, undisturbed, codes=older.codes, message="has taken it over")


def test_a_run_that_lives_is_not_disturbed(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    """The one that lives waits until the other has ended, however long that takes."""
    run = tmp_path / "run"
    gate = tmp_path / "gate"
    stays = [at_step(3, rank, lambda: until(gate.exists, timeout_s=500)) for rank in (0, 1)]
    settings = config(shards, noisy, run, **KNOBS, hang_timeout_s=600.0)
    living = start(settings, tmp_path, patch=both(quick, *stays))
    until(lambda: steps_taken(run) >= 2)
    second = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=quick)
    second.wait()
    gate.touch()
    assert living.wait() == [0, 0], living.said
    message = f"a run that is going on: process {living.pids[0]} on"
    assert_survived(second, run, undisturbed, codes=[2, 2], message=message)


@pytest.mark.parametrize("content", [slow(""), "{", slow('{"attempt": "x"}'), "dead", "foreign"])
def test_a_stale_lease_is_taken_over(
    content: str, shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    pid = os.fork()
    if pid == 0:
        lease.acquire(run, "stale")
        os._exit(0)
    os.waitpid(pid, 0)
    holder = json.loads((run / "lease.json").read_text())
    if content == "foreign":
        (run / "lease.json").write_text(json.dumps(holder | {"host": "elsewhere"}))
    elif content != "dead":
        (run / "lease.json").write_text(content)
    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=quick)
    job.wait()
    assert_survived(job, run, undisturbed, codes=[0, 0], message="taking over")
    assert not (run / "lease.json").exists(), "given back at the end"


def test_a_stale_lock_of_a_killed_build_holds_nothing_up(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extensions = tmp_path / "extensions"
    for name in ("deepspeed_shm_comm", "fused_adam", "cpu_adam"):
        (extensions / name).mkdir(parents=True)
        (extensions / name / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    run = tmp_path / "run"
    job = start(config(shards, noisy, run, **KNOBS), tmp_path)
    job.wait()
    assert_survived(job, run, undisturbed, codes=[0, 0], message="done; the best")


def test_a_crash_loop_is_ended(shards: Path, noisy: Path, undisturbed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = start(
        config(shards, noisy, run, **KNOBS),
        tmp_path,
        patch=at_step(1, 0, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    )
    assert stopped.wait() == [0, 0], "stopped on request: this does not count"
    for _ in range(3):
        crash = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=at_step(4, 1, die))
        assert crash.wait() == [75, -9], crash.said
    for path in (run / "checkpoints").glob("step-00000004"):
        pytest.fail(f"{path} was gained")
    job = start(config(shards, noisy, run, **KNOBS), tmp_path)
    job.wait()
    again = start(config(shards, noisy, run, max_tries=9, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    message = "3 tries in a row that ended without a new checkpoint"
    assert_survived(job, run, undisturbed, codes=[2, 2], message=message)
