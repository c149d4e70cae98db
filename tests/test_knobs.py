"""A knob is one field: its range, its part in a run's identity, in `--change`, in comparisons."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from mgc_dist import cli, config
from mgc_dist.config import TrainConfig, identity, knobs
from mgc_dist.config.knobs import LEARNED, Range, check
from mgc_dist.errors import UserError
from mgc_dist.scoring import conditions
from mgc_dist.training import resume

RUN = Path("run")
SECTIONS = (
    config.SynthConfig(out=RUN),
    config.ShardConfig(),
    config.VerifyConfig(),
    config.AuditConfig(),
    config.BiasConfig(),
    config.SourceConfig(),
    config.DataConfig(),
    config.LossConfig(),
    config.OptimConfig(),
    config.EngineConfig(),
    config.RunConfig(dry_run=True),
    config.EvaluateConfig(run=RUN),
    config.ExamConfig(run=RUN),
    config.CompareConfig(runs=(RUN, RUN)),
    config.PredictConfig(run=RUN, files=()),
    config.DoctorConfig(),
)
RANGES = [
    pytest.param(section, name, found, id=f"{type(section).__name__}.{name}")
    for section in SECTIONS
    for name, hint in knobs.hints(type(section)).items()
    if (found := knobs.mark(hint, Range))
]


@pytest.mark.parametrize(("section", "name", "allowed"), RANGES)
def test_a_value_outside_its_range_is_refused_by_its_flag(
    section: Any, name: str, allowed: Range
) -> None:
    outside = [math.nan, allowed.above, allowed.below]
    outside += [allowed.minimum - 1] if allowed.minimum is not None else []
    outside += [allowed.maximum + 1] if allowed.maximum is not None else []
    for value in outside:
        if value is not None:
            with pytest.raises(UserError, match=rf"^{knobs.flag(name)}: got \S+, expected "):
                dataclasses.replace(section, **{name: value})
    for value in (allowed.minimum, allowed.maximum):
        assert value is None or allowed.holds(value)


def test_a_range_says_what_it_holds() -> None:
    said = {
        "100 to 1000000": Range(minimum=100, maximum=1_000_000, cure=""),
        "above 0 to 10": Range(above=0, maximum=10, cure=""),
        "0 to below 1": Range(minimum=0, below=1, cure=""),
    }
    assert {str(found): found for found in said.values()} == said
    with pytest.raises(UserError, match="--lr: got -1, expected 0 to 10\n  1e-5 to 1e-3"):
        config.OptimConfig(lr=-1)


@dataclass(frozen=True, kw_only=True)
class WithMomentum:
    """The section of the optimizer, and a new knob: one field."""

    lr: Annotated[float, LEARNED] = 3e-5
    momentum: Annotated[float, Range(minimum=0, below=1, cure="0.9 is usual"), LEARNED] = 0.9

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class NewTrain(TrainConfig):
    """Training, with the new knob in its place."""

    optim: WithMomentum = field(default_factory=WithMomentum)  # type: ignore[assignment]


def parsed(*words: str) -> NewTrain:
    return cli.parse("train", NewTrain, words)


def test_a_new_knob_of_training_is_one_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--momentum: got 1.0, expected 0 to below 1\n  0.9 "):
        parsed("--momentum", "1")
    assert cli.flags_of(parsed("--momentum", "0.5"))["--momentum"] == "0.5"
    before, now = identity.own(TrainConfig()), identity.own(parsed("--momentum", "0.5"))
    with pytest.raises(UserError, match=r"--momentum: got 0.5, expected 0.9.*\n.*--change mom"):
        resume.refuse_change("run", now, identity.own(NewTrain()), config_type=NewTrain)
    with pytest.raises(UserError, match=r"--momentum: got 0.5, expected 0.9"):
        resume.refuse_change("a run without the knob", now, before, config_type=NewTrain)
    assert not resume.refuse_change("run", identity.own(NewTrain()), before, config_type=NewTrain)
    allowed = parsed("--momentum", "0.5", "--change", "momentum").output.change
    changes = resume.refuse_change("run", now, before, allowed, config_type=NewTrain)
    assert changes == {"momentum": (0.5, 0.9)}
    (tmp_path / "config.yaml").write_text(cli.dump("train", parsed("--momentum", "0.5")))
    assert parsed("--config", str(tmp_path / "config.yaml")).optim.momentum == 0.5
    assert conditions.settings_of(tmp_path)[1]["momentum"] == "0.5", "runs are compared by it"


def test_what_is_not_learned_is_no_other_setting() -> None:
    marks = knobs.effects(TrainConfig)
    told_apart = {name for name, mark in marks.items() if mark and mark.condition}
    assert {"lr", "loss", "freeze", "zero_stage", "select", "window_shards"} <= told_apart
    assert not {"seed", "shards", "bias_table", "cache", "run", "stage_dir"} & told_apart


OLD: dict[str, Any] = {
    "--loss": "loss=poe beta=0.5 beta_end=None entropy_weight=0.03 dfl_gamma=2.0 bias_ratio=0.1 "
    "ce_weight=0.0",
    "data set (--shards)": "d" * 64,
    "genres": "blues, jazz",
    "bias table (--bias-table)": "b" * 64,
    "order version": 1,
    "--seed": 0,
    "--window-shards": 0,
    "--global-batch": 64,
    "positions (--epochs)": 120,
    "--model": "facebook/wav2vec2-large-960h-lv60-self",
    "--freeze": "feature_encoder",
    "--spec-augment": True,
    "--lr": 3e-05,
    "--head-lr": 0.001,
    "--weight-decay": 0.01,
    "--warmup-fraction": 0.1,
    "--final-lr-fraction": 0.02,
    "--clip-norm": 1.0,
    "frozen weights of --model": "f" * 16,
    "shapes of --model": "s" * 16,
    "--cache": "none",
    "--precision of the weights": "fp32",
}
"""As version 0.1.0 wrote the identity of a run with default settings."""


def now(**changes: object) -> dict[str, Any]:
    """The identity of that run as it is written today."""
    found = {"shards": "d" * 64, "genres": "blues, jazz", "bias_table": "b" * 64}
    found |= {"frozen_weights": "f" * 16, "shapes": "s" * 16, "weights_precision": "fp32"}
    found |= {"model": f"wav2vec2 {'0' * 32}"}
    rest = {"order_version": 1, "epochs": 120, "cache": "none"}
    return identity.own(TrainConfig()) | found | rest | changes


def test_an_identity_of_the_first_version_still_compares_right() -> None:
    written = json.loads(json.dumps(OLD))
    ours = now()
    del ours["model"]  # a path says nothing about what lies there
    assert identity.read(written) == ours
    assert not resume.refuse_change("checkpoint", now(), written)
    for key, value, message in (
        ("beta", 0.25, r"checkpoint: --beta: got 0.25, expected 0.5, as .*\n.*--change loss,"),
        ("loss", "ce", "checkpoint: --loss: got ce, expected poe"),
        ("beta_end", 1.0, "checkpoint: --beta-end: got 1.0, expected None"),
        ("shards", "e" * 64, r"checkpoint: data set \(--shards\): got e+, .*\n.*--change shards"),
        ("epochs", 60, r"positions \(--epochs\): got 60, expected 120"),
        ("freeze", "backbone", "--freeze: got backbone, expected feature_encoder"),
        ("order_version", 2, "order version: got 2, expected 1"),
    ):
        with pytest.raises(UserError, match=message):
            resume.refuse_change("checkpoint", now(**{key: value}), written)
    changes = resume.refuse_change("x", now(beta=0.25, loss="dfl"), written, ["loss"])
    assert changes == {"loss": ("dfl", "poe"), "beta": (0.25, 0.5)}


def test_models_are_compared_by_configuration() -> None:
    written = now()
    with pytest.raises(UserError, match=r"configuration of --model: got wav2vec2 1+, expected"):
        resume.refuse_change("checkpoint", now(model=f"wav2vec2 {'1' * 32}"), written)


def test_a_knob_that_an_old_run_did_not_write_down_is_not_taken_for_its_default() -> None:
    written = {key: value for key, value in OLD.items() if key != "--lr"}
    with pytest.raises(UserError, match="--lr: got 3e-05, expected not written down"):
        resume.refuse_change("checkpoint", now(), written)


def test_old_files_with_shards_from_elsewhere_parse(tmp_path: Path) -> None:
    inside = "shards_from: /far\n    stage_dir: $TMPDIR\n    stage_timeout_s: 60"
    text = f"train:\n  data:\n    shards: s\n    {inside}\n    cache: none\n"
    file = tmp_path / "config.yaml"
    for command in ("bias", "evaluate"):
        text += f"{command}:\n    {inside}\n"
    file.write_text(text)
    expected = config.SourceConfig(shards_from="/far", stage_dir="$TMPDIR", stage_timeout_s=60)
    made = cli.parse("train", TrainConfig, ["--config", str(file)])
    assert made.data.source == expected
    file.write_text(cli.dump("train", made) + text[text.index("bias:") :])
    assert "\n    stage_dir: $TMPDIR\n" in file.read_text(), "it is written as it was"
    assert cli.parse("train", TrainConfig, ["--config", str(file)]) == made
    bias = cli.parse("bias", config.BiasConfig, ["--config", str(file)])
    assert bias.source == expected
    words = ["run", "--config", str(file), "--stage-dir", "/node"]
    evaluated = cli.parse("evaluate", config.EvaluateConfig, words)
    assert evaluated.source == dataclasses.replace(expected, stage_dir="/node")
