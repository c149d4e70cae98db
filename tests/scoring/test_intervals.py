"""Intervals against scipy: its bootstrap, its binomial tests, its t-test."""

import numpy as np
import pytest
import sklearn.metrics
from scipy import stats

from mgc_dist.scoring import intervals


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [150] of 4 genres, two models' predictions."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(4), [60, 40, 30, 20])
    guesses = [np.where(rng.random(150) < p, label, rng.integers(0, 4, 150)) for p in (0.7, 0.5)]
    return label, guesses[0], guesses[1]


def by_scipy(statistic, *data, resamples: int = 4000):
    interval = stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    return [interval.low, interval.high]


def macro_f1(label, guess):
    return sklearn.metrics.f1_score(label, guess, average="macro", labels=range(4), zero_division=0)


def test_intervals_over_tracks_agree_with_scipys_bootstrap(drawn) -> None:
    label, guess, _ = drawn
    (found,) = intervals.resample(label, [guess], np.arange(150), genres=4, resamples=4000, seed=0)
    told = found.intervals()
    accuracy = by_scipy(lambda y, g: (y == g).mean(), label, guess)
    assert told["accuracy"] == pytest.approx(accuracy, abs=0.01)
    assert told["macro_f1"] == pytest.approx(
        by_scipy(macro_f1, label, guess, resamples=1000), abs=0.015
    )
    balanced = by_scipy(
        lambda y, g: np.mean([(g[y == k] == k).mean() for k in np.unique(y)]), label, guess
    )
    assert told["balanced_accuracy"] == pytest.approx(balanced, abs=0.01)
    recall = by_scipy(lambda y, g: (g[y == 3] == 3).mean() if (y == 3).any() else 0.5, label, guess)
    assert intervals.percentile(found.recall[:, 3]) == pytest.approx(recall, abs=0.03)


def test_paired_differences_agree_with_scipys_bootstrap(drawn) -> None:
    label, first, second = drawn
    one, two = intervals.resample(
        label, [first, second], np.arange(150), genres=4, resamples=4000, seed=0
    )
    found = intervals.percentile(two.figures["accuracy"] - one.figures["accuracy"])
    expected = by_scipy(lambda y, a, b: (y == b).mean() - (y == a).mean(), label, first, second)
    assert found == pytest.approx(expected, abs=0.01)


def test_whole_clusters_are_drawn(drawn) -> None:
    label, guess, _ = drawn
    cluster = np.arange(150) // 5 * 7 + 3  # 30 artists, numbers with gaps
    (found,) = intervals.resample(label, [guess], cluster, genres=4, resamples=4000, seed=0)
    hits = (label == guess).reshape(30, 5).sum(1)
    expected = by_scipy(lambda h: h.sum() / (5 * len(h)), hits)
    assert found.intervals()["accuracy"] == pytest.approx(expected, abs=0.01)


def test_clusters_of_like_tracks_widen_the_interval() -> None:
    label = np.zeros(100, np.int64)
    guess = (np.arange(100) // 10 % 2).astype(np.int64)  # 10 artists, all right or all wrong
    widths = []
    for cluster in (np.arange(100), np.arange(100) // 10):
        (found,) = intervals.resample(label, [guess], cluster, genres=2, resamples=2000, seed=0)
        low, high = found.intervals()["accuracy"]
        widths.append(high - low)
    assert widths[1] / widths[0] == pytest.approx(10**0.5, rel=0.1)  # sqrt of the cluster's size


def test_same_seed_same_digits_in_blocks_of_memory(drawn, monkeypatch) -> None:
    label, guess, _ = drawn

    def draw(seed: int) -> bytes:
        cluster = np.arange(150)
        (found,) = intervals.resample(label, [guess], cluster, genres=4, resamples=300, seed=seed)
        assert found.figures["accuracy"].shape == (300,)
        assert found.recall.shape == (300, 4)
        return found.figures["macro_f1"].tobytes()

    assert draw(3) == draw(3) != draw(4)
    monkeypatch.setattr(intervals, "_BLOCK", 150 * 64)
    draw(3)


def test_wilson_agrees_with_scipy() -> None:
    for hits, count in ((0, 6), (6, 6), (3, 10), (250, 290)):
        expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
        assert intervals.wilson(hits, count) == pytest.approx((expected.low, expected.high))
    assert intervals.wilson(0, 0) is None


def test_mcnemar_agrees_with_scipy() -> None:
    for first, second in ((0, 5), (5, 0), (6, 11), (7, 7), (1, 30), (120, 90)):
        expected = stats.binomtest(first, first + second, 0.5).pvalue
        assert intervals.mcnemar(first, second) == pytest.approx(expected)
    assert intervals.mcnemar(0, 0) == 1


def test_students_interval_agrees_with_scipy() -> None:
    values = [0.02, 0.05, -0.01, 0.04]
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert intervals.student(values) == pytest.approx((expected.low, expected.high))
    assert intervals.student([0.1]) is None


def test_unknown_groups_are_alone() -> None:
    found = intervals.clusters_of(["a", None, "b", "a", None])
    assert found[0] == found[3]
    assert len(set(found.tolist())) == 4
