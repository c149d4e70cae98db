"""What must stay in one split: tracks of an artist, and tracks that hold one recording.

Artists are known from a table of the user's, or from GTZAN's list, which the package holds.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.data.tables import plain, read_table
from mgc_dist.data.tracks import SUFFIXES, Track, group_key
from mgc_dist.errors import UserError
from mgc_dist.files import replace_text
from mgc_dist.packing import fingerprints
from mgc_dist.packing.parts import Waves
from mgc_dist.workers import spread

GTZAN = "gtzan"
"""What `--groups` calls the list of GTZAN's artists: 919 of 1,000 tracks have one.

Source: B. L. Sturm, "An Analysis of the GTZAN Music Genre Dataset", MIRUM 2012, and its index.
"""
Marks = NDArray[np.uint32]

_SHOWN = 10
"""Pairs that a message names; a file lists all."""


def with_groups(tracks: Sequence[Track], table: Path) -> list[Track]:
    """Tracks with the groups of a table (`track` and `artist` or `group`), or of GTZAN's list.

    `track` is the file's name with or without suffix, or the track's id; with a column `genre`
    it counts within that genre. A blank group means unknown: such a track is its own group,
    never one shared by all blanks. A track that the table does not name keeps its group.

    Raises:
        UserError: the table is unreadable, lacks a column, names none of the tracks, or gives
            a track two groups.
    """
    if str(table) == GTZAN and not table.exists():
        table = Path(str(files("mgc_dist") / "packing" / "gtzan_artists.csv"))
    lines = read_table(table, "--groups")
    rows = [row for _, row in lines]
    column = "group" if rows and "group" in rows[0] else "artist"
    if not rows or "track" not in rows[0] or column not in rows[0]:
        raise UserError(
            f"--groups {table}",
            got=f"columns {', '.join(rows[0]) if rows else 'none'}",
            expected="a header with track and artist (or group)",
            cure="write one line a track below such a header",
        )
    groups: dict[tuple[str, str], str | None] = {}
    for line, row in lines:
        name, group = row["track"], row[column] or None
        if not name:
            raise UserError(
                f"--groups {table}: line {line}",
                got="a blank track",
                expected="the name of a file or a track's id",
                cure="fill it in, or take the line out",
            )
        name = name.removesuffix(Path(name).suffix) if name.lower().endswith(SUFFIXES) else name
        key = (row.get("genre") or "", name)
        if groups.setdefault(key, group) != group:
            raise UserError(
                f"--groups {table}: track {name}",
                got=f"both {groups[key]!r} and {group!r}",
                expected="one artist a track",
                cure="add a column genre if two genres use one name, or correct the table",
            )

    def keys(track: Track) -> list[tuple[str, str]]:
        names = (track.path.stem, track.id)
        return [(genre, name) for genre in (track.genre, "") for name in names]

    found = {t.id: next((key for key in keys(t) if key in groups), None) for t in tracks}
    grouped = [replace(t, group=groups.get(found[t.id] or ("", "")) or t.group) for t in tracks]
    if not any(found.values()):
        raise UserError(
            f"--groups {table}",
            got="none of the tracks by name",
            expected=f"names such as {tracks[0].path.stem}",
            cure="the column track holds the file's name without its suffix",
        )
    return grouped


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Two tracks that hold one recording.

    Attributes:
        first: a track.
        second: the other one.
        speed: of the second, relative to the first.
        start_s: where the second begins in the first, in seconds.
    """

    first: Track
    second: Track
    speed: float
    start_s: float

    def __str__(self) -> str:
        found = f"{self.first.path} and {self.second.path}"
        if abs(self.speed - 1) > 0.0005:
            found += f", {abs(self.speed - 1):.1%} {'faster' if self.speed > 1 else 'slower'}"
        return found + (f", {self.start_s:+.1f} s" if abs(self.start_s) >= 0.05 else "")


