"""Packing on several machines: each decodes a part of the tracks, one joins them.

Part i of n takes every n-th track in the order of their ids and writes its waves, resampled
and quantised, into OUT/parts/part-0001-of-0004.pcm, with a list beside it. Joining is packing
with these waves in place of the source files, so its bytes are those of one process; and since
a wave knows nothing of rows, a file that one part finds unusable costs the others nothing.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from mgc_dist.data import audio
from mgc_dist.data.ledger import Ledger
from mgc_dist.data.tracks import Track
from mgc_dist.errors import UserError
from mgc_dist.files import fingerprint, locked, replace_text, stamp_of, sync, write_at
from mgc_dist.packing.cut import reason_of
from mgc_dist.workers import spread

FOLDER = "parts"
_FORMAT = "mgc_dist part 1"


@dataclass(frozen=True, kw_only=True)
class DecodedTrack:
    """A track in a part.

    Attributes:
        id: of the track.
        file: name of the part's file of waves.
        offset: of the wave in it, in bytes.
        samples: of the wave.
        source_bytes: size of the source file.
        source_xxh3: xxh3_128 of the source file.
        checksum: xxh3_64 of the wave.
        bad: why the track is unusable, "" if it is not.
    """

    id: str
    file: str = ""
    offset: int = 0
    samples: int = 0
    source_bytes: int = 0
    source_xxh3: str = ""
    checksum: int = 0
    bad: str = ""


@dataclass(frozen=True, kw_only=True)
class PartWaves:
    """Waves read from joined parts; stands in for the source files.

    Attributes:
        folder: of the parts.
        tracks: by id.
    """

    folder: Path
    tracks: dict[str, DecodedTrack]

    def __call__(self, track: Track) -> tuple[NDArray[np.int16], str]:
        """The wave of a track, int16 [samples], and its source's xxh3_128.

        Raises:
            UserError: it is not what its part wrote.
        """
        entry = self.tracks[track.id]
        path = self.folder / entry.file
        data = _read_wave(path, entry)
        if xxhash.xxh3_64_intdigest(data) != entry.checksum:
            raise UserError(
                f"part {path}: track {track.id}, offset {entry.offset}",
                got=f"{len(data)} bytes with another checksum",
                expected=f"{2 * entry.samples} bytes with {entry.checksum:016x}",
                cure="run this part again",
            )
        return np.frombuffer(data, "<i2"), entry.source_xxh3

    def samples(self, track: Track) -> int | str:
        """Length of a track's wave, or why there is none."""
        entry = self.tracks[track.id]
        return entry.bad or entry.samples

    def stamp(self, track: Track) -> str:
        """Checksums of source and wave."""
        entry = self.tracks[track.id]
        return f"{entry.source_xxh3} {entry.checksum:016x}"


