"""Figures against scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics as reference

from mgc_dist import metrics


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
    assert found.balanced_accuracy == pytest.approx(reference.balanced_accuracy_score(label, guess))
    assert found.macro_f1 == pytest.approx(
        reference.f1_score(label, guess, average="macro", labels=names, zero_division=0)
    )
    assert found.nll == pytest.approx(reference.log_loss(label, probability, labels=names))
    assert (found.confusion == reference.confusion_matrix(label, guess, labels=names)).all()
    each = reference.precision_recall_fscore_support(label, guess, labels=names, zero_division=0)
    for k, row in enumerate(found.per_genre()):
        assert list(row.values()) == pytest.approx([values[k] for values in each])


def test_tracks_are_means_of_their_segments_in_any_order() -> None:
    probability = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]])
    tracks, mean = metrics.track_probabilities(probability, np.array([7, 2, 7, 2]))
    assert tracks.tolist() == [2, 7]
    assert mean == pytest.approx(np.array([[0.25, 0.75], [0.65, 0.35]]))


def test_calibration_error_by_hand() -> None:
    probability = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [1.0, 0.0]])
    label = np.array([0, 1, 0, 0])
    # bins of 1/15: 0.9 (two, one right), 0.6 (one, right), 1.0 (one, right)
    expected = (abs(1.8 - 1) + abs(0.6 - 1) + 0) / 4
    assert metrics.expected_calibration_error(probability, label) == pytest.approx(expected)


def test_effective_sample_size() -> None:
    assert metrics.effective_sample_size(np.ones(10)) == pytest.approx(10)
    assert metrics.effective_sample_size(np.array([1.0, 0, 0, 0])) == pytest.approx(1)
    assert metrics.effective_sample_size(np.zeros(3)) == 0
