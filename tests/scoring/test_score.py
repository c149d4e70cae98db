"""Segments to tracks in three ways, and the temperature of the tracks."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from mgc_dist.scoring.calibration import fit_temperature as fit_of_rows
from mgc_dist.scoring.score import fit_temperature, judge, mean_probability


def of(*rows: tuple[float, ...]) -> np.ndarray:
    return np.log(np.array(rows, np.float32))


def test_three_ways_from_segments_to_a_track_by_hand() -> None:
    # one sure segment against two that lean the other way
    logits = of((0.98, 0.02), (0.4, 0.6), (0.4, 0.6))
    label, track = np.zeros(3, np.int64), np.zeros(3, np.int64)
    found = {way: judge(logits, label, track, "test", way) for way in ("mean-prob", "vote")}
    assert found["mean-prob"].probabilities == pytest.approx(
        np.array([[1.78 / 3, 1.22 / 3]]), abs=1e-6
    )
    assert found["mean-prob"].guesses.tolist() == [0]
    assert found["vote"].probabilities == pytest.approx(np.array([[1 / 3, 2 / 3]]))
    assert found["vote"].guesses.tolist() == [1]
    assert found["vote"].track.accuracy == 0.0
    assert np.isnan(found["vote"].track.nll)
    mean = judge(logits, label, track, "test", "mean-logit")
    odds = (0.98 / 0.02 * (0.4 / 0.6) ** 2) ** (1 / 3)  # the geometric mean of the odds
    assert mean.probabilities[0, 0] == pytest.approx(odds / (1 + odds), abs=1e-6)
    for one in (*found.values(), mean):
        assert {way: s.accuracy for way, s in one.aggregates.items()} == {
            "mean-prob": 1.0,
            "mean-logit": 1.0,
            "vote": 0.0,
        }


def test_a_tie_of_votes_goes_to_the_higher_mean_probability() -> None:
    logits = of((0.5, 0.4, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8), (0.1, 0.1, 0.8))
    found = judge(logits, np.array([1, 1, 2, 2]), np.array([0, 0, 1, 1]), "test", "vote")
    assert found.probabilities[0] == pytest.approx([0.5, 0.5, 0])
    assert found.guesses.tolist() == [1, 2]
    assert found.track.confusion.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [600, 4] that are too sure, labels, and 120 tracks of 5 segments in any order."""
    rng = np.random.default_rng(0)
    track = rng.permutation(np.repeat(np.arange(120), 5))
    truth = rng.integers(0, 4, 120)
    shown = np.where(rng.random(120) < 0.75, truth, rng.integers(0, 4, 120))
    logits = 3 * rng.normal(size=(600, 4)) + 6 * np.eye(4)[shown[track]]
    return logits.astype(np.float32), truth[track], track


def nll(logits: np.ndarray, label: np.ndarray, track: np.ndarray, temperature: float) -> float:
    """A track at a time."""
    total = []
    for one in np.unique(track):
        rows = softmax(logits[track == one].astype(np.float64) / temperature, axis=1)
        total.append(-np.log(rows.mean(0)[label[track == one][0]]))
    return float(np.mean(total))


ALONE = [None] * 120


def test_temperature_is_where_the_likelihood_of_the_tracks_is_best(drawn) -> None:
    found = fit_temperature(*drawn, ALONE)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 400))
    best = grid[np.argmin([nll(*drawn, temperature) for temperature in grid])]
    assert found == pytest.approx(best, rel=0.02)
    assert found > 1.2
    assert nll(*drawn, found) < nll(*drawn, 1.0)


def test_with_one_segment_a_track_it_is_the_temperature_of_the_rows(drawn) -> None:
    logits, label, _ = drawn
    expected = fit_of_rows(logits.astype(np.float64), label)
    found = fit_temperature(logits, label, np.arange(600), [None] * 600)
    assert found == pytest.approx(expected, rel=1e-3)


def test_mean_probability_divides_by_the_temperature(drawn) -> None:
    logits, _, track = drawn
    mean, guess = mean_probability(logits, track, 2.0)
    rows = np.exp(log_softmax(logits[track == 7].astype(np.float64) / 2, axis=1))
    assert mean[7] == pytest.approx(rows.mean(0))
    assert guess[7] == rows.mean(0).argmax()


def test_no_temperature_where_there_is_no_best_one(drawn) -> None:
    _, label, track = drawn
    sure = np.eye(4, dtype=np.float32)[label] * 4
    assert fit_temperature(sure, label, track, ALONE) is None, "all right: the lower the better"
    wrong = np.roll(np.eye(4, dtype=np.float32)[label] * 9, 1, axis=1)
    assert fit_temperature(wrong, label, track, ALONE) is None, "all wrong: the higher the better"


def test_a_temperature_that_does_not_help_tracks_it_has_not_seen_is_not_accepted() -> None:
    """40 calibrated tracks: the best T is never quite 1, and a part of what it wins is chance."""
    accepted, worse, tries = 0, 0, 40
    for seed in range(tries):
        rng = np.random.default_rng(seed)
        logits = 2 * rng.normal(size=(80, 4))
        drawn = [rng.choice(4, p=row) for row in softmax(logits, axis=1)]
        here = logits[:40].astype(np.float32), np.array(drawn[:40]), np.arange(40)
        found = fit_temperature(*here, [None] * 40)
        if found is not None:
            accepted += 1
            there = logits[40:].astype(np.float32), np.array(drawn[40:]), np.arange(40)
            worse += nll(*there, found) > nll(*there, 1.0)
    assert accepted < tries / 2, "before, all of them were"
    assert worse < tries / 4


def test_artists_are_left_out_whole() -> None:
    """Two artists, one all right and one all wrong: each tells nothing about the other."""
    label = np.zeros(40, np.int64)
    logits = np.zeros((40, 2), np.float32)
    logits[:30, 0] = logits[30:, 1] = 5.0
    here = logits, label, np.arange(40)
    assert fit_temperature(*here, [None] * 40) > 2, "track by track, any of them tells of the rest"
    assert fit_temperature(*here, ["one"] * 30 + ["other"] * 10) is None
    assert fit_temperature(*here, ["one"] * 40) is None, "nobody is left to judge by"


def test_what_select_compares_by_and_rows_that_are_not_finite() -> None:
    logits = of((0.9, 0.1), (0.4, 0.6))
    found = judge(logits, np.zeros(2, np.int64), np.arange(2), "validation")
    assert found.loss_by("nll") == pytest.approx(-np.log([0.9, 0.4]).mean(), rel=1e-6)
    assert found.loss_by("macro-f1") == pytest.approx(-(2 / 3) / 2)
    assert found.loss_by("last") == 0
    assert found.rows_not_finite == 0
    for bad in (np.nan, np.inf):
        logits[1, 0] = bad
        with np.errstate(invalid="ignore"):
            found = judge(logits, np.zeros(2, np.int64), np.arange(2), "validation")
        assert found.rows_not_finite == 1
