"""Averages of the weights against a plain loop with AdamW, and through stops; dropout is on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NOISY, build_tiny, run_ranks, write_model
from harness import slow
from metrics import read_metrics
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from trainings import config, train_on, train_until

from mgc_dist import evaluate, export, train
from mgc_dist.cluster import ranks
from mgc_dist.cluster.ranks import seed_everything
from mgc_dist.config import EvaluateConfig, ExportConfig
from mgc_dist.data.order import MicroBatch, Plan, lay_out, training_batches
from mgc_dist.errors import UserError
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.report.dossier import Dossier
from mgc_dist.training.engine import Engine

PLAN = Plan(rows=9, total=34, global_batch=6, seed=1)  # 6 steps, the last one of 4 rows
LR, HEAD_LR, CLIP, DECAY = 1e-3, 3e-3, 0.1, 0.8

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with dropout."""
    drops = {name: value for name, value in NOISY.items() if name.endswith("dropout")}
    return write_model(tmp_path_factory.mktemp("model") / "dropping.json", **drops)


def drawn() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    wave = torch.from_numpy(rng.integers(-9000, 9000, (PLAN.rows, 8000)).astype(np.int16))
    return wave, torch.from_numpy(rng.integers(0, 3, PLAN.rows))


def share_of(net: Any, micro: MicroBatch) -> Tensor:
    """What the true rows of a micro batch add to the loss of its step, with its own dropout."""
    seed_everything(5, micro.step, micro.number)
    wave, label = drawn()
    rows, true = np.maximum(micro.place, 0), torch.from_numpy(micro.place >= 0)
    losses = nn.functional.cross_entropy(net(wave[rows]), label[rows], reduction="none")
    return (losses * true).sum() / PLAN.true_rows(micro.step)


def reference(file: Path) -> Weights:
    """The averages of a plain loop: AdamW, and torch's AveragedModel with a formula in float64."""
    net = build_tiny(file, freeze="feature_encoder").train()
    head, backbone = net.head_and_backbone()
    groups = [{"params": backbone, "lr": LR}, {"params": head, "lr": HEAD_LR}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    averaged = AveragedModel(
        net.net, avg_fn=lambda old, new, _: DECAY * old + (1 - DECAY) * new.double()
    ).double()
    averaged.n_averaged += 1  # it holds the first weights
    alone = lay_out(global_batch=6, world=1, largest_micro_batch=2)
    for micro in training_batches(PLAN, alone, 0, 0):
        share_of(net, micro).backward()
        if micro.micro_step == alone.accumulation - 1:
            nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], CLIP)
            optimizer.step()
            optimizer.zero_grad()
            averaged.update_parameters(net.net)
    return {f"net.{n}": p.detach().numpy() for n, p in averaged.module.named_parameters()}


def make_engine(model: WaveClassifier, peers: ranks.Ranks, stage: int, **changes: Any) -> Engine:
    settings: dict[str, Any] = {"bf16": False, "ema_decay": DECAY} | changes
    return Engine(
        model,
        lay_out(global_batch=6, world=peers.world, largest_micro_batch=2),
        peers,
        zero_stage=stage,
        lr=LR,
        head_lr=HEAD_LR,
        weight_decay=0.01,
        clip_norm=CLIP,
        bucket_elements=3000,
        **settings,
    )


def steps_of(engine: Engine, first: int, end: int) -> None:
    """Train from a step up to another one."""
    engine.train(True)
    peers = engine.ranks
    layout = lay_out(global_batch=6, world=peers.world, largest_micro_batch=2)
    for micro in training_batches(PLAN, layout, peers.rank, first):
        if micro.step == end:
            return
        engine.set_lr(1.0)
        engine.backward(share_of(engine, micro))
        assert engine.step()


def held(engine: Engine) -> tuple[Weights, Weights]:
    """Raw and averaged weights; a validation between them changes neither."""
    raw = engine.state.all_weights()
    engine.train(False)
    before = logits(engine)
    with engine.all_averaged():
        averaged = engine.state.all_weights()
        between = logits(engine)
    assert not before.equal(between), "the averages are computed with"
    assert logits(engine).equal(before)
    after = engine.state.all_weights()
    assert all(raw[name].equal(after[name]) for name in raw)
    return {n: v.numpy() for n, v in raw.items()}, {n: v.numpy() for n, v in averaged.items()}


def logits(engine: Engine) -> Tensor:
    with torch.no_grad():
        return engine(drawn()[0])


def undisturbed(file: Path, stage: int, changes: dict[str, Any]) -> list[tuple[Weights, Weights]]:
    """Raw and averaged weights at the start and after each step."""
    with ranks.join("cpu") as peers:
        engine = make_engine(build_tiny(file, freeze="feature_encoder"), peers, stage, **changes)
        first = {name: value.numpy() for name, value in engine.state.all_weights().items()}
        found = [(first, first)]
        for step in range(PLAN.steps):
            steps_of(engine, step, step + 1)
            found.append(held(engine))
        return found


def stopped(file: Path, stage: int, changes: dict[str, Any], folder: Path) -> None:
    """Train three steps, and save."""
    with ranks.join("cpu") as peers:
        engine = make_engine(build_tiny(file, freeze="feature_encoder"), peers, stage, **changes)
        steps_of(engine, 0, 3)
        engine.state.save(folder, "three", {})
        peers.barrier()


