"""Cross-fitting: no row judges itself, no other split is looked at, calibrated by training rows."""

import numpy as np
import pytest
from scipy.special import log_softmax

from mgc_dist.bias_model.heads import cross_fit, fit_head, head_hash
from mgc_dist.errors import UserError
from mgc_dist.scoring.calibration import fit_temperature


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden [200, 6], labels of 4 genres, folds (-1 for the last 50 rows)."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, 200)
    hidden = (0.8 * rng.normal(size=(200, 6))).astype(np.float32)
    hidden[:, :4] += 1.5 * np.eye(4, dtype=np.float32)[label]
    fold = np.arange(200) % 5
    fold[150:] = -1
    return hidden, label, fold


def fit(hidden, label, fold, **changes):
    return cross_fit(hidden, label, fold, **({"folds": 5, "genres": 4, "c": 1.0} | changes))


def test_rows_are_probabilities_that_beat_chance(drawn) -> None:
    hidden, label, fold = drawn
    found = fit(hidden, label, fold)
    assert found.log_probability.dtype == np.float32
    assert np.exp(found.log_probability).sum(1) == pytest.approx(np.ones(200), abs=1e-5)
    guess = found.log_probability.argmax(1)
    assert (guess[:150] == label[:150]).mean() > 0.6
    assert (guess[150:] == label[150:]).mean() > 0.6


def test_a_row_never_judges_itself_or_its_fold(drawn) -> None:
    hidden, label, fold = drawn
    before = fit(hidden, label, fold)
    changed = label.copy()
    changed[fold == 2] = (changed[fold == 2] + 1) % 4
    after = fit(hidden, changed, fold)
    mine = fold == 2
    # the shared temperature may move; the order of the logits of fold 2 may not
    assert (before.heads[2].weight == after.heads[2].weight).all()
    raw = before.log_probability[mine] * before.temperature
    again = after.log_probability[mine] * after.temperature
    centred = raw - raw.mean(1, keepdims=True)
    assert centred == pytest.approx(again - again.mean(1, keepdims=True), abs=1e-4)


def test_labels_of_other_splits_change_no_byte(drawn) -> None:
    hidden, label, fold = drawn
    changed = label.copy()
    changed[150:] = 3 - changed[150:]
    one, two = fit(hidden, label, fold), fit(hidden, changed, fold)
    assert one.log_probability.tobytes() == two.log_probability.tobytes()
    assert one.temperature == two.temperature


def test_other_splits_get_the_mean_of_the_heads(drawn) -> None:
    hidden, label, fold = drawn
    found = fit(hidden, label, fold)
    each = [
        np.exp(log_softmax(head.logits(hidden[150:]) / found.temperature, axis=1))
        for head in found.heads
    ]
    assert np.exp(found.log_probability[150:]) == pytest.approx(np.mean(each, axis=0), abs=1e-6)


def test_temperature_is_where_the_likelihood_is_best() -> None:
    rng = np.random.default_rng(1)
    logits = 4.0 * rng.normal(size=(4000, 4))
    truth = np.array([rng.choice(4, p=np.exp(row)) for row in log_softmax(logits / 2.5, axis=1)])
    assert fit_temperature(logits, truth) == pytest.approx(2.5, rel=0.1)


def test_heads_of_two_and_of_one_genre(drawn) -> None:
    hidden, label, _ = drawn
    two = label % 2 * 3  # genres 0 and 3 of 4
    head = fit_head(hidden, two, 4, 1.0)
    logits = head.logits(hidden)
    assert (logits.argmax(1) == two).mean() > 0.6
    assert set(logits.argmax(1)) <= {0, 3}
    one = fit_head(hidden, np.full(200, 2), 4, 1.0)
    assert (one.logits(hidden).argmax(1) == 2).all()


def test_an_empty_fold_is_refused(drawn) -> None:
    hidden, label, fold = drawn
    with pytest.raises(UserError, match=r"--folds 6: got 5 non-empty folds"):
        fit(hidden, label, fold, folds=6)


def test_the_hash_of_the_heads_sees_every_number(drawn) -> None:
    hidden, label, fold = drawn
    heads = fit(hidden, label, fold).heads
    first = head_hash(heads)
    assert head_hash(fit(hidden, label, fold).heads) == first
    assert head_hash(heads[::-1]) != first
    for array in (heads[3].mean, heads[3].scale, heads[3].weight, heads[3].intercept):
        before = array.flat[-1]
        array.flat[-1] = np.nextafter(before, 9e9)
        assert head_hash(heads) != first
        array.flat[-1] = before
        assert head_hash(heads) == first
