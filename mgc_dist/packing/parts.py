"""Decoding, each file once: waves, resampled and quantised, before any row is dealt.

Part i of n takes every n-th track in the order of their ids and appends its waves to files in
OUT/parts, with a list beside them. Packing on one machine is part 1 of 1, joined at once. A wave
knows nothing of rows: a file that proves unusable, or another length than its header's, costs
nothing but its own place, and what is decoded stays until it is packed.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import FileIO
from pathlib import Path
from uuid import uuid4

import numpy as np
import xxhash
from numpy.typing import NDArray

from mgc_dist.data import audio
from mgc_dist.data.ledger import Ledger
from mgc_dist.data.tables import Value
from mgc_dist.data.tracks import Track
from mgc_dist.errors import UserError
from mgc_dist.files import (
    fingerprint,
    locked,
    refuse_small_disk,
    replace_text,
    stamp_of,
    sync,
    write_at,
)
from mgc_dist.packing.cut import reason_of
from mgc_dist.workers import spread

FOLDER = "parts"
_FORMAT = "mgc_dist part 3"


@dataclass(frozen=True, kw_only=True)
class DecodedTrack:
    """A track in a part.

    Attributes:
        id: of the track.
        stamp: of the source file where it was decoded; "" if there was none.
        file: name of the file of waves.
        offset: of the wave in it, in bytes.
        samples: of the wave.
        source_bytes: size of the source file.
        source_xxh3: xxh3_128 of the source file.
        checksum: xxh3_64 of the wave.
        about: fields of `audio.Source`; empty for an unusable track.
        bad: why the track is unusable, "" if it is not.
    """

    id: str
    stamp: str = ""
    file: str = ""
    offset: int = 0
    samples: int = 0
    source_bytes: int = 0
    source_xxh3: str = ""
    checksum: int = 0
    about: dict[str, Value] = field(default_factory=dict)
    bad: str = ""


@dataclass(frozen=True, kw_only=True)
class Waves:
    """Waves of decoded tracks.

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

    def only(self, track: Track) -> "Waves":
        """The wave of one track: what a worker is sent."""
        return Waves(folder=self.folder, tracks={track.id: self.tracks[track.id]})

    def samples(self, track: Track) -> int | str:
        """Length of a track's wave, or why there is none."""
        entry = self.tracks[track.id]
        return entry.bad or entry.samples

    def about(self, track: Track) -> dict[str, Value]:
        """What its file shows of how it was recorded and encoded: fields of `audio.Source`."""
        return self.tracks[track.id].about

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
    lengths: Mapping[str, int | str],
    jobs: int,
    progress: Callable[[Iterator[DecodedTrack]], Iterable[DecodedTrack]],
) -> tuple[int, dict[str, str]]:
    """Decode the tracks of a part; what an earlier try has finished is kept.

    Args:
        tracks: all of them.
        sample_rate: of the waves, in Hz.
        out: folder of the data set.
        part: (i, n), i from 1 to n.
        lengths: id -> samples as headers tell them, or what is wrong: what the disk must hold.
        jobs: processes, 0 for one a core.
        progress: wraps the stream of finished tracks.

    Returns:
        The number of tracks of the part, and id -> reason of those that are unusable.
    """
    folder, name = out / FOLDER, _name(*part)
    folder.mkdir(parents=True, exist_ok=True)
    mine = sorted(tracks, key=lambda track: track.id)[part[0] - 1 :: part[1]]
    with locked(folder / f"{name}.lock", wait_s=0, purpose=f"decoding part {part[0]}/{part[1]}"):
        known = _known(folder, name, sample_rate)
        with Ledger(folder / f"{name}.jsonl.tmp", f"{_FORMAT} at {sample_rate} Hz") as ledger:
            known |= ledger.done
            items = [(track.id, track.path, known.get(track.id)) for track in mine]
            lengths_of_new = (lengths[track.id] for track in mine if track.id not in known)
            refuse_small_disk(
                f"--out {out}",
                out,
                2 * sum(n for n in lengths_of_new if isinstance(n, int)),
                purpose=" for decoded audio, and more for the shards",
                cure="free some, or choose another --out",
            )
            _spool.cache_clear()  # with one job the cache is this process's
            decoded = []
            work = partial(_decode, sample_rate=sample_rate, folder=folder, name=name)
            for item in progress(spread(work, items, jobs)):
                decoded.append(item)
                if vars(item) != ledger.done.get(item.id):
                    ledger.add(vars(item))
            _spool.cache_clear()
        files = {item.file for item in decoded if item.file}
        for file in files:
            sync(folder / file)
        content = {
            "format": _FORMAT,
            "part": list(part),
            "sample_rate": sample_rate,
            "tracks": [vars(item) for item in decoded],
        }
        replace_text(folder / f"{name}.json", json.dumps(content))
        (folder / f"{name}.jsonl.tmp").unlink()
        for path in folder.glob(f"{name}.*.pcm"):
            if path.name not in files:
                path.unlink()
    return len(mine), {item.id: item.bad for item in decoded if item.bad}


