"""Evaluation on the genres that a model and a data set have in common."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny, run_ranks, shard_config
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)
from test_results import write_run

from mgc_dist import evaluate, shard
from mgc_dist.config import CompareConfig, EvaluateConfig
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.models.folder import load_exported, save_exported
from mgc_dist.report import comparison
from mgc_dist.scoring import conditions, paired, results
from mgc_dist.scoring.shared_genres import match

MODEL = ("country", "disco", "blues", "hiphop", "classical")
"""In another order than that of the data sets, which is by name."""
FOLDER = Path("shards/theirs")


def targets(data: tuple[str, ...], given: str | None = None, model: Any = MODEL) -> dict[str, Any]:
    found = match(model, data, given, FOLDER)
    assert found is not None
    return {
        name: None if label is None else model[label]
        for name, label in zip(data, found.to, strict=True)
    }


def test_the_same_genres_need_no_matching() -> None:
    assert match(MODEL, MODEL, None, FOLDER) is None
    other = match(MODEL, tuple(sorted(MODEL)), None, FOLDER)
    assert other is not None
    assert other.genres == MODEL


def test_names_are_matched_by_letters_and_digits() -> None:
    data = ("Blues", "Hip-Hop", "pop", "♪", "country")
    expected = {"Blues": "blues", "Hip-Hop": "hiphop", "country": "country"}
    assert targets(data) == {"pop": None, "♪": None} | expected
    model = ("caf\u00e9 del mar", "STRASSE", "80s")
    data = ("Cafe\u0301-del-Mar", "straße", "'80s")
    assert targets(data, model=model) == dict(zip(data, model, strict=True))


def test_an_exact_name_goes_before_a_similar_one() -> None:
    model = ("hiphop", "Hip-Hop", "rock")
    assert targets(("Hip-Hop", "rock"), model=model) == {"Hip-Hop": "Hip-Hop", "rock": "rock"}
    with pytest.raises(UserError, match=r"genre HIPHOP .*: got several .* hiphop, Hip-Hop(.|\n)*="):
        match(model, ("HIPHOP", "rock"), None, FOLDER)


@pytest.mark.parametrize(
    "text", ["R&B,hiphop\nBlues,\n", "theirs,ours\nR&B,hiphop\nBlues,\n", "R&B\thiphop\nBlues\t\n"]
)
def test_a_map_by_file_or_by_hand(text: str, tmp_path: Path) -> None:
    data = ("Blues", "Country", "R&B", "disco")
    expected = {"Blues": None, "Country": "country", "R&B": "hiphop", "disco": "disco"}
    (tmp_path / "map").write_text(text)
    assert targets(data, str(tmp_path / "map")) == expected
    assert targets(data, "R&B=hiphop, Blues=") == expected


def test_maps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = ("Blues", "Country", "R&B")
    for given, why in (
        ("RnB=hiphop", r"'RnB', which is no genre of the data set, expected one of Blues, Cou"),
        ("R&B=soul", r"'soul', which is no genre of the model, expected one of country, disco"),
        ("R&B=hiphop,R&B=disco", r"'R&B' as both 'hiphop' and 'disco'"),
        ("map.csv", r"got no file of that name, expected a CSV or TSV file of two columns"),
        ("R&B=hiphop,Blues", r"no file of that name, and a part without ="),
    ):
        with pytest.raises(UserError, match=why):
            match(MODEL, data, given, FOLDER)
    for text, why in (("a,b,c\n", "3 columns in"), ("", "no rows"), ("R&B\n", "1 columns in")):
        (tmp_path / "map").write_text(text)
        with pytest.raises(UserError, match=rf"{why}(.|\n)*a line a genre"):
            match(MODEL, data, str(tmp_path / "map"), FOLDER)


def test_less_than_two_genres_in_common_are_refused() -> None:
    for data, known in ((("pop", "soul"), "none"), (("Blues", "pop"), "blues")):
        with pytest.raises(UserError, match=rf"which the model knows {known}, (.|\n)*--genre-map"):
            match(MODEL, data, None, FOLDER)


def test_a_map_may_not_take_the_place_of_a_runs_own_figures() -> None:
    with pytest.raises(UserError, match=r"--genre-map: got neither --data nor --name"):
        EvaluateConfig(run=Path("run"), genre_map="a=b")
    EvaluateConfig(run=Path("run"), genre_map="a=b", name="fewer")


@pytest.fixture(scope="module")
def foreign(tracks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of Blues, Country and, unknown to the model, Reggae."""
    folder = tmp_path_factory.mktemp("foreign")
    names = {"blues": "Blues", "classical": "Reggae", "country": "Country"}
    text = (tracks / "artists.csv").read_text()
    for old, new in names.items():
        shutil.copytree(tracks / old, folder / "music" / new)
        text = text.replace(f",{old},", f",{new},")
    (folder / "music" / "artists.csv").write_text(text)
    shard.run(shard_config(folder / "music", folder / "theirs"))
    return folder / "theirs"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """An exported model of five genres that names several of them."""
    net = build_tiny(tiny_model, MODEL)
    weights = dict(net.state_dict())
    weights["net.classifier.weight"] = 300 * weights["net.classifier.weight"]
    save_exported(net, weights, tmp_path / "model", 16_000, 1.5)
    return tmp_path / "model"


