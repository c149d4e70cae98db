"""Fault 6: the disk is full during a save."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Patch, assert_survived, at_step, start
from metrics import read_metrics
from trainings import config

from mgc_dist.training import checkpoint

KNOBS: dict[str, Any] = {"checkpoint_every_epochs": 0.3, "resume": "auto"}


def full(rank: int, first: int, last: int) -> Patch:
    """No room for the files that a rank writes from its `first` to its `last` one."""

    def patch(this: int) -> None:
        write, saves = torch.save, iter(range(1, 1000))

        def failing(state: Any, file: Any, *args: Any) -> None:
            if this == rank and first <= next(saves) <= last:
                file.write(b"half of it")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
            write(state, file, *args)

        torch.save = failing

    return patch


def test_a_tool_beside_the_checkpoints_cannot_be_written(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    """DeepSpeed copies zero_to_fp32.py on rank 0, between two collectives."""
    run = tmp_path / "run"

    def no_room(rank: int) -> None:
        from deepspeed.runtime import engine

        copy, calls = engine.copyfile, iter(range(1000))

        def failing(source: str, target: str) -> None:
            if next(calls) == 2:  # the first one of the second save
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
            copy(source, target)

        engine.copyfile = failing

    settings = config(shards, noisy, run, hang_timeout_s=20.0, **KNOBS)
    job = start(settings, tmp_path, patch=no_room)
    job.wait()
    assert_survived(job, run, undisturbed, codes=[0, 0], message="No space left on device")
    assert len(read_metrics(run, "save_failed")) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_one_save_fails_and_the_run_goes_on(
    rank: int, shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=full(rank, 2, 2))
    job.wait()
    assert_survived(job, run, undisturbed, codes=[0, 0], message="No space left on device")
    assert "the run goes on" in job.said
    assert len(read_metrics(run, "save_failed")) == 1
    assert not list((run / "checkpoints").glob("tmp-*")), "removed at once"


def test_the_disk_stays_full(shards: Path, noisy: Path, undisturbed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=full(1, 2, 99))
    job.wait()
    assert [path.name for path in (run / "checkpoints").glob("*-*")] == ["step-00000002"]
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    message = "the last whole one in"
    assert_survived(job, run, undisturbed, codes=[74, 74], message=message)


def test_a_save_that_has_no_room_is_not_begun(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def nearly_full(rank: int) -> None:
        usage = checkpoint.shutil.disk_usage(tmp_path)
        checkpoint.shutil.disk_usage = lambda path: usage._replace(free=1000)

    job = start(config(shards, noisy, run, **KNOBS), tmp_path, patch=nearly_full)
    job.wait()
    again = start(config(shards, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=[74, 74], message="1,000 bytes free")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_file_system_that_is_really_full(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "none", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        run = small / "run"
        job = start(config(shards, noisy, run, **KNOBS), tmp_path)
        job.wait()
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        again = start(config(shards, noisy, run, **KNOBS), tmp_path)
        assert again.wait() == [0, 0], again.said
        assert_survived(job, run, undisturbed, codes=[74, 74], message="not saved at step")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.parametrize("error", ["OSError", "RuntimeError"])
def test_no_room_to_carry_a_checkpoint_to_other_ranks(
    error: str, shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    """Torch's writer raises a RuntimeError without a word about space."""
    run = tmp_path / "run"
    stop = at_step(3, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    settings = config(shards, noisy, run, **KNOBS)
    assert start(settings, tmp_path, patch=stop).wait() == [0, 0]
    before = sorted(path.name for path in (run / "checkpoints").iterdir())

    def no_room(rank: int) -> None:
        def failing(state: Any, file: Any, *args: Any, **words: Any) -> None:
            if error == "OSError":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

        torch.save = failing

    job = start(settings, tmp_path, world=3, patch=no_room)
    assert job.wait() == [74, 74, 74], job.said
    assert "to be carried to another number of ranks: got " in job.said
    assert "make room, or go on with as many ranks as before" in job.said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert start(settings, tmp_path, world=3).wait() == [0, 0, 0]