def join(tracks: Sequence[Track], sample_rate: int, out: Path, *, total: int = 0) -> Waves:
    """The waves of all parts.

    Args:
        tracks: to be packed.
        sample_rate: of the waves, in Hz.
        out: folder of the data set.
        total: number of parts, 0 for the number that is there.

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
    many = total or int(names[0].rsplit("-", 1)[1])
    wanted = [_name(number, many) for number in range(1, many + 1)]
    if total:
        names = wanted
    if names != wanted:
        odd = sorted(set(names) ^ set(wanted))[0]
        fault = "missing" if odd in wanted else "of another number of parts"
        raise UserError(
            f"--join in {folder}",
            got=f"{len(names)} finished parts; {odd} is {fault}",
            expected=f"{many} parts of {many}",
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
    return Waves(folder=folder, tracks=decoded)


def remove(out: Path, *, joined: bool) -> None:
    """Remove what has been packed: all parts once they are joined, else part 1 of 1."""
    folder = out / FOLDER
    for path in folder.glob("part-*-of-*" if joined else f"{_name(1, 1)}*"):
        path.unlink()
    with suppress(OSError):  # none there, or files of others in it
        folder.rmdir()


def _name(number: int, total: int) -> str:
    return f"part-{number:04d}-of-{total:04d}"


def _known(folder: Path, name: str, sample_rate: int) -> dict[str, dict[str, object]]:
    """What a finished list of this part says of each track, by id; nothing if it is damaged."""
    with suppress(UserError):
        part = _read_list(folder, name)
        if part.sample_rate == sample_rate:
            return {item.id: vars(item) for item in part.tracks}
    return {}


def _decode(
    item: tuple[str, Path, dict[str, object] | None], sample_rate: int, folder: Path, name: str
) -> DecodedTrack:
    id_, path, promised = item
    stamp = stamp_of(path) if path.is_file() else ""
    if promised and promised["stamp"] == stamp:
        known = DecodedTrack(**promised)  # type: ignore[arg-type]
        if known.bad or _is_whole(folder, known):
            return known
    size = path.stat().st_size if stamp else 0
    try:
        wave, source = audio.decode(path, sample_rate)
    except audio.UnusableAudio as error:
        return DecodedTrack(id=id_, stamp=stamp, source_bytes=size, bad=reason_of(error))
    file = _spool(folder, name)
    offset = file.seek(0, os.SEEK_END)
    write_at(file, offset, wave.data.cast("B"))
    return DecodedTrack(
        id=id_,
        stamp=stamp,
        file=Path(str(file.name)).name,
        offset=offset,
        samples=len(wave),
        source_bytes=size,
        source_xxh3=fingerprint(path),
        checksum=xxhash.xxh3_64_intdigest(wave.data),
        about=dict(vars(source)),
    )


@lru_cache(maxsize=1)
def _spool(folder: Path, name: str) -> FileIO:
    """The file that this process appends waves to: nobody knows their lengths before."""
    return (folder / f"{name}.{uuid4().hex[:12]}.pcm").open("xb", buffering=0)


def _read_wave(path: Path, entry: DecodedTrack) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), 2 * entry.samples, entry.offset)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What the list beside a part's waves says."""

    sample_rate: int
    tracks: list[DecodedTrack]


def _is_whole(folder: Path, item: DecodedTrack) -> bool:
    path = folder / item.file
    return path.is_file() and (xxhash.xxh3_64_intdigest(_read_wave(path, item)) == item.checksum)


def _read_list(folder: Path, name: str) -> _Part:
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        tracks = [DecodedTrack(**entry) for entry in content["tracks"]]
        return _Part(sample_rate=content["sample_rate"], tracks=tracks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"part {path}",
            got=f"{type(error).__name__}: {error}",
            expected="a list as --part wrote it",
            cure="run this part again",
        ) from error
