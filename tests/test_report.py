"""Files for people: names and values survive."""

import csv
import json
from pathlib import Path

import numpy as np

from mgc_dist import report
from mgc_dist.score import judge


def test_confusion_and_predictions(tmp_path: Path) -> None:
    genres = ("blues", "日本の曲")
    logits = np.log(np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4]], np.float32))
    found = judge(logits, np.array([0, 1, 1]), np.array([0, 1, 2]), "test")
    report.write_confusion(tmp_path / "new", "c", found.track.confusion, genres, "a title")
    with (tmp_path / "new" / "c.csv").open(encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["truth", "blues", "日本の曲"],
            ["blues", "1", "0"],
            ["日本の曲", "1", "1"],
        ]
    assert (tmp_path / "new" / "c.png").stat().st_size > 5000
    report.write_predictions(tmp_path / "p" / "t.jsonl", found, ("a", "b", "c"), genres)
    lines = [json.loads(x) for x in (tmp_path / "p" / "t.jsonl").read_text().splitlines()]
    assert [line["track"] for line in lines] == ["a", "b", "c"]
    assert lines[2]["prediction"] == "blues"
    assert lines[2]["truth"] == "日本の曲"
    told = json.loads(json.dumps(report.summary(found, genres)))
    assert told["track"]["accuracy"] == 2 / 3
    assert told["per_genre"]["blues"]["support"] == 1
