"""ZeRO 0 to 3 against plain autograd in one process: both flavours, all freeze modes, fp32, bf16.

The reference is torch alone: AdamW with two groups, clip_grad_norm_, the mean over true rows.
Global batch 6 on 2 ranks with micro batches of 2 makes 8 slots: padding, accumulation 2.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE_FLAVOUR, build_tiny, run_ranks, write_model
from harness import slow
from torch import Tensor, nn

from mgc_dist.cluster import ranks
from mgc_dist.config import EngineConfig, LossConfig
from mgc_dist.data.order import Plan, lay_out, training_batches
from mgc_dist.errors import UserError
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.models.folder import save_exported
from mgc_dist.training.engine import Engine, lr_factor
from mgc_dist.training.losses import masked_sum, row_losses
from mgc_dist.training.meters import CENSUS_STEPS, Census

PLAN = Plan(rows=9, total=34, global_batch=6, seed=1)  # 6 steps, the last one of 4 rows
LR, HEAD_LR, CLIP = 1e-3, 3e-3, 0.1
CASES = [
    (flavour, freeze, checkpointing)
    for flavour in ("large", "base")
    for freeze in ("none", "feature_encoder", "layers:1", "backbone")
    for checkpointing in ((False, True) if freeze in ("none", "layers:1") else (False,))
]

Trajectory = tuple[list[float], dict[str, np.ndarray], list[float]]


def models(folder: Path) -> dict[str, Path]:
    large = write_model(folder / "large.json")
    return {"large": large, "base": write_model(folder / "base.json", **BASE_FLAVOUR)}


def build(file: Path, freeze: str, checkpointing: bool) -> WaveClassifier:
    layers = 1 if freeze == "layers:1" else None
    return build_tiny(
        file, freeze=freeze, frozen_layers=layers, activation_checkpointing=checkpointing
    )


def drawn() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    wave = torch.from_numpy(rng.integers(-9000, 9000, (PLAN.rows, 8000)).astype(np.int16))
    return wave, torch.from_numpy(rng.integers(0, 3, PLAN.rows))


def factor(step: int) -> float:
    return lr_factor(PLAN.seen_after(step), PLAN.total, warmup=0.3, final=0.1)


def reference(file: Path, freeze: str, device: str = "cpu") -> Trajectory:
    return followed(build(file, freeze, False), device)


def followed(model: WaveClassifier, device: str = "cpu") -> Trajectory:
    """Losses, gradients of the first step before clipping, and norms, by torch alone."""
    net, (wave, label) = model.to(device).train(), drawn()
    wave, label = wave.to(device), label.to(device)
    head, backbone = net.head_and_backbone()
    groups = [{"params": p, "lr": lr} for p, lr in ((backbone, LR), (head, HEAD_LR)) if p]
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    losses, norms, first = [], [], {}
    for step in range(PLAN.steps):
        places = PLAN.places(np.arange(step * 6, PLAN.seen_after(step)))
        loss = nn.functional.cross_entropy(net(wave[places]), label[places])
        optimizer.zero_grad()
        loss.backward()
        trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        if step == 0:
            first = {name: p.grad.cpu().numpy().copy() for name, p in trained}
        norms.append(float(nn.utils.clip_grad_norm_([p for _, p in trained], CLIP)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, first, norms


def make_engine(
    model: WaveClassifier,
    peers: ranks.Ranks,
    stage: int,
    bf16: bool,
    compiled: bool = False,
    **settings: Any,
) -> Engine:
    return Engine(
        model.to(peers.device),
        lay_out(global_batch=6, world=peers.world, largest_micro_batch=2),
        peers,
        zero_stage=stage,
        bf16=bf16,
        lr=LR,
        head_lr=HEAD_LR,
        weight_decay=0.01,
        clip_norm=CLIP,
        bucket_elements=3000,
        compile_model=compiled,
        **settings,
    )


def trajectory(
    model: WaveClassifier,
    peers: ranks.Ranks,
    stage: int,
    bf16: bool,
    compiled: bool = False,
    **settings: Any,
) -> Trajectory:
    """The same through DeepSpeed, on all ranks."""
    engine, (wave, label) = make_engine(model, peers, stage, bf16, compiled, **settings), drawn()
    wave, label = wave.to(peers.device), label.to(peers.device)
    engine.train(True)
    layout = lay_out(global_batch=6, world=peers.world, largest_micro_batch=2)
    losses, norms, first = [0.0] * PLAN.steps, [], {}
    for micro in training_batches(PLAN, layout, peers.rank, 0):
        engine.set_lr(factor(micro.step))
        true = torch.from_numpy(micro.place >= 0).to(peers.device)
        rows = torch.from_numpy(np.maximum(micro.place, 0))
        found = row_losses(LossConfig(loss="ce"), engine(wave[rows]), label[rows])
        share = masked_sum(found, true.float()) / PLAN.true_rows(micro.step)
        engine.backward(share)
        losses[micro.step] += share.item()
        if micro.micro_step == layout.accumulation - 1:
            if micro.step == 0:
                grads = engine.all_grads()
                first = {n: g.detach().float().cpu().numpy().copy() for n, g in grads}
            assert engine.step()
            norms.append(engine.grad_norm() or 0.0)
        else:
            engine.step()
    return peers.all_sum(torch.tensor(losses, dtype=torch.float64)).tolist(), first, norms


def trajectories(files: dict[str, Path], stage: int, bf16: bool) -> list[Trajectory]:
    with ranks.join("cpu") as peers:
        cases = CASES[::3] if bf16 else CASES
        return [trajectory(build(files[f], z, c), peers, stage, bf16) for f, z, c in cases]


@pytest.mark.parametrize("world", [slow(1), 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_follows_plain_autograd(stage: int, world: int, tmp_path: Path) -> None:
    files = models(tmp_path)
    found = run_ranks(world, trajectories, files, stage, False)[0]
    for (flavour, freeze, _), (losses, grads, norms) in zip(CASES, found, strict=True):
        expected, first, steep = reference(files[flavour], freeze)
        assert max(steep) > CLIP, "the clipping bites"
        assert losses == pytest.approx(expected, abs=2e-6), (flavour, freeze)
        assert norms == pytest.approx(steep, rel=1e-4, abs=1e-6)
        assert grads.keys() == first.keys()
        for name, grad in first.items():
            np.testing.assert_allclose(grads[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autocast_follows_at_every_stage(stage: int, tmp_path: Path) -> None:
    # bf16.enabled would start Adam at its second step at stage 0 (0.744 x the first update);
    # autocast keeps float32 weights, and does not
    files = models(tmp_path)
    found = run_ranks(2, trajectories, files, stage, True)[0]
    for (flavour, freeze, _), (losses, _, _) in zip(CASES[::3], found, strict=True):
        assert losses == pytest.approx(reference(files[flavour], freeze)[0], abs=0.02)


@pytest.mark.parametrize("flavour", ["large", "base"])
@pytest.mark.parametrize("freeze", ["feature_encoder", "layers:1", "backbone"])
def test_frozen_parts_are_still_and_out_of_the_backward_pass(
    flavour: str, freeze: str, tmp_path: Path
) -> None:
    model = build(models(tmp_path)[flavour], freeze, False).train()
    assert model.net.config.layerdrop == 0.0
    frozen = [m for m in model._frozen for m in m.modules()]
    assert not any(module.training for module in frozen)
    assert model.training
    seen = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        tensors = list(output.values()) if isinstance(output, dict) else output
        tensors = tensors if isinstance(tensors, list | tuple) else (tensors,)
        seen.extend(t.requires_grad for t in tensors if isinstance(t, Tensor))

    handles = [module.register_forward_hook(note) for module in model._frozen]
    model(torch.zeros((2, 8000), dtype=torch.int16)).sum().backward()
    for handle in handles:
        handle.remove()
    assert seen
    assert not any(seen)


def exported(file: Path, stage: int, folder: Path) -> tuple[np.ndarray, bool, bool]:
    """Live logits after two steps; whether DeepSpeed's own tool and the start agree."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with ranks.join("cpu") as peers:
        model = build(file, "layers:1", False)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        engine, (wave, label) = make_engine(model, peers, stage, False), drawn()
        engine.train(True)
        engine.set_lr(1.0)
        for _ in range(2 * (3 if peers.world == 1 else 2)):
            loss = nn.functional.cross_entropy(engine(wave[:2]), label[:2], reduction="sum")
            engine.backward(loss / 6)
            engine.step()
        engine.train(False)
        with torch.no_grad():
            logits = engine(wave)
        weights = engine.state.all_weights()
        engine.state.save(folder, "step", {})
        peers.barrier()
        if not peers.is_first:
            return logits.numpy(), True, True
        save_exported(model, weights, folder / "model", 16_000)
        same = True
        if stage > 0:
            theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder), "step")
            same = all(
                bool(theirs[name].equal(value))
                for name, value in weights.items()
                if stage > 1 or name not in before
            )  # DeepSpeed leaves those out at stage 1
        return logits.numpy(), same, all(weights[n].equal(v) for n, v in before.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_export_is_the_live_model(stage: int, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForAudioClassification, pipeline

    from mgc_dist.encoders.hub import normalise

    logits, same, frozen_kept = run_ranks(2, exported, tiny_model, stage, tmp_path)[0]
    assert same, "DeepSpeed's zero_to_fp32 reads the same weights from our checkpoint"
    assert frozen_kept
    wave, _ = drawn()
    net = AutoModelForAudioClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        found = net(normalise(wave)).logits.numpy()
    assert np.abs(found - logits).max() == 0.0
    classify = pipeline("audio-classification", model=str(tmp_path / "model"), top_k=None)
    said = classify({"array": wave[0].numpy() / 32768.0, "sampling_rate": 16_000})
    expected = torch.softmax(torch.from_numpy(logits[0]), 0)
    by_name = {entry["label"]: entry["score"] for entry in said}
    for label, name in enumerate(("a", "b", "c")):
        assert by_name[name] == pytest.approx(float(expected[label]), abs=1e-5)


def between_steps(file: Path, stage: int, exports: bool) -> tuple[list[float], bool]:
    """Losses under autocast; whether what was exported between steps was all float32."""
    with ranks.join("cpu") as peers:
        engine, (wave, label) = (
            make_engine(build(file, "layers:1", False), peers, stage, True),
            drawn(),
        )
        losses, rounded = [], False
        for _ in range(4):
            engine.train(True)
            engine.set_lr(1.0)
            for _ in range(2):
                loss = nn.functional.cross_entropy(engine(wave[:2]), label[:2], reduction="sum")
                engine.backward(loss / 6)
                engine.step()
            losses.append(loss.item())
            for _ in range(2 * exports):
                engine.train(False)
                with torch.no_grad():
                    engine(wave)
                weight = engine.state.all_weights().get("net.projector.weight")
                rounded |= weight is not None and weight.bfloat16().float().equal(weight)
        return losses, rounded


def test_a_second_export_before_a_step_rounds_nothing(tiny_model: Path) -> None:
    # GatheredParameters let go of ZeRO-3's weights, and the next pass left them there in bf16
    found, rounded = run_ranks(2, between_steps, tiny_model, 3, True)[0]
    assert not rounded
    assert found == run_ranks(2, between_steps, tiny_model, 3, False)[0][0]


def grads_of(model: WaveClassifier) -> Iterator[tuple[str, Tensor]]:
    wave, label = drawn()
    nn.functional.cross_entropy(model.train()(wave), label).backward()
    return ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)


def test_the_census_is_silent_when_all_learn(tiny_model: Path) -> None:
    model = build(tiny_model, "feature_encoder", False)
    census = Census(model)
    grads = [
        (name, torch.zeros_like(grad) if name.endswith("k_proj.bias") else grad)
        for name, grad in grads_of(model)
    ]
    census.add(grads)
    assert not census.is_open


def test_the_census_names_what_gets_no_gradient(tiny_model: Path) -> None:
    model = build(tiny_model, "none", False)
    model.net.forgotten = nn.Linear(3, 3)
    census, grads = Census(model), list(grads_of(model))
    for _ in range(CENSUS_STEPS - 1):
        census.add(grads)
    assert census.is_open
    with pytest.raises(UserError, match=r"no gradient for 2, such as net\.forgotten\.bias"):
        census.add(grads)


def test_a_step_that_is_not_finite_tells_the_census_nothing(tiny_model: Path) -> None:
    model = build(tiny_model, "none", False)
    model.net.forgotten = nn.Linear(3, 3)
    census, grads = Census(model), list(grads_of(model))
    for _ in range(2 * CENSUS_STEPS):
        census.add([*grads[:-1], (grads[-1][0], grads[-1][1] / 0)])
    for _ in range(CENSUS_STEPS - 1):
        census.add(grads)
    with pytest.raises(UserError, match="no gradient for 2"):
        census.add(grads)


def test_the_census_refuses_gradients_of_frozen_parameters(tiny_model: Path) -> None:
    model = build(tiny_model, "none", False)
    census, grads = Census(model), list(grads_of(model))
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(UserError, match="a gradient for the frozen net"):
        census.add(grads)


def test_compile_with_stage_3_is_refused() -> None:
    with pytest.raises(UserError, match="ZeRO-3 loses nearly all gradients"):
        EngineConfig(zero_stage=3, compile=True)
    assert EngineConfig(zero_stage=2, compile=True).compile
