"""Waves to shards in one parallel pass, with the same bytes for any number of processes.

All records have one size, so each worker writes its segments at their known offsets. Names are
temporary until all is written; manifest last. What is finished is in a ledger: after a kill the
same command goes on, once the bytes that the ledger promises have been read and checked.
"""

import bisect
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgc_dist import __version__
from mgc_dist.data import audio, manifest, record
from mgc_dist.data.ledger import Ledger
from mgc_dist.data.manifest import Manifest, ShardEntry, TrackEntry
from mgc_dist.errors import UserError
from mgc_dist.files import locked, most_open, refuse_small_disk, replacing, sha256, sync, write_at
from mgc_dist.packing import provenance
from mgc_dist.packing.cut import SPREAD_VERSION, PackPlan
from mgc_dist.packing.parts import Waves
from mgc_dist.workers import cores, spread

LOCK = ".packing.lock"
_LEDGER = "packing.jsonl.tmp"
_OURS = re.compile(
    r"(train|validation|test|fold\d+)-\d{6}\.tar(\.tmp)?"
    r"|(index\.npy|tracks\.parquet|manifest\.json|packing\.jsonl)(\.tmp)*"
)

_ROWS_AT_ONCE = 4096
_LONGEST_FLOAT = 0.30000000000000004
"""As many digits as a start time can have in JSON."""

Settings = dict[str, int | float | str]


