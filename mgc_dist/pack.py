"""Tracks to shards in one parallel pass, with the same bytes for any number of processes.

Every track is decoded and resampled once. All records have one size, so each worker writes its
segments at their known offsets. Names are temporary until all is written; manifest last.
"""

import bisect
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist import audio, manifest, record
from mgc_dist.cut import PackPlan, reason_of
from mgc_dist.errors import UserError
from mgc_dist.files import replacing, sha256, sync
from mgc_dist.manifest import Manifest, ShardEntry, TrackEntry
from mgc_dist.tracks import Track

_OURS = re.compile(
    r"(train|validation|test)-\d{6}\.tar(\.tmp)?|(index\.npy|manifest\.json)(\.tmp)?"
)


def pack(
    plan: PackPlan,
    out: Path,
    settings: dict[str, int | float | str],
    *,
    jobs: int,
    progress: Callable[[Iterator["PackedTrack"]], Iterable["PackedTrack"]],
) -> tuple[Manifest | None, dict[str, str]]:
    """Write the shards, the index and, last, the manifest.

    Args:
        plan: what to write.
        out: folder; leftovers of an earlier try are replaced.
        settings: to record in the manifest.
        jobs: processes, 0 for one a core.
        progress: wraps the stream of finished tracks, to show how far it is.

    Returns:
        The manifest and no bad tracks; or None and id -> reason of the tracks that proved
        unusable when they were decoded: then nothing has been published.
    """
    out.mkdir(parents=True, exist_ok=True)
    _remove_ours(out, (".tmp",))
    shards = plan.shards()
    for name, rows in shards:
        with (out / f"{name}.tmp").open("wb") as file:
            file.truncate(record.shard_bytes(rows, plan.cut.segment_samples))
    places = [(out / f"{name}.tmp", first) for name, first in _first_rows(shards)]
    write = partial(_pack_track, plan=plan, rows=plan.rows_of_tracks(), places=places)
    with ExitStack() as stack:
        if jobs == 1:
            results: Iterator[PackedTrack] = map(write, range(len(plan.tracks)))
        else:
            pool = ProcessPoolExecutor(
                jobs or len(os.sched_getaffinity(0)),
                mp_context=get_context("spawn"),
                initializer=_set_work,
                initargs=(write,),
            )
            results = stack.enter_context(pool).map(_work, range(len(plan.tracks)), chunksize=4)
        packed = list(progress(results))
    bad = {item.id: item.bad for item in packed if item.bad}
    if bad:
        for name, _ in shards:
            (out / f"{name}.tmp").unlink()
        return None, bad
    return _publish(plan, out, settings, packed), {}


def _remove_ours(out: Path, suffixes: tuple[str, ...]) -> None:
    """Remove files that an earlier packing made, and no others."""
    for path in out.iterdir():
        if _OURS.fullmatch(path.name) and path.suffix in suffixes:
            path.unlink()


@dataclass(frozen=True, kw_only=True)
class PackedTrack:
    """What a worker reports of a track.

    Attributes:
        id: of the track.
        sha256: of its source file.
        checksums: xxh3_64 of each record.
        payloads: sha256 of each segment's audio.
        bad: why it is unusable, "" if it is not.
    """

    id: str
    sha256: str = ""
    checksums: tuple[int, ...] = ()
    payloads: tuple[str, ...] = ()
    bad: str = ""


_assigned: list[Callable[[int], PackedTrack]] = []


def _set_work(write: Callable[[int], PackedTrack]) -> None:
    _assigned[:] = [write]


def _work(index: int) -> PackedTrack:
    return _assigned[0](index)


def _pack_track(
    index: int, plan: PackPlan, rows: list[NDArray[np.int64]], places: list[tuple[Path, int]]
) -> PackedTrack:
    track, cut = plan.tracks[index], plan.cut
    try:
        wave = audio.read(track.path, cut.sample_rate)
    except UserError as error:
        return PackedTrack(id=track.id, bad=reason_of(error))
    windows = audio.segments(audio.to_int16(wave), cut.segment_samples, cut.hop_samples)
    first_rows = [first for _, first in places]
    checksums, payloads = [], []
    for segment, (row, window) in enumerate(zip(rows[index], windows, strict=True)):
        data = record.encode(_describe(plan, track, segment, int(row)), window)
        path, first = places[bisect.bisect_right(first_rows, int(row)) - 1]
        _write_at(path, (int(row) - first) * len(data), data)
        checksums.append(record.checksum(data))
        payloads.append(hashlib.sha256(window.tobytes()).hexdigest())
    return PackedTrack(
        id=track.id,
        sha256=sha256(track.path),
        checksums=tuple(checksums),
        payloads=tuple(payloads),
    )


