"""What a run goes on from, and what it must agree with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from metrics import validation_event

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.config import RunConfig, TrainConfig
from mgc_dist.config.knobs import change_names
from mgc_dist.data.order import Plan
from mgc_dist.errors import UserError
from mgc_dist.events import CheckpointEvent
from mgc_dist.journal import Journal
from mgc_dist.training import resume

ALONE = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def manifest(folder: Path, **facts: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "MANIFEST.json").write_text(json.dumps(facts))
    return folder


def test_other_ranks_and_stages_of_a_family_are_carried_over(tmp_path: Path) -> None:
    folder = manifest(tmp_path / "c", world=2, zero_stage=2)
    assert not resume.must_reshape(folder, world=2, zero_stage=2)
    assert resume.must_reshape(folder, world=4, zero_stage=2)
    assert resume.must_reshape(folder, world=2, zero_stage=1)
    for stage in (0, 3):
        with pytest.raises(UserError, match="go on with --zero-stage 1 or 2, on any number"):
            resume.must_reshape(folder, world=2, zero_stage=stage)


def test_a_change_is_refused_by_name() -> None:
    resume.refuse_change("x", {"seed": 1}, {"seed": 1, "more": 2})
    with pytest.raises(UserError, match=r"x: --seed: got 2, expected 1.*\n.*--change seed"):
        resume.refuse_change("x", {"seed": 2}, {"seed": 1})
    with pytest.raises(UserError, match="x: --lr: got 2, expected not written down"):
        resume.refuse_change("x", {"lr": 2}, {})
    every = list(change_names(TrainConfig))
    with pytest.raises(UserError, match="x: --freeze: got a") as error:
        resume.refuse_change("x", {"freeze": "a"}, {"freeze": "b"}, every)
    assert "--change" not in str(error.value), "an optimizer's state fits no other freezing"


def test_a_change_is_allowed_by_name() -> None:
    ours, theirs = {"lr": 1, "seed": 1}, {"lr": 2, "seed": 2}
    with pytest.raises(UserError, match="x: --seed"):
        resume.refuse_change("x", ours, theirs, ["lr"])
    changes = resume.refuse_change("x", ours, theirs, ["lr", "seed", "epochs"])
    assert changes == {"lr": (1, 2), "seed": (1, 2)}


@pytest.mark.parametrize(
    ("name", "samples_seen", "message"),
    [
        ("global-batch", 50, ""),
        ("epochs", 160, "got 160, expected the end of a step of 20 rows, up to 140"),
        ("seed", 40, "--change seed at samples_seen 40: got 5 of 35 rows into an epoch"),
        ("shards", 60, "--change shards at samples_seen 60: got 25 of 35 rows into an epoch"),
        ("window-shards", 20, "give the same --window-shards"),
        ("lr", 20, ""),
        ("seed", 140, ""),
        ("global-batch", 140, ""),
    ],
)
def test_a_change_that_the_position_does_not_survive(
    name: str, samples_seen: int, message: str
) -> None:
    plan = Plan(rows=35, total=140, global_batch=20, seed=0)
    changes = {name.replace("-", "_"): (1, 2)}
    if message:
        with pytest.raises(UserError, match=message):
            resume.refuse_position(changes, plan, samples_seen)
    else:
        resume.refuse_position(changes, plan, samples_seen)


def test_checkpoints_that_have_vanished_do_not_mean_from_scratch(tmp_path: Path) -> None:
    settings = RunConfig(run=tmp_path, resume="auto")
    assert resume.all_choose(settings, ALONE) is None
    journal = Journal(tmp_path, writes=True)
    journal.write(CheckpointEvent(samples_seen=40, save_s=1.5))
    journal.close()
    with pytest.raises(UserError, match=r"got none, though 1 have been saved, .* 40") as error:
        resume.all_choose(settings, ALONE)
    assert error.value.exit_code == 65


def test_what_best_holds_is_known(tmp_path: Path) -> None:
    assert not resume.holds_best(tmp_path, 20, 0.5)
    journal = Journal(tmp_path, writes=True)
    for seen, figure, exported in ((10, 0.4, True), (20, 0.5, True), (30, 0.3, False)):
        journal.write(validation_event(seen, track_macro_f1=figure, exported=exported))
    assert resume.holds_best(tmp_path, 20, -0.5), "as version 0.1.0 wrote it"
    figures: dict[str, Any] = {"track_macro_f1": 0.9, "select": "nll", "exported": True}
    journal.write(validation_event(40, select_loss=0.25, **figures))
    assert not resume.holds_best(tmp_path, 20, -0.5), "a run that goes back before 40 lost it"
    assert resume.holds_best(tmp_path, 40, 0.25)
    journal.write(validation_event(50, select_loss=0.125, **figures))
    journal.close()
    assert not resume.holds_best(tmp_path, 40, 0.25)
    assert not resume.holds_best(tmp_path, 50, 0.25)


def test_a_best_model_that_a_kill_left_between_two_renames_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, writes=True)
    journal.write(validation_event(20, select="nll", select_loss=0.25, exported=True))
    journal.close()
    state = resume.State(best_by="nll", best_loss=0.25, best_samples_seen=20, samples_seen=30)
    (tmp_path / "best.old").mkdir()
    resume.all_keep_best(RunConfig(run=tmp_path), ALONE, state)
    assert (tmp_path / "best").is_dir()
    assert state.best_loss == 0.25
    (tmp_path / "best").rmdir()  # one that is lost: the next validation is the best
    resume.all_keep_best(RunConfig(run=tmp_path), ALONE, state)
    assert state.best_loss is None


def test_fresh_moves_everything_but_the_lease(tmp_path: Path) -> None:
    for name in ("lease.json", "metrics.jsonl", "config.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    resume.set_aside(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    resume.set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside-1", "aside-2", "lease.json"]
    assert (tmp_path / "aside-1" / "checkpoints").is_dir()
