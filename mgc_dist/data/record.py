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
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from mgc_dist.errors import UserError

BLOCK = 512
JSON_BYTES = BLOCK
RIFF_BYTES = 44
WAVE_OFFSET = BLOCK + JSON_BYTES + BLOCK + RIFF_BYTES
"""From the start of a record to its first audio sample."""

Parts = tuple[bytearray, memoryview, bytearray]
"""A record in memory: all before its audio, its audio, all after it."""

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


def head(segment: Segment, samples: int) -> bytes:
    """Everything in front of a segment's first audio sample: WAVE_OFFSET bytes.

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
    key = segment.key
    return b"".join(
        (
            _tar_header(f"{key}.json", len(text)),
            text.ljust(JSON_BYTES, b"\0"),
            _tar_header(f"{key}.wav", RIFF_BYTES + 2 * samples),
            _riff_header(samples, segment.sample_rate),
        )
    )


def encode(segment: Segment, wave: NDArray[np.int16]) -> bytearray:
    """The record of a segment.

    Args:
        segment: its description.
        wave: int16 [T].

    Returns:
        record_bytes(T) bytes.

    Raises:
        UserError: the key or the description does not fit.
    """
    record = bytearray(record_bytes(len(wave)))
    record[:WAVE_OFFSET] = head(segment, len(wave))
    into = np.frombuffer(record, "<i2", len(wave), WAVE_OFFSET)
    into[:] = wave
    return record


def checksum(record: bytes | bytearray | memoryview) -> int:
    """xxh3_64 of a whole record (headers, JSON, audio, padding): 7 us for 3 s."""
    return xxhash.xxh3_64_intdigest(record)


def checksum_of_parts(parts: Parts) -> int:
    """As `checksum`, of a record that lies in three places."""
    head, wave, tail = parts
    digest = xxhash.xxh3_64(head)
    digest.update(wave)
    digest.update(tail)
    return digest.intdigest()


def payload_digest(wave: bytes | bytearray | memoryview) -> str:
    """xxh3_128 of a segment's audio, little-endian: its part in `dataset_id`."""
    return xxhash.xxh3_128_hexdigest(wave)


def key_at(record: bytes | bytearray | memoryview) -> str:
    """The key that a record's first tar header claims, for error messages only."""
    return bytes(record[:100]).split(b"\0")[0].decode("ascii", "replace").removesuffix(".json")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _tar_header(name: str, size: int) -> bytes:
    """As TarInfo.tobuf writes it (a test), in a tenth of its time."""
    blank, total = _blank_header(size)
    path = name.encode("ascii")
    total += sum(path)
    return b"%b%b%06o\0 %b" % (path, blank[len(path) : 148], total, blank[156:])


@lru_cache(maxsize=1024)  # the wave has one size, the JSON some dozens
def _blank_header(size: int) -> tuple[bytes, int]:
    info = tarfile.TarInfo("")  # mtime 0, uid 0, gid 0, no owner names, mode 0644
    info.size = size
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header, sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")


@lru_cache(maxsize=8)
def _riff_header(samples: int, sample_rate: int) -> bytes:
    size = 2 * samples
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16),
        *(b"data", size),
    )
