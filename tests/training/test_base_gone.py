"""A run goes on without the model that it began with: a checkpoint holds what it needs of it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import NOISY, build_tiny, run_ranks, write_model
from harness import slow, weights_hash
from safetensors.torch import load_file
from trainings import config, losses, train_on, train_until
from transformers import Wav2Vec2FeatureExtractor

from mgc_dist.errors import UserError
from mgc_dist.journal import read_environment
from mgc_dist.training import resume

BASE = Path("models/tiny")
"""Relative, as a name of the hub looks."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a pretrained model in it, which is started from."""
    monkeypatch.chdir(tmp_path)
    noisy = write_model(tmp_path / "noisy.json", **NOISY)
    build_tiny(noisy, seed=7).net.save_pretrained(BASE)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(BASE)
    return tmp_path


@pytest.mark.parametrize(
    ("stage", "world", "freeze", "cache"),
    [
        (2, 1, "feature_encoder", "cnn"),
        (3, 2, "layers:1", "none"),
        slow(0, 1, "none", "none"),
        slow(1, 2, "layers:1", "none"),
    ],
)
def test_a_run_goes_on_to_the_bit_without_its_model(
    stage: int, world: int, freeze: str, cache: str, shards: Path, table: Path, work: Path
) -> None:
    whole, parts = work / "whole", work / "parts"
    knobs: dict[str, Any] = {"zero_stage": stage, "epochs": 1.0, "freeze": freeze, "cache": cache}
    knobs |= {"cache_dir": work / "cache"}
    train_on(world, config(shards, BASE, whole, **knobs))
    assert run_ranks(world, train_until, 2, config(shards, BASE, parts, **knobs)) == [0] * world
    before = read_environment(parts)["identity"]
    shutil.rmtree(BASE)
    if world > 1:
        shutil.copytree(parts, work / "other")
    train_on(world, config(shards, BASE, parts, resume="auto", **knobs))
    assert read_environment(parts)["identity"] == before
    assert losses(parts) == losses(whole)
    assert weights_hash(parts, stage) == weights_hash(whole, stage)
    if world > 1:
        train_on(1, config(shards, BASE, work / "other", resume="auto", **knobs))
        ours, theirs = (load_file(run / "best" / "model.safetensors") for run in (parts, whole))
        assert ours.keys() == theirs.keys()
        assert losses(work / "other") == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize("stage", [2, slow(3)])
def test_the_statistics_of_frozen_norms_come_from_the_checkpoint(
    stage: int, shards: Path, table: Path, work: Path
) -> None:
    """A conformer has BatchNorm, whose means and variances are no parameters."""
    shutil.rmtree(BASE)
    settings = {"model_type": "wav2vec2-conformer", "position_embeddings_type": None}
    name = write_model(work / "conformer.json", **settings)
    net = build_tiny(name, freeze="backbone").net
    for part, buffer in net.named_buffers():
        if part.endswith("running_mean"):
            buffer.fill_(0.5)
    net.save_pretrained(BASE)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(BASE)
    run, knobs = work / "run", {"zero_stage": stage, "epochs": 1.0, "freeze": "backbone"}
    assert run_ranks(2, train_until, 2, config(shards, BASE, run, **knobs)) == [0, 0]
    shutil.rmtree(BASE)
    train_on(1, config(shards, BASE, run, resume="auto", **knobs))
    kept = load_file(run / "best" / "model.safetensors")
    means = [value for name, value in kept.items() if name.endswith("running_mean")]
    assert means
    assert all(bool((value == 0.5).all()) for value in means)


def test_what_no_checkpoint_holds_is_asked_for(
    shards: Path, table: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, knobs = work / "run", {"epochs": 1.0, "precision": "bf16-weights"}
    knobs |= {"freeze": "feature_encoder", "spec_augment": False}
    assert run_ranks(1, train_until, 2, config(shards, BASE, run, **knobs)) == [0]
    moved = BASE.rename("moved")
    with pytest.raises(UserError, match="bfloat16, rounded") as error:
        train_on(1, config(shards, BASE, run, resume="auto", **knobs))
    assert "name its folder: --model FOLDER" in str(error.value)
    with pytest.raises(UserError, match="model models/none"):
        train_on(1, config(shards, Path("models/none"), run, resume="auto", **knobs))
    with pytest.raises(UserError, match="model models/tiny"):
        train_on(1, config(shards, BASE, work / "new", resume="auto", **knobs))
    monkeypatch.setattr(resume, "is_found", lambda *_: True)  # a model of the hub is loaded again
    with pytest.raises(UserError, match="model models/tiny: got") as error:
        train_on(1, config(shards, BASE, run, resume="auto", **knobs))
    assert "frozen" not in str(error.value)
    train_on(1, config(shards, moved, run, resume="auto", **knobs))