def resumed(
    file: Path, stage: int, changes: dict[str, Any], folder: Path, reshape: bool
) -> tuple[Weights, Weights]:
    """Go on from three steps, with a model that began with other weights."""
    with ranks.join("cpu") as peers:
        model = build_tiny(file, freeze="feature_encoder", seed=0 if reshape else 1)
        engine = make_engine(model, peers, stage, **changes)
        engine.state.all_load(folder / "three", reshape=reshape)
        steps_of(engine, 3, PLAN.steps)
        return held(engine)


def refuse_far(found: Weights, expected: Weights, most: float) -> None:
    for name, value in expected.items():
        if "k_proj.bias" not in name:  # its true gradient is zero: Adam follows its noise
            assert np.abs(found[name] - value).max() < most, name


def refuse_other_formula(steps: list[tuple[Weights, Weights]], most: float) -> None:
    """The averages are those of the raw weights in float64, step by step."""
    expected = {name: value.astype(np.float64) for name, value in steps[0][1].items()}
    for raw, averaged in steps[1:]:
        expected = {n: DECAY * v + (1 - DECAY) * raw[n] for n, v in expected.items()}
        refuse_far(averaged, expected, most)


@pytest.mark.parametrize(
    ("stage", "world"),
    [(0, 2), (2, 1), (2, 2), (3, 2), *(slow(*case) for case in ((0, 1), (1, 1), (1, 2), (3, 1)))],
)
def test_averages_follow_a_plain_loop(stage: int, world: int, dropping: Path) -> None:
    found = run_ranks(world, undisturbed, dropping, stage, {})[0]
    refuse_other_formula(found, 3e-7)
    moved = [name for name, value in found[-1][0].items() if (value != found[0][0][name]).any()]
    assert len(moved) > 30
    refuse_far(found[-1][1], reference(dropping), 2e-5)


@pytest.mark.parametrize("stage", [0, slow(1), 2, 3])
def test_averages_go_on_to_the_bit_and_on_other_ranks_to_rounding(
    stage: int, dropping: Path, tmp_path: Path
) -> None:
    whole = run_ranks(2, undisturbed, dropping, stage, {})[0][-1]
    run_ranks(2, stopped, dropping, stage, {}, tmp_path)
    for found, expected in zip(
        run_ranks(2, resumed, dropping, stage, {}, tmp_path, False)[0], whole, strict=True
    ):
        assert all((found[name] == value).all() for name, value in expected.items())
    carried = run_ranks(3, resumed, dropping, stage, {}, tmp_path, True)[0]
    refuse_far(carried[0], whole[0], 2e-5)
    refuse_far(carried[1], whole[1], 2e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_averages_of_bf16_weights_are_those_of_the_float32_copies(
    stage: int, dropping: Path, tmp_path: Path
) -> None:
    changes = {"bf16_weights": True}
    whole = run_ranks(2, undisturbed, dropping, stage, changes)[0]
    refuse_other_formula(whole, 3e-6)
    run_ranks(2, stopped, dropping, stage, changes, tmp_path)
    again = run_ranks(2, resumed, dropping, stage, changes, tmp_path, False)[0]
    assert all((again[1][name] == value).all() for name, value in whole[-1][1].items())


def test_a_run_validates_and_exports_both_and_goes_on_to_the_bit(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    knobs: dict[str, Any] = {"epochs": 1.0, "validate_every_epochs": 0.5, "lr": 3e-3}
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    train_on(1, config(shards, noisy, plain, **knobs))
    train_on(1, config(shards, noisy, whole, ema_decay=0.7, **knobs))
    assert weights_of(whole / "best") == weights_of(plain / "best"), "it changes no training"
    assert weights_of(whole / "best-ema") != weights_of(whole / "best")
    assert not (plain / "best-ema").exists()

    settings = config(shards, noisy, parts, ema_decay=0.7, **knobs)
    assert run_ranks(1, train_until, 2, settings) == [0]
    other = config(shards, noisy, parts, ema_decay=0.8, resume="auto", **knobs)
    with pytest.raises(UserError, match=r"--ema-decay: got 0.8, expected 0.7"):
        run_ranks(1, train.run, other)
    train_on(1, config(shards, noisy, parts, ema_decay=0.7, resume="auto", **knobs))
    for name in ("best", "best-ema"):
        assert weights_of(parts / name) == weights_of(whole / name)
    ours, theirs = (read_metrics(run, "ema_validation") for run in (parts, whole))
    assert [line["track_nll"] for line in ours] == [line["track_nll"] for line in theirs]

    told = [line["track_nll"] for line in theirs if line["exported"]][-1]
    ask = EvaluateConfig(run=whole, split="validation", ema=True)
    run_ranks(1, evaluate.run, ask)
    found = json.loads((whole / "evaluation" / "validation-ema.json").read_text())
    figures = found["temperature"]["without"] if found["temperature"] else found["track"]
    assert figures["nll"] == pytest.approx(told, rel=1e-5)
    assert set(Dossier(whole).evaluations) == {"validation-ema"}, "it is not outdated"
    export.run(ExportConfig(run=whole, out=tmp_path / "out", ema=True))
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"--ema with .*plain: got no best-ema/ there"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=plain, ema=True))


def test_averages_begin_and_end_where_it_is_allowed(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run, knobs = tmp_path / "run", {"change": ("ema-decay",)}
    assert run_ranks(1, train_until, 2, config(shards, tiny_model, run)) == [0]
    settings = config(shards, tiny_model, run, resume="auto", ema_decay=0.5, **knobs)
    assert run_ranks(1, train_until, 6, settings) == [0]
    assert list(run.glob("checkpoints/*/average-00000.pt"))
    train_on(1, config(shards, tiny_model, run, resume="auto", **knobs))
    assert len(read_metrics(run, "ema_validation")) == 1, "at the end there was no average"


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
