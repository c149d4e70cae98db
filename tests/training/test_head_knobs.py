"""Heads through ZeRO against plain autograd; stopped, resumed, kept in the identity, exported."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny, run_ranks
from harness import slow, weights_hash
from safetensors.torch import load_file
from test_equality import Trajectory, followed, trajectory
from test_families import write
from trainings import config, losses, train_on, train_until

from mgc_dist import export
from mgc_dist.cluster import ranks
from mgc_dist.config import ExportConfig, TrainConfig
from mgc_dist.config.head import HeadConfig
from mgc_dist.errors import UserError
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.models.folder import load_exported

BOTH = HeadConfig(pooling="attention", layer_mix=True)
LOWER = HeadConfig(pooling="attention", layer_mix=True, from_layer=1)


def build(file: Path) -> WaveClassifier:
    return build_tiny(file, freeze="feature_encoder", head=BOTH)


@pytest.fixture
def files(tiny_model: Path, tmp_path: Path) -> dict[str, Path]:
    """Models with the sum of transformers, and with ours."""
    return {"wav2vec2": tiny_model, "ast": write(tmp_path, "audio-spectrogram-transformer")}


def headed_trajectory(file: Path, stage: int) -> Trajectory:
    with ranks.join("cpu") as peers:
        return trajectory(build(file), peers, stage, False)


@pytest.mark.parametrize(
    ("family", "stage"),
    [("wav2vec2", 0), ("ast", 3), *(slow("wav2vec2", n) for n in (2, 3)), slow("ast", 0)],
)
def test_heads_follow_plain_autograd(family: str, stage: int, files: dict[str, Path]) -> None:
    expected, first, steep = followed(build(files[family]))
    found, grads, norms = run_ranks(2, headed_trajectory, files[family], stage)[0]
    assert found == pytest.approx(expected, abs=2e-6)
    assert norms == pytest.approx(steep, rel=1e-4, abs=1e-6)
    assert grads.keys() == first.keys()
    assert sum("layer_weights" in name or ".score." in name for name in first) == 2
    for name, grad in first.items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)


def headed(shards: Path, model: Path, run: Path, head: HeadConfig, **changes: Any) -> TrainConfig:
    knobs = {"loss": "ce", "epochs": 40 / 66, "freeze": "feature_encoder"} | changes
    settings = config(shards, model, run, **knobs)
    return replace(settings, main=replace(settings.main, head=head))


@pytest.mark.parametrize(("stage", "head"), [(3, LOWER), slow(0, BOTH), slow(2, BOTH)])
def test_a_run_goes_on_to_the_bit_and_is_exported(
    stage: int, head: HeadConfig, shards: Path, noisy: Path, tmp_path: Path, capsys: Any
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    knobs = {"zero_stage": stage}
    train_on(2, headed(shards, noisy, whole, head, **knobs))
    assert run_ranks(2, train_until, 2, headed(shards, noisy, parts, head, **knobs)) == [0, 0]
    with pytest.raises(UserError, match=r"--(pooling|layer-mix): got "):
        train_on(1, headed(shards, noisy, parts, HeadConfig(), resume="auto", **knobs))
    train_on(2, headed(shards, noisy, parts, head, resume="auto", **knobs))
    assert losses(parts) == losses(whole)
    assert weights_hash(parts, stage) == weights_hash(whole, stage)
    trained = load_file(parts / "best" / "model.safetensors")
    assert float(trained["projector.score.weight"].abs().max()) > 0
    assert trained["layer_weights"].unique().numel() > 1
    out = tmp_path / "out"
    export.run(ExportConfig(run=parts, out=out))
    assert "trust_remote_code=True)" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True)" in card
    wave = torch.zeros(2, 8000, dtype=torch.int16)
    wave[1] = torch.arange(8000) % 200
    with torch.no_grad():
        best, plain = (load_exported(folder) for folder in (parts / "best", out))
        torch.testing.assert_close(best.calibrated(wave), plain(wave), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.grid
def test_a_run_goes_on_without_its_model(
    shards: Path, noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = Path("models/tiny")
    build_tiny(noisy, seed=7).net.save_pretrained(base)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on(1, headed(shards, base, whole, LOWER))
    assert run_ranks(1, train_until, 2, headed(shards, base, parts, LOWER)) == [0]
    shutil.rmtree(base)
    train_on(1, headed(shards, base, parts, LOWER, resume="auto"))
    assert losses(parts) == losses(whole)
    assert weights_hash(parts) == weights_hash(whole)
