"""Intervals against scipy and scikit-learn, and over simulated test sets of new artists."""

import numpy as np
import pytest
import sklearn.metrics
from scipy import stats

from mgc_dist.scoring import intervals
from mgc_dist.scoring.metrics import confusion_of, figures_of, precision_recall_f1


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [150] of 4 genres, two models' predictions."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(4), [60, 40, 30, 20])
    guesses = [np.where(rng.random(150) < p, label, rng.integers(0, 4, 150)) for p in (0.7, 0.5)]
    return label, guesses[0], guesses[1]


def told(label, guess, cluster, genres=4) -> dict[str, tuple[float, float]]:
    """Intervals of all figures."""
    left = intervals.leave_out(label, guess, cluster, genres=genres)
    values = figures_of(confusion_of(label, guess, genres))
    return {
        name: intervals.of_figure(
            float(values[name]),
            intervals.deviation(without),
            clusters=len(without),
            items=len(label),
        )
        for name, without in left.figures.items()
    }


def test_figures_without_a_cluster_are_scikit_learns(drawn, monkeypatch) -> None:
    label, guess, _ = drawn
    cluster = np.arange(150) // 7 * 5 + 3  # numbers with gaps
    for cells in (intervals._CELLS, 16 * 5):  # at once, and five clusters at a time
        monkeypatch.setattr(intervals, "_CELLS", cells)
        left = intervals.leave_out(label, guess, cluster, genres=4)
        for place, number in enumerate(np.unique(cluster)):
            kept = cluster != number
            y, g = label[kept], guess[kept]
            assert left.figures["accuracy"][place] == pytest.approx((y == g).mean())
            f1 = sklearn.metrics.f1_score(y, g, average=None, labels=range(4), zero_division=0)
            assert left.f1[place] == pytest.approx(f1)
            assert left.figures["macro_f1"][place] == pytest.approx(f1.mean())
            recall = sklearn.metrics.recall_score(
                y, g, average=None, labels=range(4), zero_division=0
            )
            assert left.recall[place] == pytest.approx(recall)
            assert left.holds[place].tolist() == [k in label[~kept] for k in range(4)]


def test_single_tracks_give_wilsons_interval(drawn) -> None:
    """As scipy has it, but for Student's t in place of the normal distribution."""
    label, guess, _ = drawn
    hits = int((label == guess).sum())
    expected = stats.binomtest(hits, 150).proportion_ci(0.95, method="wilson")
    assert told(label, guess, np.arange(150))["accuracy"] == pytest.approx(expected, abs=2e-3)
    assert intervals.of_share(label == guess, np.arange(150)) == pytest.approx(expected, abs=2e-3)


def test_errors_agree_with_scipys_bootstrap(drawn) -> None:
    label, guess, other = drawn
    cluster = np.arange(150) // 5
    one, two = (intervals.leave_out(label, g, cluster, genres=4) for g in (guess, other))
    gain = ((label == other).astype(int) - (label == guess)).reshape(30, 5).sum(1)
    expected = stats.bootstrap(
        (gain,), lambda g: g.sum() / (5 * len(g)), vectorized=False, rng=np.random.default_rng(1)
    ).standard_error
    found = intervals.deviation(two.figures["accuracy"] - one.figures["accuracy"])
    assert found == pytest.approx(expected, rel=0.05)


