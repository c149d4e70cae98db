"""Faults 18 to 22: damaged and malicious data, a killed packing, another data set's table."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import bias_config, make_table, run_ranks, shard_config
from harness import Job, assert_survived, slow, start
from trainings import config

from mgc_dist import cli
from mgc_dist.config import ShardConfig
from mgc_dist.packing import pack
from mgc_dist.shard import run as pack_run

KNOBS: dict[str, Any] = {"checkpoint_every_epochs": 0.3, "resume": "auto"}


@pytest.fixture
def own(shards: Path, table: Path, tmp_path: Path) -> Path:
    """A copy of the shards and their table that may be damaged."""
    return Path(shutil.copytree(shards, tmp_path / "own"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


def link(path: Path) -> None:
    """As a malicious archive: the member's type says that it is a link."""
    content = bytearray(path.read_bytes())
    content[156:157] = b"2"
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip, "checksum"),
        slow(cut, "bytes, expected"),
        slow(Path.unlink, "no such file"),
        (link, "train-"),
    ],
)
def test_a_shard_is_damaged(
    harm: Any, message: str, own: Path, shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run, name = tmp_path / "run", "train-000001.tar"
    harm(own / name)
    job = start(config(own, noisy, run, **KNOBS), tmp_path)
    job.wait()
    assert set(job.codes) <= {2, 75}, job.said
    assert 2 in job.codes
    assert name in job.said
    shutil.copy(shards / name, own / name)
    again = start(config(own, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=job.codes, message=message)


def shard_job(settings: ShardConfig, work: Path, kill: bool) -> Job:
    """`python -m mgc_dist.shard` in a process of its own, killed in the middle if asked."""
    folder = work / f"pack-{len(list(work.glob('pack-*')))}"
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        handle = os.open(folder / "rank0.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        if kill:

            def killed(*args: Any, **kwargs: Any) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            pack.manifest.write = killed
        file = folder / "config.yaml"
        file.write_text(cli.dump("shard", settings))
        sys.argv = ["shard", "--config", str(file)]
        try:
            cli.main("shard", ShardConfig, pack_run)
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code or 0))
    return Job(folder=folder, pids=[pid])


@pytest.mark.parametrize("fault", [slow("bad header"), "not finite", "killed"])
def test_packing_meets_a_fault_and_gives_the_same_data_set(
    fault: str, tracks: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    own, out = Path(shutil.copytree(tracks, tmp_path / "tracks")), tmp_path / "out"
    intruder = own / sorted(path.name for path in own.iterdir() if path.is_dir())[0] / "zz.wav"
    if fault == "bad header":
        wave = next(intruder.parent.glob("*.wav")).read_bytes()
        intruder.write_bytes(wave[:22] + b"\xff\xff" + wave[24:])  # 65,535 channels
    elif fault == "not finite":
        soundfile.write(intruder, np.full(66_150, np.nan, np.float32), 22_050, "FLOAT")
    settings = shard_config(own, out)
    job = shard_job(settings, tmp_path, kill=fault == "killed")
    job.wait()
    assert not (out / "manifest.json").exists(), "no manifest, no data set"
    intruder.unlink(missing_ok=True)
    again = shard_job(settings, tmp_path, kill=False)
    assert again.wait() == [0], again.said
    run_ranks(1, make_table, bias_config(out))
    run = tmp_path / "run"
    trained = start(config(out, noisy, run, **KNOBS), tmp_path)
    assert trained.wait() == [0, 0], trained.said
    codes: list[int | None] = [-9] if fault == "killed" else [2]
    message = "" if fault == "killed" else "zz"
    assert_survived(job, run, undisturbed, codes=codes, message=message)


def test_a_bias_table_of_another_data_set(
    own: Path, tracks: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    pack_run(shard_config(tracks, other, hop_s=0.5))
    run_ranks(1, make_table, bias_config(other))
    right = Path(shutil.move(own / "bias", tmp_path / "right"))
    shutil.copytree(other / "bias", own / "bias")
    job = start(config(own, noisy, run, **KNOBS), tmp_path)
    job.wait()
    shutil.rmtree(own / "bias")
    shutil.copytree(right, own / "bias")
    again = start(config(own, noisy, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=[2, 2], message="a table of data set")
