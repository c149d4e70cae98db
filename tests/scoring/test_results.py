"""What evaluate wrote is read back, or refused with the reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgc_dist.errors import UserError
from mgc_dist.report import evaluation as report
from mgc_dist.report.evaluation import Subject
from mgc_dist.scoring import results
from mgc_dist.scoring.score import judge
from mgc_dist.scoring.subgroups import Subgroups, names_of

GENRES = ("blues", "jazz", "rock")


def write_run(run: Path, *, seed: int = 0, skill: float = 0.6, **changes: Any) -> Path:
    """An evaluation of 60 tracks by 20 artists; the truth does not depend on the seed."""
    truth = np.repeat(np.arange(3), 20)
    rng = np.random.default_rng(seed)
    shown = np.where(rng.random(60) < skill, truth, rng.integers(0, 3, 60))
    logits = (rng.normal(size=(60, 3)) + 4 * np.eye(3)[shown]).astype(np.float32)
    aligned = np.arange(60) % 3 > 0
    subject: dict[str, Any] = {
        "name": "test",
        "run": run.name,
        "dataset_id": "d" * 64,
        "genres": GENRES,
        "track_ids": tuple(f"t{track:02d}" for track in range(60)),
        "groups": tuple(f"artist {track // 3}" for track in range(60)),
        "aligned": aligned,
        "subgroups": Subgroups(source="drawn", of_track=names_of(aligned)),
    } | changes
    way = subject.pop("aggregate", "mean-prob")
    result = judge(logits, truth, np.arange(60), "test", way)
    made = Subject(**subject)
    figures = report.summary(made, result)
    (run / "evaluation").mkdir(parents=True)
    (run / "evaluation" / f"{made.name}.json").write_text(json.dumps(figures))
    report.write_predictions(run / "predictions" / f"{made.name}.jsonl", made, result)
    return run


def test_truths_and_predictions_come_back_sorted_by_track(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    lines = (run / "predictions/test.jsonl").read_text().rstrip("\n").split("\n")
    (run / "predictions/test.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    found = results.read(run, "test")
    assert found.tracks == tuple(sorted(found.tracks))
    assert found.label.tolist() == np.repeat(np.arange(3), 20).tolist()
    parsed = [json.loads(line) for line in lines]
    assert [GENRES[guess] for guess in found.guess] == [line["prediction"] for line in parsed]
    assert found.groups[:4] == ("artist 0", "artist 0", "artist 0", "artist 1")
    assert found.subgroups[:2] == ("bias-conflicting", "bias-aligned")
    told = json.loads((run / "evaluation/test.json").read_text())
    assert (found.guess == found.label).mean() == pytest.approx(told["track"]["accuracy"])


def test_a_line_separator_in_a_name_is_no_end_of_a_line(tmp_path: Path) -> None:
    genres = ("blues", "jazz", "rock\u2028roll")
    assert results.read(write_run(tmp_path / "a", genres=genres), "test").genres == genres


def test_missing_and_damaged_predictions_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with pytest.raises(UserError, match=r"validation\.json, but test(.|\n)*launch/evaluate\.py"):
        results.read(run, "validation")
    with pytest.raises(UserError, match=r"no .*none/evaluation/test\.json,"):
        results.read(tmp_path / "none", "test")
    path = run / "predictions/test.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-200])
    with pytest.raises(UserError, match=r"predictions .*test\.jsonl: got JSONDecodeError"):
        results.read(run, "test")
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="59 tracks, and 60 in"):
        results.read(run, "test")
    path.write_text(whole.replace('"subgroup"', '"other"'))
    with pytest.raises(UserError, match="KeyError: 'subgroup'"):
        results.read(run, "test")


def test_runs_that_were_measured_differently_are_refused(tmp_path: Path) -> None:
    a = results.read(write_run(tmp_path / "a"), "test")
    results.refuse_different(a, results.read(write_run(tmp_path / "b", seed=1), "test"))
    ids = (*(f"t{track:02d}" for track in range(59)), "new")
    for name, changes, message in (
        ("ids", {"track_ids": ids}, r"tracks of .*60 tracks, 1 of its own \(t59\) and .*\(new\)"),
        ("set", {"dataset_id": "e" * 64}, "data set of .*got dddddddddddd and eeeeeeeeeeee"),
        ("genres", {"genres": ("blues", "jazz", "pop")}, "genres of .*rock and blues, jazz, pop"),
        ("way", {"aggregate": "vote"}, "--aggregate of .*got mean-prob and vote"),
    ):
        other = results.read(write_run(tmp_path / name, **changes), "test")
        with pytest.raises(UserError, match=message):
            results.refuse_different(a, other)
    lines = (a.run / "predictions/test.jsonl").read_text()
    (a.run / "predictions/test.jsonl").write_text(
        lines.replace('"truth": "rock"', '"truth": "jazz"', 1)
    )
    with pytest.raises(UserError, match=r"truths of .*got t40 rock and t40 jazz"):
        results.refuse_different(a, results.read(a.run, "test"))