def test_clusters_of_like_tracks_widen_the_interval() -> None:
    label = np.zeros(1000, np.int64)
    guess = (np.arange(1000) // 10 % 2).astype(np.int64)  # 100 artists, all right or all wrong
    widths = []
    for cluster in (np.arange(1000), np.arange(1000) // 10):
        low, high = told(label, guess, cluster, genres=2)["accuracy"]
        widths.append(high - low)
    assert widths[1] / widths[0] == pytest.approx(10**0.5, rel=0.05)  # sqrt of the cluster's size


def test_where_nothing_varies_the_clusters_count() -> None:
    """A bootstrap of tracks that are all right would claim certainty: 1.000 to 1.000."""
    label, cluster = np.repeat([0, 1], 40), np.arange(80) // 4
    low, high = told(label, label, cluster, genres=2)["accuracy"]
    assert (low, high) == (pytest.approx(1 / (1 + stats.t.ppf(0.975, 19) ** 2 / 20)), 1.0)
    assert intervals.of_share(np.ones(80, bool), cluster) == (pytest.approx(low), 1.0)
    assert intervals.of_share(np.ones(3, bool), np.zeros(3, int)) is None
    assert intervals.of_difference(0.0, 0.0, clusters=20) is None


def sets_by_artist(rng, artists: int, skills: tuple[float, ...]):
    """A test set of new artists: labels, clusters, and the guesses of one model a skill.

    Every artist has a skill of its own, and half of the tracks are alike for all models.
    """
    label, cluster, guesses = [], [], [[] for _ in skills]
    for artist in range(4 * artists):
        size = int(rng.choice([1, 1, 2, 3, 8]))
        label += [artist % 4] * size
        cluster += [artist] * size
        alike, luck = rng.random(size) < 0.5, rng.random(size)
        own = [rng.beta(3 * skill, 3 * (1 - skill)) for skill in skills]
        for model, skill in enumerate(own):
            right = np.where(alike, luck < own[0], rng.random(size) < skill)
            wrong = (artist + 1 + rng.integers(0, 3, size)) % 4
            guesses[model] += np.where(right, artist % 4, wrong).tolist()
    return np.array(label), np.array(cluster), [np.array(guess) for guess in guesses]


def test_intervals_cover_the_truth_of_new_artists() -> None:
    """Nominal 95 % over 800 test sets; the binomial error of the count is 0.8 points."""
    rng, sets = np.random.default_rng(0), 800
    hits = dict.fromkeys(("accuracy", "macro_f1", "f1", "recall", "difference", "tracks"), 0)
    for _ in range(sets):
        label, cluster, (guess, other) = sets_by_artist(rng, 20, (0.8, 0.8))
        found = told(label, guess, cluster)
        hits["accuracy"] += found["accuracy"][0] < 0.8 < found["accuracy"][1]
        hits["macro_f1"] += found["macro_f1"][0] < 0.8 < found["macro_f1"][1]
        left, right = (intervals.leave_out(label, g, cluster, genres=4) for g in (guess, other))
        _, recall, f1 = precision_recall_f1(confusion_of(label, guess, 4))
        bounds = left.of_genre(0, float(recall[0]), float(f1[0]), int((label == 0).sum()))
        for name, (low, high) in zip(("recall", "f1"), bounds, strict=True):
            hits[name] += low < 0.8 < high
        gain = float((label == other).mean() - (label == guess).mean())
        error = intervals.deviation(right.figures["accuracy"] - left.figures["accuracy"])
        low, high = intervals.of_difference(gain, error, clusters=80)
        hits["difference"] += low < 0 < high
        alone = told(label, guess, np.arange(len(label)))["accuracy"]
        hits["tracks"] += alone[0] < 0.8 < alone[1]
    covered = {name: count / sets for name, count in hits.items()}
    assert covered.pop("tracks") < 0.9, "tracks alone claim too much"
    assert all(0.93 <= each <= 0.97 for each in covered.values()), covered


def test_gains_over_seeds_and_artists_cover_the_truth() -> None:
    """Both are drawn anew each time. Over seeds alone, 95 % would be far too sure."""
    rng, sets, true = np.random.default_rng(1), 1000, 0.03
    joint = alone = 0
    for _ in range(sets):
        of_seed, of_artist = rng.normal(0, 0.01, 5), rng.normal(0, 0.2, 60)
        each = true + of_seed[:, None] + of_artist + rng.normal(0, 0.1, (5, 60))  # [S, C]
        gains = each.mean(axis=1)
        without = (each.sum(axis=1, keepdims=True) - each) / 59
        found, seeds = intervals.over_seeds(gains, without), intervals.over_seeds(gains)
        assert found is not None
        assert seeds is not None
        joint += found.interval[0] < true < found.interval[1]
        alone += seeds.interval[0] < true < seeds.interval[1]
    assert 0.93 <= joint / sets <= 0.97
    assert alone / sets < 0.8


def test_gains_of_seeds_with_tracks_of_their_own_are_students(drawn) -> None:
    values = np.array([0.02, 0.05, -0.01, 0.04])
    expected = stats.ttest_1samp(values, 0)
    found = intervals.over_seeds(values)
    assert found is not None
    interval = expected.confidence_interval()
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue)
    assert intervals.over_seeds(values[:2]) is None, "two seeds tell no spread"
    assert intervals.over_seeds(np.full(4, 0.5)) is None


def test_a_detectable_difference_is_seen_four_times_in_five() -> None:
    rng, seen, error = np.random.default_rng(0), 0, 0.1
    least = intervals.detectable(error / 20**0.5, 19)
    for _ in range(2000):
        values = rng.normal(least, error, 20)
        seen += stats.ttest_1samp(values, 0).pvalue < 0.05
    assert seen / 2000 == pytest.approx(0.8, abs=0.03)


def test_holm_agrees_with_statsmodels_figures() -> None:
    """As `multipletests([...], method="holm")` of statsmodels 0.14 gives them."""
    found = intervals.holm([0.01, 0.04, 0.03, 0.005])
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0]
    assert intervals.holm([]) == []


def test_a_share_is_surely_above_a_level_as_often_as_chance_allows(drawn) -> None:
    """Of 2,000 test sets of 40 artists, whose tracks are right together, 2.5 % or a little less."""
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(40), 4)
    found = []
    for _ in range(2000):
        own = rng.beta(0.1 * 4, 0.9 * 4, 40)[cluster]  # 0.1 on average
        found.append(intervals.p_above(rng.random(160) < own, cluster, 0.1))
    assert 0.005 < (np.array(found) < 0.025).mean() < 0.035
    alone = np.arange(160)
    right = alone < 32
    expected = (0.2 - 0.1) / np.sqrt(0.1 * 0.9 / 160)
    assert intervals.p_above(right, alone, 0.1) == pytest.approx(stats.t.sf(expected, 159), rel=0.1)
    assert intervals.p_above(right, np.zeros(160, int), 0.1) == 1.0


def test_mcnemar_agrees_with_scipy() -> None:
    for first, second in ((0, 5), (5, 0), (6, 11), (7, 7), (1, 30), (120, 90)):
        expected = stats.binomtest(first, first + second, 0.5).pvalue
        assert intervals.mcnemar(first, second) == pytest.approx(expected)
    assert intervals.mcnemar(0, 0) == 1


def test_unknown_groups_are_alone() -> None:
    found = intervals.clusters_of(["a", None, "b", "a", None])
    assert found[0] == found[3]
    assert len(set(found.tolist())) == 4
