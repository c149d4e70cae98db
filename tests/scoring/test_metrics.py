"""Figures against scikit-learn."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as reference
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.preprocessing import label_binarize

from mgc_dist.report import evaluation, tables
from mgc_dist.scoring import conditions, metrics, paired, results
from mgc_dist.scoring.score import judge


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [200, 5] and labels; genre 4 never occurs and is never predicted."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, 200)
    logits = rng.normal(size=(200, 5)) + 1.5 * np.eye(5)[label]
    logits[:, 4] -= 50
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probability, label


def test_scores_agree_with_scikit_learn(drawn) -> None:
    probability, label = drawn
    guess = probability.argmax(1)
    found = metrics.scores(probability, label)
    names = list(range(5))
    assert found.accuracy == pytest.approx(reference.accuracy_score(label, guess))
    assert found.figures["balanced_accuracy"] == pytest.approx(
        reference.balanced_accuracy_score(label, guess)
    )
    assert found.macro_f1 == pytest.approx(
        reference.f1_score(label, guess, average="macro", labels=names, zero_division=0)
    )
    assert found.nll == pytest.approx(reference.log_loss(label, probability, labels=names))
    assert (found.confusion == reference.confusion_matrix(label, guess, labels=names)).all()
    each = reference.precision_recall_fscore_support(label, guess, labels=names, zero_division=0)
    for k, row in enumerate(found.per_genre()):
        found_here = (row["precision"], row["recall"], row["f1"], row["support"])
        assert found_here == pytest.approx(tuple(values[k] for values in each))


def test_brier_score_agrees_with_scikit_learn_a_genre_at_a_time(drawn) -> None:
    probability, label = drawn
    onehot = label_binarize(label, classes=range(5))
    each = [reference.brier_score_loss(onehot[:, k], probability[:, k]) for k in range(5)]
    assert metrics.scores(probability, label).figures["brier"] == pytest.approx(sum(each))


def test_reliability_agrees_with_scikit_learn(drawn) -> None:
    probability, label = drawn
    guess, confidence = probability.argmax(1), probability.max(1)
    found = metrics.reliability(probability, label, guess)
    right, mean = calibration_curve(guess == label, confidence, n_bins=15)
    filled = found.count > 0
    assert found.accuracy[filled] == pytest.approx(right)
    assert found.confidence[filled] == pytest.approx(mean)
    assert np.isnan(found.accuracy[~filled]).all()
    assert found.count.tolist() == np.histogram(confidence, found.edges)[0].tolist()
    gap = np.abs(right - mean) * found.count[filled]
    assert metrics.scores(probability, label).ece == pytest.approx(gap.sum() / 200)


def test_figures_of_many_confusion_matrices_are_those_of_each(drawn) -> None:
    _, label = drawn
    rng = np.random.default_rng(3)
    guesses = rng.integers(0, 5, (7, 200))
    stack = np.stack([metrics.confusion_of(label, guess, 5) for guess in guesses])
    found = metrics.figures_of(stack)
    accuracy, balanced, macro_f1 = found.values()
    for k, guess in enumerate(guesses):
        assert accuracy[k] == pytest.approx(reference.accuracy_score(label, guess))
        with pytest.warns(UserWarning, match="not in y_true"):  # genre 4 is guessed at times
            expected = reference.balanced_accuracy_score(label, guess)
        assert balanced[k] == pytest.approx(expected)
        assert macro_f1[k] == pytest.approx(
            reference.f1_score(label, guess, average="macro", labels=range(5), zero_division=0)
        )


def test_a_model_that_has_diverged_is_still_counted() -> None:
    found = metrics.scores(np.full((3, 2), np.nan), np.array([0, 1, 0]))
    assert found.count == 3
    assert np.isnan(found.nll)


def test_tracks_are_means_of_their_segments_in_any_order() -> None:
    probability = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]])
    tracks, mean = metrics.track_means(probability, np.array([7, 2, 7, 2]))
    assert tracks.tolist() == [2, 7]
    assert mean == pytest.approx(np.array([[0.25, 0.75], [0.65, 0.35]]))


def test_calibration_error_by_hand() -> None:
    probability = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [1.0, 0.0]])
    label = np.array([0, 1, 0, 0])
    # bins of 1/15: 0.9 (two, one right), 0.6 (one, right), 1.0 (one, right)
    expected = (abs(1.8 - 1) + abs(0.6 - 1) + 0) / 4
    found = metrics.scores(probability, label).figures
    assert found["ece"] == pytest.approx(expected)
    assert found["overconfidence"] == pytest.approx((0.9 + 0.9 + 0.6 + 1.0) / 4 - 3 / 4)
    # how far two draws of 0.9 are from 1.8: 2, 1 or 0 right; one draw of 0.6; one that is sure
    two = 0.81 * 0.2 + 0.18 * 0.8 + 0.01 * 1.8
    assert found["ece_floor"] == pytest.approx((two + 2 * 0.6 * 0.4 + 0) / 4)


@pytest.mark.parametrize("count", [3, 290, 20_000])
def test_the_floor_is_the_mean_error_of_models_that_are_right_as_often_as_they_say(
    count: int,
) -> None:
    rng = np.random.default_rng(count)
    confidence = 0.5 + 0.5 * rng.beta(3, 1, count)
    probability = np.stack([confidence, 1 - confidence], axis=1)
    guess = np.zeros(count, np.int64)
    errors = [
        metrics.reliability(probability, (rng.random(count) > confidence).astype(int), guess).error
        for _ in range(2_000)
    ]
    floor = metrics.ece_floor(confidence)
    assert floor == pytest.approx(np.mean(errors), abs=4 * np.std(errors) / 2_000**0.5)
    assert np.isnan(metrics.ece_floor(np.array([0.5, np.nan])))
    assert np.isnan(metrics.ece_floor(np.empty(0)))
    assert metrics.ece_floor(np.full(1_000, 1 + 1e-8)) == 0, "of float32 probabilities"


def test_effective_sample_size() -> None:
    assert metrics.effective_sample_size(np.ones(10)) == pytest.approx(10)
    assert metrics.effective_sample_size(np.array([1.0, 0, 0, 0])) == pytest.approx(1)
    assert metrics.effective_sample_size(np.zeros(3)) == 0


def kappa(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cohen's kappa: agreement beyond chance."""
    total = confusion.sum(axis=(-2, -1))
    agree = np.trace(confusion, axis1=-2, axis2=-1) / total
    chance = (confusion.sum(axis=-1) * confusion.sum(axis=-2)).sum(axis=-1) / total**2
    return np.asarray((agree - chance) / (1 - chance))


