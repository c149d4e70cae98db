"""Re-read a packed data set and check every byte, as it was packed and as strangers read it.

Per shard: size, sha256, both tar headers of each record at their recorded offsets (parsed by
Python's tarfile), its description and checksum, the archive's tail; then, since a damaged
archive may be a trap, a full pass of stock webdataset over those that passed so far. Over all:
files that do not belong here, and the data-set id from the audio itself.
"""

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.data import manifest, record
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.opening import open_index
from mgc_dist.errors import UserError
from mgc_dist.files import sha256
from mgc_dist.packing.pack import identities
from mgc_dist.workers import spread

SHOWN = 20
"""Faults that a message lists."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What checking a shard gave.

    Attributes:
        payloads: xxh3_128 of the audio of its rows; "" where a record could not be read.
        faults: what is not as it was packed.
    """

    payloads: tuple[str, ...]
    faults: tuple[str, ...]


def verify(
    folder: Path,
    dataset: Manifest,
    *,
    jobs: int,
    progress: Callable[[Iterator[Checked]], Iterable[Checked]],
) -> None:
    """Check a data set.

    Args:
        folder: of the shards.
        dataset: its manifest.
        jobs: processes, 0 for one a core.
        progress: wraps the stream of finished shards.

    Raises:
        UserError: something is not as it was packed; with shard, key, offset, got, expected.
    """
    index = open_index(folder, dataset)
    known = {shard.name for shard in dataset.shards}
    extra = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    faults = [f"{name}: not in the manifest" for name in extra]
    faults += _table_faults(folder, dataset)
    check = partial(_check_shard, folder=folder, dataset=dataset)
    ends = np.cumsum([shard.rows for shard in dataset.shards]).tolist()
    starts = [0, *ends[:-1]]
    items = ((first, np.array(index[first:end])) for first, end in zip(starts, ends, strict=True))
    checked = list(progress(spread(check, items, jobs)))
    faults += [fault for shard in checked for fault in shard.faults]
    payloads = [payload for shard in checked for payload in shard.payloads]
    if not faults:
        rows = identities(index, dataset.tracks, payloads)
        again = manifest.dataset_id(dataset.settings, dataset.genres, rows)
        if again != dataset.dataset_id:
            faults.append(
                f"{manifest.NAME}: got dataset_id {dataset.dataset_id}, expected {again} as the "
                "shards give"
            )
    if faults:
        shown = "\n".join(f"    {fault}" for fault in faults[:SHOWN])
        more = f"\n    and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(
            f"data set {folder}",
            got=f"{len(faults)} faults",
            expected="none",
            cure=f"copy the files again from their source, or pack again:\n{shown}{more}",
        )


def _table_faults(folder: Path, dataset: Manifest) -> list[str]:
    """What is wrong with tracks.parquet, where there is one."""
    path, wanted = folder / manifest.TRACKS, dataset.tracks_sha256
    digest = sha256(path) if path.is_file() else "none"
    if digest == (wanted or "none"):
        return []
    return [f"{path.name}: got sha256 {digest}, expected {wanted or 'no such file'}"]


def _check_shard(item: tuple[int, NDArray[np.void]], folder: Path, dataset: Manifest) -> Checked:
    first, entries = item
    shard = dataset.shards[int(entries["shard"][0])]
    path = folder / shard.name
    size = path.stat().st_size if path.is_file() else None
    if size != shard.bytes:
        got = "no such file" if size is None else f"{size} bytes"
        return _only(shard.rows, f"{shard.name}: got {got}, expected {shard.bytes} bytes")
    payloads, faults = [], []
    with path.open("rb", buffering=0) as file:
        for row, entry in enumerate(entries, start=first):
            data = os.pread(file.fileno(), int(entry["record_bytes"]), int(entry["offset"]))
            faults += _record_faults(dataset, row, entry, data)
            start = int(entry["wave_offset"] - entry["offset"])
            wave = memoryview(data)[start : start + int(entry["wave_bytes"])]
            payloads.append(record.payload_digest(wave))
        faults += _tail_faults(shard.name, file.fileno(), entries, size)
    digest = sha256(path)
    if digest != shard.sha256:
        faults.append(f"{shard.name}: got sha256 {digest}, expected {shard.sha256}")
    if not faults:
        faults += _stock_faults(path, first, payloads)
    return Checked(payloads=tuple(payloads), faults=tuple(faults))


