"""Folds of training tracks."""

from collections import Counter
from pathlib import Path

from mgc_dist.bias_model.folds import deal_folds
from mgc_dist.data.tracks import Track


def test_folds_keep_groups_together_and_spread_each_genre() -> None:
    found = [
        Track(id=f"{genre}{n}", genre=genre, path=Path(), group=f"{genre} artist {n // 2}")
        for genre in "xy"
        for n in range(20)
    ]
    folds = deal_folds(found, 5, seed=0)
    assert set(folds.values()) == {0, 1, 2, 3, 4}
    for genre in "xy":
        sizes = Counter(folds[f"group {t.group}"] for t in found if t.genre == genre)
        assert set(sizes.values()) == {4}
    assert folds != deal_folds(found, 5, seed=1)