def test_a_new_metric_is_one_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the entry is there: files, tables, intervals and comparisons follow."""
    monkeypatch.setitem(metrics.METRICS, "kappa", metrics.Metric(head="kappa", of_confusion=kappa))
    rng = np.random.default_rng(5)
    label, track = np.repeat(rng.integers(0, 3, 60), 4), np.repeat(np.arange(60), 4)
    logits = rng.normal(size=(240, 3)).astype(np.float32) + 0.5 * np.eye(3, dtype=np.float32)[label]
    result = judge(logits, label, track, "test")
    expected = reference.cohen_kappa_score(result.labels, result.guesses)
    ids = tuple(f"t{k:02d}" for k in range(60))
    subject = evaluation.Subject(
        name="test",
        run="run",
        dataset_id="0" * 64,
        genres=("a", "b", "c"),
        track_ids=ids,
        groups=(None,) * 60,
    )
    written = evaluation.summary(subject, result)
    assert written["track"]["kappa"] == pytest.approx(expected)
    low, high = written["intervals"]["tracks"]["kappa"]
    assert low < expected < high
    monkeypatch.setenv("COLUMNS", "120")
    tables.evaluation(written)
    shown = capsys.readouterr().out
    assert f"kappa {low:.3f} to {high:.3f}" in shown
    assert re.search(r"ECE\W+kappa\W", shown)
    evaluation.write(tmp_path, subject, result, written)
    found = results.read(tmp_path, "test")
    assert conditions.figures(found)["kappa"] == pytest.approx(expected)
    worse = dataclasses.replace(found, guess=np.zeros_like(found.guess))
    pair = paired.compare(found, worse, "test")
    assert pair["kappa"]["difference"] == pytest.approx(-expected)
    assert "kappa" in pair["intervals"]["tracks"]
