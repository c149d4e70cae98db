"""What version 0.1.0 wrote is read: shards, bias table, cache, a run, its checkpoint, its figures.

`tests/old/make.py` made the archive with the code of that version.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import run_ranks
from metrics import read_metrics

from mgc_dist import bias, cli, compare, evaluate, predict, shard, train
from mgc_dist.config import (
    BiasConfig,
    CompareConfig,
    EvaluateConfig,
    PredictConfig,
    TrainConfig,
    VerifyConfig,
)
from mgc_dist.files import json_lines

ARCHIVE = Path(__file__).parent / "old" / "v0_1_0.tar.xz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which version 0.1.0 worked; its paths are relative to it."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resumed(run: Path, *flags: str) -> TrainConfig:
    """As `train --config RUN/config.yaml --resume auto` is parsed."""
    words = ["--config", str(run / "config.yaml"), "--resume", "auto", "--time-limit-s", "0"]
    return cli.parse("train", TrainConfig, [*words, *flags])


def test_shards_and_bias_table(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard.verify(VerifyConfig(shards=Path("shards")))
    made = (old / "shards/bias/log_probability.npy").stat().st_mtime_ns
    settings = BiasConfig(shards=Path("shards"), backbone="logmel", folds=2, device="cpu")
    run_ranks(1, bias.run, settings)
    assert (old / "shards/bias/log_probability.npy").stat().st_mtime_ns == made


SINCE = {"ece_floor", "overconfidence", "calibration"}
"""Figures that have come in since."""


def same_to_rounding(found: Any, expected: Any) -> None:
    """Equal but for the last digits of numbers, in which processors differ."""
    if isinstance(expected, dict):
        assert [key for key in found if key not in SINCE] == list(expected)
        for key, value in expected.items():
            same_to_rounding(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same_to_rounding(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    else:
        assert found == expected


def plain(figures: Any) -> Any:
    """Figures without intervals, which are made in another way than by version 0.1.0."""
    if not isinstance(figures, dict):
        return figures
    return {key: plain(value) for key, value in figures.items() if "interval" not in key}


def test_a_run_is_measured_and_predicts(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(Path("runs/done/evaluation/test.json").read_text())
    said = json_lines(Path("runs/done/predictions/test.jsonl"))
    run_ranks(1, evaluate.run, EvaluateConfig(run=Path("runs/done"), device="cpu"))
    after = json.loads(Path("runs/done/evaluation/test.json").read_text())
    same_to_rounding({key: plain(after)[key] for key in plain(before)}, plain(before))
    same_to_rounding(json_lines(Path("runs/done/predictions/test.jsonl")), said)
    capsys.readouterr()
    wave = 0.3 * np.sin(2 * np.pi * 200 * np.arange(16_000) / 16_000)
    soundfile.write(old / "tone.wav", wave, 16_000)
    predict.run(
        PredictConfig(run=Path("runs/done"), files=(old / "tone.wav",), device="cpu", json=True)
    )
    assert json.loads(capsys.readouterr().out)[0]["genre"] in before["genres"]
    assert (old / "runs/done/report.html").is_file()


def test_figures_are_compared(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(ARCHIVE) as tar:
        members = [m for m in tar.getmembers() if m.name.startswith("runs/done")]
        tar.extractall(old / "twin", members, filter="data")
    compare.run(CompareConfig(runs=(Path("runs/done"), Path("twin/runs/done"))))
    assert "p = 1" in capsys.readouterr().out


def test_a_stopped_run_goes_on(old: Path) -> None:
    run = Path("runs/stopped")
    first = read_metrics(run, "step")[-1]["step"]
    assert run_ranks(1, train.run, resumed(run)) == [0]
    steps = [line["step"] for line in read_metrics(run, "step")]
    assert steps == list(range(1, 15)), f"{first} steps were taken before"
    assert (run / "DONE").is_file()
    assert (run / "best" / "model.safetensors").is_file()


def test_a_complete_run_is_left_alone_and_its_cache_is_used(
    old: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path("runs/done")
    before = (run / "metrics.jsonl").read_bytes()
    assert run_ranks(1, train.run, resumed(run, "--change", "model")) == [0]
    assert "already complete" in capfd.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before
    held = {path: path.stat().st_mtime_ns for path in Path("shards/cache").rglob("features.npy")}
    assert held
    again = resumed(run, "--run", "runs/new", "--fresh", "--resume", "never")
    assert run_ranks(1, train.run, again) == [0]
    assert held == {path: path.stat().st_mtime_ns for path in held}, "made again"
