"""Shards to the batches of a rank: positional reads at known offsets, checked, ahead of need.

A reader thread fills int16 buffers while the device computes; conversion to float happens on
the device. Damage is never skipped: a skip on one rank would break the equal steps of all.
Every record is checked against its checksum when read, once more after a re-read, and then an
error names shard, key and offset.
"""

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgc_dist.data import cross_validation, opening, record
from mgc_dist.data.features import Features
from mgc_dist.data.manifest import ShardEntry
from mgc_dist.data.order import MicroBatch
from mgc_dist.errors import UserError
from mgc_dist.files import most_open

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank feeds one forward pass with.

    Attributes:
        plan: the micro batch that this fulfils.
        input: waves int16 [B, T]; from a cache, features of its dtype [B, F, D] in their place.
            Zeros for padding; pinned if asked for.
        row: int64 [B], -1 for padding.
        label: int64 [B], 0 for padding.
        weight: float32 [B], 1 for a true row, 0 for padding.
        draw: int64 [B], of the plan.
    """

    plan: MicroBatch
    input: Tensor
    row: Tensor
    label: Tensor
    weight: Tensor
    draw: Tensor


class ShardSet:
    """A packed data set, open for reading by any number of threads.

    Args:
        folder: that `python -m mgc_dist.shard` filled.
        fold: that is tested, of a data set with folds.
        is_whole: whether to take all rows of a data set with folds as they were packed.

    Raises:
        UserError: no data set there, its index or a shard does not match its manifest, or it has
            no such fold.
    """

    def __init__(self, folder: Path, fold: int | None = None, *, is_whole: bool = False) -> None:
        self.folder = folder
        packed, index = opening.opened(folder)
        self.packed_id = packed.dataset_id
        self.manifest = packed if is_whole else cross_validation.of_fold(folder, packed, fold)
        self.index = cross_validation.turned(index, packed, self.manifest)
        self.first_row = cross_validation.first_row(packed, self.manifest)
        self._record_bytes = record.record_bytes(self.manifest.segment_samples)
        audio_bytes = 2 * self.manifest.segment_samples
        self._tail_bytes = self._record_bytes - record.WAVE_OFFSET - audio_bytes
        for shard in self.manifest.shards:
            self._refuse_other_size(shard)
        self._opened = lru_cache(most_open(len(self.manifest.shards)))(self._open)

    def _refuse_other_size(self, shard: ShardEntry) -> None:
        path = self.folder / shard.name
        try:
            size = path.stat().st_size
        except OSError:
            size = None
        whole = record.shard_bytes(shard.rows, self.manifest.segment_samples)
        if not size == shard.bytes == whole:
            got = "no such file" if size is None else f"{size} bytes"
            expected = f"{shard.bytes} ({shard.rows} rows: {whole})"
            raise opening.not_as_packed(path, got, expected)

    def _open(self, shard: int) -> "_File":
        entry = self.manifest.shards[shard]
        try:
            return _File(self.folder / entry.name)
        except FileNotFoundError as error:
            path = self.folder / entry.name
            raise opening.not_as_packed(path, "no such file", entry.bytes) from error

    def close(self) -> None:
        """Close the shards; one that is being read is closed when that is done."""
        self._opened.cache_clear()

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def labels(self) -> NDArray[np.int64]:
        """Label of each row: int64 [N]."""
        return self.index["label"].astype(np.int64)

    @property
    def tracks(self) -> NDArray[np.int64]:
        """Track of each row, a position in the manifest's list: int64 [N]."""
        return self.index["track"].astype(np.int64)

    def keys(self) -> list[str]:
        """Key of each row, as its record is named in the shards: N of them, in row order."""
        ids = [track.id for track in self.manifest.tracks]
        pairs = zip(self.index["track"].tolist(), self.index["segment"].tolist(), strict=True)
        return [record.key_of(ids[track], segment) for track, segment in pairs]

    def rows_of(self, split: str) -> tuple[int, int]:
        """First row of a split and one past its last.

        Raises:
            UserError: it has none; a data set without training rows is for evaluation only.
        """
        first, stop = self.manifest.splits[split]
        if first == stop:
            filled = [name for name, (a, b) in self.manifest.splits.items() if a < b]
            raise UserError(
                f"{split} split of data set {self.folder}",
                got="no rows",
                expected=f"one of its splits: {', '.join(filled)}",
                cure="without training rows it serves `evaluate --data`; to train, pack "
                "tracks for train, validation and test",
            )
        return first, stop

    def shard_rows_of(self, split: str) -> tuple[int, ...]:
        """Rows of each shard of a split, in row order."""
        first, stop = self.rows_of(split)
        ends = np.cumsum([shard.rows for shard in self.manifest.shards]).tolist()
        pairs = zip(ends, self.manifest.shards, strict=True)
        return tuple(shard.rows for end, shard in pairs if first < end <= stop)

    def labels_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Label of each row, 0 for padding (-1): int64 [B]."""
        return np.where(rows >= 0, self.index["label"][np.maximum(rows, 0)], 0).astype(np.int64)

    def read(self, row: int) -> NDArray[np.int16]:
        """The audio of a row: int16 [T].

        Raises:
            UserError: the record is damaged, also after a second read.
        """
        wave: NDArray[np.int16] = np.empty((1, self.manifest.segment_samples), np.int16)
        self.read_batch(np.array([row]), wave, np.empty(1, np.int64))
        return wave.reshape(-1)

    def read_batch(
        self, rows: NDArray[np.int64], wave: NDArray[np.int16], label: NDArray[np.int64]
    ) -> None:
        """Read rows into a batch.

        Args:
            rows: int64 [B], -1 for padding.
            wave: int16 [B, T], written; zeros for padding.
            label: int64 [B], written; 0 for padding.

        Raises:
            UserError: a record is damaged, also after a second read.
        """
        label[:] = self.labels_of(rows)
        entries = self.index[np.maximum(rows, 0)]  # one gather a batch: 2 us a row, not 10
        columns = (entries["shard"], entries["offset"], entries["checksum"])
        places = zip(rows.tolist(), *(column.tolist() for column in columns), strict=True)
        head, tail = bytearray(record.WAVE_OFFSET), bytearray(self._tail_bytes)
        for k, (row, shard, offset, checksum) in enumerate(places):
            if row < 0:
                wave[k] = 0
                continue
            parts = (head, wave[k].data.cast("B"), tail)
            if self._read_into(parts, shard, offset) == checksum:
                continue
            name = self.manifest.shards[shard].name
            log.warning("row %d: checksum mismatch in %s, reading again", row, name)
            if self._read_into(parts, shard, offset) != checksum:
                raise self._damaged(row)

    def _read_into(self, parts: record.Parts, shard: int, offset: int) -> int:
        """Read a record straight to where its audio belongs; its checksum, -1 if it is cut."""
        file = self._opened(shard)  # held: two threads may open one, of which one is kept
        count = os.preadv(file.handle, parts, offset)
        return record.checksum_of_parts(parts) if count == self._record_bytes else -1

    def _damaged(self, row: int) -> UserError:
        entry = self.index[row]
        number, offset = int(entry["shard"]), int(entry["offset"])
        shard = self.manifest.shards[number].name
        track = self.manifest.tracks[int(entry["track"])].id
        key = record.key_of(track, int(entry["segment"]))
        file = self._opened(number)
        data = os.pread(file.handle, self._record_bytes, offset)
        found = record.checksum(data)
        return UserError(
            f"damaged record: shard {self.folder / shard}, key {key}, row {row}, offset {offset}",
            got=f"{len(data)} bytes of key {record.key_at(data)!r} with checksum {found:016x}",
            expected=f"{self._record_bytes} bytes with {int(entry['checksum']):016x}",
            cure="copy the shard again from its source, or pack again with --overwrite",
            this_rank_only=True,
        )


class _File:
    """A file that is open as long as anyone holds this: a thread may read what another lets go."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