def _first_rows(shards: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    first = 0
    for name, rows in shards:
        yield name, first
        first += rows


def _describe(plan: PackPlan, track: Track, segment: int, row: int) -> record.Segment:
    return record.Segment(
        row=row,
        track=track.id,
        group=track.group,
        genre=track.genre,
        label=plan.genres.index(track.genre),
        segment=segment,
        start_s=segment * plan.cut.hop_samples / plan.cut.sample_rate,
        sample_rate=plan.cut.sample_rate,
        split=track.split,
    )


def _write_at(path: Path, offset: int, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(handle, data, offset)
    finally:
        os.close(handle)


def _publish(
    plan: PackPlan, out: Path, settings: dict[str, int | float | str], packed: list[PackedTrack]
) -> Manifest:
    index, payloads = _index(plan, packed)
    shards = []
    for name, rows in plan.shards():
        temporary = out / f"{name}.tmp"
        sync(temporary)
        size = temporary.stat().st_size
        shards.append(ShardEntry(name=name, rows=rows, bytes=size, sha256=sha256(temporary)))
    (out / manifest.NAME).unlink(missing_ok=True)  # first: without it the rest is no data set
    _remove_ours(out, (".tar", ".npy"))
    with replacing(out / manifest.INDEX) as file:
        np.save(file, index, allow_pickle=False)
    settings = settings | {
        "segment_samples": plan.cut.segment_samples,
        "hop_samples": plan.cut.hop_samples,
        "sample_rate": plan.cut.sample_rate,
        "rows_per_shard": plan.cut.rows_per_shard,
    }
    tracks = track_entries(plan, packed)
    keys = (
        (
            record.key_of(tracks[entry["track"]].id, int(entry["segment"])),
            tracks[entry["track"]].split,
            tracks[entry["track"]].group,
            int(entry["label"]),
            payload,
        )
        for entry, payload in zip(index, payloads, strict=True)
    )
    result = Manifest(
        dataset_id=manifest.dataset_id(settings, plan.genres, keys),
        settings=settings,
        genres=plan.genres,
        splits=_split_bounds(plan),
        tracks=tracks,
        excluded=plan.excluded,
        shards=tuple(shards),
        index_sha256=sha256(out / manifest.INDEX),
        versions={name: version(name) for name in ("mgc_dist", "numpy", "soundfile", "soxr")},
    )
    for shard in shards:
        (out / f"{shard.name}.tmp").replace(out / shard.name)
    manifest.write(out, result)
    return result


def track_entries(plan: PackPlan, packed: Sequence[PackedTrack]) -> tuple[TrackEntry, ...]:
    """What the manifest says of each track."""
    return tuple(
        TrackEntry(
            id=track.id,
            genre=track.genre,
            group=track.group,
            split=track.split,
            segments=int(segments),
            source=f"{track.path.parent.name}/{track.path.name}",
            sha256=item.sha256,
        )
        for track, segments, item in zip(plan.tracks, plan.segments, packed, strict=True)
    )


def is_packed(plan: PackPlan, found: Manifest, settings: dict[str, int | float | str]) -> bool:
    """Whether a manifest already holds what the plan would write, by content of the sources."""
    same = {key: found.settings.get(key) for key in settings} == settings
    names = [PackedTrack(id=track.id) for track in plan.tracks]
    entries = tuple(replace(entry, sha256="") for entry in found.tracks)
    cut = plan.cut
    if not same or entries != track_entries(plan, names):
        return False
    if found.settings["segment_samples"] != cut.segment_samples:
        return False
    if (found.settings["hop_samples"], found.sample_rate) != (cut.hop_samples, cut.sample_rate):
        return False
    if [(shard.name, shard.rows) for shard in found.shards] != plan.shards():
        return False
    pairs = zip(found.tracks, plan.tracks, strict=True)
    return all(entry.sha256 == sha256(track.path) for entry, track in pairs)


def _index(plan: PackPlan, packed: list[PackedTrack]) -> tuple[NDArray[np.void], list[str]]:
    total = int(plan.segments.sum())
    size = record.record_bytes(plan.cut.segment_samples)
    index = np.zeros(total, record.INDEX_DTYPE)
    payloads = [""] * total
    first = 0
    for number, (_, rows) in enumerate(plan.shards()):
        index["shard"][first : first + rows] = number
        index["offset"][first : first + rows] = np.arange(rows) * size
        first += rows
    index["wave_offset"] = index["offset"] + record.WAVE_OFFSET
    index["wave_bytes"] = 2 * plan.cut.segment_samples
    index["record_bytes"] = size
    for number, (rows_of, item) in enumerate(zip(plan.rows_of_tracks(), packed, strict=True)):
        index["track"][rows_of] = number
        index["segment"][rows_of] = np.arange(len(rows_of))
        index["label"][rows_of] = plan.genres.index(plan.tracks[number].genre)
        index["checksum"][rows_of] = np.array(item.checksums, np.uint64)
        for row, payload in zip(rows_of, item.payloads, strict=True):
            payloads[row] = payload
    return index, payloads


def _split_bounds(plan: PackPlan) -> dict[str, tuple[int, int]]:
    bounds, first = {}, 0
    for split, rows in plan.split_rows.items():
        bounds[split] = (first, first + rows)
        first += rows
    return bounds
