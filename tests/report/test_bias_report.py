"""The bias report: figures against scikit-learn and by hand, warnings, files."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_ranks
from metrics import read_metrics
from scipy.special import log_softmax, rel_entr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, recall_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from trainings import config

from mgc_dist import probe, train
from mgc_dist.bias_model import probe_share, summary
from mgc_dist.bias_model import table as tables
from mgc_dist.config import DataConfig, LossConfig, ProbeConfig, TrainConfig
from mgc_dist.data import manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.report import bias_report
from mgc_dist.scoring.written import BiasGenre, BiasReport, ProbeFigures
from mgc_dist.training import logbook


@pytest.fixture(scope="module")
def data(shards: Path) -> tuple[manifest.Manifest, np.ndarray, np.ndarray]:
    with ShardSet(shards) as opened:
        return opened.manifest, opened.labels, opened.tracks


def table_of(logit: np.ndarray, *, ours: tables.Header | None = None) -> tables.BiasTable:
    return tables.BiasTable(
        name="logmel" if ours else "x.csv",
        fold_status="out-of-fold" if ours else "unknown",
        sha256="0",
        log_probability=log_softmax(logit, axis=1).astype(np.float32),
        header=ours,
    )


def noisy(label: np.ndarray, strength: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(len(label), 3)) + strength * np.eye(3)[label]


def test_figures_are_scikit_learns(data) -> None:
    found, label, track = data
    table = table_of(noisy(label, 1.0))
    report = summary.make(table, found, label, track)
    probability = np.exp(table.log_probability.astype(np.float64))
    guess = probability.argmax(1)
    for split, (first, stop) in found.splits.items():
        rows = slice(first, stop)
        figures = report["splits"][split]
        assert figures["count"] == stop - first
        assert figures["accuracy"] == (guess[rows] == label[rows]).mean()
        expected = log_loss(label[rows], probability[rows] / probability[rows].sum(1)[:, None])
        assert figures["nll"] == pytest.approx(expected, abs=1e-5)
        genres = report["per_genre"] if split == "train" else report["per_genre_of"][split]
        recalls = recall_score(label[rows], guess[rows], average=None)
        assert [of["accuracy"] for of in genres.values()] == pytest.approx(recalls.tolist())
    truth = probability[np.arange(66), label[:66]]
    tenths = np.minimum((truth * 10).astype(int), 9)
    assert report["truth_histogram"] == np.bincount(tenths, minlength=10).tolist()
    assert report["effective_sample_size"] == pytest.approx(
        (1 - truth).sum() ** 2 / ((1 - truth) ** 2).sum()
    )


def test_aligned_and_conflicting_rows_and_tracks_by_hand(data) -> None:
    found, label, track = data
    table = table_of(noisy(label, 1.0))
    report = summary.make(table, found, label, track)
    p = np.exp(table.log_probability.astype(np.float64))
    for split in ("train", "validation", "test"):
        genres = report["per_genre"] if split == "train" else report["per_genre_of"][split]
        for k, genre in enumerate(found.genres):
            rows = tracks = right_rows = right_tracks = 0
            for number, entry in enumerate(found.tracks):
                if (entry.split, entry.genre) != (split, genre):
                    continue
                mine = p[track == number]
                rows, tracks = rows + len(mine), tracks + 1
                right_rows += int((mine.argmax(1) == k).sum())
                right_tracks += int(mine.mean(0).argmax() == k)
            of = genres[genre]
            assert (of["rows"], of["aligned_rows"]) == (rows, right_rows)
            assert of["conflicting_rows"] == rows - right_rows
            assert of["aligned_tracks"] == right_tracks
            assert of["conflicting_tracks"] == tracks - right_tracks


def test_the_files_hold_what_the_type_promises(shards: Path, table: Path) -> None:
    report = json.loads((table / "report.json").read_text())
    header = tables.read_header(table)
    assert report["backbone"] == "logmel"
    assert (report["layers"], report["folds"]) == ([0], 2)
    assert report["temperature"] == header.temperature
    assert report["fold_status"] == "out-of-fold"
    assert report["table_sha256"] == header.table_sha256
    assert set(report["splits"]) == {"train", "validation", "test"}
    assert {"count", "accuracy", "nll", "ece"} < set(report["splits"]["train"])
    assert sum(report["truth_histogram"]) == 66
    assert set(report["per_genre"]) == set(manifest.read(shards).genres)
    assert set(report) == set(BiasReport.__annotations__)
    assert all(set(one) == set(BiasGenre.__annotations__) for one in report["per_genre"].values())
    assert (table / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_knows_too_much_is_warned_of_with_the_reason(data) -> None:
    found, label, track = data
    (fold, good, easy) = summary.make(table_of(noisy(label, 9.0)), found, label, track)["warnings"]
    assert "x.csv is unknown" in fold
    assert "right in 100 % of the training segments (above 90 %)" in good
    assert "0.915" in good
    assert "--loss ce" in good
    assert "blues (100 %), classical (100 %), country (100 %)" in easy


def test_a_bias_model_that_knows_what_a_probe_of_the_main_model_knows_is_warned_of(
    data, table: Path
) -> None:
    found, label, track = data
    header = replace(tables.read_header(table), temperature=1.3)
    ours = table_of(noisy(label, 1.5), ours=header)
    accuracy = summary.make(ours, found, label, track)["splits"]["train"]["accuracy"]
    probe: ProbeFigures = {"model": "m", "model_hash": "h", "layer": 4, "accuracy": 0.9, "nll": 0.3}
    chance = 1 / 3
    share = (accuracy - chance) / (0.9 - chance)
    assert 0.5 < share < 0.8
    assert "probe" not in " ".join(summary.make(ours, found, label, track, probe)["warnings"])
    weaker = probe | {"accuracy": accuracy}
    (*_, said) = summary.make(ours, found, label, track, weaker)["warnings"]
    assert "knows 100 % of what a linear probe of m knows" in said
    at_chance = probe | {"accuracy": chance}
    assert "probe" not in " ".join(summary.make(ours, found, label, track, at_chance)["warnings"])


def test_divergence_is_the_mean_kl_from_uniform(data) -> None:
    found, label, track = data
    table = table_of(noisy(label, 1.0))
    report = summary.make(table, found, label, track)
    p = np.exp(table.log_probability[:66].astype(np.float64))
    kl = rel_entr(p, np.full_like(p, 1 / 3)).sum(axis=1).mean()
    assert report["divergence"] == pytest.approx(kl, abs=1e-6)
    beta = summary.MUCH / kl
    assert summary.warning_of_beta(report, 0.99 * beta) is None
    said = summary.warning_of_beta(report, 1.02 * beta)
    assert said is not None
    assert "0.51 nats (of 1.10)" in said
    assert summary.warning_of_beta(report | {"divergence": 0.0}, 5.0) is None


@pytest.fixture(scope="module")
def probed(shards: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with a bias table, probed by the bands that the bias model sees."""
    own = tmp_path_factory.mktemp("probed") / "shards"
    shutil.copytree(shards, own, ignore=shutil.ignore_patterns("bias", "probe"))
    shutil.copytree(table, own / "bias", ignore=shutil.ignore_patterns("report.*"))
    settings = ProbeConfig(
        shards=own, model="logmel", head=("linear",), c=(0.1,), batch=8, device="cpu"
    )
    run_ranks(1, probe.run, settings)
    return own


