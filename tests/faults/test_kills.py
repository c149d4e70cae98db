"""Faults 1, 2, 3, 5: ranks killed at a step, and at every point of a checkpoint's commit."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, Patch, assert_survived, at_step, both, die, slow, slow_steps, start, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainings import config

from mgc_dist.cluster.lease import Lease, acquire
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.training import checkpoint

GONE = "is gone, last seen at step"


@pytest.mark.parametrize(("rank", "step"), [slow(0, 1), (1, 1), (0, 5), slow(1, 6), slow(1, 13)])
def test_a_rank_is_killed_at_a_step(
    rank: int, step: int, shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = {"checkpoint_every_epochs": 0.3, "resume": "auto"}
    job = start(config(shards, noisy, run, **knobs), tmp_path, patch=at_step(step, rank, die))
    job.wait()
    again = start(config(shards, noisy, run, **knobs), tmp_path)
    assert again.wait() == [0, 0], again.said
    codes: list[int | None] = [75, 75]
    codes[rank] = -signal.SIGKILL
    assert_survived(job, run, undisturbed, codes=codes, message=f"rank {rank} (process")
    assert GONE in job.said


def killed_in(where: str) -> Patch:
    """Kill a rank in the second commit, at a named point: rank 1 in its own shard, else rank 0."""

    def patch(rank: int) -> None:
        if rank != (where == "shard of rank 1"):
            return
        if where in HALF_WRITTEN:
            torch.save = _half_written(torch.save)
            return
        name, before = AROUND[where]
        setattr(checkpoint, name, _dying(getattr(checkpoint, name), before=before))

    return patch


def _half_written(write: Callable[..., Any]) -> Callable[..., Any]:
    saves = iter(range(1000))

    def half(state: Any, file: Any, *args: Any) -> None:
        if next(saves) == 2 - (int(os.environ["RANK"]) == 1):  # first file of the second commit
            file.write(b"half of it")
            file.flush()
            die()
        write(state, file, *args)

    return half


def _dying(call: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
    calls = iter(range(1000))

    def counted(*args: Any, **kwargs: Any) -> Any:
        here = next(calls) == 1
        if here and before:
            die()
        result = call(*args, **kwargs)
        if here:
            die()
        return result

    return counted


HALF_WRITTEN = ("model states", "shard of rank 1")
AROUND = {
    "before": ("_prepare", True),
    "after the shards": ("_write_manifest", True),
    "after the manifest": ("_write_manifest", False),
    "before the rename": ("_publish", True),
    "after the rename": ("_set_aside_newer", True),
    "after all": ("_publish", False),
}
POINTS = [*HALF_WRITTEN, "before the rename", "after the rename"]
POINTS += [slow(point) for point in AROUND if "rename" not in point]


@pytest.mark.parametrize("where", POINTS)
def test_a_rank_is_killed_in_a_save(
    where: str, shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = {"checkpoint_every_epochs": 0.3, "resume": "auto"}
    job = start(config(shards, noisy, run, **knobs), tmp_path, patch=killed_in(where))
    job.wait()
    again = start(config(shards, noisy, run, **knobs), tmp_path)
    assert again.wait() == [0, 0], again.said
    killed = 1 if where == "shard of rank 1" else 0
    codes: list[int | None] = [75, 75]
    codes[killed] = -signal.SIGKILL
    assert_survived(job, run, undisturbed, codes=codes, message=GONE)
    assert not list((run / "checkpoints").glob("tmp-*"))


def test_a_save_is_slower_than_the_grace(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = {"checkpoint_every_epochs": 0.3, "resume": "auto"}

    def slow_save(rank: int) -> None:
        write = checkpoint._write_manifest

        def slowly(*args: Any) -> None:
            if (run / "checkpoints" / "latest").exists():
                time.sleep(30)
            write(*args)

        checkpoint._write_manifest = slowly

    patch = both(slow_steps(0.1), slow_save)
    job = start(config(shards, noisy, run, **knobs), tmp_path, patch=patch)
    until(lambda: (run / "checkpoints" / "latest").exists())
    for rank in (0, 1):
        job.signal(rank, signal.SIGTERM)
    until(lambda: list((run / "checkpoints").glob("tmp-*")))
    time.sleep(1.0)  # the grace
    for rank in (0, 1):
        job.signal(rank, signal.SIGKILL)
    job.wait()
    again = start(config(shards, noisy, run, **knobs), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=[-9, -9], message="saved ")
    assert "removing half-written tmp-" in again.said


ALONE = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))
SYSTEM_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open")


def commit(run: Path, step: int, lease: Lease, keep: int) -> None:
    """A commit with two files whose content tells the step."""

    def save(root: Path, tag: str) -> list[Path]:
        (root / tag).mkdir(parents=True)
        paths = [root / tag / name for name in ("weights.pt", "optimizer.pt")]
        for path in paths:
            path.write_bytes(bytes([step]) * 500)
        return paths

    checkpoint.all_commit(
        run, step, ALONE, save, facts={"world": 1, "zero_stage": 2}, keep=keep, lease=lease
    )


def commit_and_die(run: Path, step: int, lease: Lease, keep: int, at: int) -> bool:
    """Commit in a child that is killed before its `at`-th system call on files; if it was."""
    pid = os.fork()
    if pid == 0:
        calls = iter(range(1_000_000))

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == at:
                    die()
                return call(*args, **kwargs)

            return counting

        for name in SYSTEM_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        commit(run, step, lease, keep)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(keep=st.integers(1, 3), at=st.integers(0, 60), again=st.integers(0, 60))
def test_a_kill_anywhere_in_the_commit_leaves_a_whole_checkpoint(
    keep: int, at: int, again: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("commit")
    lease = acquire(run, "parent")
    for step in (1, 2, 3):
        commit(run, step, lease, keep)
    killed = commit_and_die(run, 4, lease, keep, at)
    for step in (4, 5):  # the newest one is whole, and holds what its step wrote
        found = checkpoint.all_newest(run, ALONE)
        assert found is not None
        number = int(found.name[-8:])
        assert number in ((3, 4) if step == 4 else (3, 4, 5))
        if not killed and step == 4:
            assert number == 4
        assert (found / "weights.pt").read_bytes() == bytes([number]) * 500
        if step == 4:
            killed = commit_and_die(run, 5, lease, keep, again)
    commit(run, 6, lease, keep)
    names = sorted(path.name for path in (run / "checkpoints").glob("*-*"))
    assert names[-1] == "step-00000006"
    assert len(names) <= keep, "leftovers stay"


def test_every_point_of_the_commit_is_reached(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lease = acquire(run, "parent")
    for step in (1, 2):
        commit(run, step, lease, 1)
    points = 0
    while commit_and_die(run, 3 + points, lease, 1, points):
        assert checkpoint.all_newest(run, ALONE) is not None
        points += 1
    assert points > 15, "the commit has more system calls than that"


def test_a_job_is_told_by_its_codes() -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
    assert Job(folder=Path("."), pids=[pid]).wait(0.2) == [None]