@dataclass(frozen=True, kw_only=True)
class PackedTrack:
    """What a worker reports of a track.

    Attributes:
        id: of the track.
        source_xxh3: xxh3_128 of its source file.
        checksums: xxh3_64 of each record.
        payloads: xxh3_128 of each segment's audio.
    """

    id: str
    source_xxh3: str = ""
    checksums: tuple[int, ...] = ()
    payloads: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """What workers have reported so far, in arrays: as objects a million tracks took 2.4 GB.

    Attributes:
        sources: xxh3_128 of each finished track's source file.
        checksums: xxh3_64 of each record, uint64 [N] in row order.
        payloads: xxh3_128 of each segment's audio, uint8 [N, 16].
    """

    sources: list[str]
    checksums: NDArray[np.uint64]
    payloads: NDArray[np.uint8]

    def take(self, rows: NDArray[np.int64], item: PackedTrack) -> None:
        self.sources.append(item.source_xxh3)
        self.checksums[rows] = np.array(item.checksums, np.uint64)
        digests = bytes.fromhex("".join(item.payloads))
        self.payloads[rows] = np.frombuffer(digests, np.uint8).reshape(-1, 16)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a worker needs to pack a track.

    Attributes:
        plan: of this track only.
        rows: of its segments.
        waves: its wave.
        promised: what the ledger says of it, None for nothing.
    """

    plan: PackPlan
    rows: list[int]
    waves: Waves
    promised: dict[str, Any] | None


def pack(
    plan: PackPlan,
    out: Path,
    settings: Settings,
    waves: Waves,
    *,
    overwrite: bool,
    jobs: int,
    progress: Callable[[Iterator[PackedTrack]], Iterable[PackedTrack]],
) -> Manifest:
    """Write the shards, the index and, last, the manifest. The folder is the caller's `alone`.

    Args:
        plan: what to write.
        out: folder; what an earlier try has finished of the same plan is kept.
        settings: to record in the manifest.
        waves: the decoded tracks.
        overwrite: whether a data set, or files of its names, may be replaced.
        jobs: processes, 0 for one a core.
        progress: wraps the stream of finished tracks, to show how far it is.

    Raises:
        UserError: something is there that may not be replaced, the disk is too small, or a wave
            is not what it was when it was decoded.
        OSError: writing failed.
    """
    if not overwrite:
        _refuse_to_replace(out)
    with Ledger(out / _LEDGER, _name_of(plan, waves)) as ledger:
        rows = plan.rows()
        packed = _write_all(plan, rows, out, waves, ledger, jobs=jobs, progress=progress)
    about = [waves.about(track) for track in plan.tracks]
    made = _publish(plan, rows, out, settings, packed, about, jobs)
    (out / _LEDGER).unlink()
    return made


def tidy(out: Path) -> None:
    """Remove what a packing that was killed after its last step has left behind."""
    with alone(out):
        _remove_ours(out, (".tmp",))


def alone(out: Path) -> AbstractContextManager[None]:
    """Hold the folder for one packing.

    Raises:
        UserError: another process packs here.
    """
    out.mkdir(parents=True, exist_ok=True)
    return locked(out / LOCK, wait_s=0, purpose=f"packing into {out}")


def _refuse_to_replace(out: Path) -> None:
    """Under the lock: what was looked at before may have changed."""
    if (out / manifest.NAME).exists():
        raise UserError(
            f"--out {out}",
            got="a data set that another process has packed meanwhile",
            expected="an empty folder",
            cure="choose another --out, or replace it with --overwrite",
        )
    ours = sorted(path.name for path in out.iterdir() if _OURS.fullmatch(path.name))
    foreign = [name for name in ours if not name.endswith(".tmp")]
    if foreign and not (out / _LEDGER).exists():
        raise UserError(
            f"--out {out}",
            got=f"{foreign[0]}, which no packing that was killed here has left",
            expected="an empty folder",
            cure="choose another --out, or let it be replaced with --overwrite",
        )


def _name_of(plan: PackPlan, waves: Waves) -> str:
    """Names all that decides which bytes are written where."""
    content = {
        "format_version": manifest.FORMAT_VERSION,
        "spread_version": SPREAD_VERSION,
        "cut": asdict(plan.cut),
        "tracks": [
            (t.id, t.genre, t.group, t.split, int(segments), waves.stamp(t))
            for t, segments in zip(plan.tracks, plan.segments, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tasks(
    plan: PackPlan, rows: NDArray[np.int64], waves: Waves, done: Mapping[str, dict[str, Any]]
) -> Iterator[_Task]:
    """The work of packing, a track each: a worker is sent nothing that grows with the data set.

    Args:
        plan: of all.
        rows: from `plan.rows()`.
        waves: of all tracks.
        done: what the ledger promises, by track.
    """
    first = 0
    for index, (track, end) in enumerate(zip(plan.tracks, plan.ends.tolist(), strict=True)):
        yield _Task(
            plan=plan.only(index),
            rows=rows[first:end].tolist(),
            waves=waves.only(track),
            promised=done.get(track.id),
        )
        first = end


def _write_all(
    plan: PackPlan,
    rows: NDArray[np.int64],
    out: Path,
    waves: Waves,
    ledger: Ledger,
    *,
    jobs: int,
    progress: Callable[[Iterator[PackedTrack]], Iterable[PackedTrack]],
) -> _Packed:
    shards = plan.shards()
    if not ledger.done:
        _remove_ours(out, (".tmp",), keep=ledger.path)
    _open_shards(plan, out, resuming=bool(ledger.done))
    places = [(out / f"{name}.tmp", first) for name, first in _first_rows(shards)]
    write = partial(_pack_track, places=places)
    work = tasks(plan, rows, waves, ledger.done)
    _opener.cache_clear()  # with one job the cache is this process's, and files may be new
    packed = _Packed(
        sources=[],
        checksums=np.zeros(len(rows), np.uint64),
        payloads=np.zeros((len(rows), 16), np.uint8),
    )
    first = 0
    finished = progress(spread(write, work, jobs))
    for item, end in zip(finished, plan.ends.tolist(), strict=True):
        packed.take(rows[first:end], item)
        first = end
        if item.id not in ledger.done:
            ledger.add(vars(item))
    _opener.cache_clear()
    return packed


def _open_shards(plan: PackPlan, out: Path, *, resuming: bool) -> None:
    """Make the shards under their temporary names, in full length."""
    sizes = {
        f"{name}.tmp": record.shard_bytes(rows, plan.cut.segment_samples)
        for name, rows in plan.shards()
    }
    if resuming and not (out / manifest.NAME).exists():  # killed while publishing
        for name in sizes:
            published = out / name.removesuffix(".tmp")
            if published.is_file() and not (out / name).exists():
                published.rename(out / name)
    for path in (out / name for name in sizes):
        if path.is_file() and path.stat().st_size != sizes[path.name]:
            path.unlink()
    held = sum((out / name).stat().st_blocks * 512 for name in sizes if (out / name).is_file())
    needed = sum(sizes.values()) - held
    refuse_small_disk(f"--out {out}", out, needed, cure="free some, or choose another --out")
    for name, size in sizes.items():
        (out / name).touch()
        os.truncate(out / name, size)


def _remove_ours(out: Path, suffixes: tuple[str, ...], keep: Path | None = None) -> None:
    """Remove files that an earlier packing made, and no others."""
    for path in out.iterdir():
        if _OURS.fullmatch(path.name) and path.suffix in suffixes and path != keep:
            path.unlink()


def _pack_track(task: _Task, places: list[tuple[Path, int]]) -> PackedTrack:
    plan, cut, (track,) = task.plan, task.plan.cut, task.plan.tracks
    size = record.record_bytes(cut.segment_samples)
    opened, where = _opener(len(places)), []
    for row in task.rows:
        path, first = places[bisect.bisect_right(places, row, key=lambda place: place[1]) - 1]
        where.append((row, path, (row - first) * size))
    if task.promised:
        known = PackedTrack(**task.promised)
        if _is_written(known, [(opened(path), offset) for _, path, offset in where], size):
            return known
    wave, source = task.waves(track)
    every = audio.segments(wave, cut.segment_samples, cut.hop_samples)
    windows = (every[plan.window(0, segment)] for segment in range(len(where)))
    checksums, payloads = [], []
    for segment, ((row, path, offset), window) in enumerate(zip(where, windows, strict=True)):
        data = record.encode(_describe(plan, 0, segment, row), window)
        write_at(opened(path), offset, data)
        checksums.append(record.checksum(data))
        payloads.append(record.payload_digest(window.data))
    return PackedTrack(
        id=track.id, source_xxh3=source, checksums=tuple(checksums), payloads=tuple(payloads)
    )


@lru_cache(maxsize=1)
def _opener(shards: int) -> Callable[[Path], FileIO]:
    """Opens shards and keeps them open: opening one for each of its records cost 10 us a segment.

    All of them, where this process's limit allows it: 256 missed from 131,000 rows on, and a
    segment took 740 us in place of 460.
    """
    return lru_cache(most_open(shards))(_open)


def _open(path: Path) -> FileIO:
    return path.open("r+b", buffering=0)


def _is_written(known: PackedTrack, where: list[tuple[FileIO, int]], size: int) -> bool:
    """Whether the records that the ledger promises are on the disk: a crash may have lost them."""
    for checksum, (file, offset) in zip(known.checksums, where, strict=True):
        if record.checksum(os.pread(file.fileno(), size, offset)) != checksum:
            return False
    return True


def _first_rows(shards: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    first = 0
    for name, rows in shards:
        yield name, first
        first += rows


def _describe(plan: PackPlan, index: int, segment: int, row: int) -> record.Segment:
    track = plan.tracks[index]
    return record.Segment(
        row=row,
        track=track.id,
        group=track.group,
        genre=track.genre,
        label=plan.genres.index(track.genre),
        segment=segment,
        start_s=plan.window(index, segment) * plan.cut.hop_samples / plan.cut.sample_rate,
        sample_rate=plan.cut.sample_rate,
        split=track.split,
    )


def refuse_long_descriptions(plan: PackPlan) -> None:
    """Check, with the longest numbers that can come, that descriptions fit into a record.

    Raises:
        UserError: one is too long.
    """
    rows = int(plan.segments.sum())
    for index, segments in enumerate(plan.segments.tolist()):
        last = _describe(plan, index, max(0, segments - 1), rows)
        record.head(replace(last, start_s=_LONGEST_FLOAT), 0)


def _publish(
    plan: PackPlan,
    rows: NDArray[np.int64],
    out: Path,
    settings: Settings,
    packed: _Packed,
    about: Sequence[provenance.About],
    jobs: int,
) -> Manifest:
    index = _index(plan, rows, packed.checksums)
    shards = _hashed(plan, out, jobs)
    (out / manifest.NAME).unlink(missing_ok=True)  # first: without it the rest is no data set
    _remove_ours(out, (".tar", ".npy", ".parquet"))
    with replacing(out / manifest.INDEX) as file:
        np.save(file, index, allow_pickle=False)
    settings = (
        settings
        | ({"max_segments": cap} if (cap := plan.cut.max_segments) else {})
        | {
            "segment_samples": plan.cut.segment_samples,
            "hop_samples": plan.cut.hop_samples,
            "sample_rate": plan.cut.sample_rate,
            "rows_per_shard": plan.cut.rows_per_shard,
        }
    )
    tracks = track_entries(plan, packed.sources)
    identity = identities(index, tracks, (bytes(digest).hex() for digest in packed.payloads))
    result = Manifest(
        dataset_id=manifest.dataset_id(settings, plan.genres, identity),
        settings=settings,
        genres=plan.genres,
        splits=_split_bounds(plan),
        tracks=tracks,
        excluded=plan.excluded,
        shards=shards,
        index_sha256=sha256(out / manifest.INDEX),
        tracks_sha256=provenance.write(out / manifest.TRACKS, tracks, about),
        telling=provenance.telling(tracks, about),
        versions={"mgc_dist": __version__}
        | {name: version(name) for name in ("numpy", "soundfile", "soxr", "av", "pyarrow")},
    )
    for shard in shards:
        (out / f"{shard.name}.tmp").replace(out / shard.name)
    sync(out)  # the names of the shards, before the manifest vouches for them
    manifest.write(out, result)
    return result


def _hashed(plan: PackPlan, out: Path, jobs: int) -> tuple[ShardEntry, ...]:
    def entry(shard: tuple[str, int]) -> ShardEntry:
        temporary = out / f"{shard[0]}.tmp"
        sync(temporary)
        size, digest = temporary.stat().st_size, sha256(temporary)
        return ShardEntry(name=shard[0], rows=shard[1], bytes=size, sha256=digest)

    with ThreadPoolExecutor(jobs or cores()) as threads:  # hashlib lets other threads run
        return tuple(threads.map(entry, plan.shards()))


def track_entries(plan: PackPlan, sources: Iterable[str]) -> tuple[TrackEntry, ...]:
    """What the manifest says of each track; `sources` are the xxh3_128 of their files."""
    return tuple(
        TrackEntry(
            id=track.id,
            genre=track.genre,
            group=track.group,
            split=track.split,
            segments=int(segments),
            windows=int(windows),
            source=f"{track.path.parent.name}/{track.path.name}",
            source_xxh3=source,
        )
        for track, segments, windows, source in zip(
            plan.tracks, plan.segments, plan.windows, sources, strict=True
        )
    )


def identities(
    index: NDArray[np.void], tracks: Sequence[TrackEntry], payloads: Iterable[str]
) -> Iterator[tuple[str, str, str | None, int, str]]:
    """What `dataset_id` knows of each row: key, split, group, label, digest of its audio."""
    columns = (_each(index, name) for name in ("track", "segment", "label"))
    for place, segment, label, payload in zip(*columns, payloads, strict=True):
        track = tracks[place]
        yield record.key_of(track.id, segment), track.split, track.group, label, payload


def _each(index: NDArray[np.void], name: str) -> Iterator[int]:
    """A column as numbers of Python, some at a time."""
    for first in range(0, len(index), _ROWS_AT_ONCE):
        yield from index[name][first : first + _ROWS_AT_ONCE].tolist()


def _index(
    plan: PackPlan, rows: NDArray[np.int64], checksums: NDArray[np.uint64]
) -> NDArray[np.void]:
    size = record.record_bytes(plan.cut.segment_samples)
    index = np.zeros(len(rows), record.INDEX_DTYPE)
    first = 0
    for number, (_, count) in enumerate(plan.shards()):
        index["shard"][first : first + count] = number
        index["offset"][first : first + count] = np.arange(count) * size
        first += count
    index["wave_offset"] = index["offset"] + record.WAVE_OFFSET
    index["wave_bytes"] = 2 * plan.cut.segment_samples
    index["record_bytes"] = size
    index["checksum"] = checksums
    label_of = {genre: label for label, genre in enumerate(plan.genres)}
    labels = [label_of[track.genre] for track in plan.tracks]
    index["track"][rows] = np.repeat(np.arange(len(labels)), plan.segments)
    index["label"][rows] = np.repeat(labels, plan.segments)
    start = np.repeat(plan.ends - plan.segments, plan.segments)
    index["segment"][rows] = np.arange(len(rows)) - start
    return index


def _split_bounds(plan: PackPlan) -> dict[str, tuple[int, int]]:
    bounds, first = {}, 0
    for split, rows in plan.split_rows.items():
        bounds[split] = (first, first + rows)
        first += rows
    return bounds
