"""The exam: digits at any world size, figures against other libraries, resume, controls, pages."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny, run_ranks, shard_config, write_tracks
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score

from mgc_dist import exam, shard
from mgc_dist.config import ExamConfig
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.models.folder import load_exported, save_exported
from mgc_dist.report import exam_report, examination, page
from mgc_dist.scoring import exams
from mgc_dist.scoring.metrics import track_means
from mgc_dist.sound.transformations import transformed

ONLY = ("gain", "polarity", "splice", "mp3", "noise")


def config(run: Path, shards: Path, **changes: Any) -> ExamConfig:
    settings = {"run": run, "data": shards, "name": "test", "only": ONLY, "batch": 8}
    return ExamConfig(**(settings | {"band_segments": 16, "device": "cpu"} | changes))


def hidden_of(model: Any, wave: np.ndarray) -> np.ndarray:
    """What the last layer gets: int16 [M, T] -> [M, D]."""
    parts: list[torch.Tensor] = []
    hook = model.net.classifier.register_forward_pre_hook(lambda _, given: parts.append(given[0]))
    with torch.no_grad():
        for first in range(0, len(wave), 22):
            model(torch.from_numpy(wave[first : first + 22]))
    hook.remove()
    return torch.cat(parts).numpy()


def rows_of(shards: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, waves, labels and tracks."""
    with ShardSet(shards) as data:
        first, stop = data.rows_of(split)
        rows = np.arange(first, stop)
        wave = np.stack([data.read(int(row)) for row in rows])
        return rows, wave, data.labels[first:stop], data.tracks[first:stop]