def repetitions(
    tracks: Sequence[Track],
    waves: Waves,
    sample_rate: int,
    *,
    jobs: int,
    progress: Callable[[Iterator[Marks]], Iterable[Marks]],
) -> list[Repetition]:
    """Tracks that hold the same recording: copies of one wave, and those found by ear.

    Args:
        tracks: that are compared.
        waves: of them.
        sample_rate: of the waves, in Hz.
        jobs: processes, 0 for one a core.
        progress: wraps the stream of tracks that have been listened to.
    """
    alike: dict[int, list[int]] = defaultdict(list)
    for number, track in enumerate(tracks):
        alike[waves.tracks[track.id].checksum].append(number)
    pairs = {(same[0], other): (1.0, 0.0) for same in alike.values() for other in same[1:]}
    listen = partial(_landmarks, sample_rate=sample_rate)
    items = ((track, waves.only(track)) for track in tracks)
    prints = list(progress(spread(listen, items, jobs)))
    for pair in fingerprints.find(prints, lambda number: waves(tracks[number])[0], sample_rate):
        pairs.setdefault((pair.first, pair.second), (pair.speed, pair.start_s))
    return [
        Repetition(first=tracks[one], second=tracks[two], speed=speed, start_s=start_s)
        for (one, two), (speed, start_s) in sorted(pairs.items())
    ]


def _landmarks(item: tuple[Track, Waves], sample_rate: int) -> Marks:
    track, waves = item
    return fingerprints.landmarks(waves(track)[0], sample_rate)


def refuse_repetitions(
    found: Sequence[Repetition], split_of: Mapping[str, str], listing: Path, *, may_join: bool
) -> list[str]:
    """What is to be said of repetitions within one split.

    Args:
        found: all of them.
        split_of: id -> split of each track.
        listing: a CSV file that will name all of them.
        may_join: whether `--same-group` is a way out.

    Raises:
        UserError: some are in two splits.
    """
    if not found:
        listing.unlink(missing_ok=True)
        return []
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ("track", "split", "genre", "same_as", "its_split", "its_genre", "speed", "start_s")
    )
    for each in found:
        one, two = each.first, each.second
        about = (f"{each.speed:.4f}", f"{each.start_s:.2f}")
        where = split_of[one.id], split_of[two.id]
        row = (one.path, where[0], one.genre, two.path, where[1], two.genre, *about)
        lines.writerow(plain(row))
    replace_text(listing, text.getvalue())
    across = [each for each in found if split_of[each.first.id] != split_of[each.second.id]]
    if across:
        shown = "\n".join(f"    {each}" for each in across[:_SHOWN])
        cure = (
            "--same-group keeps each pair in one split"
            if may_join
            else "leave one of each pair out of the list of splits"
        )
        raise UserError(
            "the same recording in two splits",
            got=f"{len(across)} pairs of tracks",
            expected="none",
            cure=f"{cure}; --no-repetitions does not look for them. {listing} lists all:\n{shown}",
        )
    notes = [
        f"{len(found)} pairs of tracks hold the same recording, each within one split: {listing}"
    ]
    genres = [each for each in found if each.first.genre != each.second.genre]
    if genres:
        notes.append(f"{len(genres)} of these pairs have two genres, such as {genres[0]}")
    return notes


def as_one_group(tracks: Sequence[Track], found: Iterable[Repetition]) -> list[Track]:
    """Tracks whose repetitions, and the other tracks of their artists, are in one group."""
    head: dict[str, str] = {}

    def of(key: str) -> str:
        while head.get(key, key) != key:
            key = head[key]
        return key

    keys = {track.id: group_key(track.id, track.group) for track in tracks}
    for each in found:
        one, two = sorted((of(keys[each.first.id]), of(keys[each.second.id])))
        head[two] = one
    named = {key: key.partition(" ")[2] for key in {*head, *head.values()}}
    return [
        replace(track, group=named[of(keys[track.id])]) if keys[track.id] in named else track
        for track in tracks
    ]
