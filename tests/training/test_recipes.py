"""Schedules, label smoothing, class weights and patience, each against another implementation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks
from metrics import read_metrics
from sklearn.utils.class_weight import compute_class_weight
from trainings import config, losses, train_on
from transformers import get_scheduler

from mgc_dist import train
from mgc_dist.config import LossConfig, OptimConfig, RunConfig, TrainConfig
from mgc_dist.config.losses import LOSSES
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.journal import read_status
from mgc_dist.training.engine import lr_factor
from mgc_dist.training.losses import class_weights, row_losses

STEPS, WARMUP = 200, 20


@pytest.mark.parametrize(
    ("schedule", "name"),
    [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")],
)
def test_schedules_are_those_of_transformers(schedule: Any, name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    for step in range(1, STEPS):
        optimizer.step()
        theirs.step()
        ours = lr_factor(step, STEPS, warmup=WARMUP / STEPS, final=0.0, schedule=schedule)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)


def test_the_inverse_square_root_falls_from_the_end_of_the_warm_up() -> None:
    """Vaswani et al., eq. 3: min(step^-0.5, step warmup^-1.5), which is 1 at its peak here."""
    for step in range(1, STEPS + 1):
        ours = lr_factor(step, STEPS, warmup=WARMUP / STEPS, final=0, schedule="inverse-sqrt")
        theirs = min(step**-0.5, step * WARMUP**-1.5) * WARMUP**0.5
        assert ours == pytest.approx(theirs)
    with pytest.raises(UserError, match="--schedule inverse-sqrt: got --warmup-fraction 0"):
        OptimConfig(schedule="inverse-sqrt", warmup_fraction=0.0)


def test_smoothed_cross_entropy_is_that_of_torch() -> None:
    torch.manual_seed(0)
    logits, label = 5 * torch.randn(40, 7), torch.randint(7, (40,))
    found = row_losses(LossConfig(loss="ce", label_smoothing=0.2), logits, label)
    expected = F.cross_entropy(logits, label, label_smoothing=0.2, reduction="none")
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_smoothing_spreads_any_loss_over_the_labels(loss: Any) -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(6, 4), torch.randint(4, (6,))
    more: dict[str, Any] = {"bias": torch.randn(6, 4).log_softmax(1), "gain": torch.rand(6)}
    plain, smooth = LossConfig(loss=loss), LossConfig(loss=loss, label_smoothing=0.3)
    each = [row_losses(plain, logits, torch.full((6,), k), **more) for k in range(4)]
    expected = 0.7 * row_losses(plain, logits, label, **more) + 0.3 * torch.stack(each).mean(0)
    found = row_losses(smooth, logits, label, **more)
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-5)


def test_balanced_weights_are_those_of_scikit_learn(shards: Path, tmp_path: Path) -> None:
    with ShardSet(shards) as data:
        first, stop = data.rows_of("train")
        label, genres = data.labels[first:stop], data.manifest.genres
        found = class_weights("balanced", data)
        expected = compute_class_weight("balanced", classes=np.arange(len(genres)), y=label)
        assert found.numpy() == pytest.approx(expected)
        table = tmp_path / "w.csv"
        table.write_text("genre,weight\n" + "".join(f"{g},{n}\n" for n, g in enumerate(genres)))
        found = class_weights(str(table), data)
        assert float(found[torch.from_numpy(label)].mean()) == pytest.approx(1)
        assert (found / found[1]).tolist() == pytest.approx(list(range(len(genres))))
        table.write_text(f"genre,weight\n{genres[0]},1\n")
        with pytest.raises(UserError, match=rf"no weight of {genres[1]}"):
            class_weights(str(table), data)
        table.write_text(f"genre,weight\n{genres[0]},-1\n")
        with pytest.raises(UserError, match=r"line 2: got genre '\w+', weight '-1'"):
            class_weights(str(table), data)


def with_loss(settings: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(settings, objective=replace(settings.objective, **changes))


def test_weighted_and_smoothed_losses_do_not_depend_on_the_ranks(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "w.csv"
    weights.write_text("genre,weight\nblues,1\nclassical,2\ncountry,0.5\n")
    found = {}
    for world in (1, 3):
        settings = config(shards, noisy, tmp_path / str(world), epochs=0.6, loss="reweight")
        train_on(world, with_loss(settings, class_weight=str(weights), label_smoothing=0.1))
        found[world] = losses(tmp_path / str(world))
    assert found[3] == pytest.approx(found[1], rel=1e-5)
    other = config(shards, noisy, tmp_path / "1", epochs=0.6, loss="reweight", resume="auto")
    with pytest.raises(UserError, match=r"\(--class-weight\): got none, expected 0\.8\d+ 1\.7"):
        run_ranks(1, train.run, with_loss(other, label_smoothing=0.1))


def test_a_run_ends_when_validations_get_no_better(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    """With rates that undo what was learned; the best model stays, and the run is complete."""
    run = tmp_path / "run"
    knobs: dict[str, Any] = {
        "lr": 0.1,
        "head_lr": 1.0,
        "epochs": 40.0,
        "validate_every_epochs": 0.5,
    }
    settings = config(shards, noisy, run, **knobs)
    patient = replace(settings, output=replace(settings.output, patience=2))
    train_on(2, patient)
    told = [line["select_loss"] for line in read_metrics(run, "validation")]
    best = int(np.argmin(told))
    assert len(told) == best + 3
    assert (run / "DONE").exists()
    assert read_status(run)["samples_seen"] < 40 * 66
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert int(newest.name[5:]) == read_metrics(run, "step")[-1]["step"]
    train_on(1, replace(patient, output=replace(patient.output, resume="auto")))  # complete
    assert len(read_metrics(run, "validation")) == len(told)
    with pytest.raises(UserError, match="--patience with --select last"):
        RunConfig(patience=1, select="last")
