"""How the sources were recorded and encoded: a table beside the shards, and whether it tells.

A data set in which one genre comes as MP3 and another as FLAC can be learned without listening.
So each property of the files alone has to guess the genre of tracks by artists that it has not
seen; what guesses well is named where people look, and `evaluate` takes it for subgroups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.data.manifest import TRACKS, Manifest, TrackEntry
from mgc_dist.data.tables import Value, read_columns, write_columns
from mgc_dist.data.tracks import group_key
from mgc_dist.files import sha256

PROPERTIES = (
    "container",
    "codec",
    "sample_rate",
    "channels",
    "kbit_rate",
    "seconds",
    "peak",
    "clipped",
    "mixing_loss_db",
    "loudness_lufs",
)
"""Columns that are looked at: the fields of `audio.Source`."""
_BINS = 8
"""Numbers of more different values are cut into so many parts of equal size."""
_LEAST_GAIN = 0.1
"""A property tells the genre if it gets so far from chance towards certainty..."""
_ERRORS = 4.0
"""... and lies so many standard errors above chance, each group counting once. Of properties drawn
at random 0.3 % do: guesses of one genre go together, so these errors are not of a normal kind."""
_NOTHING = 1e-9
"""Less than any track counts, and more than what rounding leaves of none."""

About = Mapping[str, Value]


def write(path: Path, tracks: Sequence[TrackEntry], about: Sequence[About]) -> str:
    """Write a row a track, of what the manifest says and of its source; returns the sha256."""
    empty: dict[str, Value] = dict.fromkeys(PROPERTIES)
    rows = []
    for track, own in zip(tracks, about, strict=True):
        said = asdict(track)
        rows.append({"track": said.pop("id")} | said | empty | dict(own))
    write_columns(path, rows)
    return sha256(path)


def telling(tracks: Sequence[TrackEntry], about: Sequence[About]) -> dict[str, float]:
    """Properties that tell the genre of a track by themselves, and how often.

    Each value of a property stands for the genre that is most frequent there, in shares of the
    genres, among the tracks of all other groups.

    Returns:
        property -> mean over the genres of the share that is guessed rightly; only those that
        are clearly above chance, which is 1 / K.
    """
    genre = _numbered([track.genre for track in tracks])
    group = _numbered([group_key(track.id, track.group) for track in tracks])
    genres = genre.max() + 1
    chance = 1 / genres
    groups = np.bincount(np.unique(np.stack([genre, group]), axis=1)[0])  # of each genre
    error = np.sqrt(chance * (1 - chance) * (1 / groups).sum()) / genres
    found = {}
    for name in PROPERTIES:
        share = _guessed(_in_bins([own.get(name) for own in about]), genre, group)
        if share > chance + max(_LEAST_GAIN * (1 - chance), _ERRORS * error):
            found[name] = round(share, 3)
    return found


def indicators(
    about: Sequence[About], names: Sequence[str]
) -> tuple[list[str], NDArray[np.float32]]:
    """Properties as a linear model takes them: a column for each value, or part of the values.

    Args:
        about: of each of M tracks.
        names: d properties of PROPERTIES; one that is unknown is a value too.

    Returns:
        What each column stands for, and zeros and ones, float32 [M, columns].
    """
    titles, columns = [], []
    for name in names:
        known = [own.get(name) for own in about]
        place = _in_bins(known)
        for number in np.unique(place).tolist():
            mine = place == number
            titles.append(f"{name} {_told([known[n] for n in np.flatnonzero(mine)])}")
            columns.append(mine.astype(np.float32))
    return titles, np.stack(columns, axis=1)


def _told(values: Sequence[Value]) -> str:
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values) or len(set(numbers)) == 1:
        return "unknown" if values[0] is None else str(values[0])
    return f"{min(numbers):g} to {max(numbers):g}"


def read(folder: Path, manifest: Manifest) -> list[About] | None:
    """What the table beside the shards says of each track, in the manifest's order.

    Returns:
        None for a data set from before there was one.

    Raises:
        UserError: the table is unreadable.
    """
    if not manifest.tracks_sha256:
        return None
    rows = {row["track"]: row for row in read_columns(folder / TRACKS, "shards")}
    return [rows.get(track.id, {}) for track in manifest.tracks]


def _guessed(
    values: NDArray[np.int64], genre: NDArray[np.int64], group: NDArray[np.int64]
) -> float:
    genres = int(genre.max()) + 1
    weight = 1 / np.bincount(genre)[genre]  # each genre counts the same
    seen = np.zeros((values.max() + 1, genres))
    np.add.at(seen, (values, genre), weight)
    right = np.zeros(genres)
    order = np.argsort(group, kind="stable")
    for mine in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):  # a group's tracks
        np.subtract.at(seen, (values[mine], genre[mine]), weight[mine])
        others = seen[values[mine]]  # [M, K]
        is_right = (others.argmax(axis=1) == genre[mine]) & (others.max(axis=1) > _NOTHING)
        np.add.at(right, genre[mine], is_right * weight[mine])
        np.add.at(seen, (values[mine], genre[mine]), weight[mine])
    return float(right.mean())


def _in_bins(column: Sequence[Value]) -> NDArray[np.int64]:
    """A number for each value; numbers of many values by the part of equal size they lie in."""
    is_number = all(value is None or isinstance(value, int | float) for value in column)
    if not is_number or len(set(column)) <= _BINS:
        return _numbered(["" if value is None else str(value) for value in column])
    known = np.array([np.nan if value is None else float(value) for value in column])
    borders = np.nanquantile(known, np.arange(1, _BINS) / _BINS)
    return np.where(np.isnan(known), _BINS, np.searchsorted(borders, known, side="right"))


def _numbered(names: Sequence[str]) -> NDArray[np.int64]:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)
