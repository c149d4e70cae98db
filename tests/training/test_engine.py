"""Gradients through DeepSpeed against plain autograd; the schedule; full weights."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny, run_ranks

from mgc_dist.cluster import ranks
from mgc_dist.config import LossConfig
from mgc_dist.data.order import Plan, lay_out, training_batches
from mgc_dist.errors import UserError
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.training.engine import Engine, lr_factor
from mgc_dist.training.losses import masked_sum, row_losses

ROWS = 7  # true rows of the one step; global batch 8


def classifier(tiny_model: Path) -> WaveClassifier:
    return build_tiny(tiny_model, freeze="feature_encoder")


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    wave = torch.from_numpy(rng.integers(-9000, 9000, (ROWS, 8000)).astype(np.int16))
    return wave, torch.from_numpy(rng.integers(0, 3, ROWS))


def micro_losses(net, label, wave, place):
    """Loss sum over the true rows of a micro batch, padding as zeros."""
    true = torch.from_numpy(place >= 0)
    logits = net(torch.where(true[:, None], wave[place], torch.zeros_like(wave[place])))
    losses = row_losses(LossConfig(loss="ce"), logits, label[place])
    return masked_sum(losses, true.float())


def step_of_engine(tiny_model: Path, stage: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """One SGD-like step: the weights after it tell the (unclipped) gradient."""
    wave, label = drawn()
    with ranks.join("cpu") as peers:
        layout = lay_out(global_batch=8, world=peers.world, largest_micro_batch=2)
        engine = Engine(
            classifier(tiny_model),
            layout,
            peers,
            zero_stage=stage,
            bf16=False,
            lr=1e-3,
            head_lr=2e-3,
            weight_decay=0.0,
            clip_norm=1e9,
            bucket_elements=1000,
        )
        engine.train(True)
        rates = engine.set_lr(0.5)
        plan = Plan(rows=ROWS, total=ROWS, global_batch=8, seed=0)
        for micro in training_batches(plan, layout, peers.rank, 0):
            total = micro_losses(engine, label, wave, micro.place)
            engine.backward(total / plan.true_rows(0))
            assert engine.step()
        weights = engine.state.all_weights()
        return {name: value.numpy() for name, value in weights.items()}, rates


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[str, np.ndarray]:
    """Weights after the same step by plain torch on the whole batch."""
    wave, label = drawn()
    net = classifier(tiny_model).train()
    head, backbone = net.head_and_backbone()
    groups = [{"params": backbone, "lr": 0.5e-3}, {"params": head, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    torch.nn.functional.cross_entropy(net(wave), label).backward()
    optimizer.step()
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_is_the_mean_over_true_rows_by_plain_autograd(
    stage: int, world: int, expected: dict[str, np.ndarray], tiny_model: Path
) -> None:
    # 7 rows in 8 (world 1) or 12 (world 3) slots: some ranks hold padding only
    found = run_ranks(world, step_of_engine, tiny_model, stage)
    weights, rates = found[0]
    assert rates == [0.5e-3, 1e-3]
    assert all(rest == {} for rest, _ in found[1:])
    assert set(weights) == set(expected)
    before = classifier(tiny_model).state_dict()
    for name, value in expected.items():
        # Adam's first step is lr * sign(gradient): compare where the gradient is not noise
        moved = np.abs(value - before[name].numpy()) > 0.49e-3
        assert np.abs(weights[name] - value)[moved].max(initial=0) < 2e-6, name
        if "k_proj.bias" not in name:  # its true gradient is zero
            assert np.abs(weights[name] - value).mean() < 1e-5, name
        if "feature_extractor" in name:
            assert (value == before[name].numpy()).all()


def started(tiny_model: Path, peers: ranks.Ranks) -> Engine:
    return Engine(
        classifier(tiny_model),
        lay_out(global_batch=8, world=peers.world, largest_micro_batch=2),
        peers,
        zero_stage=2,
        bf16=False,
        lr=1e-3,
        head_lr=1e-3,
        weight_decay=0.0,
        clip_norm=1.0,
        bucket_elements=1000,
    )


def test_deepspeed_takes_the_gpu_that_slurm_has_bound(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local rank 3 sees one GPU, number 0, as `device_of` says; number LOCAL_RANK is not there."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    class FoundDevice(Exception):
        pass

    def initialize(*, args: Any, **words: Any) -> None:
        bare = DeepSpeedEngine.__new__(DeepSpeedEngine)
        torch.nn.Module.__init__(bare)
        bare.local_rank = 3
        bare._set_distributed_vars(args)
        raise FoundDevice(taken)

    taken: list[int] = []
    accelerator = SimpleNamespace(set_device=taken.append, device_name=lambda n: f"cuda:{n}")
    monkeypatch.setattr("deepspeed.runtime.engine.get_accelerator", lambda: accelerator)
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda: 4)
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 3)
    fake = SimpleNamespace(initialize=initialize)
    monkeypatch.setattr("mgc_dist.training.engine._import_deepspeed", lambda peers: fake)
    peers = ranks.Ranks(rank=3, world=4, local_rank=3, device=torch.device("cuda", 0))
    with pytest.raises(FoundDevice):
        started(tiny_model, peers)
    assert taken == [0]


def test_another_device_than_that_of_the_first_training_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed asks for the device when it is imported, and keeps it."""
    taken = SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: taken)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match="got cpu, where DeepSpeed was imported for cuda"):
        started(tiny_model, ranks.Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu")))


def test_schedule_rises_linearly_and_follows_a_cosine() -> None:
    values = [lr_factor(n, 100, warmup=0.1, final=0.02) for n in range(1, 101)]
    assert values[4] == pytest.approx(0.5)
    assert max(values) == values[9] == pytest.approx(1.0)
    assert values[54] == pytest.approx(0.51)
    assert values[99] == pytest.approx(0.02)
    assert all(a >= b for a, b in pairwise(values[9:]))
    assert lr_factor(1, 100, warmup=0.0, final=0.0) == pytest.approx(1.0, abs=1e-3)
