"""Files of an evaluation: names and values survive, and every key is there."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import recall_score

from mgc_dist.report import evaluation as report
from mgc_dist.report.evaluation import Subject
from mgc_dist.scoring.score import SplitScores, judge
from mgc_dist.scoring.subgroups import Subgroups

GENRES = ("blues", "日本の曲")
CALIBRATION = {"ece", "ece_floor", "overconfidence"}
SCALARS = {"count", "accuracy", "balanced_accuracy", "macro_f1", "nll", "brier", *CALIBRATION}


def measured(**changes: object) -> tuple[Subject, SplitScores]:
    """Three tracks; the last one has two segments."""
    logits = np.log(np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.7, 0.3]], np.float32))
    result = judge(logits, np.array([0, 1, 1, 1]), np.array([0, 1, 2, 2]), "test")
    subject = {
        "name": "test-of-x",
        "run": "r",
        "dataset_id": "d",
        "genres": GENRES,
        "track_ids": ("a", "b", "c"),
        "groups": ("one", None, "one"),
        "temperature": 2.0,
        "aligned": np.array([True, False, False]),
        "subgroups": Subgroups(source="a table", of_track=["loud", None, "quiet"]),
    }
    return Subject(**(subject | changes)), result


def told(subject: Subject, result: SplitScores) -> dict:
    figures = report.summary(subject, result)
    return json.loads(json.dumps(figures, allow_nan=False))


def test_every_figure_is_in_the_file() -> None:
    found = told(*measured())
    assert (found["split"], found["name"], found["run"]) == ("test", "test-of-x", "r")
    for unit in (found["track"], found["segment"], *found["aggregates"].values()):
        assert set(unit) == SCALARS
    assert found["track"]["accuracy"] == pytest.approx(2 / 3)
    assert found["segment"]["count"] == 4
    assert found["aggregates"]["vote"]["nll"] is None
    assert found["aggregates"]["mean-prob"] == found["track"]
    assert found["confusion"] == [[1, 0], [1, 1]]
    genre = found["per_genre"]["日本の曲"]
    assert genre["recall"] == recall_score([0, 1, 1], [0, 1, 0])
    assert genre["recall_interval"][0] < 0.5 < genre["recall_interval"][1]
    assert found["worst_genre"] == {"name": "日本の曲", "recall": 0.5}
    assert sum(found["reliability"]["count"]) == 3
    assert found["reliability"]["accuracy"][0] is None
    assert found["intervals"]["level"] == 0.95


def test_groups_are_drawn_only_where_they_are_known() -> None:
    assert told(*measured())["intervals"]["known_groups"] == 1
    assert set(told(*measured())["intervals"]["groups"]) == {
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
    }
    alone = told(*measured(groups=(None, None, None)))["intervals"]
    assert alone["groups"] is None
    assert alone["known_groups"] == 0
    assert alone["tracks"]["accuracy"][0] <= 2 / 3 <= alone["tracks"]["accuracy"][1]


def test_figures_without_the_temperature_stand_beside_those_with_it() -> None:
    found = told(*measured())
    rows = np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.7, 0.3]]) ** 2.0
    rows /= rows.sum(1, keepdims=True)
    truth = np.array([rows[0, 0], rows[1, 1], rows[2:, 1].mean()])
    without = found["temperature"]["without"]
    assert without["nll"] == pytest.approx(-np.log(truth).mean(), rel=1e-5)
    assert without["accuracy"] == pytest.approx(2 / 3)
    assert found["temperature"]["fitted_on"] == "validation"
    assert found["track"]["nll"] == pytest.approx(-np.log([0.9, 0.7, 0.35]).mean(), rel=1e-5)
    assert told(*measured(temperature=None))["temperature"] is None


def test_subgroups_of_tracks_and_of_their_segments() -> None:
    found = told(*measured())["subgroups"]
    assert found["source"] == "a table"
    assert found["groups"]["quiet"]["count"] == 1
    assert found["groups"]["quiet"]["accuracy"] == 0.0
    quiet = found["groups"]["quiet"]["calibration"]
    assert set(quiet) == CALIBRATION
    assert quiet["ece"] == quiet["overconfidence"] == pytest.approx(0.65), "says 0.65, is wrong"
    assert quiet["ece_floor"] == pytest.approx(2 * 0.65 * 0.35)
    assert found["segment"]["quiet"] == {"count": 2, "accuracy": 0.0}
    assert found["worst_group"] == {"name": "quiet", "accuracy": 0.0, "count": 1}
    own = Subgroups(source="s", of_track=["x", "y", "y"], of_row=["x", "x", "y", "x"])
    found = told(*measured(subgroups=own))["subgroups"]
    assert found["segment"]["x"] == {"count": 3, "accuracy": pytest.approx(2 / 3)}
    assert told(*measured(subgroups=None))["subgroups"] is None


def test_files_are_written(tmp_path: Path) -> None:
    subject, result = measured()
    report.write(tmp_path / "r", subject, result, told(subject, result))
    folder = tmp_path / "r" / "evaluation"
    with (folder / "confusion-test-of-x.csv").open(encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["truth", "blues", "日本の曲"],
            ["blues", "1", "0"],
            ["日本の曲", "1", "1"],
        ]
    subject, result = measured(genres=("=1+1", "blues"))  # a spreadsheet would show 2
    report.write(tmp_path / "f", subject, result, told(subject, result))
    text = (tmp_path / "f" / "evaluation" / "confusion-test-of-x.csv").read_text()
    assert text.split() == ["truth,'=1+1,blues", "'=1+1,1,0", "blues,1,1"]
    for name in ("confusion", "reliability"):
        assert (folder / f"{name}-test-of-x.png").stat().st_size > 5000
    assert json.loads((folder / "test-of-x.json").read_text())["dataset_id"] == "d"
    text = (tmp_path / "r/predictions/test-of-x.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["track"] for line in lines] == ["a", "b", "c"]
    assert (lines[2]["truth"], lines[2]["prediction"]) == ("日本の曲", "blues")
    assert (lines[0]["group"], lines[1]["group"]) == ("one", None)
    assert [line["bias_aligned"] for line in lines] == [True, False, False]
    assert [line["subgroup"] for line in lines] == ["loud", None, "quiet"]
    assert lines[2]["probabilities"]["blues"] == pytest.approx(0.65, abs=1e-6)
    logits = np.load(tmp_path / "r/predictions/test-of-x.logits.npy", allow_pickle=False)
    assert logits.dtype == np.float32
    assert logits.tobytes() == result.logits.tobytes()


def test_without_a_bias_table_nothing_is_aligned(tmp_path: Path) -> None:
    subject, result = measured(aligned=None, subgroups=None)
    report.write_predictions(tmp_path / "new" / "p.jsonl", subject, result)
    lines = [json.loads(line) for line in (tmp_path / "new/p.jsonl").open(encoding="utf-8")]
    assert [(line["bias_aligned"], line["subgroup"]) for line in lines] == [(None, None)] * 3


def test_one_artist_of_all_tracks_gives_no_interval_over_groups() -> None:
    subject, result = measured(groups=("one", "one", "one"))
    found = told(subject, result)["intervals"]
    assert (found["groups"], found["known_groups"]) == (None, 1)
    assert found["tracks"] is not None