def decode_part(
    tracks: Sequence[Track],
    sample_rate: int,
    out: Path,
    *,
    part: tuple[int, int],
    jobs: int,
    progress: Callable[[Iterator[DecodedTrack]], Iterable[DecodedTrack]],
) -> tuple[int, dict[str, str]]:
    """Decode the tracks of a part; what an earlier try has finished is kept.

    Args:
        tracks: all of them.
        sample_rate: of the waves, in Hz.
        out: folder of the data set.
        part: (i, n), i from 1 to n.
        jobs: processes, 0 for one a core.
        progress: wraps the stream of finished tracks.

    Returns:
        The number of tracks of the part, and id -> reason of those that are unusable.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = _name(*part)
    waves, temporary = folder / f"{name}.pcm", folder / f"{name}.pcm.tmp"
    mine = sorted(tracks, key=lambda track: track.id)[part[0] - 1 :: part[1]]
    with locked(folder / f"{name}.lock", wait_s=0, purpose=f"--part {part[0]}/{part[1]}"):
        tasks = _tasks(mine, sample_rate)
        work = hashlib.sha256(json.dumps([sample_rate, part, tasks]).encode()).hexdigest()
        if _is_done(folder, name, work):
            return len(mine), _bad(_read_list(folder, name).tracks)
        with Ledger(folder / f"{name}.jsonl.tmp", work) as ledger:
            temporary.touch()
            os.truncate(temporary, sum(2 * samples for _, samples, _ in tasks.values()))
            paths = {track.id: track.path for track in mine}
            decode = partial(
                _decode, paths=paths, sample_rate=sample_rate, into=temporary, name=waves.name
            )
            items = [(id_, task, ledger.done.get(id_)) for id_, task in tasks.items()]
            decoded = []
            for item in progress(spread(decode, items, jobs)):
                decoded.append(item)
                if item.id not in ledger.done:
                    ledger.add(vars(item))
        sync(temporary)
        temporary.replace(waves)
        content = {
            "format": _FORMAT,
            "work": work,
            "part": list(part),
            "sample_rate": sample_rate,
            "tracks": [vars(item) for item in decoded],
        }
        replace_text(folder / f"{name}.json", json.dumps(content))
        (folder / f"{name}.jsonl.tmp").unlink()
    return len(mine), _bad(decoded)


def join(tracks: Sequence[Track], sample_rate: int, out: Path) -> PartWaves:
    """The waves of all parts.

    Raises:
        UserError: a part is missing, was made with other settings or for other tracks, or a
            source file has another size today.
    """
    folder = out / FOLDER
    names = sorted(path.stem for path in folder.glob("part-*-of-*.json"))
    if not names:
        raise UserError(
            f"--join in {folder}",
            got="no finished part",
            expected="the parts that --part 1/N to N/N write",
            cure="run them first, with the same --data and --out",
        )
    total = int(names[0].rsplit("-", 1)[1])
    wanted = [_name(number, total) for number in range(1, total + 1)]
    if names != wanted:
        odd = sorted(set(names) ^ set(wanted))[0]
        fault = "missing" if odd in wanted else "of another number of parts"
        raise UserError(
            f"--join in {folder}",
            got=f"{len(names)} finished parts; {odd} is {fault}",
            expected=f"{total} parts of {total}",
            cure="run the missing ones, or remove those of another number of parts",
        )
    decoded: dict[str, DecodedTrack] = {}
    for name in names:
        part = _read_list(folder, name)
        if part.sample_rate != sample_rate:
            raise UserError(
                f"part {folder / name}",
                got=f"waves at {part.sample_rate} Hz",
                expected=f"{sample_rate} Hz",
                cure="give the --sample-rate that the parts were made with",
            )
        decoded |= {item.id: item for item in part.tracks}
    for track in tracks:
        size = track.path.stat().st_size if track.path.is_file() else 0
        item = decoded.get(track.id)
        if item is None or item.source_bytes != size:
            raise UserError(
                f"parts in {folder}: track {track.id}",
                got="no such track" if item is None else f"made from {item.source_bytes} bytes",
                expected=f"the {size} bytes of {track.path}",
                cure="the tracks have changed: run the parts again",
            )
    return PartWaves(folder=folder, tracks=decoded)


def remove(out: Path) -> None:
    """Remove the parts once they are joined."""
    folder = out / FOLDER
    for path in folder.glob("part-*-of-*"):
        path.unlink()
    with suppress(OSError):  # none there, or files of others in it
        folder.rmdir()


def _name(number: int, total: int) -> str:
    return f"part-{number:04d}-of-{total:04d}"


def _tasks(tracks: Sequence[Track], sample_rate: int) -> dict[str, tuple[int, int, str]]:
    """Offset in bytes, planned samples (0 for a bad header) and stamp of the source, by id."""
    tasks, offset = {}, 0
    for track in tracks:
        try:
            samples = audio.read_header(track.path).samples_at(sample_rate)
        except audio.UnusableAudio:
            samples = 0
        tasks[track.id] = (offset, samples, stamp_of(track.path) if track.path.is_file() else "")
        offset += 2 * samples
    return tasks


def _decode(
    item: tuple[str, tuple[int, int, str], dict[str, object] | None],
    paths: dict[str, Path],
    sample_rate: int,
    into: Path,
    name: str,
) -> DecodedTrack:
    id_, (offset, planned, _), promised = item
    path = paths[id_]
    if promised:
        known = DecodedTrack(**promised)  # type: ignore[arg-type]
        if known.bad or _is_whole(into, known):
            return known
    size = path.stat().st_size if path.is_file() else 0
    try:
        wave = audio.read_int16(path, sample_rate)
    except audio.UnusableAudio as error:
        return DecodedTrack(id=id_, source_bytes=size, bad=reason_of(error))
    if len(wave) != planned:
        raise UserError(
            f"audio file {path}",
            got=f"{len(wave)} samples",
            expected=f"{planned} as its header promised when this part began",
            cure="it has changed meanwhile: run this part again",
        )
    with into.open("r+b", buffering=0) as file:
        write_at(file, offset, wave.data.cast("B"))
    return DecodedTrack(
        id=id_,
        file=name,
        offset=offset,
        samples=len(wave),
        source_bytes=size,
        source_xxh3=fingerprint(path),
        checksum=xxhash.xxh3_64_intdigest(wave.data),
    )


def _read_wave(path: Path, entry: DecodedTrack) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), 2 * entry.samples, entry.offset)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What the list beside a part's waves says."""

    work: str
    sample_rate: int
    tracks: list[DecodedTrack]


def _is_done(folder: Path, name: str, work: str) -> bool:
    """Whether a part is finished and all of its waves are as they were written."""
    waves = folder / f"{name}.pcm"
    try:
        part = _read_list(folder, name)
    except UserError:
        return False
    return part.work == work and all(
        item.bad or (waves.is_file() and _is_whole(waves, item)) for item in part.tracks
    )


def _is_whole(waves: Path, item: DecodedTrack) -> bool:
    return xxhash.xxh3_64_intdigest(_read_wave(waves, item)) == item.checksum


def _read_list(folder: Path, name: str) -> _Part:
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        tracks = [DecodedTrack(**entry) for entry in content["tracks"]]
        return _Part(work=content["work"], sample_rate=content["sample_rate"], tracks=tracks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"part {path}",
            got=f"{type(error).__name__}: {error}",
            expected="a list as --part wrote it",
            cure="run this part again",
        ) from error


def _bad(decoded: Sequence[DecodedTrack]) -> dict[str, str]:
    return {item.id: item.bad for item in decoded if item.bad}
