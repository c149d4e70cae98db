"""A finished run is trained longer, and a run that goes back stays on the way it has taken."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_ranks
from metrics import read_metrics
from trainings import config, losses, stop_after, train_on

from mgc_dist import train
from mgc_dist.config import RunConfig, TrainConfig
from mgc_dist.journal import read_status
from mgc_dist.training import loop
from mgc_dist.training.engine import lr_factor

ROWS, BATCH = 66, 10


@pytest.mark.parametrize("extension", ["replan", "hold"])
def test_one_epoch_then_two_more_at_sizes_that_do_not_divide(
    extension: str, shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    """66 rows and 10 a step, on 1 and on 2 ranks: steps and rates as promised."""
    runs = {}
    for world in (1, 2):
        run = tmp_path / f"{extension}{world}"
        train_on(world, config(shards, noisy, run, epochs=1.0))
        longer = config(shards, noisy, run, epochs=3.0, resume="auto", change=("epochs",))
        train_on(world, replace(longer, optim=replace(longer.optim, extension=extension)))
        assert read_status(run)["samples_seen"] == 3 * ROWS
        runs[world] = run
    steps = read_metrics(runs[1], "step")
    seen = [line["samples_seen"] for line in steps]
    assert seen == [*range(10, 66, 10), 66, *range(76, 198, 10), 198]
    assert [line["step"] for line in steps] == list(range(1, 22))
    for line in steps:
        total = ROWS if line["samples_seen"] <= ROWS else 3 * ROWS
        factor = lr_factor(line["samples_seen"], total, warmup=0.1, final=0.02)
        if total > ROWS and extension == "hold":
            factor = 0.02
        assert line["lr"] == pytest.approx(1e-3 * factor, rel=1e-6)
    assert losses(runs[2]) == pytest.approx(losses(runs[1]), rel=1e-5)


def test_a_longer_run_that_is_killed_goes_on_where_it_was(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    """Positions are counted from the end of the first plan, also in the try after the next one."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        train_on(1, config(shards, noisy, run, epochs=1.0))
    longer: dict[str, Any] = {"epochs": 2.0, "resume": "auto", "change": ("epochs",)}
    train_on(1, config(shards, noisy, whole, **longer))
    knobs = config(shards, noisy, cut, **longer)
    run_ranks(1, stopped_at, 10, knobs)
    assert 66 < read_status(cut)["samples_seen"] < 132
    train_on(2, config(shards, noisy, cut, epochs=2.0, resume="auto"))
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


def stopped_at(step: int, settings: TrainConfig) -> int:
    stop_after(step)
    return int(train.run(settings))


@pytest.mark.parametrize("own", [True, False])
def test_going_back_is_written_down_before_the_first_step(
    own: bool, shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    """A kill before the first checkpoint does not bring back the way that was left."""
    first, run = tmp_path / "first", tmp_path / "run"
    knobs: dict[str, Any] = {"epochs": 2.0, "checkpoint_every_epochs": 0.5}
    train_on(1, config(shards, noisy, first, **knobs))
    early, late = sorted((first / "checkpoints").glob("step-*"))[-2:]
    run = first if own else run
    back = config(shards, noisy, run, **(knobs | {"resume": str(early)}))
    with pytest.raises(RuntimeError):
        run_ranks(1, killed, back)
    train_on(1, config(shards, noisy, run, **(knobs | {"resume": "auto"})))
    starts = [line["samples_seen"] for line in read_metrics(run, "start")]
    assert starts[-2:] == [starts[-1]] * 2
    assert 0 < starts[-1] < 2 * ROWS
    assert read_status(run)["samples_seen"] == 2 * ROWS
    assert late.name in {path.name for path in (run / "checkpoints").iterdir()}


def killed(settings: TrainConfig) -> int:
    """Die before the first step."""
    loop.begin_step = lambda run, step: os._exit(9)
    return int(train.run(settings))


@pytest.mark.parametrize(
    ("given", "first", "later"),
    [
        (
            {"resume": "runs/x/checkpoints/step-00000100"},
            "runs/x/checkpoints/step-00000100",
            "auto",
        ),
        ({"resume": "auto"}, "auto", "auto"),
        ({"resume": "auto", "fresh": True}, "never", "auto"),
        ({"resume": "never"}, "never", "never"),
    ],
)
def test_what_is_asked_counts_for_the_first_try_of_a_job(
    given: dict[str, Any], first: str, later: str
) -> None:
    output = RunConfig(**given)
    assert (output.of_try(0).resume, output.of_try(0).fresh) == (first, output.fresh)
    assert (output.of_try(1).resume, output.of_try(1).fresh) == (later, False)