def test_the_probe_is_cross_fitted_on_the_folds_of_the_table(probed: Path) -> None:
    header = tables.read_header(probed / "bias")
    with ShardSet(probed) as opened:  # by track: an artist has a genre to itself here
        apart = tuple(replace(track, group=None) for track in opened.manifest.tracks)
        training = [track.id for track in apart if track.split == "train"]
        header = replace(header, fold_of={f"track {id_}": n % 2 for n, id_ in enumerate(training)})
        alone = SimpleNamespace(
            manifest=replace(opened.manifest, tracks=apart),
            packed_id=opened.packed_id,
            first_row=0,
            labels=opened.labels,
            tracks=opened.tracks,
        )
        found = probe_share.measure(probed / "probe", header, alone, None)
        label, track = opened.labels[:66], opened.tracks[:66]
    states = np.load(probed / "probe" / "hidden.npy")[:66, 0].astype(np.float64)
    fold = np.array([header.fold_of[f"track {apart[t].id}"] for t in track])
    right = np.zeros(66, bool)
    for k in (0, 1):
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        head.fit(states[fold != k], label[fold != k])
        right[fold == k] = head.predict(states[fold == k]) == label[fold == k]
    assert found is not None
    assert 0 < right.mean() < 1
    assert found["accuracy"] == pytest.approx(right.mean())
    assert (found["model"], found["layer"]) == ("logmel", 0)
    assert probe_share.measure(probed / "probe", header, alone, found) is found
    assert probe_share.measure(probed / "nowhere", header, alone, None) is None
    alone.packed_id = "another"
    assert probe_share.measure(probed / "probe", header, alone, None) is None


def test_a_probe_that_lies_beside_the_shards_is_in_the_report(probed: Path) -> None:
    with ShardSet(probed) as opened:
        text, _ = bias_report.bring(probed / "bias", opened, write_anew=True)
        found = tables.read(probed / "bias", opened.manifest)
    report = json.loads(text.read_text())
    accuracy = report["splits"]["train"]["accuracy"]
    assert report["probe"]["accuracy"] == pytest.approx(accuracy), "the bias model's own bands"
    assert summary.probe_of(probed / "bias", found) == report["probe"]
    assert summary.probe_of(probed / "bias", replace(found, sha256="another")) is None