@pytest.fixture(scope="module")
def model(shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny wav2vec2 whose last layer was fitted to training rows: it knows a little."""
    with ShardSet(shards) as data:
        built = build_tiny(tiny_model, data.manifest.genres).eval()
    _, wave, label, _ = rows_of(shards, "train")
    hidden = hidden_of(built, wave)
    fit = LogisticRegression(C=10, max_iter=2000).fit(hidden / hidden.std(), label)
    with torch.no_grad():
        built.net.classifier.weight.copy_(torch.from_numpy(fit.coef_ / hidden.std()))
        built.net.classifier.bias.copy_(torch.from_numpy(fit.intercept_))
    folder = tmp_path_factory.mktemp("examined") / "model"
    save_exported(built, built.state_dict(), folder, 16_000)
    return folder


@pytest.fixture(scope="module")
def examined(shards: Path, model: Path) -> Path:
    """The model with an exam by one rank."""
    run_ranks(1, exam.run, config(model, shards))
    return model


@pytest.fixture
def fresh(model: Path, tmp_path: Path) -> Path:
    """A copy of the model without an exam, under the same name."""
    return Path(shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("exam")))


def written(run: Path) -> dict[str, bytes]:
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted((run / "exam").rglob("*"))
        if path.suffix in (".json", ".npy", ".wav")
    }


def test_two_and_three_ranks_write_the_digits_of_one(
    examined: Path, fresh: Path, shards: Path
) -> None:
    expected = written(examined)
    assert len(expected) > 14
    for world in (2, 3):
        shutil.rmtree(fresh / "exam", ignore_errors=True)
        run_ranks(world, exam.run, config(fresh, shards))
        assert written(fresh) == expected


def test_figures_follow_from_the_answers(examined: Path, shards: Path) -> None:
    found = json.loads((examined / "exam" / "test.json").read_text())
    _, _, label, track = rows_of(shards, "test")
    truth = np.array([label[track == each][0] for each in np.unique(track)])

    def guesses(name: str) -> np.ndarray:
        logits = torch.from_numpy(np.load(examined / "exam" / "test" / f"{name}.npy")).double()
        return track_means(logits.softmax(1).numpy(), track)[1].argmax(axis=1)

    before = guesses("answers untouched 0")
    assert found["untouched"] == pytest.approx((before == truth).mean())
    assert found["untouched"] > 0.5
    right, values = [before == truth], []
    for line in found["transformations"]:
        after = guesses(f"answers {line['name']} {line['strength']:g}")
        right.append(after == truth)
        assert line["accuracy"] == pytest.approx((after == truth).mean())
        assert line["difference"] == pytest.approx(line["accuracy"] - found["untouched"])
        assert line["changed"] == pytest.approx((after != before).mean())
        lost, won = (right[0] & ~right[-1]).sum(), (right[-1] & ~right[0]).sum()
        assert (line["lost"], line["won"]) == (lost, won)
        p = stats.binomtest(int(lost), int(lost + won)).pvalue if lost + won else 1.0
        assert line["p"] == pytest.approx(p)
        values.append(p)
        recall = recall_score(truth, after, average=None, labels=range(3))
        assert list(line["per_genre"].values()) == pytest.approx(recall)
        assert line["interval"][0] <= line["accuracy"] <= line["interval"][1]
    assert len(values) == 13
    assert found["always_right"] == pytest.approx(np.all(right, axis=0).mean())
    least = min(found["transformations"], key=lambda line: line["accuracy"])
    assert found["worst"] == [least["name"], least["strength"]]
    controlled = [line["name"] for line in found["transformations"] if line["control"]]
    assert len(controlled) == 3 == len(set(controlled))


def test_answers_are_the_models_to_changed_waves(examined: Path, shards: Path) -> None:
    rows, wave, _, _ = rows_of(shards, "test")
    kept = np.load(examined / "exam" / "test" / "answers noise 10.npy")
    loaded = load_exported(examined)
    given = (torch.from_numpy(wave[:8]), torch.from_numpy(rows[:8]))
    changed = transformed("noise", 10, *given, rate=16_000, seed=0)
    with torch.no_grad():
        assert kept[:8] == pytest.approx(loaded(changed).numpy(), abs=1e-4)
        assert kept[:8] != pytest.approx(loaded(given[0]).numpy(), abs=1e-2)


def test_controls_are_scikit_learns_on_changed_training_rows(examined: Path, shards: Path) -> None:
    found = json.loads((examined / "exam" / "test.json").read_text())
    line = next(line for line in found["transformations"] if line["control"])
    key, loaded = (line["name"], line["strength"]), load_exported(examined)
    hidden = {}
    for split in ("train", "test"):
        rows, wave, label, _ = rows_of(shards, split)
        given = (torch.from_numpy(wave), torch.from_numpy(rows))
        changed = transformed(*key, *given, rate=16_000, seed=0).numpy()
        hidden[split] = hidden_of(loaded, changed).astype(np.float64), label
    mean, scale = hidden["train"][0].mean(axis=0), hidden["train"][0].std(axis=0)
    fit = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8)
    fit.fit((hidden["train"][0] - mean) / scale, hidden["train"][1])
    expected = fit.decision_function((hidden["test"][0] - mean) / scale)
    kept = np.load(examined / "exam" / "test" / f"refitted {key[0]} {key[1]:g}.npy")
    centred = kept - kept.mean(axis=1, keepdims=True)
    assert centred == pytest.approx(expected - expected.mean(axis=1, keepdims=True), abs=0.05)


def killed_at(pass_number: int, settings: ExamConfig) -> None:
    """Fail in the middle of a pass, as if the job had ended."""
    put = examination.Kept.put
    done = []

    def counted(self: Any, what: str, key: Any, values: Any) -> None:
        done.append(key)
        if len(done) == pass_number:
            raise MemoryError("as if killed")
        put(self, what, key, values)

    examination.Kept.put = counted  # type: ignore[method-assign]
    exam.run(settings)


def passes(settings: ExamConfig) -> list[tuple[str, float]]:
    """What is put by an exam."""
    put, done = examination.Kept.put, []

    def counted(self: Any, what: str, key: Any, values: Any) -> None:
        done.append((what, *key))
        put(self, what, key, values)

    examination.Kept.put = counted  # type: ignore[method-assign]
    exam.run(settings)
    return done


def test_an_exam_that_was_stopped_goes_on(examined: Path, fresh: Path, shards: Path) -> None:
    settings = config(fresh, shards)
    with pytest.raises(MemoryError):
        run_ranks(1, killed_at, 6, settings)
    assert not (fresh / "exam" / "test.json").exists()
    kept = {path.name for path in (fresh / "exam" / "test").glob("*.npy")}
    assert len(kept) == 5
    (done,) = run_ranks(1, passes, settings)
    assert len(done) == 18 - 5
    assert not {f"{what} {name} {strength:g}.npy" for what, name, strength in done} & kept
    assert written(fresh) == written(examined)
    assert run_ranks(1, passes, settings) == [[]]
    (again,) = run_ranks(1, passes, config(fresh, shards, seed=1, controls="none"))
    assert len(again) == 14
    assert not list((fresh / "exam" / "test").glob("refitted*"))


def test_all_can_be_controlled_after_the_worst(fresh: Path, shards: Path) -> None:
    settings = config(fresh, shards, only=("gain", "polarity"), band_segments=0)
    run_ranks(1, exam.run, settings)
    (done,) = run_ranks(1, passes, config(fresh, shards, only=("gain", "polarity"), controls="all"))
    found = exams.read(fresh / "exam" / "test.json")
    assert {what for what, *_ in done} == {"refitted"}
    assert all(line.control for line in found.transformations)
    assert found.bands is not None


def test_what_does_not_fit_is_refused(fresh: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--only gain loud: got loud, expected some of gain, "):
        run_ranks(1, exam.run, config(fresh, shards, only=("gain", "loud")))
    write_tracks(tmp_path / "few", genres=2)
    shard.run(shard_config(tmp_path / "few", tmp_path / "other"))
    with pytest.raises(UserError, match=r"(?s)genres of .*other: got .*without --data"):
        run_ranks(1, exam.run, config(fresh, tmp_path / "other"))
    (fresh / "exam").mkdir(exist_ok=True)
    (fresh / "exam" / "test.json").write_text("{}")
    with pytest.raises(UserError, match=r"(?s)got KeyError.*remove "):
        exams.read(fresh / "exam" / "test.json")


def test_the_page_shows_the_exam_and_its_audio(examined: Path) -> None:
    text = page.write(examined).read_text()
    assert "What changes its answers" in text
    assert "with the last layer anew" in text
    found = exams.read(examined / "exam" / "test.json")
    assert text.count("data:audio/wav") == len(found.heard) > 0
    for name in ("polarity", "mp3", "splice"):
        assert name in text


def test_compare_shows_exams_of_the_same_tracks_side_by_side(
    examined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(examined, tmp_path / "other"))
    exam_report.show_beside(exam_report.beside((examined, other), "test"))
    found, shown = exams.read(examined / "exam" / "test.json"), capsys.readouterr().out
    for line in found.transformations:
        row = next(row for row in shown.splitlines() if f" {line.name} {line.strength:g} " in row)
        assert row.count(f"{line.accuracy:.3f}") == 2
    path = other / "exam" / "test.json"
    path.write_text(path.read_text().replace(found.dataset_id, "0" * 64))
    assert exam_report.beside((examined, other), "test") == []
    path.unlink()
    assert exam_report.beside((examined, other), "test") == []
