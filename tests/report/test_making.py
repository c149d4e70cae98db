"""What the report says about the making follows from the run folder; its commands parse."""

import json
import shlex
import shutil
from html import unescape
from pathlib import Path

import pytest
from conftest import shard_config
from runs import bias_report, write_training
from test_verdict import html, words

from mgc_dist import cli, shard
from mgc_dist.config import (
    BiasConfig,
    DataConfig,
    EvaluateConfig,
    LossConfig,
    ShardConfig,
    TrainConfig,
)
from mgc_dist.data import manifest
from mgc_dist.report import making
from mgc_dist.report.dossier import Dossier


@pytest.fixture
def run(shards: Path, table: Path, tmp_path: Path) -> Path:
    write_training(tmp_path / "run", shards)
    return tmp_path / "run"


def test_the_data_set_and_what_is_not_controlled(
    run: Path, shards: Path, tracks: Path, tmp_path: Path
) -> None:
    shown = words(making.data(Dossier(run)))
    assert manifest.read(shards).dataset_id[:12] in shown
    assert "train 3 6 3 66 0.01" in shown
    assert "of the 18 tracks whose artist is known" in shown
    assert "Not controlled" not in shown
    shard.run(shard_config(tracks, tmp_path / "unknown", groups=None))
    write_training(tmp_path / "other", tmp_path / "unknown")
    shown = words(making.data(Dossier(tmp_path / "other")))
    assert "Not controlled: 18 tracks have no known artist" in shown
    shutil.rmtree(tmp_path / "unknown")
    shown = words(making.data(Dossier(tmp_path / "other")))
    assert "not where they were, or were packed again" in shown


def test_settings_and_bias_table(run: Path, table: Path) -> None:
    shown = words(making.training(Dossier(run)))
    for part in (
        "loss poe (beta 0.5)",
        "bias table logmel, table ",
        "ranks 2 on cpu",
        "precision auto, fp32",
        "seed 0",
        "torch 2.11.0",
        "git 0123abcd",
    ):
        assert part in shown
    (run / "config.yaml").unlink()
    assert "config.yaml is not there" in words(making.training(Dossier(run)))


def test_curves_leave_out_what_was_done_again(run: Path) -> None:
    text = unescape(html(making.curves(Dossier(run))))
    assert "over 66 points" in text
    assert "where the run was resumed" in text
    assert text.count("<figure") == 3
    assert "the head's is 50 times as high" in text
    assert "holds no steps" in words(making.curves(Dossier(run / "none")))


def test_the_bias_report(run: Path, shards: Path, table: Path, tmp_path: Path) -> None:
    bias = Path(shutil.copytree(table, tmp_path / "bias"))
    report = bias_report(list(manifest.read(shards).genres))
    (bias / "report.json").write_text(json.dumps(report))
    data = DataConfig(shards=shards, bias_table=bias)
    config = TrainConfig(data=data)
    (run / "config.yaml").write_text(cli.dump("train", config))
    shown = words(making.bias(Dossier(run)))
    assert "a bias model that knows the task" in shown
    assert "48 of 66 segments" in shown
    assert "train 66 0.500 1.500 0.100" in shown
    assert "blues 11 11 1 1" in shown
    (bias / "report.json").unlink()
    assert "gone or made again since" in words(making.bias(Dossier(run)))
    plain = TrainConfig(data=data, objective=LossConfig(loss="ce"))
    (run / "config.yaml").write_text(cli.dump("train", plain))
    assert making.bias(Dossier(run)) is None
    assert "none: plain cross-entropy" in words(making.training(Dossier(run)))


def test_cost_and_tries(run: Path) -> None:
    times = iter(range(1000, 100_000, 100))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["time_s"] = next(times)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = words(making.cost(Dossier(run)))
    seconds = 100 * (len(lines) - 2)  # the time between the two tries is not spent
    assert f"wall time {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} h" in shown
    assert "tries 2 (1 done, 1 without a last word)" in shown
    assert "0.20 % of the time" in shown
    assert "seconds a step 0.125 (median), 0.125 to 0.125" in shown
    assert "TFLOP/s of a rank 395.8 (median)" in shown
    assert "of its bf16 peak (MFU), % 40 (median), 40 to 40" in shown
    assert "1.25 GiB" in shown
    assert "tells of no try" in words(making.cost(Dossier(run / "none")))


def test_the_commands_parse_and_pack_the_same(run: Path, table: Path, shards: Path) -> None:
    section = making.commands(Dossier(run))
    assert section.code in unescape(html(section))
    lines = [shlex.split(line) for line in section.code.splitlines()]
    pack, bias, train, plain, evaluate = lines
    assert pack[:3] == ["python", "-m", "mgc_dist.shard"]
    packed = cli.parse("shard", ShardConfig, pack[3:])
    settings = manifest.read(shards).settings
    assert packed.segment_samples == settings["segment_samples"]
    assert packed.hop_samples == settings["hop_samples"]
    assert packed.rows_per_shard == settings["rows_per_shard"]
    assert packed.split == settings["split"]
    assert packed.validation_fraction == settings["validation_fraction"]
    assert cli.parse("bias", BiasConfig, bias[2:]).backbone == "logmel"
    assert cli.parse("bias", BiasConfig, bias[2:]).folds == 2
    again = cli.parse("train", TrainConfig, train[2:])
    assert (again.output.run, again.output.resume) == (Path(f"{run}-again"), "never")
    assert cli.parse("train", TrainConfig, plain[2:]).objective.loss == "ce"
    assert cli.parse("evaluate", EvaluateConfig, evaluate[2:]).run == Path(f"{run}-again")
