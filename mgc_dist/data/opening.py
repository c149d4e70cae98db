"""Opening a data set: all of it is checked once, and each later start costs a second.

Of a million tracks the manifest alone took 21 s and 1.8 GB on each rank, and the index 6 s, while
a rank that trains needs split bounds, shards and the index, and no name. So the first opening
checks everything, and then notes, in a folder of the data set, what the manifest says but its
tracks. Later ones compare both files with the note and map the index; tracks are read when they
are asked for. Ranks that open at once wait for the first of them. Where the folder cannot be
written to, each opening checks everything.

The note counts for files of the same place, times and content only: neither a copy, nor what has
changed since, nor a stranger's note is believed.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from mgc_dist.data import manifest, record
from mgc_dist.data.manifest import Manifest, Tracks
from mgc_dist.errors import UserError
from mgc_dist.files import fingerprint, locked, replace_text, sha256, stamp_of

FOLDER = ".opened"
_FORMAT = "mgc_dist opened 1"
_WAIT_S = 600.0
"""For another rank that checks; a million tracks take it 30 s."""
_BLOCK = 1 << 18
"""Rows of the index that are checked at a time: 12 MB of it."""

Opened = tuple[Manifest, NDArray[np.void]]


def opened(folder: Path) -> Opened:
    """The manifest of a data set and its index, INDEX_DTYPE [N], which is memory-mapped.

    Raises:
        UserError: no data set there, its manifest is damaged, or its index does not match it.
    """
    if found := _noted(folder):
        return found
    if not (folder / manifest.NAME).is_file():
        return _checked(folder)  # refuses it, and leaves the folder as it is
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        purpose = f"checking data set {folder}"
        with locked(folder / FOLDER / "lock", wait_s=_WAIT_S, purpose=purpose):
            return _noted(folder) or _checked(folder)
    except OSError:  # it is not ours to write into
        return _checked(folder)


def _checked(folder: Path) -> Opened:
    """Look at everything, and note it."""
    facts = _facts(folder)  # before: what changes meanwhile is looked at again
    dataset = manifest.read(folder)
    index = open_index(folder, dataset)
    about = asdict(replace(dataset, tracks=()))
    with suppress(OSError):
        replace_text(_note(folder), json.dumps({"of": facts, "manifest": about}))
    return _noted(folder) or (dataset, index)  # the note leaves the tracks out of memory


def _noted(folder: Path) -> Opened | None:
    """As the note has it; None where it is of other files, or there is none."""
    try:
        note = json.loads(_note(folder).read_text(encoding="utf-8"))
        facts = _facts(folder)
        if not facts or note["of"] != facts:
            return None
        tracks = Tracks(lambda: _tracks(folder, facts[manifest.NAME]))
        dataset = replace(manifest.from_json(note["manifest"]), tracks=tracks)
        index: NDArray[np.void] = np.load(
            folder / manifest.INDEX, mmap_mode="r", allow_pickle=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dataset, index


def _note(folder: Path) -> Path:
    """Of this place: nodes may see one folder under several names."""
    return folder / FOLDER / f"{xxhash.xxh3_64_hexdigest(os.fsencode(folder.resolve()))}.json"


def _facts(folder: Path) -> dict[str, str]:
    """What changes with the files that are checked; nothing where one is missing."""
    with suppress(OSError):
        names = (manifest.NAME, manifest.INDEX)
        facts = {name: _fact(folder / name) for name in names}
        return {"format": _FORMAT} | facts
    return {}


def _fact(path: Path) -> str:
    return f"{stamp_of(path)} {fingerprint(path)}"


def _tracks(folder: Path, fact: str) -> Iterator[manifest.TrackEntry]:
    """The tracks of a manifest that has been checked.

    Raises:
        UserError: it is another one now.
    """
    path = folder / manifest.NAME
    try:
        if _fact(path) == fact:
            return manifest.tracks_of(json.loads(path.read_text(encoding="utf-8")))
        got = "another manifest"
    except (OSError, ValueError) as error:
        got = str(error)
    raise not_as_packed(path, got, "the one that was there at the start")


def open_index(folder: Path, dataset: Manifest) -> NDArray[np.void]:
    """The index of a data set, memory-mapped; checked against the manifest in every field.

    Args:
        folder: of the shards.
        dataset: their manifest.

    Returns:
        INDEX_DTYPE [N].

    Raises:
        UserError: it is damaged, of another data set, or not what packing would have written.
    """
    path = folder / manifest.INDEX
    try:
        digest = sha256(path)
        if digest != dataset.index_sha256:
            raise ValueError(f"sha256 {digest[:12]}")
        index: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
        if index.dtype != record.INDEX_DTYPE or index.shape != (dataset.rows,):
            raise ValueError(f"{index.shape} entries of {index.dtype}")
    except (OSError, ValueError) as error:
        raise not_as_packed(path, str(error), f"sha256 {dataset.index_sha256[:12]}") from error
    for row, name, got, expected in _odd_fields(index, dataset):
        raise not_as_packed(path, f"{name} {got} of row {row}", f"{name} {expected}")
    return index


def _odd_fields(
    index: NDArray[np.void], dataset: Manifest
) -> Iterator[tuple[int, str, object, object]]:
    """Fields that differ from what the format and the manifest leave as the only possibility."""
    label_of = {genre: label for label, genre in enumerate(dataset.genres)}
    names = list(dataset.splits)
    tracks = dataset.tracks
    count = np.array([track.segments for track in tracks])
    first_segment = np.cumsum(count) - count
    labels = np.array([label_of.get(track.genre, -1) for track in tracks])
    splits = np.array([names.index(track.split) for track in tracks])
    split_ends = np.array([stop for _, stop in dataset.splits.values()])
    shard_ends = np.cumsum([shard.rows for shard in dataset.shards])
    is_there = np.zeros(dataset.rows, bool)
    for first in range(0, dataset.rows, _BLOCK):
        part = np.array(index[first : first + _BLOCK])
        row = np.arange(first, first + len(part))
        yield from _odd_places(part, row, shard_ends, dataset.segment_samples)
        track = part["track"]
        yield from _differing(part, row, "track", np.minimum(track, len(tracks) - 1))
        yield from _differing(part, row, "label", labels[track])
        yield from _differing(part, row, "segment", np.minimum(part["segment"], count[track] - 1))
        split = np.searchsorted(split_ends, row, side="right")
        for place in np.flatnonzero(splits[track] != split)[:1].tolist():
            yield (
                int(row[place]),
                "track",
                int(track[place]),
                "of the split that the row belongs to",
            )
        is_there[first_segment[track] + part["segment"]] = True
    for number in np.flatnonzero(~is_there)[:1].tolist():  # as many rows as keys: one comes twice
        place = int(np.searchsorted(first_segment, number, side="right")) - 1
        key = record.key_of(tracks[place].id, number - int(first_segment[place]))
        yield -1, f"number of rows of key {key}", 0, 1


def _odd_places(
    part: NDArray[np.void], row: NDArray[np.int64], shard_ends: NDArray[np.int64], samples: int
) -> Iterator[tuple[int, str, object, object]]:
    """Where a row's record lies follows from its number alone."""
    size = record.record_bytes(samples)
    shard = np.searchsorted(shard_ends, row, side="right")
    offset = (row - np.concatenate([[0], shard_ends])[shard]) * size
    yield from _differing(part, row, "shard", shard)
    yield from _differing(part, row, "offset", offset)
    yield from _differing(part, row, "wave_offset", offset + record.WAVE_OFFSET)
    yield from _differing(part, row, "wave_bytes", np.full(len(row), 2 * samples))
    yield from _differing(part, row, "record_bytes", np.full(len(row), size))


def _differing(
    part: NDArray[np.void], row: NDArray[np.int64], name: str, expected: NDArray[np.int64]
) -> Iterator[tuple[int, str, object, object]]:
    for place in np.flatnonzero(part[name] != expected)[:1].tolist():
        yield int(row[place]), name, int(part[name][place]), int(expected[place])


def not_as_packed(path: Path, got: object, expected: object) -> UserError:
    """The refusal of a file of a data set that is not what its manifest says."""
    return UserError(
        f"data set file {path}",
        got=got,
        expected=f"{expected}, as the manifest says",
        cure="copy the data set again, or pack it again with --overwrite",
        this_rank_only=True,
    )
