"""What will be packed, known from the tracks' lengths alone: segments, rows, shards.

Rows are dealt out before anything is written: the segments of a split are permuted by a keyed
bijection, so that a track's segments lie in different shards and no second shuffle is needed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.data import audio, record
from mgc_dist.data.manifest import window_of
from mgc_dist.data.order import bijection, key_of
from mgc_dist.data.tracks import KNOWN_BAD, Track, names_of_splits, refuse_leaks
from mgc_dist.errors import UserError
from mgc_dist.files import replace_text
from mgc_dist.workers import spread

SPREAD_VERSION = 1
"""Changes whenever the order of rows does."""
_HEADERS_AT_ONCE = 8
"""Threads that read headers: on a network file system each waits some milliseconds."""
_ROWS_AT_ONCE = 1 << 18
"""Rows that are dealt in one go: 2 MB an array."""
_LEAST_ROWS, _SHARDS, _LARGEST_SHARD = 512, 256, 1_000_000_000
"""Rows of a shard at least; shards that a data set has at most, as long as they stay below so many
bytes. 19 million rows of 3 s made 37,000 shards of 512."""
_PRINTED = 10
"""Unusable files that are named one by one; of more, a file holds the names."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How tracks become segments and segments become shards (samples, Hz, rows).

    `max_segments` of a track are kept, spread over it; 0 keeps all. With 0 `rows_per_shard` a plan
    chooses by the size of the data set.
    """

    segment_samples: int
    hop_samples: int
    sample_rate: int
    rows_per_shard: int
    max_segments: int = 0


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """What will be written, known from the tracks' lengths alone.

    Attributes:
        cut: lengths and rates.
        tracks: with splits, in the order of their ids.
        windows: int64 [tracks], whole segments that each holds.
        genres: names in label order.
        excluded: id -> reason of tracks that are left out.
    """

    cut: Cut
    tracks: tuple[Track, ...]
    windows: NDArray[np.int64]
    genres: tuple[str, ...]
    excluded: dict[str, str]

    @cached_property
    def segments(self) -> NDArray[np.int64]:
        """S of each track: int64 [tracks]."""
        return np.minimum(self.windows, self.cut.max_segments or self.windows)

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where each track's part of `rows` ends: int64 [tracks]."""
        return np.cumsum(self.segments)

    def only(self, index: int) -> "PackPlan":
        """The plan of one track, as a worker needs it: it knows nothing of rows."""
        here = slice(index, index + 1)
        return replace(self, tracks=self.tracks[here], windows=self.windows[here], excluded={})

    def window(self, index: int, segment: int) -> int:
        """Which window of a track a segment of it is."""
        return window_of(segment, int(self.segments[index]), int(self.windows[index]))

    @cached_property
    def split_rows(self) -> dict[str, int]:
        """Rows of each split."""
        splits = np.array([track.split for track in self.tracks])
        names = names_of_splits(splits.tolist())
        return {split: int(self.segments[splits == split].sum()) for split in names}

    def is_same(self, other: "PackPlan") -> bool:
        """Whether both write the same."""
        mine, theirs = (
            (plan.cut, plan.tracks, plan.windows.tolist(), plan.genres, plan.excluded)
            for plan in (self, other)
        )
        return mine == theirs

    def shards(self) -> list[tuple[str, int]]:
        """Name and rows of each shard, in row order."""
        shards: list[tuple[str, int]] = []
        for split, rows in self.split_rows.items():
            for number, first in enumerate(range(0, rows, self.cut.rows_per_shard)):
                name = f"{split}-{number:06d}.tar"
                shards.append((name, min(self.cut.rows_per_shard, rows - first)))
        return shards

    def rows(self) -> NDArray[np.int64]:
        """The row of each segment, track after track: int64 [N]."""
        number_of = {name: number for number, name in enumerate(self.split_rows)}
        of_track = np.array([number_of[track.split] for track in self.tracks], np.int8)
        split = np.repeat(of_track, self.segments)
        rows = np.empty(len(split), np.int64)
        first = 0
        for number, count in enumerate(self.split_rows.values()):
            key, of_split = key_of(SPREAD_VERSION, number), np.flatnonzero(split == number)
            for start in range(0, count, _ROWS_AT_ONCE):
                place = np.arange(start, min(start + _ROWS_AT_ONCE, count))
                rows[of_split[place]] = bijection(place, count, key) + first
            first += count
        return rows


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of tracks before they are decoded.

    Attributes:
        samples: id -> length at the new rate, or what is wrong with the file.
        guessed: ids of the tracks whose length only decoding tells.
    """

    samples: dict[str, int | str]
    guessed: frozenset[str]


def inspect(tracks: Sequence[Track], cut: Cut) -> Lengths:
    """Read every header."""
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as threads:
        looked = dict(zip((t.id for t in tracks), threads.map(_header, tracks), strict=True))
    return Lengths(
        samples={
            id_: found if isinstance(found, str) else _planned(found, cut)
            for id_, found in looked.items()
        },
        guessed=frozenset(
            id_
            for id_, found in looked.items()
            if not isinstance(found, str) and not found.is_exact
        ),
    )


def _header(track: Track) -> audio.Header | str:
    try:
        return audio.look(track.path)
    except audio.UnusableAudio as error:
        return reason_of(error)


def _planned(header: audio.Header, cut: Cut) -> int:
    """Samples at the new rate; a guess does not make a track too short."""
    samples = header.samples_at(cut.sample_rate)
    return samples if header.is_exact else max(samples, cut.segment_samples)


def count_segments(
    samples: Mapping[str, int | str], cut: Cut
) -> tuple[dict[str, int], dict[str, str]]:
    """Id -> whole segments, and id -> reason of the tracks that give none.

    Args:
        samples: id -> length at the new rate, or what is wrong with the file.
        cut: lengths.
    """
    segments: dict[str, int] = {}
    bad: dict[str, str] = {}
    for id_, length in samples.items():
        if isinstance(length, str):
            bad[id_] = length
            continue
        count = audio.segment_count(length, cut.segment_samples, cut.hop_samples)
        if count:
            segments[id_] = count
        else:
            bad[id_] = f"too short: {length / cut.sample_rate:.2f} s"
    return segments, bad


def decode_all(
    tracks: Sequence[Track],
    cut: Cut,
    *,
    jobs: int,
    progress: Callable[[Iterator[str]], Iterable[str]],
) -> dict[str, str]:
    """Which tracks cannot be decoded: id -> reason. Nothing is written.

    Args:
        tracks: to decode.
        cut: gives the sample rate.
        jobs: processes, 0 for one a core.
        progress: wraps the stream of finished tracks.
    """
    paths = [track.path for track in tracks]
    found = progress(spread(partial(_fault_of, sample_rate=cut.sample_rate), paths, jobs))
    return {track.id: fault for track, fault in zip(tracks, found, strict=True) if fault}


def _fault_of(path: Path, sample_rate: int) -> str:
    try:
        audio.read_int16(path, sample_rate)
    except audio.UnusableAudio as error:
        return reason_of(error)
    return ""


def judge_bad(
    bad: Mapping[str, str], tracks: Sequence[Track], allowed: int, listing: Path
) -> dict[str, str]:
    """Reasons to record for unusable tracks; files that are known to be bad need no leave.

    Args:
        bad: id -> reason.
        tracks: that the ids belong to.
        allowed: how many may be unusable.
        listing: file that all are written into if they are too many to print.

    Raises:
        UserError: more unexpected ones than allowed.
    """
    paths = {track.id: track.path for track in tracks}
    unexpected = {id_: reason for id_, reason in bad.items() if id_ not in KNOWN_BAD}
    if len(unexpected) > allowed:
        lines = [f"{paths[id_]}: {why}" for id_, why in sorted(unexpected.items())]
        if len(lines) > _PRINTED:
            replace_text(listing, "".join(f"{line}\n" for line in lines))
            counts = Counter(unexpected.values()).most_common(_PRINTED)
            lines = [f"{count} times: {why}" for why, count in counts]
            lines.append(f"{listing} lists all of them")
        listed = "\n".join(f"    {line}" for line in lines)
        raise UserError(
            "unusable audio files",
            got=f"{len(unexpected)} of {len(tracks)}",
            expected=f"at most {allowed} (--allow-bad)",
            cure=f"replace them, or leave them out with --allow-bad {len(unexpected)}:\n{listed}",
        )
    known = {
        id_: f"{why} (known: {KNOWN_BAD[id_]})" for id_, why in bad.items() if id_ in KNOWN_BAD
    }
    return unexpected | known


def leave_out_small(tracks: Sequence[Track], min_tracks: int) -> tuple[list[Track], dict[str, str]]:
    """Tracks of genres that have so many, and id -> reason of the others."""
    counts = Counter(track.genre for track in tracks)
    small = {
        track.id: f"genre {track.genre} has {counts[track.genre]} tracks, fewer than --min-tracks"
        for track in tracks
        if counts[track.genre] < min_tracks
    }
    return [track for track in tracks if track.id not in small], small


def make_plan(
    tracks: Iterable[Track], windows: Mapping[str, int], excluded: Mapping[str, str], cut: Cut
) -> PackPlan:
    """The plan for tracks that have a split.

    Raises:
        UserError: a track or group is in two splits, there is only one genre, training rows
            have no validation or test rows beside them, or a fold has none. Without training
            rows other splits may be empty: one can evaluate on such a data set.
    """
    kept = tuple(sorted((t for t in tracks if t.id not in excluded), key=lambda t: t.id))
    refuse_leaks(kept)
    plan = PackPlan(
        cut=_with_shard_size(cut, [windows[track.id] for track in kept]),
        tracks=kept,
        windows=np.array([windows[track.id] for track in kept], np.int64),
        genres=tuple(sorted({track.genre for track in kept})),
        excluded=dict(sorted(excluded.items())),
    )
    if len(plan.genres) < 2:
        raise UserError(
            "genres",
            got=", ".join(plan.genres) or "none",
            expected="at least two folders of tracks",
            cure="give the folder that holds the genre folders",
        )
    for split, rows in plan.split_rows.items():
        if rows == 0 and plan.split_rows.get("train", 1):
            raise UserError(
                f"{split} split", got="no tracks", expected="some", cure="use --split stratified"
            )
    return plan


def _with_shard_size(cut: Cut, windows: Iterable[int]) -> Cut:
    """With as many rows in a shard as asked for, else by the size of the data set."""
    if cut.rows_per_shard:
        return cut
    rows = sum(min(count, cut.max_segments or count) for count in windows)
    largest = max(_LEAST_ROWS, _LARGEST_SHARD // record.record_bytes(cut.segment_samples))
    wanted = min(max(_LEAST_ROWS, -(-rows // _SHARDS)), largest)
    return replace(cut, rows_per_shard=wanted)


def reason_of(error: UserError) -> str:
    """What was met, without the file's name in front."""
    return str(error).splitlines()[0].split(": got ", 1)[1]
