"""Doubted labels: by hand, and how many planted ones are found."""

import numpy as np
import pytest

from mgc_dist.bias_model import doubts
from mgc_dist.bias_model.heads import cross_fit


def test_a_track_is_doubted_if_it_reaches_the_threshold_of_another_genre() -> None:
    """Thresholds are 0.7 and 0.575: what a genre's own tracks give it, on average."""
    probability = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.1, 0.9], [0.75, 0.25]])
    label = np.array([0, 0, 0, 1, 1])
    found = doubts.find(probability, label)
    assert found.track.tolist() == [4, 2]  # 0.25 - 0.75 is surer than 0.4 - 0.6
    assert found.guess.tolist() == [0, 1]
    assert doubts.find(np.eye(3), np.arange(3)).track.tolist() == []
    unsure = np.array([[0.55, 0.45], [0.95, 0.05], [0.2, 0.8], [0.45, 0.55]])
    assert doubts.find(unsure, np.array([1, 0, 1, 0])).track.tolist() == [], "it reaches neither"


@pytest.mark.parametrize(
    ("apart", "recall", "precision"), [(5.0, 0.7, 0.95), (3.0, 0.65, 0.9), (1.6, 0.65, 0.15)]
)
def test_planted_wrong_labels_are_found_as_far_as_genres_can_be_told(
    apart: float, recall: float, precision: float
) -> None:
    """600 tracks of 6 genres, of which 8 % have another one's label."""
    rng = np.random.default_rng(0)
    truth = np.arange(600) % 6
    hidden = rng.normal(size=(600, 8)) + apart * np.eye(6, 8)[truth]
    wrong = rng.random(600) < 0.08
    label = np.where(wrong, (truth + rng.integers(1, 6, 600)) % 6, truth)
    fitted = cross_fit(
        hidden.astype(np.float32), label, rng.permutation(600) % 5, folds=5, genres=6, c=1.0
    )
    found = doubts.find(np.exp(fitted.log_probability.astype(np.float64)), label)
    hits = wrong[found.track].sum()
    assert hits / wrong.sum() >= recall
    assert hits / len(found.track) >= precision
    known = found.track[wrong[found.track]]
    assert (found.guess[wrong[found.track]] == truth[known]).mean() > 0.6
    if apart > 2:  # the model is right in 0.92 of the tracks or more
        assert wrong[found.track[:10]].all(), "the surest come first"
