"""The whole training command on forked ranks: trajectories, resume, stop, refusals."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NOISY, build_tiny, run_ranks, write_model
from harness import slow, weights_hash
from metrics import read_metrics
from trainings import config, losses, train_on, train_until
from transformers import AutoConfig

from mgc_dist import evaluate, train
from mgc_dist.config import (
    EvaluateConfig,
    TrainConfig,
)
from mgc_dist.errors import PeerLost, UserError
from mgc_dist.journal import read_status
from mgc_dist.models import flops
from mgc_dist.models.folder import load_exported
from mgc_dist.scoring.score import judge
from mgc_dist.training import checkpoint, keeper, logbook, loop, run_folder
from mgc_dist.training.engine import Engine
from mgc_dist.training.resume import State


@pytest.fixture(scope="module")
def reference(shards: Path, table: Path, tiny_model: Path, tmp_path_factory: Any) -> list[float]:
    """Losses of one rank at ZeRO-0."""
    run = tmp_path_factory.mktemp("reference") / "run"
    train_on(1, config(shards, tiny_model, run, zero_stage=0))
    found = losses(run)
    assert len(found) == 13
    assert found[-1] != pytest.approx(found[0], abs=1e-3), "nothing was learned"
    return found


@pytest.mark.parametrize("world", [slow(1), slow(2), 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_trajectories_agree_over_stages_and_ranks(
    stage: int, world: int, reference: list[float], shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    # global batch 10 is not divisible by 3, and the last step holds 8 rows
    train_on(world, config(shards, tiny_model, tmp_path / "run", zero_stage=stage))
    assert losses(tmp_path / "run") == pytest.approx(reference, abs=1e-5)
    assert read_status(tmp_path / "run")["state"] == "done"


@pytest.mark.parametrize("peak", [None, 0.01])
def test_speed_is_told_in_the_models_own_work(
    peak: float | None,
    shards: Path,
    table: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if peak:  # a CPU has none in the table
        monkeypatch.setattr(logbook, "peak_tflop_per_s", lambda device: peak)
    run = tmp_path / "run"
    knobs = {"zero_stage": 3, "epochs": 0.6, "freeze": "layers:1"}
    train_on(2, config(shards, tiny_model, run, **knobs))
    of_segment = flops.count(build_tiny(tiny_model, freeze="layers:1", frozen_layers=1), 8000)
    assert of_segment is not None
    steps = read_metrics(run, "step")
    assert len(steps) == 4
    for step in steps:
        reached = of_segment.training * step["segments_per_s"] / 2 / 1e12
        assert step["model_tflop_per_s"] == pytest.approx(reached, rel=1e-2)
        assert step["step_s"] * step["segments_per_s"] == pytest.approx(10, rel=1e-2)
        assert ("mfu" in step) == bool(peak)
        if peak:
            assert step["mfu"] == pytest.approx(reached / peak, abs=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_autocast_follows_and_keeps_float32_weights(
    stage: int, reference: list[float], shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run = tmp_path / "run"
    train_on(2, config(shards, tiny_model, run, zero_stage=stage, precision="bf16"))
    assert losses(run) == pytest.approx(reference, abs=0.02)
    assert losses(run) != pytest.approx(reference, abs=1e-6)
    weights = load_file(run / "best" / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
    assert "bf16 autocast" in (run / "train.log").read_text()


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_weights_follow_resume_to_the_bit_and_export_the_optimizers(
    stage: int, reference: list[float], shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    knobs: dict[str, Any] = {"zero_stage": stage, "precision": "bf16-weights"}
    train_on(2, config(shards, tiny_model, whole, **knobs))
    assert losses(whole) == pytest.approx(reference, abs=0.04)
    assert "bf16 weights" in (whole / "train.log").read_text()

    assert run_ranks(2, train_until, 2, config(shards, tiny_model, parts, **knobs)) == [0, 0]
    plain = config(shards, tiny_model, parts, zero_stage=stage, resume="auto")
    with pytest.raises(UserError, match=r"--precision: got fp32, expected bf16-weights"):
        run_ranks(2, train.run, plain)
    train_on(2, config(shards, tiny_model, parts, resume="auto", **knobs))
    assert losses(parts) == losses(whole)
    assert weights_hash(parts, stage) == weights_hash(whole, stage)

    weights = load_file(whole / "best" / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
    moved = weights["wav2vec2.encoder.layers.1.feed_forward.output_dense.weight"]
    assert not moved.equal(moved.bfloat16().float()), "what the optimizer has, not its rounding"


def test_bf16_weights_keep_frozen_ones_and_go_on_elsewhere(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = {"precision": "bf16-weights", "freeze": "layers:1"}
    assert run_ranks(2, train_until, 2, config(shards, tiny_model, run, **knobs)) == [0, 0]
    train_on(1, config(shards, tiny_model, run, resume="auto", **knobs))
    other = tmp_path / "other"
    train_on(1, config(shards, tiny_model, other, **knobs))
    assert losses(run) == pytest.approx(losses(other), abs=0.02)
    states = [load_exported(path / "best").state_dict() for path in (run, other)]
    name = "net.wav2vec2.encoder.layers.0.feed_forward.output_dense.weight"
    assert states[0][name].equal(states[1][name])
    assert states[0][name].equal(states[0][name].bfloat16().float())


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 2), (3, 2), (2, 1)])
def test_stopped_and_resumed_ends_with_the_same_bits(
    stage: int, world: int, shards: Path, table: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "noisy.json", **NOISY)  # dropout and SpecAugment
    knobs = {"zero_stage": stage, "epochs": 1.0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on(world, config(shards, model, whole, **knobs))

    first = config(shards, model, parts, **knobs)
    assert run_ranks(world, train_until, 2, first) == [0] * world
    status = read_status(parts)
    # signalled after the 3rd step: the flag travels with the 4th and is read with the 5th
    assert (status["state"], status["samples_seen"]) == ("stopped", 50)
    assert (parts / "REQUEUE").exists()
    assert not (parts / "DONE").exists()

    train_on(world, config(shards, model, parts, resume="auto", **knobs))
    assert losses(parts) == losses(whole)
    assert weights_hash(parts, stage) == weights_hash(whole, stage)
    assert (parts / "DONE").exists()
    assert not (parts / "REQUEUE").exists()
    assert (
        read_metrics(parts, "validation")[-1]["track_nll"]
        == (read_metrics(whole, "validation")[-1]["track_nll"])
    )
    best = (parts / "best" / "model.safetensors").read_bytes()
    assert best == (whole / "best" / "model.safetensors").read_bytes()


def test_windows_resume_to_the_same_bits_with_more_reader_threads(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path, reference: list[float]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on(1, config(shards, tiny_model, whole, window_shards=2))
    assert losses(whole) != pytest.approx(reference, abs=1e-5), "the order is another one"
    settings = config(shards, tiny_model, parts, window_shards=2)
    assert run_ranks(1, train_until, 2, settings) == [0]
    again = {"resume": "auto", "reader_threads": 3, "micro_batch": 10}
    other = config(shards, tiny_model, parts, window_shards=1, **again)
    with pytest.raises(UserError, match=r"--window-shards: got 1 of 20 rows, expected 2 of 20"):
        run_ranks(1, train.run, other)
    train_on(1, config(shards, tiny_model, parts, window_shards=2, **again))
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)  # another micro batch
    exact = tmp_path / "exact"
    assert run_ranks(1, train_until, 2, config(shards, tiny_model, exact, window_shards=2)) == [0]
    again = {"resume": "auto", "reader_threads": 3}
    train_on(1, config(shards, tiny_model, exact, window_shards=2, **again))
    assert losses(exact) == losses(whole)
    assert weights_hash(exact, 2) == weights_hash(whole, 2)


def test_resume_refuses_what_would_change_the_run(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_on(1, config(shards, tiny_model, run, epochs=0.5))
    (run / "DONE").unlink()
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "status.json")}
    again = {"epochs": 0.5, "resume": "auto"}
    for changes, name, world in (
        ({"loss": "ce"}, "--loss", 1),
        ({"global_batch": 12}, "--global-batch", 1),
        ({"epochs": 0.7}, "--epochs", 1),
        ({"seed": 3}, "--seed", 1),
        ({"zero_stage": 3}, "--zero-stage", 1),
        ({"freeze": "layers:1"}, "--freeze", 1),
        ({"lr": 2e-3}, r"--lr: got 0.002, expected 0.001.*\n.*--change lr", 1),
        ({"weight_decay": 0.1}, "--weight-decay", 1),
        ({"clip_norm": 0.1}, "--clip-norm", 1),
        ({"warmup_fraction": 0.2}, "--warmup-fraction", 1),
        ({"final_lr_fraction": 0.2}, "--final-lr-fraction", 1),
        ({"model": str(write_model(tmp_path / "wide.json", hidden_size=64))}, "--model", 1),
    ):
        settings = {"model": tiny_model} | again | changes
        with pytest.raises(UserError, match=name):
            run_ranks(world, train.run, config(shards, settings.pop("model"), run, **settings))
        assert {name: (run / name).read_bytes() for name in before} == before
    with pytest.raises(UserError, match=r"not empty.*\n.*--resume auto"):
        run_ranks(1, train.run, config(shards, tiny_model, run))
    other = config(shards, tiny_model, tmp_path / "other", resume="latest")
    with pytest.raises(UserError, match="no checkpoint"):
        run_ranks(1, train.run, other)


@pytest.mark.parametrize("stage", [0, slow(1), 2, 3])
def test_an_allowed_change_takes_effect_and_is_written_down(
    stage: int, shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A run that changes at once is the reference: that a resumed one follows it to the bit."""
    ours: dict[str, Any] = {"lr": 4e-3, "weight_decay": 50.0, "clip_norm": 0.05, "loss": "ce"}
    names = ("lr", "weight-decay", "clip-norm", "loss", "bias-table")
    knobs: dict[str, Any] = {"zero_stage": stage, "epochs": 1.0}
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert run_ranks(2, train_until, 2, config(shards, tiny_model, run, **knobs)) == [0, 0]
    assert run_ranks(2, changed_at, 5, ours, config(shards, tiny_model, whole, **knobs)) == [0, 0]
    changed = config(shards, tiny_model, run, resume="auto", change=names, **knobs, **ours)
    train_on(2, changed)
    assert losses(run) == losses(whole)
    assert weights_hash(run, stage) == weights_hash(whole, stage)
    assert (
        "changed from samples_seen 50 on: --lr: 0.001 -> 0.004" in (run / "train.log").read_text()
    )
    lines = read_metrics(run, "changed")
    assert next(line["name"] for line in lines) == "--loss"
    assert {"--weight-decay", "--clip-norm", "bias table (--bias-table)"} < {
        str(line["name"]) for line in lines
    }
    assert "change: []" in (run / "config.yaml").read_text(), "it was for this once"


