"""A step's loss on any number of ranks against one process with plain torch."""

import json
import math
import tarfile
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny, run_ranks
from metrics import read_metrics
from torch import Tensor, nn
from trainings import config, losses, train_on

from mgc_dist import train
from mgc_dist.bias_model import table as tables
from mgc_dist.config import LossConfig
from mgc_dist.data.order import MicroBatch, Plan
from mgc_dist.data.reader import Batch, ShardSet
from mgc_dist.training.engine import lr_factor
from mgc_dist.training.losses import Objective

GLOBAL_BATCH = 10
CASES: dict[str, dict[str, Any]] = {
    "poe, annealed": {"loss": "poe", "beta": 0.2, "beta_end": 1.0},
    "learned-mixin": {"loss": "learned-mixin"},
    "learned-mixin-h": {"loss": "learned-mixin-h", "entropy_weight": 0.1},
    "reweight": {"loss": "reweight"},
    "reweight and ce": {"loss": "reweight", "ce_weight": 0.3},
    "dfl": {"loss": "dfl", "dfl_gamma": 1.5},
    "mixture and ce": {"loss": "mixture", "ce_weight": 0.5},
}


def settings_of(shards: Path, model: Path, run: Path, case: str, **changes: Any) -> Any:
    found = config(shards, model, run, **({"epochs": 38 / 66} | changes))
    return replace(found, objective=LossConfig(**CASES[case]))


def closed_form(case: str, z: Tensor, y: Tensor, b: Tensor, g: Tensor, beta: float) -> Tensor:
    """Loss of a whole global batch: log-probabilities b, gain g."""
    knobs = CASES[case]
    ce = F.cross_entropy(z, y, reduction="none")
    truth = b.gather(1, y[:, None])[:, 0].exp()
    if knobs["loss"] == "poe":
        main = F.cross_entropy(z + beta * b, y)
    elif knobs["loss"].startswith("learned"):
        q = F.softmax(g[:, None] * b, 1)
        entropy = -(q * F.log_softmax(g[:, None] * b, 1)).sum(1)
        main = F.cross_entropy(z + g[:, None] * b, y)
        main = main + knobs.get("entropy_weight", 0.0) * entropy.mean()
    elif knobs["loss"] == "reweight":
        main = ((1 - truth) * ce).sum() / (1 - truth).sum()
    elif knobs["loss"] == "dfl":
        main = ((1 - truth) ** knobs["dfl_gamma"] * ce).mean()
    else:
        main = -(0.9 * (-ce).exp() + 0.1 * truth).log().mean()
    return main + knobs.get("ce_weight", 0.0) * ce.mean()


def reference(shards: Path, table: Path, model: Path, case: str) -> list[float]:
    """Losses of the first four steps by torch alone: AdamW, clipping, the same schedule."""
    learns = CASES[case]["loss"].startswith("learned")
    with ShardSet(shards) as data:
        found = tables.read(table, data.manifest)
        first, stop = data.rows_of("train")
        genres = data.manifest.genres
        plan = Plan(rows=stop - first, total=38, global_batch=GLOBAL_BATCH, seed=0)
        net = build_tiny(model, genres, learns_gain=learns).train()
        head, backbone = net.head_and_backbone()
        groups = [{"params": backbone, "lr": 1e-3}, {"params": head, "lr": 3e-3}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        waves, total = waves_of(data), []
        for step in range(plan.steps):
            places = plan.places(np.arange(step * GLOBAL_BATCH, plan.seen_after(step))) + first
            x = torch.stack([torch.from_numpy(waves[row]) for row in places])
            y = torch.from_numpy(data.labels[places])
            b = torch.from_numpy(np.array(found.log_probability[places]))
            z, g = net(x, with_gain=True) if learns else (net(x), torch.ones(len(y)))
            beta = 0.2 + 0.8 * step / (plan.steps - 1)
            loss = closed_form(case, z, y, b, g, beta)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], 1.0)
            factor = lr_factor(plan.seen_after(step), plan.total, warmup=0.1, final=0.02)
            for group, peak in zip(optimizer.param_groups, (1e-3, 3e-3), strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            total.append(loss.item())
    return total


def waves_of(data: ShardSet) -> dict[int, np.ndarray]:
    """int16 [T] of each training row, read by Python's tarfile and wave."""
    found = {}
    for path in sorted(data.folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for about, audio in zip(members[::2], members[1::2], strict=True):
                row = json.load(tar.extractfile(about))["row"]
                with wave.open(tar.extractfile(audio)) as file:
                    found[row] = np.frombuffer(file.readframes(file.getnframes()), "<i2").copy()
    return found


@pytest.mark.parametrize(
    ("case", "stage"), [*((case, 2) for case in CASES), ("learned-mixin-h", 3), ("reweight", 0)]
)
def test_three_ranks_follow_one_process(
    case: str, stage: int, shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    # global batch 10 in 3 ranks x micro batch 2 x accumulation 2: padding; the last step has 8 rows
    knobs = {"micro_batch": 2, "zero_stage": stage}
    settings = settings_of(shards, tiny_model, tmp_path / "run", case, **knobs)
    train_on(3, settings)
    expected = reference(shards, table, tiny_model, case)
    assert len(expected) == 4
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=2e-5)


def test_beta_zero_is_ce_to_the_bit(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    found = []
    for name, choice in (("a", LossConfig(loss="ce")), ("b", LossConfig(loss="poe", beta=0.0))):
        settings = config(shards, tiny_model, tmp_path / name, epochs=38 / 66)
        run_ranks(1, train.run, replace(settings, objective=choice))
        found.append(losses(tmp_path / name))
    assert found[0] == found[1]


def test_the_journal_has_beta_and_the_mean_gain(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for case, key in (("poe, annealed", "beta"), ("learned-mixin", "mean_gain")):
        run = tmp_path / key
        train_on(1, settings_of(shards, tiny_model, run, case))
        values = [line[key] for line in read_metrics(run, "step")]
        assert len(values) == 4
        if key == "beta":
            assert values == pytest.approx([0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1.0])
        else:
            assert min(values) > 0
            assert len(set(values)) == 4, "it learns"


def test_rows_without_weight_give_no_gradient_and_are_told(
    shards: Path, table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ShardSet(shards) as data:
        found = tables.read(table, data.manifest)
        sure = np.full_like(found.log_probability, -100.0)
        sure[np.arange(len(sure)), data.labels] = 0.0
        first, stop = data.rows_of("train")
        plan = Plan(rows=stop - first, total=20, global_batch=10, seed=0)
        own = Objective(
            LossConfig(loss="reweight"), plan, data, replace(found, log_probability=sure)
        )
        assert own.divisor(1) == 0.0
        batch = Batch(
            plan=MicroBatch(
                step=1, micro_step=0, number=0, place=np.array([0, -1]), draw=np.zeros(2, np.int64)
            ),
            input=torch.zeros((2, 8), dtype=torch.int16),
            row=torch.tensor([first, -1]),
            label=torch.tensor([int(data.labels[first]), 0]),
            weight=torch.tensor([1.0, 0.0]),
            draw=torch.zeros(2, dtype=torch.int64),
        )
        z = torch.zeros((2, 3), requires_grad=True)
        loss = own.micro_loss(batch, z, None)
        loss.share.backward()
    assert loss.share.item() == 0.0
    assert z.grad is not None
    assert not z.grad.any()
    assert loss.rows.tolist() == pytest.approx([math.log(3)] * 2)
    assert "step 2: all rows have the weight 0" in caplog.text
