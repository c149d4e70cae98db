"""Folds of the training tracks, so that no head predicts tracks that it was fitted on."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mgc_dist.data.manifest import TrackEntry
from mgc_dist.data.tracks import Track, group_key, keyed


def deal_folds(tracks: Sequence[Track], folds: int, seed: int) -> dict[str, int]:
    """group_key -> fold, 0 .. folds - 1, each genre spread evenly over folds.

    Groups are taken largest first, in an order keyed by the seed. Each goes to the fold that
    has the fewest tracks of the group's genres, and of equals to the one with the fewest tracks.
    """
    members: dict[str, Counter[str]] = defaultdict(Counter)
    for track in tracks:
        members[group_key(track.id, track.group)][track.genre] += 1
    have: list[Counter[str]] = [Counter() for _ in range(folds)]

    def fill(fold: int, genres: Mapping[str, int]) -> tuple[int, int]:
        here = sum(count * have[fold][genre] for genre, count in genres.items())
        return here, have[fold].total()

    chosen: dict[str, int] = {}
    for key in sorted(members, key=lambda k: (-members[k].total(), keyed(seed, k))):
        best = min(range(folds), key=lambda fold: fill(fold, members[key]))
        have[best].update(members[key])
        chosen[key] = best
    return chosen


def of_tracks(
    fold_of: Mapping[str, int], tracks: Iterable[Track | TrackEntry]
) -> NDArray[np.int64]:
    """The fold of each track, int64 [M]; -1 for one whose group has none.

    Args:
        fold_of: group_key -> fold.
        tracks: in the order of the result.
    """
    keys = (group_key(track.id, track.group) for track in tracks)
    return np.array([fold_of.get(key, -1) for key in keys], np.int64)
