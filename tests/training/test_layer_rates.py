"""Learning rates that fall from layer to layer, against AdamW with groups of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE_FLAVOUR, build_tiny, run_ranks, write_model
from harness import slow
from metrics import read_metrics
from torch import nn
from trainings import config, train_on

from mgc_dist import train
from mgc_dist.cluster import ranks
from mgc_dist.data.order import MicroBatch, Plan, lay_out, training_batches
from mgc_dist.errors import UserError
from mgc_dist.training.engine import Engine

PLAN = Plan(rows=9, total=34, global_batch=6, seed=1)  # 6 steps, the last one of 4 rows
LR, HEAD_LR, DECAY = 1e-3, 3e-3, 0.5
LAYERS = 4

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four layers."""
    file = tmp_path_factory.mktemp("model") / "deep.json"
    return write_model(file, num_hidden_layers=LAYERS)


def rate_of(name: str) -> float:
    """By the words of a user: the last layer has LR, each one below it half of the one above."""
    if "wav2vec2." not in name:
        return HEAD_LR
    if ".encoder.layer_norm." in name:
        return LR
    for layer in range(1, LAYERS + 1):
        if f".layers.{layer - 1}." in name:
            return LR * DECAY ** (LAYERS - layer)
    return LR * DECAY**LAYERS


def factor(step: int) -> float:
    return 1 - step / 10


def share_of(net: Any, micro: MicroBatch) -> torch.Tensor:
    """What the true rows of a micro batch add to the loss of their step."""
    rng = np.random.default_rng(0)
    wave = torch.from_numpy(rng.integers(-9000, 9000, (PLAN.rows, 8000)).astype(np.int16))
    label = torch.from_numpy(rng.integers(0, 3, PLAN.rows))
    rows, true = np.maximum(micro.place, 0), torch.from_numpy(micro.place >= 0)
    losses = nn.functional.cross_entropy(net(wave[rows]), label[rows], reduction="none")
    return (losses * true).sum() / PLAN.true_rows(micro.step)


def reference(file: Path) -> Weights:
    """A plain loop: AdamW with a group for each weight."""
    net = build_tiny(file).train()
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": rate_of(name)} for name, p in named], weight_decay=0.1
    )
    alone = lay_out(global_batch=6, world=1, largest_micro_batch=2)
    for micro in training_batches(PLAN, alone, 0, 0):
        share_of(net, micro).backward()
        if micro.micro_step == alone.accumulation - 1:
            for group, (name, _) in zip(optimizer.param_groups, named, strict=True):
                group["lr"] = rate_of(name) * factor(micro.step)
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().numpy() for name, p in net.named_parameters()}


def through(file: Path, stage: int, first: int, end: int, folder: Path, reshape: bool) -> Weights:
    """Train steps by the engine, from a checkpoint if the first one is not 0, and save."""
    with ranks.join("cpu") as peers:
        layout = lay_out(global_batch=6, world=peers.world, largest_micro_batch=2)
        engine = Engine(
            build_tiny(file),
            layout,
            peers,
            zero_stage=stage,
            bf16=False,
            lr=LR,
            head_lr=HEAD_LR,
            weight_decay=0.1,
            clip_norm=1e9,
            bucket_elements=3000,
            layer_lr_decay=DECAY,
        )
        if first:
            engine.state.all_load(folder / f"step-{first}", reshape=reshape)
        engine.train(True)
        for micro in training_batches(PLAN, layout, peers.rank, first):
            if micro.step < end:
                engine.set_lr(factor(micro.step))
                engine.backward(share_of(engine, micro))
                assert engine.step()
        engine.state.save(folder, f"step-{end}", {})
        peers.barrier()
        return {name: value.numpy() for name, value in engine.state.all_weights().items()}


def refuse_far(found: Weights, expected: Weights) -> None:
    for name, value in expected.items():
        if "k_proj.bias" not in name:  # its true gradient is zero: Adam follows its noise
            assert np.abs(found[name] - value).max() < 2e-5, name


@pytest.mark.parametrize("stage", [0, slow(1), 2, 3])
def test_rates_by_layer_follow_plain_adamw_through_stops(
    stage: int, deep: Path, tmp_path: Path
) -> None:
    whole = run_ranks(2, through, deep, stage, 0, 6, tmp_path, False)[0]
    refuse_far(whole, reference(deep))
    run_ranks(2, through, deep, stage, 0, 3, tmp_path, False)
    same = run_ranks(2, through, deep, stage, 3, 6, tmp_path, False)[0]
    assert all((same[name] == value).all() for name, value in whole.items())
    other = run_ranks(1, through, deep, stage, 3, 6, tmp_path, True)[0]
    refuse_far(other, whole)


@pytest.mark.parametrize("flavour", [{}, BASE_FLAVOUR])
def test_every_weight_of_the_backbone_has_its_place(
    flavour: dict[str, Any], tmp_path: Path
) -> None:
    model = build_tiny(write_model(tmp_path / "two.json", **flavour))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)].removeprefix("net.wav2vec2."): above
        for above, parameters in model.backbone_by_layer().items()
        for p in parameters
    }
    assert len(found) == len(model.head_and_backbone()[1])
    assert list(model.backbone_by_layer()) == [2, 1, 0]
    last = {name for name, above in found.items() if above == 0}
    norm = {"encoder.layer_norm.weight", "encoder.layer_norm.bias"}
    assert norm <= last or flavour, "the norm of the large flavour stands above the layers"
    assert {name for name in last - norm if not name.startswith("encoder.layers.1.")} == set()
    below = {name.split(".")[0] for name, above in found.items() if above == 2}
    assert below == {"feature_extractor", "feature_projection", "encoder"}
    assert all(found[n] == 2 for n in found if "pos_conv" in n or (flavour and n in norm))


def test_a_run_tells_its_rates_and_refuses_others(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = config(shards, tiny_model, run, layer_lr_decay=0.5, epochs=20 / 66)
    train_on(1, settings)
    lines = read_metrics(run, "step")
    assert [line["head_lr"] / line["lr"] for line in lines] == pytest.approx([3.0, 3.0])
    log = (run / "train.log").read_text()
    assert "0.003 of the head, 0.001 of the last layer, down to 0.00025" in log
    other = replace(
        settings,
        optim=replace(settings.optim, layer_lr_decay=1.0),
        output=replace(settings.output, resume="auto"),
    )
    with pytest.raises(UserError, match=r"--layer-lr-decay: got 1.0, expected 0.5") as error:
        train_on(1, other)
    assert "--change" not in str(error.value), "the optimizer's state has other groups"


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_model_without_layers_is_refused(dry_run: bool, shards: Path, tmp_path: Path) -> None:
    settings = config(shards, Path("logmel-cnn"), tmp_path / "run", layer_lr_decay=0.5, loss="ce")
    settings = replace(settings, output=replace(settings.output, dry_run=dry_run))
    with pytest.raises(UserError, match=r"got a model without encoder layers, .*\n  use --l"):
        run_ranks(1, train.run, settings)