def test_a_single_genre_that_is_too_easy_is_named(data, table: Path) -> None:
    found, label, track = data
    logit = noisy(label, 1.0)
    logit[label == 1, 1] += 9
    header = replace(tables.read_header(table), temperature=1.3)
    (_, easy) = summary.make(table_of(logit, ours=header), found, label, track)["warnings"]
    assert "nearly always names classical (100 %):" in easy
    assert "blues" not in easy


def test_a_model_that_knows_nothing_is_warned_of(data, table: Path) -> None:
    found, label, track = data
    header = replace(tables.read_header(table), temperature=20.0)
    wrong = noisy((label + 1) % 3, 2.0)
    said = summary.make(table_of(wrong, ours=header), found, label, track)["warnings"]
    assert "not below that of guessing (1.10)" in said[1]
    assert "temperature ran to its bound (20.00)" in said[2]


def test_a_genre_that_its_head_has_never_heard_is_named(data, table: Path) -> None:
    found, label, track = data
    header = replace(tables.read_header(table), temperature=1.3)
    training = [t for t in found.tracks if t.split == "train"]
    assert len({t.group for t in training}) == 3, "one training artist a genre"
    fine = table_of(noisy(label, 1.0), ours=header)
    (said,) = summary.make(fine, found, label, track)["warnings"]
    assert said.startswith("all training tracks of blues, classical, country are in one fold")
    alone = [t.id for t in training if t.genre == "country"]
    apart = [
        replace(t, group=None) if t.split == "train" and t.genre != "country" else t
        for t in found.tracks
    ]
    folds = {f"track {t.id}": n % 2 for n, t in enumerate(training) if t.genre != "country"}
    folds[f"group {training[-1].group}"] = 0
    split = table_of(noisy(label, 1.0), ours=replace(header, fold_of=folds))
    (said,) = summary.make(split, replace(found, tracks=tuple(apart)), label, track)["warnings"]
    assert len(alone) == 2
    assert said.startswith("all training tracks of country are in one fold")


def test_the_text_shows_every_split_genre_and_warning(
    data, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, label, track = data
    bias_report.show(summary.make(table_of(noisy(label, 9.0)), found, label, track))
    said = capsys.readouterr().out
    words = ("train", "validation", "test", *found.genres, "as given", "Warning: ", "nats")
    for word in words:
        assert word in said
    ours = table_of(noisy(label, 1.0), ours=tables.read_header(table))
    bias_report.show(summary.make(ours, found, label, track))
    said = capsys.readouterr().out
    assert "out of fold" in said
    assert "mean of heads" in said


def test_training_with_a_foreign_table_says_and_records_what_is_unknown(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with ShardSet(shards) as opened:
        keys, genres = opened.keys(), opened.manifest.genres
    values = np.load(table / tables.TABLE).astype(float)
    lines = [
        ",".join([key, *map(repr, row)]) for key, row in zip(keys, values.tolist(), strict=True)
    ]
    file = tmp_path / "theirs.csv"
    file.write_text("\n".join([",".join(["key", *genres]), *lines]))
    losses = []
    for name, place in (("ours", None), ("theirs", file)):
        settings = config(shards, tiny_model, tmp_path / name, epochs=30 / 66)
        settings = replace(settings, data=replace(settings.data, bias_table=place))
        assert run_ranks(2, train.run, settings) == [0, 0]
        losses.append([line["loss"] for line in read_metrics(tmp_path / name, "step")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    said = (tmp_path / "theirs" / "train.log").read_text()
    assert said.count("the fold status of theirs.csv is unknown") == 1
    assert "fold status" not in (tmp_path / "ours" / "train.log").read_text()
    env = json.loads((tmp_path / "theirs" / "env.json").read_text())
    assert env["bias_table"] == {"name": "theirs.csv", "fold_status": "unknown"}
    file.write_text(file.read_text().replace(lines[3], f"{keys[3]},0,0,0"))  # one row's logits
    again = replace(settings, output=replace(settings.output, resume="auto"))
    with pytest.raises(UserError, match=r"bias table \(--bias-table\)"):
        run_ranks(1, train.run, again)


def test_training_repeats_every_warning_on_rank_0(
    data, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, label, track = data
    opened = SimpleNamespace(manifest=found, labels=label, tracks=track)
    settings = TrainConfig(data=DataConfig(shards=shards, bias_table=Path("x.csv")))
    mild = replace(settings, objective=LossConfig(loss="poe", beta=0.25))
    for first, of, count in ((True, settings, 4), (True, mild, 3), (False, settings, 0)):
        caplog.clear()
        run = SimpleNamespace(
            objective=SimpleNamespace(table=table_of(noisy(label, 9.0))),
            shards=opened,
            config=of,
            ranks=SimpleNamespace(is_first=first),
        )
        logging.getLogger("mgc_dist").propagate = True
        logbook.warn_of_bias(run)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == count
        assert all(line.startswith("bias table x.csv: ") for line in lines[:3])
        assert all("--beta 0.5 times the bias model's KL" in line for line in lines[3:])
