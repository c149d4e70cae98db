"""What a shard holds: the bytes of one segment in a tar file, and the index that finds them.

A record is KEY.json and KEY.wav in USTAR format, with every field fixed:

    512 B tar header | JSON in 512 B | 512 B tar header | 44 B RIFF header, PCM16, padding

so all offsets are known before packing, any reader of webdataset tars can read a shard, and
the same input gives the same bytes. Nothing in a record is ever executed or unpickled.
"""

import json
import struct
import tarfile
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from mgc_dist.errors import UserError

BLOCK = 512
JSON_BYTES = BLOCK
RIFF_BYTES = 44
WAVE_OFFSET = BLOCK + JSON_BYTES + BLOCK + RIFF_BYTES
"""From the start of a record to its first audio sample."""

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("wave_offset", "<u8"),
        ("wave_bytes", "<u4"),
        ("record_bytes", "<u4"),
        ("checksum", "<u8"),
        ("label", "<u2"),
        ("track", "<u4"),
        ("segment", "<u4"),
    ]
)
"""One entry a row: where its record lies, xxh3_64 of the whole record, and what it is."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The description that KEY.json holds.

    Attributes:
        row: number in the data set.
        track: id of its track.
        group: artist or other source, None if unknown.
        genre, label: name and index.
        segment: number in its track.
        start_s: seconds from the start of the track.
        sample_rate: in Hz.
        split: train, validation or test.
    """

    row: int
    track: str
    group: str | None
    genre: str
    label: int
    segment: int
    start_s: float
    sample_rate: int
    split: str

    @property
    def key(self) -> str:
        """Name of the sample in the tar: no dot, because webdataset cuts the key at the first."""
        return key_of(self.track, self.segment)


def key_of(track: str, segment: int) -> str:
    """`blues_00000`, 3 -> `blues_00000_03`."""
    key = f"{track}_{segment:02d}"
    if "." in key or "/" in key or not key.isascii() or len(key) > 90:
        raise UserError(
            f"sample key {key}",
            got=repr(key),
            expected="at most 90 ASCII letters without dots or slashes",
            cure="rename the file",
        )
    return key


def record_bytes(samples: int) -> int:
    """Length of a record with `samples` audio samples."""
    return WAVE_OFFSET - RIFF_BYTES + _padded(RIFF_BYTES + 2 * samples)


def shard_bytes(rows: int, samples: int) -> int:
    """Length of a shard: its records, two zero blocks, rounded up to tar's 10,240 bytes."""
    content = rows * record_bytes(samples) + 2 * BLOCK
    return -(-content // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def encode(segment: Segment, wave: NDArray[np.int16]) -> bytes:
    """The record of a segment.

    Args:
        segment: its description.
        wave: int16 [T].

    Returns:
        record_bytes(T) bytes.

    Raises:
        UserError: the key or the description does not fit.
    """
    text = json.dumps(
        {
            "row": segment.row,
            "track": segment.track,
            "group": segment.group,
            "genre": segment.genre,
            "label": segment.label,
            "segment": segment.segment,
            "start_s": segment.start_s,
            "sample_rate": segment.sample_rate,
            "split": segment.split,
        },
        ensure_ascii=False,
    ).encode()
    if len(text) > JSON_BYTES:
        raise UserError(
            f"description of track {segment.track}",
            got=f"{len(text)} bytes",
            expected=f"at most {JSON_BYTES}",
            cure="shorten the names of its genre and artist",
        )
    payload = _riff_header(len(wave), segment.sample_rate) + wave.astype("<i2").tobytes()
    return b"".join(
        (
            _tar_header(f"{segment.key}.json", len(text)),
            text.ljust(JSON_BYTES, b"\0"),
            _tar_header(f"{segment.key}.wav", len(payload)),
            payload.ljust(_padded(len(payload)), b"\0"),
        )
    )


def checksum(record: bytes) -> int:
    """xxh3_64 of a whole record (headers, JSON, audio, padding): 7 us for 3 s."""
    return xxhash.xxh3_64_intdigest(record)


def key_at(record: bytes) -> str:
    """The key that a record's first tar header claims, for error messages only."""
    return record[:100].split(b"\0")[0].decode("ascii", "replace").removesuffix(".json")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # mtime 0, uid 0, gid 0, no owner names, mode 0644
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _riff_header(samples: int, sample_rate: int) -> bytes:
    size = 2 * samples
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16),
        *(b"data", size),
    )
