"""evaluate, predict, export on a trained run: files, figures, refusals."""

import csv
import errno
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import run_ranks, shard_config, write_tracks
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score
from soxr import resample
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import config, train_on
from transformers import pipeline

from mgc_dist import cli, evaluate, export, predict, shard
from mgc_dist.config import EvaluateConfig, ExportConfig, PredictConfig, TrainConfig
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.files import locked
from mgc_dist.packing.music import compose
from mgc_dist.scoring.score import fit_temperature


@pytest.fixture(scope="module")
def trained(
    shards: Path, table: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of 20 steps that has learned a little."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train_on(2, config(shards, tiny_model, run, epochs=3.0, checkpoint_every_epochs=3.0))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_evaluate_writes_the_same_digits_at_any_world_size(run: Path) -> None:
    written = []
    for world in (1, 2, 4):
        run_ranks(world, evaluate.run, EvaluateConfig(run=run, batch=8))
        names = ("evaluation/test.json", "evaluation/confusion-test.csv", "predictions/test.jsonl")
        names += ("predictions/test.logits.npy",)
        written.append([(run / name).read_bytes() for name in names])
    assert written[0] == written[1] == written[2]


def test_figures_follow_from_the_predictions(run: Path) -> None:
    run_ranks(1, evaluate.run, EvaluateConfig(run=run, split="validation"))
    lines = [json.loads(line) for line in (run / "predictions/validation.jsonl").open()]
    found = json.loads((run / "evaluation" / "validation.json").read_text())
    truth, guess = [line["truth"] for line in lines], [line["prediction"] for line in lines]
    assert found["track"]["count"] == len(lines) == 6
    assert found["segment"]["count"] == 66
    assert found["track"]["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    expected = f1_score(truth, guess, average="macro", labels=found["genres"], zero_division=0)
    assert found["track"]["macro_f1"] == pytest.approx(expected)
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert max(line["probabilities"], key=line["probabilities"].get) == line["prediction"]
    with (run / "evaluation" / "confusion-validation.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["truth", *found["genres"]]
    assert [[int(x) for x in row[1:]] for row in rows[1:]] == found["confusion"]
    picture = (run / "evaluation" / "confusion-validation.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_the_temperature_is_that_of_the_validation_logits(run: Path) -> None:
    """Six tracks tell none that also helps tracks left out; other tests plant one."""
    run_ranks(1, evaluate.run, EvaluateConfig(run=run, split="validation"))
    logits = np.load(run / "predictions" / "validation.logits.npy")
    trained_with = cli.parse("train", TrainConfig, ["--config", f"{run}/config.yaml"])
    with ShardSet(trained_with.data.shards) as data:
        first, stop = data.rows_of("validation")
        track, label = data.tracks[first:stop], data.labels[first:stop]
        groups = [data.manifest.tracks[place].group for place in np.unique(track)]
    value = json.loads((run / "best/config.json").read_text())["calibration_temperature"]
    assert value == fit_temperature(logits, label, track, groups)


def plant(run: Path, temperature: float = 1.75) -> float:
    """Give the run's model a temperature."""
    path = run / "best" / "config.json"
    told = json.loads(path.read_text()) | {"calibration_temperature": temperature}
    path.write_text(json.dumps(told))
    return temperature


def test_every_figure_is_of_the_calibrated_probabilities(run: Path) -> None:
    def measured() -> tuple[dict, np.ndarray]:
        run_ranks(1, evaluate.run, EvaluateConfig(run=run))
        told = json.loads((run / "evaluation" / "test.json").read_text())
        return told, np.load(run / "predictions" / "test.logits.npy")

    before, raw = measured()
    value = plant(run)
    after, logits = measured()
    np.testing.assert_allclose(logits, raw / value, rtol=1e-6)
    assert before["temperature"] is None
    assert after["temperature"]["value"] == value
    for name in ("nll", "ece", "accuracy"):
        assert after["temperature"]["without"][name] == pytest.approx(before["track"][name])
    assert after["track"]["nll"] != pytest.approx(before["track"]["nll"], abs=1e-9)
    assert after["segment"]["accuracy"] == before["segment"]["accuracy"]
    of_track = [json.loads(line) for line in (run / "predictions/test.jsonl").open()]
    with ShardSet(
        cli.parse("train", TrainConfig, ["--config", f"{run}/config.yaml"]).data.shards
    ) as data:
        first, stop = data.rows_of("test")
        track = data.tracks[first:stop]
    for line, place in zip(of_track, np.unique(track), strict=True):
        expected = softmax(raw[track == place].astype(np.float64) / value, axis=1).mean(0)
        assert list(line["probabilities"].values()) == pytest.approx(expected.tolist(), rel=1e-5)


def test_bias_subgroups_come_from_the_runs_own_table(run: Path, shards: Path, table: Path) -> None:
    run_ranks(1, evaluate.run, EvaluateConfig(run=run, aggregate="vote"))
    found = json.loads((run / "evaluation" / "test.json").read_text())
    assert found["aggregate"] == "vote"
    bias = np.exp(np.load(table / "log_probability.npy"))
    with ShardSet(shards) as data:
        first, stop = data.rows_of("test")
        ids = [track.id for track in data.manifest.tracks]
        aligned, rows = {}, 0
        for track in np.unique(data.tracks[first:stop]):
            inside = first + np.flatnonzero(data.tracks[first:stop] == track)
            label = data.labels[inside[0]]
            aligned[ids[track]] = bool(bias[inside].mean(0).argmax() == label)
            rows += int((bias[inside].argmax(1) == label).sum())
    lines = [json.loads(line) for line in (run / "predictions" / "test.jsonl").open()]
    assert {line["track"]: line["bias_aligned"] for line in lines} == aligned
    assert all(line["group"] for line in lines)
    groups = found["subgroups"]["groups"]
    assert groups["bias-aligned"]["count"] == sum(aligned.values())
    assert groups["bias-conflicting"]["count"] == len(aligned) - sum(aligned.values())
    assert found["subgroups"]["segment"]["bias-aligned"]["count"] == rows
    right = [line["truth"] == line["prediction"] for line in lines if line["bias_aligned"]]
    assert groups["bias-aligned"]["accuracy"] == pytest.approx(np.mean(right))
    assert found["intervals"]["known_groups"] == len({line["group"] for line in lines})


def test_without_a_table_there_are_no_subgroups_and_a_word_about_it(
    run: Path, shards: Path, copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, evaluate.run, EvaluateConfig(run=run, data=shards))
    assert "--bias-table names the table" in capfd.readouterr().out
    found = json.loads((run / "evaluation" / "test-of-shards.json").read_text())
    assert found["subgroups"] is None
    point_at(run, copy)
    run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    assert f"no bias table {copy / 'bias'}" in capfd.readouterr().out
    given = EvaluateConfig(run=run, data=shards, bias_table=shards / "bias", name="given")
    run_ranks(1, evaluate.run, given)
    assert json.loads((run / "evaluation/given.json").read_text())["subgroups"] is not None
    with pytest.raises(UserError, match=r"bias table .*got no such table"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=run, bias_table=tmp_path / "none"))


def test_a_damaged_table_is_refused_but_not_to_a_run_that_never_read_one(
    run: Path, copy: Path, table: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(table, copy / "bias")
    header = json.loads((copy / "bias/header.json").read_text())
    (copy / "bias/header.json").write_text(json.dumps(header | {"dataset_id": "0" * 64}))
    point_at(run, copy)
    with pytest.raises(UserError, match="a table of data set 000000000000"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("loss: poe", "loss: ce"))
    run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    assert "no bias subgroups" in capfd.readouterr().out


def test_a_bias_table_that_was_made_again_is_told(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    assert "made again" not in capfd.readouterr().out
    environment = json.loads((run / "env.json").read_text())
    environment["identity"]["bias table (--bias-table)"] = "0" * 64
    (run / "env.json").write_text(json.dumps(environment))
    run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    assert "is not the table of the training: it was made again since" in capfd.readouterr().out


def test_subgroups_of_the_users_table(run: Path, shards: Path, tmp_path: Path) -> None:
    with ShardSet(shards) as data:
        ids = [track.id for track in data.manifest.tracks]
    lines = [f"{track},{'old' if n % 2 else 'new'}" for n, track in enumerate(ids)]
    (tmp_path / "t.csv").write_text("track,decade\n" + "\n".join(lines) + "\n")
    given = EvaluateConfig(run=run, subgroups=tmp_path / "t.csv", subgroup_column="decade")
    run_ranks(1, evaluate.run, given)
    found = json.loads((run / "evaluation" / "test.json").read_text())["subgroups"]
    assert found["source"] == "column decade of t.csv"
    assert set(found["groups"]) == {"new", "old"}
    assert sum(each["count"] for each in found["groups"].values()) == 6
    with pytest.raises(UserError, match="--subgroup-column"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=run, subgroups=tmp_path / "t.csv"))


def test_subgroups_by_a_property_of_the_source_files(run: Path, shards: Path) -> None:
    run_ranks(1, evaluate.run, EvaluateConfig(run=run, subgroup_column="loudness_lufs"))
    found = json.loads((run / "evaluation" / "test.json").read_text())["subgroups"]
    assert found["source"] == "loudness_lufs of the source files"
    assert sum(each["count"] for each in found["groups"].values()) == 6
    with pytest.raises(UserError, match=r"expected one of track, genre, .*codec"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=run, subgroup_column="decade"))


def test_what_evaluate_prints(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plant(run)
    run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    shown = capfd.readouterr().out
    found = json.loads((run / "evaluation" / "test.json").read_text())
    assert f"{found['track']['accuracy']:.3f}" in shown
    for word in ("mean-logit", "vote", "(segments)"):
        assert word in shown
    assert shown.index("95 % over artists") < shown.index("95 % over tracks")
    assert f"worst genre: {found['worst_genre']['name']}" in shown
    assert f"with temperature {found['temperature']['value']:.3f}" in shown


def point_at(run: Path, shards: Path) -> None:
    """Let a run's settings name other shards."""
    text = (run / "config.yaml").read_text()
    lines = text.splitlines()
    moved = [f"    shards: {shards}" if "shards: " in line else line for line in lines]
    (run / "config.yaml").write_text("\n".join(moved))


def test_validation_while_training_said_the_same(run: Path) -> None:
    from metrics import read_metrics

    run_ranks(1, evaluate.run, EvaluateConfig(run=run, split="validation", batch=3))
    found = json.loads((run / "evaluation" / "validation.json").read_text())
    least = min(line["track_nll"] for line in read_metrics(run, "validation"))
    assert found["track"]["nll"] == pytest.approx(least, rel=1e-6)


def test_evaluate_refuses_other_genres_and_missing_models(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    write_tracks(tmp_path / "two", genres=2, duration_s=1.0)
    (tmp_path / "two" / "classical").rename(tmp_path / "two" / "pop")
    shard.run(shard_config(tmp_path / "two", tmp_path / "two-shards", groups=None))
    other = EvaluateConfig(run=run, data=tmp_path / "two-shards")
    with pytest.raises(UserError, match=r"got blues, pop, of which .* knows blues, expected at le"):
        run_ranks(1, evaluate.run, other)
    with pytest.raises(UserError, match="no such folder"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=tmp_path / "nothing"))
    exported = Path(shutil.copytree(run / "best", tmp_path / "exported"))
    with pytest.raises(UserError, match=r"names its shards(.|\n)*--data"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=exported))
    run_ranks(1, evaluate.run, EvaluateConfig(run=exported, data=shards))
    assert (exported / "evaluation" / "test-of-shards.json").is_file()


def test_evaluate_refuses_shards_that_are_not_the_trained_ones(
    run: Path, tracks: Path, tmp_path: Path
) -> None:
    original = json.loads((run / "env.json").read_text())["dataset_id"]
    shard.run(shard_config(tracks, tmp_path / "again", seed=5))
    point_at(run, tmp_path / "again")
    with pytest.raises(UserError, match=rf"packed after the training(.|\n)*{original[:12]}"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    shutil.rmtree(tmp_path / "again")
    with pytest.raises(UserError, match=r"got no folder .*again here"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    shard.run(shard_config(tracks, tmp_path / "long", segment_s=1.0))
    with pytest.raises(UserError, match=r"got 16000 samples, expected 8000"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=run, data=tmp_path / "long"))


@pytest.mark.parametrize("temperature", [None, 1.75])
def test_predict_agrees_with_evaluate_on_the_same_tracks(
    temperature: float | None, run: Path, tracks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if temperature:
        plant(run, temperature)
    run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    lines = [json.loads(line) for line in (run / "predictions" / "test.jsonl").open()]
    files = []
    for line in lines:
        genre, number = line["track"].rsplit("_", 1)
        files.append(tracks / genre / f"{genre}.{number}.wav")
    predict.run(PredictConfig(run=run, files=tuple(files), hop_s=0.25, json=True))
    for line, found in zip(lines, json.loads(capsys.readouterr().out), strict=True):
        assert found["genre"] == line["prediction"]
        assert len(found["segments"]) == 11
        assert found["segments"][2]["start_s"] == 0.5
        for genre, probability in line["probabilities"].items():
            assert found["probabilities"][genre] == pytest.approx(probability, abs=1e-5)


def test_predict_takes_any_length_rate_and_channel_count(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wave = compose("country", 0, seed=9, duration_s=2.0, per_artist=1)
    stereo = np.stack([wave, wave], axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, 22_050)
    soundfile.write(tmp_path / "b.wav", wave[: int(0.6 * 22_050)], 22_050)
    soundfile.write(tmp_path / "c.ogg", wave, 48_000)
    soundfile.write(tmp_path / "d.wav", wave[:2000], 22_050)
    files = tuple(tmp_path / name for name in ("a.flac", "b.wav", "c.ogg"))
    assert predict.run(PredictConfig(run=run / "best", files=files, hop_s=0.25)) == 0
    shown = capsys.readouterr().out
    blocks = re.split(r"^(?=/)", shown, flags=re.M)[1:]
    assert [len(block.splitlines()) - 1 for block in blocks] == [7, 1, 2], (
        "lines of 2 s, 0.6 s and 0.92 s"
    )
    assert f"{tmp_path / 'a.flac'}: " in shown
    with pytest.raises(UserError, match=r"d\.wav: got 0\.09 s, expected at least 0\.5 s"):
        predict.run(PredictConfig(run=run, files=(tmp_path / "d.wav",)))
    with pytest.raises(
        UserError, match=r"got 2 of 3 that cannot be used(.|\n)*d\.wav(.|\n)*e\.wav"
    ):
        predict.run(
            PredictConfig(run=run, files=(files[0], tmp_path / "d.wav", tmp_path / "e.wav"))
        )
    assert str(files[0]) in capsys.readouterr().out  # the good file is answered all the same
    with pytest.raises(UserError, match="FILE: got none"):
        predict.run(PredictConfig(run=run, files=()))


def test_predict_shows_a_long_file_in_few_lines(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wave = compose("blues", 1, seed=9, duration_s=30.0, per_artist=1)
    soundfile.write(tmp_path / "long.wav", wave, 22_050)
    config = PredictConfig(run=run, files=(tmp_path / "long.wav",), hop_s=0.5)
    predict.run(config)
    head, merged, *lines = capsys.readouterr().out.splitlines()
    assert merged == "  a line is 3 of 60 segments, their mean"
    assert len(lines) == 20
    predict.run(replace(config, json=True))
    (found,) = json.loads(capsys.readouterr().out)
    genres = list(found["probabilities"])
    table = np.array([list(s["probabilities"].values()) for s in found["segments"]])
    assert f"{found['genre']}  ({found['genre']} {max(found['probabilities'].values()):.3f}" in head
    for k, line in enumerate(lines):
        mean = table[3 * k : 3 * k + 3].mean(axis=0)
        start, genre, sure, *bar = line.split()
        minutes, seconds = start.split(":")
        assert 60 * int(minutes) + float(seconds) == 1.5 * k
        assert (genre, sure) == (genres[int(mean.argmax())], f"{mean.max():.2f}")
        assert len("".join(bar)) == round(24 * mean.max())


def test_predict_draws_a_picture_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wave = compose("blues", 1, seed=9, duration_s=2.0, per_artist=1)
    for name in ("one.wav", "two.wav", "two.flac"):
        soundfile.write(tmp_path / name, wave, 22_050)
    one, two, same = (tmp_path / name for name in ("one.wav", "two.wav", "two.flac"))
    plot = tmp_path / "plots" / "p.png"
    predict.run(PredictConfig(run=run, files=(one,), plot=plot))
    predict.run(PredictConfig(run=run, files=(one, two), plot=plot, json=True))
    names = sorted(path.name for path in plot.parent.iterdir())
    assert names == ["p-one.png", "p-two.png", "p.png"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"two files whose picture would be .*p-two\.png"):
        predict.run(PredictConfig(run=run, files=(two, same), plot=plot))
    assert capsys.readouterr().out == "", "refused before anything is predicted"
    with pytest.raises(UserError, match=r"--plot: got p\.jpeg, expected a name that ends in .png"):
        PredictConfig(run=run, files=(one,), plot=Path("p.jpeg"))


def test_a_complete_run_and_its_evaluation_leave_a_report(run: Path) -> None:
    before = (run / "report.html").read_text()
    assert "Not evaluated yet" in before
    assert "tries</dt><dd>1 (1 done)" in before
    run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    after = (run / "report.html").read_text()
    assert "Not evaluated yet" not in after
    assert "tracks of the test split" in after
    assert "could not be made" not in before + after


def test_training_draws_its_metrics_for_tensorboard(run: Path) -> None:
    from metrics import read_metrics

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    drawn, truth = found.Scalars("train/loss"), read_metrics(run, "step")
    assert [event.step for event in drawn] == [line["samples_seen"] for line in truth]
    losses = [line["loss"] for line in truth]
    assert [event.value for event in drawn] == pytest.approx(losses)
    validations = read_metrics(run, "validation")
    assert len(found.Images("validation/confusion")) == len(validations)
    last = validations[-1]
    assert found.Scalars("validation/track_accuracy")[-1].value == pytest.approx(
        last["track_accuracy"]
    )


def test_an_exported_model_says_of_whole_files_what_predict_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(run, 1.4)
    out = tmp_path / "model"
    export.run(ExportConfig(run=run, out=out))
    kinds = {"a.wav": (2.0, 22_050, 1), "b.flac": (3.0, 44_100, 2), "c.wav": (10.3, 16_000, 1)}
    kinds |= {"d.mp3": (4.0, 44_100, 2), "e.ogg": (0.7, 48_000, 1)}
    for name, (seconds, rate, channels) in kinds.items():
        wave = compose("jazz", 3, seed=5, duration_s=seconds, per_artist=1)
        wave = resample(wave, 22_050, rate)
        both = np.stack([wave, 0.3 * wave[::-1]], axis=1)[:, :channels]
        soundfile.write(tmp_path / name, 0.6 * both, rate)
    files = [tmp_path / name for name in kinds]
    capsys.readouterr()
    predict.run(PredictConfig(run=run, files=tuple(files), json=True))
    expected = json.loads(capsys.readouterr().out)
    program = (
        "import json, sys; sys.modules['mgc_dist'] = None; sys.path.insert(0, '.')\n"
        "from genre import GenreClassifier; classify = GenreClassifier(device='cpu')\n"
        "print(json.dumps([classify(name) for name in sys.argv[1:]]))"
    )
    words = [sys.executable, "-c", program, *map(str, files)]
    done = subprocess.run(words, cwd=out, capture_output=True, text=True, check=True)
    for ours, theirs in zip(expected, json.loads(done.stdout), strict=True):
        assert theirs["probabilities"] == pytest.approx(ours["probabilities"], abs=1e-5)
        assert theirs["genre"] == ours["genre"]


def test_a_library_is_predicted_line_by_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = tmp_path / "library"
    for name in ("Ann/one.wav", "Ann/deep/two.flac", "three.wav", ".hidden/x.wav"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        wave = compose("blues", len(name), seed=9, duration_s=1.0, per_artist=1)
        soundfile.write(library / name, wave, 22_050)
    (library / "broken.mp3").write_bytes(b"words" * 999)
    (library / "cover.jpg").write_bytes(b"picture")
    table, lines = tmp_path / "out.csv", tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"broken\.mp3: got no readable audio"):
        predict.run(PredictConfig(run=run, files=(library,), csv=table))
    rows = list(csv.DictReader(table.open()))
    assert {Path(row["file"]).name for row in rows} == {
        *("one.wav", "two.flac", "three.wav", "broken.mp3"),
    }
    for row in rows:
        if row["error"]:
            assert row["genre"] == ""
            continue
        found = {name: float(row[name]) for name in ("blues", "classical", "country")}
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)
        assert max(found, key=found.get) == row["genre"]
        assert row["is_near_chance"] == str(float(row["probability"]) < 1.5 / 3)
    listed = "".join(f"{library / name}\n" for name in ("three.wav", "broken.mp3", "none.wav"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(listed))
    with pytest.raises(UserError, match=r"got 2 of 3 that cannot be used(.|\n)*none\.wav"):
        predict.run(PredictConfig(run=run, files=(Path("-"),), jsonl=lines))
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [Path(line["file"]).name for line in written] == ["three.wav", "broken.mp3", "none.wav"]
    assert ["error" in line for line in written] == [False, True, True]
    (library / "three.wav").rename(library / "=1+1.wav")
    monkeypatch.chdir(library)  # a spreadsheet would take that name for a formula
    predict.run(PredictConfig(run=run, files=(Path("=1+1.wav"),), csv=table))
    assert next(csv.DictReader(table.open()))["file"] == "'=1+1.wav"
    (library / "Ann/deep/none").mkdir()
    with pytest.raises(UserError, match=r"got no audio files in .*Ann/deep/none"):
        predict.run(PredictConfig(run=run, files=(library / "Ann/deep/none",)))
    with pytest.raises(UserError, match="--jsonl --csv: got both"):
        PredictConfig(run=run, files=(library,), csv=table, jsonl=lines)


@pytest.mark.parametrize("temperature", [None, 1.75])
def test_export_loads_in_pipeline_with_the_same_probabilities(
    temperature: float | None,
    run: Path,
    tracks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if temperature:
        plant(run, temperature)
    out = tmp_path / "exported"
    export.run(ExportConfig(run=run, out=out))
    capsys.readouterr()
    wave = np.random.default_rng(0).integers(-9000, 9000, 8000).astype(np.int16)
    soundfile.write(tmp_path / "x.wav", wave, 16_000)
    predict.run(PredictConfig(run=run, files=(tmp_path / "x.wav",), json=True))
    expected = json.loads(capsys.readouterr().out)[0]["probabilities"]
    classify = pipeline("audio-classification", model=str(out), top_k=None)
    answer = classify({"array": wave.astype(np.float32) / 32768, "sampling_rate": 16_000})
    assert {item["label"]: item["score"] for item in answer} == pytest.approx(expected, abs=1e-5)
    predict.run(PredictConfig(run=out, files=(tmp_path / "x.wav",), json=True))
    again = json.loads(capsys.readouterr().out)[0]["probabilities"]
    assert again == pytest.approx(expected, abs=1e-6), "the temperature counts once"
    card = (out / "README.md").read_text()
    assert ("divided by 1.750" in card) == bool(temperature)
    assert "genres: blues, classical, country" in card
    assert "0.5 s of mono audio" in card
    assert str(tmp_path) not in card
    with pytest.raises(UserError, match="something that is there already"):
        export.run(ExportConfig(run=run, out=out))
    with pytest.raises(UserError, match="no such folder"):
        export.run(ExportConfig(run=tmp_path / "none", out=tmp_path / "new"))


def test_an_export_on_a_full_disk_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path, **words: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    copy = shutil.copyfile
    monkeypatch.setattr("mgc_dist.models.export.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        export.run(ExportConfig(run=run, out=tmp_path / "exported"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.setattr("mgc_dist.models.export.shutil.copyfile", copy)
    export.run(ExportConfig(run=run, out=tmp_path / "exported"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": 1, "dataset_id": 2}', "{"])
def test_a_broken_env_json_is_named(content: str, run: Path, tmp_path: Path) -> None:
    (run / "env.json").write_text(content)
    for command in (
        lambda: run_ranks(1, evaluate.run, EvaluateConfig(run=run)),
        lambda: export.run(ExportConfig(run=run, out=tmp_path / "exported")),
    ):
        with pytest.raises(UserError, match=r"env\.json: got .*\n  bring the whole run folder"):
            command()


def test_two_evaluations_do_not_write_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgc_dist.report.measure.LOCK_WAIT_S", 0.1)
    with (
        locked(run / "evaluation.lock", wait_s=0, purpose="as another evaluation"),
        pytest.raises(UserError, match=r"writing an evaluation of .*: got another process"),
    ):
        run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    assert not (run / "evaluation.lock").exists()
