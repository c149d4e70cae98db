"""float16 with a loss scale: against autograd, overflows, and the scale over a stop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks
from harness import slow, weights_hash
from metrics import read_metrics
from test_equality import CLIP, Trajectory, build, drawn, make_engine, reference, trajectory
from torch import nn
from trainings import config, losses, train_on, train_until

from mgc_dist.cluster import ranks
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.errors import UserError
from mgc_dist.training import loss_scale
from mgc_dist.training.loss_scale import LossScale
from mgc_dist.training.setup import precision_of


def scaled(file: Path, stage: int) -> Trajectory:
    with ranks.join("cpu") as peers:
        model = build(file, "feature_encoder", False)
        return trajectory(model, peers, stage, False, fp16=True)


@pytest.mark.parametrize("stage", [0, slow(1), 2, 3])
def test_float16_follows_plain_autograd_at_every_stage(stage: int, tiny_model: Path) -> None:
    # DeepSpeed's own scaler clips gradients with the scale still in them: 65536 times too much
    expected, first, steep = reference(tiny_model, "feature_encoder")
    found, grads, norms = run_ranks(2, scaled, tiny_model, stage)[0]
    assert max(steep) > CLIP, "the clipping bites"
    assert found == pytest.approx(expected, abs=1e-3)
    assert norms == pytest.approx(steep, rel=1e-2)
    assert grads.keys() == first.keys()
    for name, grad in first.items():
        size = max(float(np.abs(grad).max()), 1e-5)
        assert float(np.abs(grads[name] - grad).max()) < 0.03 * size, name


def overflowing(
    file: Path, stage: int, offload: bool = False
) -> tuple[list[tuple[bool, float]], list[bool]]:
    """Steps of which rank 1 alone overflows: applied, scale; whether weights were as before."""
    with ranks.join("cpu") as peers:
        model, (wave, label) = build(file, "feature_encoder", False), drawn()
        engine = make_engine(model, peers, stage, False, fp16=True, offload=offload)
        engine.train(True)
        engine.set_lr(1.0)
        told, still = [], []
        for step in range(5):
            before = engine.state.all_weights()
            for _ in range(2):
                loss = nn.functional.cross_entropy(engine(wave[:2]), label[:2], reduction="sum")
                huge = 1e9 if step in (0, 1, 3) and peers.rank == 1 else 1.0
                engine.backward(huge * loss / 6)
                applied = engine.step()
            told.append((applied, engine.loss_scale))
            now = engine.state.all_weights()
            still.append(all(before[name].equal(value) for name, value in now.items()))
        return told, still


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), slow(1, False), (2, False), (3, False), (2, True), (3, True)]
)
def test_what_overflows_on_one_rank_is_skipped_on_all(
    stage: int, offload: bool, tiny_model: Path
) -> None:
    (told, still), (others, _) = run_ranks(2, overflowing, tiny_model, stage, offload)
    start = 2.0**16
    quarter, eighth = start / 4, start / 8
    applied = [(False, start / 2), (False, quarter), (True, quarter), (False, eighth)]
    assert told == others == [*applied, (True, eighth)]
    assert still == [not each for each, _ in told]


def test_the_scale_moves_as_torchs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_INTERVAL", 3)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=3), LossScale()
    for applied in np.random.default_rng(0).random(60) < 0.8:
        theirs.scale(weight.sum() if applied else weight.sum() / 0).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.follow(bool(applied))
        assert ours.value == theirs.get_scale()


def knobs_of(stage: int, **changes: Any) -> dict[str, Any]:
    knobs = {"zero_stage": stage, "precision": "fp16", "freeze": "feature_encoder"}
    return knobs | changes


@pytest.mark.parametrize("stage", [2, slow(0), slow(3)])
def test_a_run_goes_on_to_the_bit_with_its_scale(
    stage: int,
    shards: Path,
    table: Path,
    noisy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_scale, "_INTERVAL", 1)  # it rises until it overflows, and so on
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    knobs = knobs_of(stage)
    train_on(2, config(shards, noisy, whole, **knobs))
    skipped = read_metrics(whole, "refused")
    assert skipped
    assert "(the loss scale falls to" in str(skipped[0]["reason"])
    middle = int(skipped[-1]["step"]) - 2
    assert run_ranks(2, train_until, middle, config(shards, noisy, parts, **knobs)) == [0, 0]
    train_on(2, config(shards, noisy, parts, resume="auto", **knobs))
    again = [(line["step"], line["reason"]) for line in read_metrics(parts, "refused")]
    assert again == [(line["step"], line["reason"]) for line in skipped]
    assert losses(parts) == losses(whole)
    assert weights_hash(parts, stage) == weights_hash(whole, stage)


def test_a_run_in_float32_may_go_on_in_float16(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    run, knobs = tmp_path / "run", knobs_of(2)
    first = config(shards, noisy, run, **(knobs | {"precision": "fp32"}))
    assert run_ranks(1, train_until, 2, first) == [0]
    with pytest.raises(UserError, match=r"--precision: got fp16, expected fp32.*\n.*--change prec"):
        train_on(1, config(shards, noisy, run, resume="auto", **knobs))
    train_on(1, config(shards, noisy, run, resume="auto", change=("precision",), **knobs))
    assert read_metrics(run, "done")


def test_a_cache_in_float16_is_refused(tmp_path: Path) -> None:
    knobs = knobs_of(2, cache="cnn")
    with pytest.raises(UserError, match=r"fp16: got --cache cnn.*\n  use --precision fp32, or"):
        config(tmp_path, tmp_path, tmp_path, **knobs)
    assert config(tmp_path, tmp_path, tmp_path, **(knobs | {"precision": "fp32"}))
    assert config(tmp_path, tmp_path, tmp_path, **(knobs | {"cache": "none"}))


@pytest.mark.parametrize(
    ("capability", "cache", "expected"),
    [
        ((9, 0), "none", "bf16"),
        ((8, 0), "cnn", "bf16"),
        ((7, 5), "none", "fp16"),
        ((7, 5), "cnn", "fp32"),
        ((7, 0), "none", "fp16"),
        ((6, 1), "none", "fp32"),
    ],
)
def test_auto_takes_what_the_gpu_has(
    capability: tuple[int, int],
    cache: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_bf16 = capability >= (8, 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    settings = config(tmp_path, tmp_path, tmp_path, cache=cache, freeze="feature_encoder")
    for device, wanted in (("cuda:0", expected), ("cpu", "fp32")):
        peers = Ranks(rank=0, world=1, local_rank=0, device=torch.device(device))
        assert precision_of(settings, peers) == wanted