def by_hand(model: Path, shards: Path, names: dict[str, str]) -> tuple[Any, Any, list[str]]:
    """Truths, probabilities [M, N] and ids of the test tracks of genres in common."""
    net, rows = load_exported(model), []
    place = [MODEL.index(genre) for genre in sorted(set(names.values()), key=MODEL.index)]
    with ShardSet(shards) as data, torch.inference_mode():
        first, stop = data.rows_of("test")
        for row in range(first, stop):
            track = data.manifest.tracks[data.tracks[row]]
            if track.genre in names:
                wave = torch.from_numpy(data.read(row).copy())[None]
                full = softmax(net.calibrated(wave).double().numpy()[0])
                rows.append((track.id, track.genre, full[place] / full[place].sum()))
    ids = sorted({id_ for id_, _, _ in rows})
    truth = [next(names[genre] for each, genre, _ in rows if each == id_) for id_ in ids]
    given = [np.mean([p for each, _, p in rows if each == id_], axis=0) for id_ in ids]
    return truth, np.array(given), ids


@pytest.mark.parametrize(
    ("genre_map", "names"),
    [
        (None, {"Blues": "blues", "Country": "country"}),
        ("Reggae=hiphop", {"Blues": "blues", "Country": "country", "Reggae": "hiphop"}),
        ("Reggae=blues", {"Blues": "blues", "Country": "country", "Reggae": "blues"}),
        ("Reggae=disco,Blues=", {"Country": "country", "Reggae": "disco"}),
    ],
)
def test_figures_on_genres_in_common_agree_with_scikit_learn(
    genre_map: str | None,
    names: dict[str, str],
    model: Path,
    foreign: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_ranks(2, evaluate.run, EvaluateConfig(run=model, data=foreign, genre_map=genre_map))
    found = json.loads((model / "evaluation" / "test-of-theirs.json").read_text())
    truth, given, ids = by_hand(model, foreign, names)
    genres = sorted(set(names.values()), key=MODEL.index)
    guess = [genres[k] for k in given.argmax(axis=1)]
    assert found["genres"] == genres
    assert found["in_common"]["of_model"] == list(MODEL)
    assert found["in_common"]["renamed"] == names
    left_out = {"Blues", "Country", "Reggae"} - set(names)
    assert found["in_common"]["left_out"] == dict.fromkeys(sorted(left_out), 2)
    track = found["track"]
    assert track["count"] == len(truth) == 2 * len(names)
    assert track["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert track["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, guess))
    f1 = f1_score(truth, guess, labels=genres, average="macro", zero_division=0)
    assert track["macro_f1"] == pytest.approx(f1)
    order = np.argsort(genres)  # log_loss takes columns by name
    nll = log_loss(truth, given[:, order], labels=sorted(genres))
    assert track["nll"] == pytest.approx(nll, abs=1e-5)
    assert found["confusion"] == confusion_matrix(truth, guess, labels=genres).tolist()
    table = precision_recall_fscore_support(truth, guess, labels=genres, zero_division=0)
    for genre, *row in zip(genres, *table, strict=True):
        shown = [found["per_genre"][genre][key] for key in ("precision", "recall", "f1")]
        assert [*shown, found["per_genre"][genre]["support"]] == pytest.approx(row)
    lines = [json.loads(line) for line in (model / "predictions/test-of-theirs.jsonl").open()]
    lines.sort(key=lambda line: line["track"])
    assert [line["track"] for line in lines] == ids
    assert [line["truth"] for line in lines] == truth
    for line, row in zip(lines, given, strict=True):
        assert list(line["probabilities"]) == genres
        assert list(line["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
    shown = capfd.readouterr().out
    assert f"on the {len(genres)} genres in common ({', '.join(genres)}), of 5 that" in shown
    assert ("tracks of other genres are left out" in shown) == bool(left_out)


def test_a_split_without_such_tracks_is_refused(model: Path, tracks: Path, tmp_path: Path) -> None:
    lines = ["path,genre,split"]
    for genre, name in (("blues", "Blues"), ("classical", "Reggae"), ("country", "Country")):
        for number, split in enumerate(("train", "validation", "test")):
            if (split, name) in (("test", "Blues"), ("test", "Country")):
                continue
            path = tracks / genre / f"{genre}.{number:05d}.wav"
            lines.append(f"{path},{name},{split}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    settings: dict[str, Any] = {"groups": None, "split": "table"}
    shard.run(shard_config(tmp_path / "t.csv", tmp_path / "out", **settings))
    with pytest.raises(UserError, match=r"test split of .*no track of a genre in common"):
        run_ranks(1, evaluate.run, EvaluateConfig(run=model, data=tmp_path / "out"))


IN_COMMON = {"of_model": ["blues", "jazz", "rock", "soul"], "renamed": {}, "left_out": {"pop": 2}}


def test_figures_on_genres_in_common_are_not_compared_with_full_ones(tmp_path: Path) -> None:
    full = write_run(tmp_path / "full", seed=1)
    fewer = [write_run(tmp_path / f"f{seed}", seed=seed, in_common=IN_COMMON) for seed in (2, 3)]
    a, b, c = (results.read(run, "test") for run in (full, *fewer))
    why = r"got on all genres of the model, and on the 3 genres in common \(blues, jazz, rock\)"
    with pytest.raises(UserError, match=why):
        paired.compare(a, b, "test")
    settings = {"loss": "ce"}
    runs = [
        conditions.Run(result=each, seed=seed, settings=settings)
        for seed, each in enumerate((a, b))
    ]
    with pytest.raises(UserError, match=why):
        conditions.compare(runs, "test")
    found = paired.compare(b, c, "test")
    assert found["in_common"] == "on the 3 genres in common (blues, jazz, rock)"


def test_reports_say_that_figures_are_on_genres_in_common(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mgc_dist.report import gallery, tables

    runs = [write_run(tmp_path / f"r{seed}", seed=seed, in_common=IN_COMMON) for seed in (2, 3)]
    figures = json.loads((runs[0] / "evaluation" / "test.json").read_text())
    sentence = "on the 3 genres in common (blues, jazz, rock), of 4 that the model knows"
    section = gallery.confusion(figures)
    assert section is not None
    assert sentence in section.drawings[0].about
    assert "2 tracks of other genres are left out (pop 2)" in section.drawings[0].about
    tables.evaluation(figures)
    tables.pair(comparison.compare(CompareConfig(runs=tuple(runs), out=tmp_path / "out")).figures)
    shown = capsys.readouterr().out
    assert f"All of it {sentence}: each segment's probabilities are renormalised" in shown
    assert "All of it on the 3 genres in common (blues, jazz, rock)." in shown
    figures["in_common"] = None
    assert "in common" not in gallery.confusion(figures).drawings[0].about  # type: ignore[union-attr]