class Reader:
    """Threads that read batches ahead of their use.

    Iterating yields the batches in order; an error in a thread is raised where the batch
    would have come. Use it as a context manager: leaving it ends the threads.

    Memory: (read_ahead + 2) batches, however large the data set is. A batch's buffer is used again
    once nothing refers to its input any more.

    Args:
        shards: to read from.
        split: whose rows the places of the micro batches count.
        batches: the micro batches of this rank, in order.
        read_ahead: batches that may be ready or under way at a time.
        pin: whether to fill page-locked memory, for copies that overlap with the device.
        threads: that read; more than one pays where the storage answers slowly.
        features: read in place of the waves, where the model takes those.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        batches: Iterable[MicroBatch],
        *,
        read_ahead: int,
        pin: bool,
        threads: int = 1,
        features: Features | None = None,
    ) -> None:
        self.wait_s = 0.0
        self._shards, self._features, self._batches = shards, features, iter(batches)
        self._first, _ = shards.rows_of(split)
        self._read_ahead, self._threads = max(1, read_ahead), threads
        self._pin, self._buffers = pin, _Buffers(pin)
        self._pending: deque[Future[Batch]] = deque()
        self._closed = False

    def __enter__(self) -> "Reader":
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="reader")
        self._start_more()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = bool(self._pending)
        self._pool.shutdown(cancel_futures=True)
        self._pending.clear()

    def __iter__(self) -> Iterator[Batch]:
        while self._pending or self._closed:
            if self._closed:
                raise RuntimeError("the reader has been left, with batches still to come")
            started = time.perf_counter()
            batch = self._pending.popleft().result()
            self.wait_s += time.perf_counter() - started
            self._start_more()
            yield batch

    def _start_more(self) -> None:
        for micro in islice(self._batches, self._read_ahead - len(self._pending)):
            self._pending.append(self._pool.submit(self._read, micro))

    def _read(self, micro: MicroBatch) -> Batch:
        row = np.where(micro.place >= 0, micro.place + self._first, -1)
        taken, label = self._read_rows(row)
        return Batch(
            plan=micro,
            input=taken,
            row=torch.from_numpy(row),
            label=self._small(label),
            weight=self._small((row >= 0).astype(np.float32)),
            draw=self._small(np.ascontiguousarray(micro.draw)),
        )

    def _small(self, values: NDArray[Any]) -> Tensor:
        """A copy to a device waits for the host unless it comes from page-locked memory."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self._pin else tensor

    def _read_rows(self, row: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """What the model takes of each row, and its label."""
        size = len(row)
        if self._features is None:
            wave = self._buffers.take(size, 2 * self._shards.manifest.segment_samples)
            wave, label = wave.view(torch.int16), np.empty(size, np.int64)  # [B, T]
            self._shards.read_batch(row, wave.numpy(), label)
            return wave, label
        key = self._features.key
        data = self._buffers.take(size, key.row_bytes)
        self._features.read_batch(row, data.numpy())
        values = data.view(key.on_device).view(size, key.frames, key.width)  # [B, F, D]
        return values, self._shards.labels_of(row)


class _Buffers:
    """Bytes of batches that come back when they are no longer referred to.

    Fresh memory costs a page fault per 4 KiB, more than reading it: 60 us a segment.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._free: deque[NDArray[np.uint8]] = deque()

    def take(self, size: int, row_bytes: int) -> Tensor:
        """uint8 [size, row_bytes], of undefined content."""
        if self._pin:  # torch keeps page-locked blocks itself, until the device has copied them
            return torch.empty((size, row_bytes), dtype=torch.uint8, pin_memory=True)
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = np.empty((size, row_bytes), np.uint8)
        if buffer.shape != (size, row_bytes):
            buffer = np.empty((size, row_bytes), np.uint8)
        lent = buffer[:]  # the tensor holds this view; when it goes, the buffer is free
        weakref.finalize(lent, self._free.append, buffer).atexit = False
        return torch.from_numpy(lent)
