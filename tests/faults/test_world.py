"""Fault 14: the number of ranks changes; and which changes are refused, saying what would fit."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model
from harness import at_step, losses_of, slow, start, weights_hash
from safetensors.torch import load_file
from trainings import config

from mgc_dist.journal import read_status

KNOBS: dict[str, Any] = {"checkpoint_every_epochs": 0.3, "resume": "auto"}


def stop_at(step: int) -> Any:
    return at_step(step, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))


SOME = [(2, "layers:1"), (3, "none")]
OTHERS = [(0, "none"), (0, "layers:1"), (1, "none"), (1, "layers:1"), (2, "none"), (3, "layers:1")]


@pytest.mark.parametrize(("stage", "freeze"), [*SOME, *(slow(*other) for other in OTHERS)])
def test_two_then_one_then_four_ranks(
    stage: int, freeze: str, shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    knobs: dict[str, Any] = KNOBS | {"zero_stage": stage, "freeze": freeze}
    undivided = start(config(shards, tiny_model, whole, **knobs), tmp_path)
    assert undivided.wait() == [0, 0], undivided.said
    settings = config(shards, tiny_model, run, **knobs)
    for world, patch in ((2, stop_at(3)), (1, stop_at(7)), (4, None)):
        job = start(settings, tmp_path, world=world, patch=patch)
        assert job.wait() == [0] * world, job.said
    assert "the run goes on the same but for rounding" in job.said
    assert read_status(run)["state"] == "done"
    assert losses_of(run) == pytest.approx(losses_of(whole), abs=2e-6)
    theirs = load_file(whole / "best" / "model.safetensors")
    ours = load_file(run / "best" / "model.safetensors")
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) < 1e-4, name
        if freeze == "layers:1" and "layers.0." in name:
            assert ours[name].equal(value), name
    assert not list((run / "checkpoints").glob("tmp-*"))


def test_stages_1_and_2_read_each_other(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    # not to the bit: stage 1 adds up its micro batches before it sums over ranks, stage 2 after
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert start(config(shards, tiny_model, whole, **KNOBS), tmp_path).wait() == [0, 0]
    first = config(shards, tiny_model, run, **(KNOBS | {"zero_stage": 1}))
    assert start(first, tmp_path, patch=stop_at(4)).wait() == [0, 0]
    again = start(config(shards, tiny_model, run, **KNOBS), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert losses_of(run) == pytest.approx(losses_of(whole), abs=2e-6)


@pytest.mark.parametrize(
    ("theirs", "ours", "fitting"), [(2, 3, "1 or 2"), slow(3, 2, "3"), slow(2, 0, "1")]
)
def test_another_family_of_stages_is_refused(
    theirs: int,
    ours: int,
    fitting: str,
    shards: Path,
    table: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = KNOBS | {"zero_stage": theirs}
    assert start(config(shards, tiny_model, run, **knobs), tmp_path, patch=stop_at(2)).wait() == [
        0,
        0,
    ]
    job = start(config(shards, tiny_model, run, **(knobs | {"zero_stage": ours})), tmp_path)
    assert job.wait() == [2, 2]
    assert f"go on with --zero-stage {fitting}" in job.said
    wide = start(config(shards, tiny_model, run, **knobs), tmp_path, world=11)
    assert wide.wait() == [2] * 11
    assert "--global-batch 10 on 11 ranks" in wide.said


def test_other_frozen_weights_are_refused(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from conftest import build_tiny

    model, run = tmp_path / "model", tmp_path / "run"
    build_tiny(tiny_model).net.save_pretrained(model)
    knobs: dict[str, Any] = KNOBS | {"freeze": "layers:1"}
    settings = config(shards, model, run, **knobs)
    assert start(settings, tmp_path, patch=stop_at(2)).wait() == [0, 0]
    other = build_tiny(write_model(tmp_path / "t.json"), seed=5)
    other.net.save_pretrained(model)
    job = start(settings, tmp_path, world=1)
    assert job.wait() == [2]
    assert "frozen weights of --model" in job.said


def test_a_run_folder_with_brackets_and_the_users_wish_to_unpickle_all(
    shards: Path,
    table: Path,
    noisy: Path,
    undisturbed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch refuses it beside ours
    run, plain = tmp_path / "run [1]*", tmp_path / "plain"
    settings = config(shards, noisy, run, **KNOBS)
    for world, step in ((2, 3), (2, 6)):
        job = start(settings, tmp_path, world=world, patch=stop_at(step))
        assert job.wait() == [0] * world, job.said
    shutil.copytree(run, plain)
    again = start(settings, tmp_path)
    assert again.wait() == [0, 0], again.said
    shutil.copytree(run, tmp_path / "done")  # DeepSpeed's own tool finds nothing under brackets
    assert weights_hash(tmp_path / "done") == undisturbed
    shutil.rmtree(run)
    shutil.copytree(plain, run)
    one = start(settings, tmp_path, world=1)
    assert one.wait() == [0], one.said
    assert not list((run / "checkpoints").glob("tmp-*"))
