"""The report has the figures of cross-entropy beside its own, or says that they are missing."""

import json
import shutil
from pathlib import Path

import pytest
from runs import write_evaluation, write_training
from test_verdict import words

from mgc_dist import compare
from mgc_dist.config import CompareConfig, LossConfig
from mgc_dist.report import beside, page, verdict
from mgc_dist.report.dossier import Dossier

POE, CE = LossConfig(loss="poe", beta=0.5), LossConfig(loss="ce")


@pytest.fixture
def runs(shards: Path, table: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run of plain cross-entropy and a debiased one, both evaluated."""
    for name, objective, skill in (("ce", CE, 0.2), ("poe", POE, 5.0)):
        write_training(tmp_path / name, shards, objective=objective)
        write_evaluation(tmp_path / name, shards, skill=skill)
        lines = tmp_path / name / "predictions" / "test.jsonl"
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        for n, row in enumerate(rows):
            row["subgroup"] = "bias-conflicting" if n % 2 else "bias-aligned"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "ce", tmp_path / "poe"


def test_alone_a_debiased_run_says_what_is_missing(runs: tuple[Path, Path]) -> None:
    ce, poe = runs
    shown = words(beside.section(Dossier(poe)))
    assert "Nothing here says whether the loss helped" in shown
    assert f"RUN-CE {poe}" in shown
    assert "harder for any model" in shown
    assert "only against a known shortcut" in shown
    assert "nothing about whether the loss" in words(verdict.conclusions(Dossier(poe)))
    assert beside.section(Dossier(ce)) is None


def test_after_compare_both_columns_stand_there_and_validation_prefers_one(
    runs: tuple[Path, Path],
) -> None:
    ce, poe = runs
    log = ce / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if line["event"] == "validation":
            line["track_nll"] /= 2
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.write(poe)
    compare.run(CompareConfig(runs=(ce, poe)))
    pair = json.loads((poe / "comparison" / "ce" / "comparison.json").read_text())
    shown = words(beside.section(Dossier(poe)))
    accuracy = pair["accuracy"]
    assert accuracy["difference"] > 0
    row = f"test, accuracy {accuracy['a']:.3f} {accuracy['b']:.3f} {accuracy['difference']:+.3f}"
    assert row in shown
    conflicting = pair["subgroups"]["bias-conflicting"]
    named = f"accuracy of bias-conflicting ({conflicting['count']}) {conflicting['a']:.3f}"
    assert named in shown
    mine, theirs = Dossier(poe).best, Dossier(ce).best
    assert mine is not None
    assert theirs is not None
    figures = f"NLL {theirs.track_nll:.3f} and {mine.track_nll:.3f}"
    assert f"Validation prefers ce (ce) ({figures})" in shown
    assert "Nothing here says" not in shown
    told = words(verdict.conclusions(Dossier(poe)))
    assert f"its accuracy less that of --loss ce is {accuracy['difference']:+.3f}" in told
    assert "nothing about whether the loss" not in told
    assert "Beside other runs" in (poe / page.NAME).read_text(), "compare writes the page anew"
    shutil.rmtree(ce)  # the comparison stays readable
    assert row in words(beside.section(Dossier(poe)))


def test_a_comparison_over_other_tracks_is_not_shown(runs: tuple[Path, Path]) -> None:
    ce, poe = runs
    compare.run(CompareConfig(runs=(ce, poe)))
    evaluation = poe / "evaluation" / "test.json"
    figures = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps(figures | {"dataset_id": "another"}))
    assert "Nothing here says" in words(beside.section(Dossier(poe)))
