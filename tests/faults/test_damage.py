"""Faults 7 to 10: checkpoints that are damaged, missing, forged or malicious."""

import hashlib
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job, assert_survived, at_step, slow, start
from trainings import config

from mgc_dist.training import checkpoint

KNOBS: dict[str, Any] = {"checkpoint_every_epochs": 0.3, "resume": "auto"}
MODEL = "mp_rank_00_model_states.pt"
SHARDS = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]


@pytest.fixture(scope="module")
def stopped(shards: Path, table: Path, noisy: Path, tmp_path_factory: Any) -> Path:
    """A run that was stopped after some steps, with two checkpoints."""
    work = tmp_path_factory.mktemp("stopped")
    patch = at_step(5, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    job = start(config(shards, noisy, work / "run", **KNOBS), work, patch=patch)
    assert job.wait() == [0, 0], job.said
    names = sorted(path.name for path in (work / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-00000006", "step-00000007"]
    return work / "run"


def go_on(shards: Path, noisy: Path, run: Path, work: Path, **knobs: Any) -> Job:
    job = start(config(shards, noisy, run, **(KNOBS | knobs)), work)
    job.wait()
    return job


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def harm(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "remove":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 16
        path.write_bytes(content)


QUICK = [(MODEL, "flip"), (SHARDS[1], "truncate"), ("MANIFEST.json", "remove")]
FILES, HARMS = (MODEL, *SHARDS, "MANIFEST.json"), ("truncate", "remove", "flip")
OTHERS = [slow(*pair) for pair in itertools.product(FILES, HARMS) if pair not in QUICK]


@pytest.mark.parametrize(("name", "kind"), [*QUICK, *OTHERS])
def test_a_file_of_the_newest_checkpoint_is_damaged(
    name: str,
    kind: str,
    stopped: Path,
    shards: Path,
    noisy: Path,
    undisturbed: str,
    tmp_path: Path,
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    harm(newest(run) / name, kind)
    job = go_on(shards, noisy, run, tmp_path)
    message = "passing over checkpoint step-00000007: "
    assert_survived(job, run, undisturbed, codes=[0, 0], message=message)
    assert name in job.said
    assert "resuming from" in job.said
    assert "step-00000006" in job.said


def test_nothing_starts_from_scratch_when_all_are_damaged(
    stopped: Path, shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    for folder in (run / "checkpoints").glob("step-*"):
        harm(folder / MODEL, "flip")
    job = go_on(shards, noisy, run, tmp_path)
    fresh = go_on(shards, noisy, run, tmp_path, resume="never", fresh=True)
    assert fresh.codes == [0, 0], fresh.said
    assert_survived(job, run, undisturbed, codes=[65, 65], message="2 damaged, none whole")
    assert (run / "aside-1" / "checkpoints" / "step-00000007").is_dir(), "nothing is deleted"


@pytest.mark.parametrize("content", [slow(None), slow(""), "step-00000099"])
def test_latest_is_missing_empty_or_wrong(
    content: str | None,
    stopped: Path,
    shards: Path,
    noisy: Path,
    undisturbed: str,
    tmp_path: Path,
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    if content is not None:
        latest.write_text(content)
    job = go_on(shards, noisy, run, tmp_path)
    assert_survived(job, run, undisturbed, codes=[0, 0], message="step-00000007")
    assert latest.read_text() == "step-00000013"


class Evil:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def reseal(folder: Path) -> None:
    """What a stranger who made a checkpoint would do: write a manifest that fits."""
    path = folder / "MANIFEST.json"
    content = json.loads(path.read_text())
    for name, entry in content["files"].items():
        data = (folder / name).read_bytes()
        entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    content["manifest_sha256"] = checkpoint._digest(content)
    path.write_text(json.dumps(content))
    assert checkpoint.damage(folder) == ""


@pytest.mark.parametrize(
    ("name", "world"), [(MODEL, 2), slow(SHARDS[1], 2), slow(MODEL, 1), (SHARDS[0], 1)]
)
def test_a_pickle_in_a_checkpoint_is_refused_before_it_runs(
    name: str,
    world: int,
    stopped: Path,
    shards: Path,
    noisy: Path,
    undisturbed: str,
    tmp_path: Path,
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    path, mark = newest(run) / name, tmp_path / "it ran"
    states = torch.load(path, weights_only=False)
    torch.save(states | {"lr_scheduler": Evil(mark)}, path)
    reseal(newest(run))
    job = start(config(shards, noisy, run, **KNOBS), tmp_path, world=world)
    job.wait()
    assert not mark.exists()
    assert 2 in job.codes
    shutil.rmtree(newest(run))
    assert go_on(shards, noisy, run, tmp_path).codes == [0, 0]
    assert_survived(job, run, undisturbed, codes=[2] * world, message="would run code")


def test_our_own_checkpoints_need_no_other_names(stopped: Path) -> None:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    from mgc_dist.training.engine_state import safe_names

    known = {f"{name.__module__}.{name.__qualname__}" for name in safe_names()}
    for path in newest(stopped).glob("*.pt"):
        torch.serialization.clear_safe_globals()
        assert set(get_unsafe_globals_in_checkpoint(path)) <= known, path.name


def test_exports_and_tables_hold_no_pickle(stopped: Path, table: Path) -> None:
    for folder in (stopped / "best", table):
        for path in folder.rglob("*"):
            assert path.suffix in (".json", ".npy", ".safetensors", ".png"), path
            if path.suffix == ".npy":
                import numpy as np

                np.load(path, allow_pickle=False)


def test_a_refused_start_leaves_the_name_free(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = go_on(shards, noisy, run, tmp_path, resume="latest")
    assert job.codes == [2, 2], job.said
    assert "no checkpoint" in job.said
    assert "heartbeat" not in job.said
    assert not run.exists()
