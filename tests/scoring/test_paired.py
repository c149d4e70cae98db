"""Two runs on the same tracks, against scipy and plain counting."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, recall_score
from test_results import GENRES, write_run

from mgc_dist.errors import UserError
from mgc_dist.report import comparison
from mgc_dist.scoring import paired, results


@pytest.fixture
def two(tmp_path: Path) -> tuple[results.Result, results.Result]:
    runs = write_run(tmp_path / "a", seed=1, skill=0.5), write_run(tmp_path / "b", seed=2)
    return results.read(runs[0], "test"), results.read(runs[1], "test")


def compare(a: results.Result, b: results.Result) -> dict:
    found = paired.compare(a, b, "test")
    return json.loads(json.dumps(found, allow_nan=False))


def test_differences_agree_with_scikit_learn(two) -> None:
    a, b = two
    found = compare(a, b)
    assert found["count"] == 60
    for one, key in ((a, "a"), (b, "b")):
        assert found["accuracy"][key] == pytest.approx(accuracy_score(one.label, one.guess))
        f1 = f1_score(one.label, one.guess, average="macro")
        assert found["macro_f1"][key] == pytest.approx(f1)
        recall = recall_score(one.label, one.guess, average=None)
        shown = [found["per_genre"][genre][key] for genre in GENRES]
        assert shown == pytest.approx(list(recall))
    gap = found["accuracy"]["b"] - found["accuracy"]["a"]
    assert found["accuracy"]["difference"] == pytest.approx(gap)


def test_mcnemar_counts_tracks_that_one_alone_gets_right(two) -> None:
    a, b = two
    found = compare(a, b)["mcnemar"]
    pairs = list(zip(a.guess == a.label, b.guess == b.label, strict=True))
    assert found["only_a"] == pairs.count((True, False)) > 0
    assert found["only_b"] == pairs.count((False, True)) > 0
    assert found["both"] + found["neither"] + found["only_a"] + found["only_b"] == 60
    discordant = found["only_a"] + found["only_b"]
    assert found["p"] == pytest.approx(stats.binomtest(found["only_a"], discordant).pvalue)


def test_intervals_are_over_artists_where_they_are_known(two, tmp_path: Path) -> None:
    a, b = two
    found = compare(a, b)
    assert found["unit"] == "groups"
    gain = ((b.guess == b.label).astype(int) - (a.guess == a.label)).reshape(20, 3).sum(1)
    expected = stats.bootstrap(
        (gain,),
        lambda g: g.sum() / (3 * len(g)),
        vectorized=False,
        n_resamples=3000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    told = found["intervals"]["groups"]["accuracy"]
    assert told == pytest.approx([expected.low, expected.high], abs=0.02)
    unknown = {"groups": (None,) * 60}
    runs = [write_run(tmp_path / f"n{n}", seed=n, **unknown) for n in (1, 2)]
    alone = compare(*(results.read(run, "test") for run in runs))
    assert alone["unit"] == "tracks"
    assert alone["intervals"]["groups"] is None


def test_subgroups_are_compared_where_both_have_the_same(two, tmp_path: Path) -> None:
    a, b = two
    found = compare(a, b)["subgroups"]
    inside = np.arange(60) % 3 > 0
    assert found["bias-aligned"]["count"] == 40
    for one, key in ((a, "a"), (b, "b")):
        right = (one.guess == one.label)[inside].mean()
        assert found["bias-aligned"][key] == pytest.approx(right)
    low, high = found["bias-aligned"]["interval"]
    assert low < found["bias-aligned"]["difference"] < high
    other = results.read(write_run(tmp_path / "c", subgroups=None), "test")
    assert compare(a, other)["subgroups"] is None


def test_where_all_tracks_are_alike_there_is_no_interval(two) -> None:
    a, _ = two
    found = compare(a, a)
    assert found["accuracy"]["difference"] == 0
    assert found["mcnemar"]["p"] == 1
    assert all(row["interval"] is None for row in found["per_genre"].values())


def test_other_tracks_are_refused(two, tmp_path: Path) -> None:
    ids = tuple(f"x{track:02d}" for track in range(60))
    other = results.read(write_run(tmp_path / "other", track_ids=ids), "test")
    with pytest.raises(UserError, match="60 of its own"):
        compare(two[0], other)


def test_the_picture_holds_every_genre_and_subgroup(two, tmp_path: Path, monkeypatch) -> None:
    drawn = []
    draw = comparison.figures.differences
    monkeypatch.setattr(
        comparison.figures,
        "differences",
        lambda *args, **more: [drawn.append(args), draw(*args, **more)][1],
    )
    comparison.draw_pair(tmp_path / "x.png", paired.compare(*two, "test"))
    names = [name for name, _, _ in drawn[0][0]]
    assert names[:2] == ["accuracy", "macro-F1"]
    assert names[2:] == [f"{g} (20)" for g in GENRES] + [
        "bias-aligned (40)",
        "bias-conflicting (20)",
    ]
