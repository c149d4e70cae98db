"""A run folder is read whole, in part, damaged or not at all; segments are those of the track."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from metrics import validation_event
from runs import write_evaluation, write_training
from scipy.special import softmax

from mgc_dist.data.reader import ShardSet
from mgc_dist.events import StepEvent, only
from mgc_dist.files import fingerprint
from mgc_dist.journal import Journal
from mgc_dist.models.folder import WEIGHTS
from mgc_dist.report import making, verdict
from mgc_dist.report.dossier import Dossier


@pytest.fixture
def run(shards: Path, table: Path, tmp_path: Path) -> Path:
    write_training(tmp_path / "run", shards)
    write_evaluation(tmp_path / "run", shards)
    return tmp_path / "run"


def test_steps_that_were_lost_and_done_again_count_once(run: Path) -> None:
    found = Dossier(run)
    steps = found.history(StepEvent)
    assert [step.step for step in steps] == list(range(1, 67))
    assert len(only(found.events, StepEvent)) == 73
    assert [(span.samples_seen, span.world) for span in found.spans] == [(0, 2), (330, 2)]
    assert all(span.ended_at_s >= span.started_at_s for span in found.spans)


def test_the_best_validation_is_the_last_whose_model_was_written(tmp_path: Path) -> None:
    """A higher one whose model did not fit on the disk is not it."""
    journal = Journal(tmp_path, writes=True)
    for seen, score, exported in ((10, 0.5, True), (20, 0.75, True), (30, 0.9, False)):
        journal.write(validation_event(seen, track_macro_f1=score, exported=exported))
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "validat')  # cut by a kill
    best = Dossier(tmp_path).best
    assert best is not None
    assert best.samples_seen == 20


def test_the_main_evaluation_is_that_of_the_test_split(run: Path) -> None:
    test = json.loads((run / "evaluation" / "test.json").read_text())
    for name in ("train", "validation", "elsewhere"):
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(test | {"name": name}))
    (run / "evaluation" / "damaged.json").write_text("{")
    found = Dossier(run)
    assert list(found.evaluations) == ["test", "elsewhere", "validation", "train"]
    assert found.main == ("test", test)


def test_the_segment_that_decided_and_its_audio(run: Path, shards: Path) -> None:
    found = Dossier(run)
    wrong = [line for line in found.predictions if line["truth"] != line["prediction"]]
    assert wrong
    deciders = found.deciders(wrong)
    logits = np.load(run / "predictions" / "test.logits.npy")
    with ShardSet(shards) as data:
        genres, (first, stop) = data.manifest.genres, data.rows_of("test")
        for line in wrong:
            rows = [
                row
                for row in range(first, stop)
                if data.manifest.tracks[int(data.index["track"][row])].id == line["track"]
            ]
            rows.sort(key=lambda row: int(data.index["segment"][row]))
            column = genres.index(line["prediction"])
            expected = [softmax(logits[row - first].astype(float))[column] for row in rows]
            decider = deciders[line["track"]]
            assert decider.wrong == pytest.approx(expected)
            assert decider.segment == int(np.argmax(expected))
            assert decider.start_s == pytest.approx([0.25 * k for k in range(len(rows))])
            wav, rate = soundfile.read(io.BytesIO(base64.b64decode(decider.wav)), dtype="int16")
            assert rate == data.manifest.sample_rate
            assert np.array_equal(wav, data.read(rows[decider.segment]))


def test_no_segments_without_logits_or_with_other_shards(run: Path, shards: Path) -> None:
    wrong = Dossier(run).predictions[:1]
    path = run / "predictions" / "test.logits.npy"
    np.save(path, np.load(path)[1:])
    assert Dossier(run).deciders(wrong) == {}
    path.unlink()
    assert Dossier(run).deciders(wrong) == {}
    write_evaluation(run, shards)
    figures = json.loads((run / "evaluation" / "test.json").read_text())
    other = figures | {"dataset_id": "0" * 64}
    (run / "evaluation" / "test.json").write_text(json.dumps(other))
    assert Dossier(run, shards).deciders(wrong) == {}


def test_an_empty_folder_is_empty(tmp_path: Path) -> None:
    found = Dossier(tmp_path)
    assert (found.config, found.main, found.best, found.bias, found.trained_on) == (None,) * 5
    assert (found.environment, found.engine, found.status) == ({}, {}, {})
    assert (found.events, found.attempts, found.predictions, found.spans) == ([], [], [], [])


def test_a_genre_may_hold_any_character(run: Path) -> None:
    path = run / "predictions" / "test.jsonl"
    line = json.loads(path.read_text().split("\n")[0]) | {"truth": "a\u2028b\x85c"}
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [found["truth"] for found in Dossier(run).predictions] == ["a\u2028b\x85c"]


def test_a_configuration_of_another_version_is_none(run: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write("  future: 1\n")
    assert Dossier(run).config is None


def test_an_evaluation_of_an_earlier_model_is_not_shown(run: Path) -> None:
    (run / "best").mkdir()
    (run / "best" / WEIGHTS).write_bytes(b"weights")
    path = run / "evaluation" / "test.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"weights": fingerprint(run / "best" / WEIGHTS)}))
    assert Dossier(run).main is not None
    assert Dossier(run).outdated == []
    (run / "best" / WEIGHTS).write_bytes(b"trained on")
    assert Dossier(run).main is None
    assert Dossier(run).outdated == ["test"]
    shown = " ".join(verdict.verdict(Dossier(run)).notes)
    assert "Not shown: test, measured on a model that best/ does not hold any more" in shown


def test_a_bias_table_that_was_made_again_is_not_the_trainings(
    run: Path, shards: Path, table: Path
) -> None:
    found = Dossier(run).bias
    assert found is not None
    environment = json.loads((run / "env.json").read_text())
    environment["identity"]["bias table (--bias-table)"] = "0" * 64
    (run / "env.json").write_text(json.dumps(environment))
    assert Dossier(run, shards).bias is None
    assert "gone or made again" in str(making.bias(Dossier(run, shards)))
