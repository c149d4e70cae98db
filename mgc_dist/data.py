"""Shards to the batches of a rank: positional reads at known offsets, checked, ahead of need.

A reader thread fills int16 buffers while the device computes; conversion to float happens on
the device. Damage is never skipped: a skip on one rank would break the equal steps of all.
Every record is checked against its checksum when read, once more after a re-read, and then an
error names shard, key and offset.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgc_dist import manifest, record
from mgc_dist.errors import UserError
from mgc_dist.files import sha256
from mgc_dist.manifest import Manifest
from mgc_dist.plan import MicroBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank feeds one forward pass with.

    Attributes:
        plan: the micro batch that this fulfils.
        wave: int16 [B, T], zeros for padding; pinned if asked for.
        row: int64 [B], -1 for padding.
        label: int64 [B], 0 for padding.
        weight: float32 [B], 1 for a true row, 0 for padding.
    """

    plan: MicroBatch
    wave: Tensor
    row: Tensor
    label: Tensor
    weight: Tensor


class ShardSet:
    """A packed data set, open for reading by any number of threads.

    Args:
        folder: that `python -m mgc_dist.shard` filled.

    Raises:
        UserError: no data set there, or its index or a shard does not match its manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = manifest.read(folder)
        self.index = _open_index(folder, self.manifest)
        self._files: list[int] = []
        for shard in self.manifest.shards:
            path = folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                raise _not_as_packed(
                    path, "no such file" if size is None else f"{size} bytes", shard.bytes
                )
            self._files.append(os.open(path, os.O_RDONLY))

    def close(self) -> None:
        """Close the shards."""
        for handle in self._files:
            os.close(handle)
        self._files.clear()

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

    def rows_of(self, split: str) -> tuple[int, int]:
        """First row of a split and one past its last."""
        return self.manifest.splits[split]

    def read(self, row: int) -> NDArray[np.int16]:
        """The audio of a row: int16 [T].

        Raises:
            UserError: the record is damaged, also after a second read.
        """
        entry = self.index[row]
        data = self._pread(entry)
        if record.checksum(data) != int(entry["checksum"]):
            log.warning("row %d: checksum mismatch in %s, reading again", row, self._name(entry))
            data = self._pread(entry)
        found = record.checksum(data)
        if len(data) != int(entry["record_bytes"]) or found != int(entry["checksum"]):
            raise self._damaged(row, entry, data, found)
        start = int(entry["wave_offset"] - entry["offset"])
        return np.frombuffer(data, "<i2", int(entry["wave_bytes"]) // 2, start)

    def _pread(self, entry: np.void) -> bytes:
        handle = self._files[int(entry["shard"])]
        return os.pread(handle, int(entry["record_bytes"]), int(entry["offset"]))

    def _name(self, entry: np.void) -> str:
        return self.manifest.shards[int(entry["shard"])].name

    def _damaged(self, row: int, entry: np.void, data: bytes, found: int) -> UserError:
        track = self.manifest.tracks[int(entry["track"])].id
        key = record.key_of(track, int(entry["segment"]))
        return UserError(
            f"damaged record: shard {self.folder / self._name(entry)}, key {key}, row {row}, "
            f"offset {int(entry['offset'])}",
            got=f"{len(data)} bytes of key {record.key_at(data)!r} with checksum {found:016x}",
            expected=f"{int(entry['record_bytes'])} bytes with {int(entry['checksum']):016x}",
            cure="copy the shard again from its source, or pack the data set again",
            this_rank_only=True,
        )


def _open_index(folder: Path, found: Manifest) -> NDArray[np.void]:
    path = folder / manifest.INDEX
    try:
        digest = sha256(path)
        if digest != found.index_sha256:
            raise ValueError(f"sha256 {digest[:12]}")
        index: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
        if index.dtype != record.INDEX_DTYPE or len(index) != found.rows:
            raise ValueError(f"{len(index)} entries of {index.dtype}")
    except (OSError, ValueError) as error:
        raise _not_as_packed(path, str(error), f"sha256 {found.index_sha256[:12]}") from error
    return index


def _not_as_packed(path: Path, got: object, expected: object) -> UserError:
    return UserError(
        f"data set file {path}",
        got=got,
        expected=f"{expected}, as the manifest says",
        cure="copy the data set again, or pack it again",
        this_rank_only=True,
    )


class Reader:
    """A thread that reads batches ahead of their use.

    Iterating yields the batches in order; an error in the thread is raised where the batch
    would have come. Use it as a context manager: leaving it ends the thread.

    Args:
        shards: to read from.
        split: whose rows the places of the micro batches count.
        batches: the micro batches of this rank, in order.
        read_ahead: batches that may be ready at a time.
        pin: whether to fill page-locked memory, for copies that overlap with the device.
    """

    def __init__(
        self,
        shards: ShardSet,
        split: str,
        batches: Iterable[MicroBatch],
        *,
        read_ahead: int,
        pin: bool,
    ) -> None:
        self.wait_s = 0.0
        self._shards, self._batches, self._pin = shards, iter(batches), pin
        self._first, _ = shards.rows_of(split)
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(max(1, read_ahead))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="reader", daemon=True)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:  # free a thread that waits for room
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            item = self._ready.get()
            self.wait_s += time.perf_counter() - started
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _fill(self) -> None:
        try:
            for micro in self._batches:
                if self._stop.is_set():
                    return
                self._ready.put(self._read(micro))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _read(self, micro: MicroBatch) -> Batch:
        size, samples = len(micro.place), self._shards.manifest.segment_samples
        wave = torch.zeros((size, samples), dtype=torch.int16, pin_memory=self._pin)  # [B, T]
        into = wave.numpy()
        row = np.where(micro.place >= 0, micro.place + self._first, -1)
        label = np.zeros(size, np.int64)
        for k, number in enumerate(row):
            if number >= 0:
                into[k] = self._shards.read(int(number))
                label[k] = self._shards.index["label"][number]
        return Batch(
            plan=micro,
            wave=wave,
            row=torch.from_numpy(row),
            label=torch.from_numpy(label),
            weight=torch.from_numpy((row >= 0).astype(np.float32)),
        )