def _only(rows: int, fault: str) -> Checked:
    return Checked(payloads=("",) * rows, faults=(fault,))


def _record_faults(dataset: Manifest, row: int, entry: np.void, data: bytes) -> list[str]:
    """Compare a record with what manifest and index say that it holds."""
    track = dataset.tracks[int(entry["track"])]
    offset, segment = int(entry["offset"]), int(entry["segment"])
    key = record.key_of(track.id, segment)
    where = f"{dataset.shards[int(entry['shard'])].name}, key {key}, offset {offset}"
    faults = []
    checksum = record.checksum(data)
    if checksum != int(entry["checksum"]) or len(data) != int(entry["record_bytes"]):
        faults.append(
            f"{where}: got {len(data)} bytes with checksum {checksum:016x}, expected "
            f"{int(entry['record_bytes'])} with {int(entry['checksum']):016x}"
        )
    wave_member = record.BLOCK + record.JSON_BYTES
    size = record.RIFF_BYTES + int(entry["wave_bytes"])
    for place, name, wanted in ((0, f"{key}.json", None), (wave_member, f"{key}.wav", size)):
        got = _member(data[place : place + record.BLOCK])
        if got[0] != name or (wanted is not None and got[1] != wanted):
            expected = f"{name}" if wanted is None else f"{name} of {wanted} bytes"
            faults.append(
                f"{where}: tar header at {offset + place}: got {got[0]} of {got[1]} bytes, "
                f"expected {expected}"
            )
    description = record.Segment(
        row=row,
        track=track.id,
        group=track.group,
        genre=track.genre,
        label=int(entry["label"]),
        segment=segment,
        start_s=dataset.start_s(track, segment),
        sample_rate=dataset.sample_rate,
        split=track.split,
    )
    expected_head = record.head(description, dataset.segment_samples)
    if not data.startswith(expected_head):
        pairs = enumerate(zip(data, expected_head, strict=False))
        first = next((n for n, (a, b) in pairs if a != b), len(data))
        faults.append(
            f"{where}: headers and description differ from the manifest's at {offset + first}"
        )
    return faults


def _member(block: bytes) -> tuple[str, int]:
    """Name and size that a tar header claims, by Python's own tarfile."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, UnicodeDecodeError) as error:
        return f"no tar header ({error})", 0
    if info.type != tarfile.REGTYPE:
        return f"{info.name!r}, no regular file but type {info.type!r},", info.size
    return info.name, info.size


def _tail_faults(name: str, handle: int, entries: NDArray[np.void], size: int) -> list[str]:
    end = int(entries["offset"][-1]) + int(entries["record_bytes"][-1])
    tail = os.pread(handle, size - end, end)
    if any(tail):
        first = next(n for n, byte in enumerate(tail) if byte)
        return [f"{name}: archive tail: got byte {tail[first]} at {end + first}, expected 0"]
    return []


def _stock_faults(path: Path, first: int, payloads: list[str]) -> list[str]:
    """Read the shard as stock webdataset does and compare sample by sample."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    seen = 0
    with path.open("rb") as stream:  # WebDataset(path) would read #, ? and {} in it as its own
        files = tar_file_expander([{"url": str(path), "stream": stream}])
        for seen, sample in enumerate(group_by_keys(files), start=1):
            if seen > len(payloads):
                break
            row = json.loads(sample["json"])["row"]
            digest = record.payload_digest(memoryview(sample["wav"])[record.RIFF_BYTES :])
            if row != first + seen - 1 or digest != payloads[seen - 1]:
                return [f"{path.name}: stock webdataset reads another {sample['__key__']}"]
    if seen != len(payloads):
        return [f"{path.name}: stock webdataset reads {seen} samples, expected {len(payloads)}"]
    return []
