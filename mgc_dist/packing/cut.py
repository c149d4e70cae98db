"""What will be packed, known from the files' headers alone: segments, rows, shards.

Rows are dealt out before anything is decoded: the segments of a split are permuted by a keyed
bijection, so that a track's segments lie in different shards and no second shuffle is needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.data import audio
from mgc_dist.data.order import bijection, key_of
from mgc_dist.data.tracks import KNOWN_BAD, SPLITS, Track, refuse_leaks
from mgc_dist.errors import UserError
from mgc_dist.workers import spread

SPREAD_VERSION = 1
"""Changes whenever the order of rows does."""
_HEADERS_AT_ONCE = 8
"""Threads that read headers: on a network file system each waits some milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How tracks become segments and segments become shards (samples, Hz, rows)."""

    segment_samples: int
    hop_samples: int
    sample_rate: int
    rows_per_shard: int


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """What will be written, known from the files' headers alone.

    Attributes:
        cut: lengths and rates.
        tracks: with splits, in the order of their ids.
        segments: int64 [tracks], S of each.
        genres: names in label order.
        excluded: id -> reason of tracks that are left out.
    """

    cut: Cut
    tracks: tuple[Track, ...]
    segments: NDArray[np.int64]
    genres: tuple[str, ...]
    excluded: dict[str, str]

    @property
    def split_rows(self) -> dict[str, int]:
        """Rows of each split."""
        splits = np.array([track.split for track in self.tracks])
        return {split: int(self.segments[splits == split].sum()) for split in SPLITS}

    def shards(self) -> list[tuple[str, int]]:
        """Name and rows of each shard, in row order."""
        shards: list[tuple[str, int]] = []
        for split, rows in self.split_rows.items():
            for number, first in enumerate(range(0, rows, self.cut.rows_per_shard)):
                name = f"{split}-{number:06d}.tar"
                shards.append((name, min(self.cut.rows_per_shard, rows - first)))
        return shards

    def rows_of_tracks(self) -> list[NDArray[np.int64]]:
        """The row of each segment of each track: a list of int64 [S]."""
        rows: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(self.tracks)
        first = 0
        for number, (split, count) in enumerate(self.split_rows.items()):
            place = bijection(np.arange(count), count, key_of(SPREAD_VERSION, number)) + first
            used = 0
            for index, track in enumerate(self.tracks):
                if track.split == split:
                    rows[index] = place[used : used + self.segments[index]]
                    used += int(self.segments[index])
            first += count
        return rows


def inspect(tracks: Sequence[Track], cut: Cut) -> tuple[dict[str, int], dict[str, str]]:
    """Read every header: id -> planned segments, and id -> what is wrong with it."""
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as threads:
        looked = list(threads.map(partial(_samples_of, sample_rate=cut.sample_rate), tracks))
    return count_segments({t.id: found for t, found in zip(tracks, looked, strict=True)}, cut)


def count_segments(
    samples: Mapping[str, int | str], cut: Cut
) -> tuple[dict[str, int], dict[str, str]]:
    """Id -> planned segments, and id -> reason of the tracks that give none.

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


def _samples_of(track: Track, sample_rate: int) -> int | str:
    try:
        return audio.read_header(track.path).samples_at(sample_rate)
    except audio.UnusableAudio as error:
        return reason_of(error)


def _fault_of(path: Path, sample_rate: int) -> str:
    try:
        audio.read_int16(path, sample_rate)
    except audio.UnusableAudio as error:
        return reason_of(error)
    return ""


def judge_bad(bad: dict[str, str], allow_bad: int) -> dict[str, str]:
    """Reasons to record for unusable tracks; files that are known to be bad need no leave.

    Raises:
        UserError: more unexpected ones than `--allow-bad`; all of them are listed.
    """
    unexpected = {id_: reason for id_, reason in bad.items() if id_ not in KNOWN_BAD}
    if len(unexpected) > allow_bad:
        listed = "\n".join(f"    {id_}: {why}" for id_, why in sorted(unexpected.items()))
        raise UserError(
            "unusable audio files",
            got=f"{len(unexpected)}",
            expected=f"at most {allow_bad} (--allow-bad)",
            cure=f"replace them, or leave them out with --allow-bad {len(unexpected)}:\n{listed}",
        )
    known = {
        id_: f"{why} (known: {KNOWN_BAD[id_]})" for id_, why in bad.items() if id_ in KNOWN_BAD
    }
    return unexpected | known


def make_plan(
    tracks: Iterable[Track], segments: dict[str, int], excluded: dict[str, str], cut: Cut
) -> PackPlan:
    """The plan for tracks that have a split.

    Raises:
        UserError: a track or group is in two splits, there is only one genre, or training rows
            have no validation or test rows beside them. Without training rows other splits
            may be empty: one can evaluate on such a data set.
    """
    kept = tuple(sorted((t for t in tracks if t.id not in excluded), key=lambda t: t.id))
    refuse_leaks(kept)
    plan = PackPlan(
        cut=cut,
        tracks=kept,
        segments=np.array([segments[track.id] for track in kept], np.int64),
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
        if rows == 0 and plan.split_rows["train"]:
            raise UserError(
                f"{split} split", got="no tracks", expected="some", cure="use --split stratified"
            )
    return plan


def reason_of(error: UserError) -> str:
    """What was met, without the file's name in front."""
    return str(error).splitlines()[0].split(": got ", 1)[1]
