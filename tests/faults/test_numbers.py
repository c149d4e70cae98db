"""Fault 11: losses and gradients that are not finite, at every stage, in fp32 and autocast."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks
from harness import Patch, assert_survived, losses_of, slow, start
from metrics import read_metrics
from safetensors.torch import load_file
from trainings import config

from mgc_dist import train
from mgc_dist.config import TrainConfig
from mgc_dist.data.reader import ShardSet
from mgc_dist.journal import read_status
from mgc_dist.training import loop, losses


def poisoned(first: int, last: int, *, kind: str = "loss") -> Patch:
    """NaN in one row of rank 1 in the steps first to last (from 1)."""

    def patch(rank: int) -> None:
        if rank != 1:
            return
        if kind == "loss":
            losses_of_rows = losses.row_losses

            def bad(*args: Any, **kwargs: Any) -> torch.Tensor:
                losses: torch.Tensor = losses_of_rows(*args, **kwargs)
                if first <= current[0] + 1 <= last:
                    losses = losses * torch.tensor([float("nan")] + [1.0] * (len(losses) - 1))
                return losses

            losses.row_losses = bad
        else:
            mask = losses.masked_sum

            def steep(*args: Any) -> torch.Tensor:  # a finite loss with an infinite gradient
                total = mask(*args)
                if first <= current[0] + 1 <= last:
                    total = total + torch.sqrt(total - total.detach())
                return total

            losses.masked_sum = steep
        forward = loop.forward
        current = [0]

        def counting(run: Any, batch: Any, meter: Any) -> Any:
            current[0] = batch.plan.step
            return forward(run, batch, meter)

        loop.forward = counting

    return patch


def test_a_run_that_meets_too_many_ends_and_goes_on_later(
    shards: Path, noisy: Path, undisturbed: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = {"checkpoint_every_epochs": 0.6, "resume": "auto"}  # steps 4, 8, 12
    job = start(config(shards, noisy, run, **knobs), tmp_path, patch=poisoned(5, 99))
    job.wait()
    status = read_status(run)
    assert (status["state"], status["exit_code"]) == ("failed", 70)
    assert not (run / "REQUEUE").exists()
    names = [path.name for path in (run / "checkpoints").glob("step-*")]
    assert names == ["step-00000004"], "none of a streak that ended the run"
    with ShardSet(shards) as opened:
        ids = [track.id for track in opened.manifest.tracks]
    refused = read_metrics(run, "refused")
    assert [line["step"] for line in refused] == [5, 6, 7]
    assert any(name in str(refused[0]["reason"]) for name in ids), "the segment is named"
    again = start(config(shards, noisy, run, **knobs), tmp_path)
    assert again.wait() == [0, 0], again.said
    assert_survived(job, run, undisturbed, codes=[70, 70], message="3 in a row are too many")


def train_poisoned(settings: TrainConfig, kind: str) -> None:
    import os

    poisoned(4, 5, kind=kind)(int(os.environ["RANK"]))
    train.run(settings)


@pytest.mark.parametrize("precision", ["fp32", slow("bf16")])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_is_refused_on_all_ranks_at_every_stage(
    stage: int, precision: str, shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    kind = "gradient" if stage % 2 else "loss"
    knobs: dict[str, Any] = {"zero_stage": stage, "precision": precision, "epochs": 1.0}
    run_ranks(2, train_poisoned, config(shards, tiny_model, tmp_path / "run", **knobs), kind)
    lines = read_metrics(tmp_path / "run", "refused")
    assert [line["step"] for line in lines] == [4, 5]
    losses = losses_of(tmp_path / "run")
    assert all(np.isfinite(loss) for loss in losses[5:]), "the weights stayed finite"
    weights = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())
    if kind == "gradient":
        assert "with finite losses" in str(lines[0]["reason"])
    # what was refused left no trace: step 6 saw the weights that step 4 saw
    calm = config(shards, tiny_model, tmp_path / "calm", **knobs)
    run_ranks(2, train.run, calm)
    assert losses[:3] == losses_of(tmp_path / "calm")[:3]


def first_update_after_refusal(model: Path, stage: int) -> float:
    """Largest change of a weight in a refused step, at stage 0 the one that would apply it."""
    from conftest import build_tiny

    from mgc_dist.cluster import ranks
    from mgc_dist.data.order import lay_out
    from mgc_dist.training.engine import Engine

    with ranks.join("cpu") as peers:
        layout = lay_out(global_batch=4, world=peers.world, largest_micro_batch=2)
        engine = Engine(
            build_tiny(model),
            layout,
            peers,
            zero_stage=stage,
            bf16=False,
            lr=1e-3,
            head_lr=1e-3,
            weight_decay=0.1,
            clip_norm=1.0,
            bucket_elements=10_000,
        )
        engine.train(True)
        wave = torch.randint(-9000, 9000, (2, 8000), dtype=torch.int16)
        engine.backward(engine(wave).sum() / 4)
        assert engine.step()
        before = engine.state.all_weights()
        engine.backward(engine(wave).sum() * (float("inf") if peers.rank else 0.25))
        assert not engine.step()
        assert engine.grad_norm() is None
        after = engine.state.all_weights()
        return max((float((after[n] - before[n]).abs().max()) for n in before), default=0.0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_refused_step_changes_no_bit(stage: int, tiny_model: Path) -> None:
    assert run_ranks(2, first_update_after_refusal, tiny_model, stage) == [0.0, 0.0]
