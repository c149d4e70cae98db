"""Low-rank adapters through ZeRO against plain autograd; stopped, resumed, counted, exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny, run_ranks
from harness import slow, weights_hash
from metrics import read_metrics
from safetensors.torch import load_file
from test_equality import CLIP, HEAD_LR, LR, PLAN, Trajectory, drawn, factor, trajectory
from test_forecast import of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from trainings import config, losses, train_on, train_until
from transformers import pipeline

from mgc_dist.cluster import ranks
from mgc_dist.config.lora import Lora
from mgc_dist.errors import UserError
from mgc_dist.models import flops
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.models.main import describe_main
from mgc_dist.training.forecast import checkpoint_bytes

LORA = Lora(r=4, alpha=8.0, targets=("q_proj", "output_dense"))
WORDS = "r=4,alpha=8,targets=q_proj,output_dense"
NAMES = ("attention.q_proj", "feed_forward.output_dense")


def build(file: Path) -> WaveClassifier:
    return build_tiny(file, freeze="feature_encoder", lora=LORA)


class Sum(nn.Module):
    """W + 2 B A as a parametrisation of W: the same function, without peft."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2.0 * self.b @ self.a


def reference(file: Path) -> Trajectory:
    """Losses, gradients of the first step before clipping, and norms, by torch alone."""
    net = build_tiny(file, freeze="feature_encoder").train()
    start, (wave, label) = dict(build(file).named_parameters()), drawn()
    net.net.base_model.requires_grad_(False)
    adapters: dict[str, nn.Parameter] = {}
    for name, module in list(net.named_modules()):
        if name.endswith(NAMES):
            a, b = (f"{name}.lora_{part}.default.weight" for part in "AB")
            own = Sum(start[a].detach(), start[b].detach())
            parametrize.register_parametrization(module, "weight", own)
            adapters |= {a: own.a, b: own.b}
    head = {n: p for n, p in net.named_parameters() if p.requires_grad and ".encoder." not in n}
    groups = [
        {"params": [*adapters.values()], "lr": LR},
        {"params": [*head.values()], "lr": HEAD_LR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    found, norms, first, trained = [], [], {}, adapters | head
    for step in range(PLAN.steps):
        places = PLAN.places(np.arange(step * 6, PLAN.seen_after(step)))
        loss = nn.functional.cross_entropy(net(wave[places]), label[places])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first = {name: p.grad.numpy().copy() for name, p in trained.items()}
        norms.append(float(nn.utils.clip_grad_norm_([*trained.values()], CLIP)))
        for group, peak in zip(optimizer.param_groups, (LR, HEAD_LR), strict=True):
            group["lr"] = peak * factor(step)
        optimizer.step()
        found.append(loss.item())
    return found, first, norms


def adapted_trajectory(file: Path, stage: int, bf16: bool) -> Trajectory:
    with ranks.join("cpu") as peers:
        return trajectory(build(file), peers, stage, bf16)


@pytest.mark.parametrize("stage", [0, slow(1), 2, 3])
def test_adapters_follow_plain_autograd_at_every_stage(stage: int, tiny_model: Path) -> None:
    expected, first, steep = reference(tiny_model)
    found, grads, norms = run_ranks(2, adapted_trajectory, tiny_model, stage, False)[0]
    assert max(steep) > CLIP, "the clipping bites"
    assert found == pytest.approx(expected, abs=2e-6)
    assert norms == pytest.approx(steep, rel=1e-4, abs=1e-6)
    assert grads.keys() == first.keys()
    for name, grad in first.items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("stage", [2, 3])
def test_autocast_follows(stage: int, tiny_model: Path) -> None:
    found, _, _ = run_ranks(2, adapted_trajectory, tiny_model, stage, True)[0]
    assert found == pytest.approx(reference(tiny_model)[0], abs=0.02)


def knobs_of(stage: int, **changes: Any) -> dict[str, Any]:
    knobs = {"zero_stage": stage, "epochs": 1.0, "freeze": "feature_encoder", "lora": WORDS}
    return knobs | changes


@pytest.mark.parametrize("stage", [2, 3, slow(0)])
def test_a_run_goes_on_to_the_bit_and_on_fewer_ranks_to_rounding(
    stage: int, shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    whole, parts, fewer = (tmp_path / name for name in ("whole", "parts", "fewer"))
    knobs = knobs_of(stage)
    train_on(2, config(shards, noisy, whole, **knobs))
    assert run_ranks(2, train_until, 2, config(shards, noisy, parts, **knobs)) == [0, 0]
    shutil.copytree(parts, fewer)
    train_on(2, config(shards, noisy, parts, resume="auto", **knobs))
    assert losses(parts) == losses(whole)
    weights = [load_file(run / "best" / "model.safetensors") for run in (parts, whole)]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    if stage != 3:  # zero_to_fp32 of stage 3 wants frozen weights
        assert weights_hash(parts, stage) == weights_hash(whole, stage)
    train_on(1, config(shards, noisy, fewer, resume="auto", **knobs))
    assert losses(fewer) == pytest.approx(losses(whole), abs=1e-5)
    assert_holds_adapters_and_head(parts)
    assert_exported(parts)


def test_a_run_with_bf16_base_weights_goes_on_to_the_bit(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    knobs = knobs_of(2, precision="bf16-weights")
    train_on(2, config(shards, noisy, whole, **knobs))
    assert run_ranks(2, train_until, 2, config(shards, noisy, parts, **knobs)) == [0, 0]
    train_on(2, config(shards, noisy, parts, resume="auto", **knobs))
    assert losses(parts) == losses(whole)
    assert weights_hash(parts) == weights_hash(whole)
    assert_exported(parts)


def assert_holds_adapters_and_head(run: Path) -> None:
    folder = max((run / "checkpoints").glob("step-*"))
    for file in folder.glob("*_model_states.pt"):
        state = torch.load(file, map_location="cpu", weights_only=False)
        names = {n for n in state["module"] if n not in state["buffer_names"]}
        assert any(".lora_A." in name for name in names)
        assert all(".lora_" in name or not is_below(name) for name in names)
        assert not state["frozen_param_fragments"]


def is_below(name: str) -> bool:
    return name.startswith("net.wav2vec2.")


def assert_exported(run: Path) -> None:
    """RUN/best is a plain model that transformers loads."""
    weights = load_file(run / "best" / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    classify = pipeline("audio-classification", model=str(run / "best"), top_k=None)
    said = classify({"array": np.zeros(8000, np.float32), "sampling_rate": 16_000})
    assert sum(item["score"] for item in said) == pytest.approx(1, abs=1e-5)


def test_what_a_checkpoint_does_not_fit_is_refused(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    knobs, run = knobs_of(2), tmp_path / "run"
    assert run_ranks(1, train_until, 1, config(shards, noisy, run, **knobs)) == [0]
    for other in ({"lora": "r=2"}, {"lora": None}):
        with pytest.raises(UserError, match=f"--lora: got {other['lora']}, expected {WORDS}, as "):
            train_on(1, config(shards, noisy, run, resume="auto", **(knobs | other)))
    train_on(1, config(shards, noisy, run, resume="auto", **knobs))
    assert read_metrics(run, "done")


def test_averages_of_adapters_are_exported_too(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    train_on(1, config(shards, noisy, tmp_path / "run", **knobs_of(2, ema_decay=0.5)))
    best, average = (
        load_file(tmp_path / "run" / name / "model.safetensors") for name in ("best", "best-ema")
    )
    assert best.keys() == average.keys()
    changed = {name for name, value in best.items() if not value.equal(average[name])}
    assert {name for name in changed if name.startswith("wav2vec2.")} == {
        f"wav2vec2.encoder.layers.{layer}.{name}.weight" for layer in (0, 1) for name in NAMES
    }


MERT_2 = {
    **{"model_type": "wav2vec2", "hidden_size": 1280, "num_hidden_layers": 32},
    **{"num_attention_heads": 16, "intermediate_size": 5120, "do_stable_layer_norm": True},
    **{"feat_extract_norm": "layer", "conv_bias": True, "mask_time_prob": 0.0},
}
"""A shape of 632 million parameters."""


def test_632_million_parameters_train_in_less_than_8_gib(tmp_path: Path) -> None:
    file = tmp_path / "mert-2.json"
    file.write_text(json.dumps(MERT_2))
    knobs = {"precision": "bf16-weights", "micro_batch": 1, "global_batch": 1, "lora": "r=16"}
    planned = of(file, tmp_path, world=1, freeze="feature_encoder", **knobs)
    every, trained = (sum(counts) for counts in zip(*planned.parts.values(), strict=True))
    assert every == pytest.approx(643e6, rel=0.02)
    head = 1280 * 256 + 256 + 256 * 10 + 10
    assert trained == 32 * 2 * 16 * (1280 + 1280) + head
    memory = planned.memory[2]
    assert memory.weights == 2 * every + 4 * trained
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    assert memory.all + planned.activation_bytes < 8 * 2**30
    assert planned.checkpoint_bytes == checkpoint_bytes(trained, trained) < 50e6
    whole = of(file, tmp_path, world=1, freeze="feature_encoder", **(knobs | {"lora": None}))
    assert whole.memory[2].all > 10 * 2**30


def test_flops_are_those_of_a_backward_pass(tiny_model: Path) -> None:
    settings: dict[str, Any] = {"frozen_layers": None, "activation_checkpointing": False}
    plain, adapted = (
        describe_main(
            str(tiny_model),
            ["a", "b", "c"],
            freeze="feature_encoder",
            segment_samples=8000,
            lora=lora,
            **settings,
        )
        for lora in (None, LORA)
    )
    ours, theirs = (flops.count(model, 8000) for model in (adapted, plain))
    frames, width, wide, rank = 24, 32, 64, 4
    more = 2 * frames * rank * (2 * width + width + wide)
    for layer in ("layer 0", "layer 1"):
        assert ours.parts[layer].forward == theirs.parts[layer].forward + more
    # the second layer: no gradient of weights, but that of adapters and of all inputs
    own = 4 * width**2 + 2 * width * wide
    gone = 2 * frames * own
    assert ours.parts["layer 1"].backward == theirs.parts["layer 1"].backward - gone + 2 * more