def changed_at(step: int, ours: dict[str, Any], settings: TrainConfig) -> int:
    """Train, and change the knobs of a live run before a step (counted from 0)."""
    begin = loop.begin_step

    def changing(run: Any, now: int) -> None:
        if now == step:
            optim = replace(run.config.optim, lr=ours["lr"])
            object.__setattr__(run, "config", replace(run.config, optim=optim))
            own = run.objective
            own._config = replace(own._config, loss=ours["loss"])
            run.engine._peak_lrs[0] = ours["lr"]
            optimizer = run.engine._engine.optimizer
            optimizer.clip_grad = ours["clip_norm"]  # stages 1 to 3
            run.engine._engine._config.gradient_clipping = ours["clip_norm"]  # stage 0
            for group in optimizer.param_groups:
                group["weight_decay"] = ours["weight_decay"]
        begin(run, now)

    loop.begin_step = changing
    return train.run(settings)


def test_a_longer_run_and_another_batch_go_on_where_they_can(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_on(1, config(shards, tiny_model, run, epochs=40 / 66))
    again: dict[str, Any] = {"resume": "auto", "epochs": 1.0, "change": ("epochs",)}
    train_on(1, config(shards, tiny_model, run, **again))
    assert read_status(run)["samples_seen"] == 66
    assert [line["samples_seen"] for line in read_metrics(run, "start")] == [0, 40]
    again |= {"epochs": 100 / 66, "global_batch": 20, "change": ("epochs", "global-batch")}
    newest = sorted((run / "checkpoints").glob("step-*"))
    assert [path.name for path in newest] == ["step-00000004", "step-00000007"]
    train_on(1, config(shards, tiny_model, run, **(again | {"resume": str(newest[0])})))
    assert read_status(run)["samples_seen"] == 100
    assert sorted(path.name for path in (run / "checkpoints").glob("*-*")) == [
        "aside-step-00000007",
        "step-00000006",
        "step-00000007",
    ]


def test_another_runs_checkpoint_does_not_take_a_used_folder_over(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    train_on(1, config(shards, tiny_model, mine, epochs=0.3, seed=1))
    train_on(1, config(shards, tiny_model, other, epochs=0.5))
    before = sorted(mine.rglob("*"))
    newest = sorted((other / "checkpoints").glob("step-*"))[-1]
    into = config(shards, tiny_model, mine, epochs=0.5, resume=str(newest))
    refused = r"which holds another run: positions \(--epochs\): got 33, expected 20"
    with pytest.raises(UserError, match=refused):
        run_ranks(1, train.run, into)
    assert sorted(mine.rglob("*")) == before


def fail_in_validation(settings: TrainConfig) -> int:
    def damaged(*args: Any, **kwargs: Any) -> None:
        raise UserError("damaged record", got="1", expected="2", cure="3")

    keeper.all_score = damaged
    return train.run(settings)


def test_a_validation_that_fails_costs_no_training(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    knobs: dict[str, Any] = {"checkpoint_every_epochs": 1.0}
    train_on(1, config(shards, tiny_model, whole, **knobs))
    with pytest.raises(UserError, match="damaged record"):
        run_ranks(1, fail_in_validation, config(shards, tiny_model, run, **knobs))
    train_on(1, config(shards, tiny_model, run, resume="auto", **knobs))
    assert [line["samples_seen"] for line in read_metrics(run, "start")] == [0, 70]
    assert losses(run) == losses(whole)
    figures = [
        [(line["samples_seen"], line["track_nll"]) for line in read_metrics(path, "validation")]
        for path in (run, whole)
    ]
    assert figures[0] == figures[1], "the one that was owed has been made up for"
    best = (run / "best" / "model.safetensors").read_bytes()
    assert best == (whole / "best" / "model.safetensors").read_bytes()


def run_out_of_memory(settings: TrainConfig, batch: int) -> int:
    """Let batches of so many rows ask for more memory than there is."""
    forward = Engine.__call__

    def hungry(self: Any, wave: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(wave) == batch:
            torch.empty(1 << 50)
        return forward(self, wave, *rest)

    Engine.__call__ = hungry  # type: ignore[method-assign]
    return train.run(settings)


def test_the_batch_that_memory_is_too_short_for_is_named(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for batch, named in ((4, "--micro-batch 4"), (9, "--eval-batch 9")):
        settings = config(shards, tiny_model, tmp_path / str(batch), micro_batch=4, eval_batch=9)
        with pytest.raises(UserError, match=f"(?s){named}: got .*memory.* lower it"):
            run_ranks(1, run_out_of_memory, settings, batch)


def build_without_memory(settings: TrainConfig) -> int:
    def hungry(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    Engine.__init__ = hungry  # type: ignore[method-assign]
    return train.run(settings)


def test_a_model_that_does_not_fit_is_told_before_the_first_step(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    told = r"(?s)tiny.json at --zero-stage 2: got CUDA out of memory.* look at --dry-run"
    with pytest.raises(UserError, match=told):
        run_ranks(1, build_without_memory, config(shards, tiny_model, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_validation_does_not_depend_on_the_micro_batch(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The same frozen-at-nothing weights, judged to the same digits."""
    figures = []
    for micro, size in ((3, 7), (10, 7), (10, 5)):
        run = tmp_path / f"{micro}-{size}"
        knobs = {"lr": 0.0, "head_lr": 0.0, "weight_decay": 0.0, "epochs": 0.5}
        train_on(1, config(shards, tiny_model, run, micro_batch=micro, eval_batch=size, **knobs))
        figures.append(read_metrics(run, "validation")[-1]["track_nll"])
    assert figures[0] == figures[1] == pytest.approx(figures[2], rel=1e-5)


def test_a_stop_saves_at_once_and_validates_when_it_goes_on(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = {"validate_every_epochs": 10 / 66, "epochs": 1.0}  # at every step
    assert run_ranks(1, train_until, 2, config(shards, tiny_model, run, **knobs)) == [0]
    seen = [line["samples_seen"] for line in read_metrics(run, "validation")]
    assert seen == [10, 20, 30, 40], "not at the step of the stop: its grace may be short"
    train_on(1, config(shards, tiny_model, run, resume="auto", **knobs))
    seen = [line["samples_seen"] for line in read_metrics(run, "validation")]
    assert seen == [10, 20, 30, 40, 50, 60, 66]


def test_a_checkpoint_that_goes_on_in_a_new_folder_gets_a_best_model_there(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    knobs: dict[str, Any] = {"validate_every_epochs": 10 / 66, "epochs": 1.0}
    train_on(1, config(shards, tiny_model, old, **knobs))
    start = sorted((old / "checkpoints").glob("step-*"))[0]
    still: dict[str, Any] = {"lr": 0.0, "head_lr": 0.0, "change": ("lr", "head-lr")}
    again = config(shards, tiny_model, new, resume=str(start), **knobs, **still)
    train_on(1, again)  # nothing is learned any more, so no figure gets better than the old best
    assert (new / "best" / "model.safetensors").is_file()
    lines = read_metrics(new, "validation")
    assert len({line["track_nll"] for line in lines}) == 1
    assert all(line["exported"] for line in lines), "a tie goes to the later one"


def test_a_model_that_is_chosen_in_another_way_is_sought_anew(
    shards: Path,
    table: Path,
    tiny_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = {"validate_every_epochs": 10 / 66, "epochs": 1.0}
    assert run_ranks(1, train_until, 2, config(shards, tiny_model, run, **knobs)) == [0]
    before = len(read_metrics(run, "validation"))
    train_on(1, config(shards, tiny_model, run, resume="auto", select="last", **knobs))
    after = read_metrics(run, "validation")[before:]
    assert [line["exported"] for line in after] == [True] * len(after)
    assert "--select is last, and was nll" in capfd.readouterr().err


@pytest.mark.parametrize("select", ["nll", "macro-f1", "last"])
def test_the_best_model_is_that_of_the_best_validation(
    select: str, shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = {"validate_every_epochs": 10 / 66, "epochs": 2.0, "lr": 3e-3}
    train_on(1, config(shards, tiny_model, run, select=select, head_lr=3e-2, **knobs))
    lines = read_metrics(run, "validation")
    figure = {
        "nll": [line["track_nll"] for line in lines],
        "macro-f1": [-line["track_macro_f1"] for line in lines],
        "last": [0.0] * len(lines),
    }[select]
    kept = [all(figure[k] <= other for other in figure[:k]) for k in range(len(lines))]
    assert [line["exported"] for line in lines] == kept
    assert not all(kept) or select != "nll", "nothing was chosen"
    last = max(k for k, is_kept in enumerate(kept) if is_kept)
    run_ranks(1, evaluate.run, EvaluateConfig(run=run, split="validation"))
    found = json.loads((run / "evaluation" / "validation.json").read_text())
    told = found["temperature"]["without"] if found["temperature"] else found["track"]
    assert told["nll"] == pytest.approx(lines[last]["track_nll"], rel=1e-5)


def diverge_at(validation: int, settings: TrainConfig) -> int:
    """One validation gives a logit that is no number."""
    score, seen = keeper.all_score, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        found = score(*args, **kwargs)
        seen.append(found)
        if len(seen) != validation:
            return found
        logits = found.logits.copy()
        logits[5, 1] = np.nan
        return judge(logits, found.row_label, found.row_track, "validation")

    keeper.all_score = broken
    return train.run(settings)


def test_a_validation_that_is_not_finite_is_never_the_best(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    knobs: dict[str, Any] = {"validate_every_epochs": 0.5, "epochs": 1.0, "select": "last"}
    assert run_ranks(1, diverge_at, 2, config(shards, tiny_model, run, **knobs)) == [0]
    lines = read_metrics(run, "validation")
    assert [line["exported"] for line in lines] == [True, False]
    assert [line["segments_not_finite"] for line in lines] == [0, 1]
    told = "the logits of 1 of 66 validation segments are not finite: this model is not kept"
    assert told in (run / "train.log").read_text()
    none = tmp_path / "none"
    knobs["validate_every_epochs"] = 1.0
    assert run_ranks(1, diverge_at, 1, config(shards, tiny_model, none, **knobs)) == [0]
    assert not (none / "best").exists()
    assert "no validation gave finite logits" in (none / "train.log").read_text()


def test_what_version_0_1_0_wrote_into_a_checkpoint_is_read() -> None:
    old = {"samples_seen": 40, "best_samples_seen": 20, "refused_in_a_row": 0}
    found = State.restored(old | {"best_macro_f1": 0.5, "owes_validation": False})
    assert (found.best_by, found.best_loss, found.samples_seen) == ("macro-f1", -0.5, 40)
    assert State.restored(old | {"best_macro_f1": -1.0}).best_loss is None
    assert State.restored(asdict(found)) == found


def lose_the_lease(settings: TrainConfig) -> int:
    """Another run takes the folder over just before a checkpoint is committed."""
    write = checkpoint._write_manifest

    def taken(*args: Any) -> None:
        write(*args)
        run = settings.output.run
        (run / "lease.json").write_text('{"attempt": "theirs", "host": "elsewhere"}')
        (run / "status.json").write_text('{"state": "running", "samples_seen": 70}')

    checkpoint._write_manifest = taken
    return train.run(settings)


def test_who_has_lost_the_folder_does_not_speak_for_it(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(PeerLost, match="elsewhere has taken it over"):
        run_ranks(1, lose_the_lease, config(shards, tiny_model, run))
    assert read_status(run) == {"state": "running", "samples_seen": 70}, "the newer run's words"
    assert (run / "lease.json").exists()


def test_a_complete_run_is_left_alone(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings = config(shards, tiny_model, tmp_path / "run", epochs=0.3)
    train_on(1, settings)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train_on(1, config(shards, tiny_model, tmp_path / "run", epochs=0.3, resume="auto"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    longer = config(shards, tiny_model, tmp_path / "run", epochs=0.6, resume="auto")
    with pytest.raises(UserError, match=r"which is complete: positions \(--epochs\): got 40"):
        run_ranks(2, train.run, longer)


def asked(settings: TrainConfig) -> int:
    """How often a training asks for a model on a hub that cannot be reached."""
    names: list[str] = []

    def unreachable(name: str, **words: Any) -> None:
        names.append(name)
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    AutoConfig.from_pretrained = unreachable
    with pytest.raises(UserError, match=r"model somebody/wav2vec2: .*We couldn't connect"):
        train.run(settings)
    return len(names)


@pytest.mark.parametrize("is_dry", [False, True])
def test_a_hub_that_cannot_be_reached_is_asked_once(
    is_dry: bool, shards: Path, table: Path, tmp_path: Path
) -> None:
    """Each time takes half a minute. The folder is judged first: a complete run needs no model."""
    settings = config(shards, Path("somebody/wav2vec2"), tmp_path / "run")
    settings = replace(settings, output=replace(settings.output, dry_run=is_dry))
    assert run_ranks(1, asked, settings) == [1]
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "file").touch()
    if not is_dry:
        with pytest.raises(UserError, match="a folder that is not empty"):
            run_ranks(1, train.run, settings)


def test_run_folder_tells_what_happened(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from mgc_dist import cli

    settings = config(shards, tiny_model, tmp_path / "run", epochs=0.5)
    train_on(1, settings)
    run = tmp_path / "run"
    assert cli.parse("train", TrainConfig, ["--config", str(run / "config.yaml")]) == settings
    assert json.loads((run / "env.json").read_text())["world"] == 1
    assert json.loads((run / "ds_config.json").read_text())["zero_optimization"]["stage"] == 2
    step = read_metrics(run, "step")[-1]
    assert step["samples_seen"] == 33
    assert step["segments_per_s"] > 0
    assert 0 <= step["data_wait_share"] <= 1
    assert "global batch 10 = 1 ranks" in (run / "train.log").read_text()


@pytest.mark.parametrize("freeze", ["feature_encoder", "layers:1", "backbone"])
def test_frozen_parts_stay_as_they_were_and_the_rest_moves(
    freeze: str, shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    moved = run_ranks(1, moved_parts, config(shards, tiny_model, tmp_path / "run", freeze=freeze))
    parts = {
        "feature_encoder": {"feature_projection", "encoder", "head"},
        "layers:1": {"encoder", "head"},
        "backbone": {"head"},
    }
    assert moved[0] == parts[freeze]


def moved_parts(settings: TrainConfig) -> set[str]:
    from mgc_dist.models.folder import load_exported

    train.run(settings)
    before = build_tiny(settings.main.model).state_dict()
    after = load_exported(settings.output.run / "best").state_dict()
    names = {name for name in before if not before[name].equal(after[name])}
    if settings.main.freeze == "layers:1":
        assert not {name for name in names if "layers.0." in name or "pos_conv" in name}
    inner = "net.wav2vec2."
    return {n.removeprefix(inner).split(".")[0] if n.startswith(inner) else "head" for n in names}


def test_the_commit_is_that_of_this_code_only(tmp_path: Path, monkeypatch: Any) -> None:
    import shutil
    import subprocess

    def git(*words: str) -> str:
        settings = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *settings, *words], capture_output=True, text=True
        )
        return done.stdout.strip()

    code = tmp_path / "train.py"
    shutil.copy(run_folder.__file__, code)
    monkeypatch.setattr(run_folder, "__file__", str(code))
    assert run_folder.commit_of_code() is None
    git("init")
    (tmp_path / "other").touch()
    git("add", "other")
    git("commit", "-m", "a repository around an installed copy")
    assert run_folder.commit_of_code() is None
    git("add", "train.py")
    git("commit", "-m", "ours")
    assert run_folder.commit_of_code() == git("rev-parse", "--short", "HEAD")
    code.write_text("changed")
    assert run_folder.commit_of_code() == f"{git('rev-parse', '--short', 'HEAD')}-dirty"
