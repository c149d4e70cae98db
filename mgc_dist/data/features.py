"""What a frozen part gives for each row, on disk: a folder that says what it is, and its reader.

`features.npy` is a plain array [rows, F, D] of float32, or of bfloat16 in uint16 (numpy has no
bfloat16), `checksums.npy` the xxh3_64 of each row, `features.json` what both are of. Rows are those
of the data set, train and validation. Reading is positional, as from the shards, and not through
a memory map: a failing disk is then an error that names the file, and not a SIGBUS. The pages are
the system's own cache in both cases, shared by all ranks of a node.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from mgc_dist.data.rowstore import CHECKSUMS, RowStore
from mgc_dist.errors import UserError

log = logging.getLogger(__name__)

STORE = RowStore(
    name="features",
    format="mgc_dist frozen features",
    version=1,
    noun="frozen features",
    keeps_checksums=True,
)


@dataclass(frozen=True, kw_only=True)
class FeaturesKey:
    """What features are of; those of another key are in another folder.

    Attributes:
        dataset_id: of the shards.
        frozen: xxh3_128 of the frozen weights below the boundary, and of what matters of the
            model's settings.
        boundary: `cnn`, `layers:N` or `backbone`.
        dtype: of a value on disk.
        precision: of the pass: float32, or autocast to bfloat16.
        device: `cpu` or `cuda`, where the pass ran: their last digits differ.
        rows, frames, width: rows of train and validation, F, D.
    """

    dataset_id: str
    frozen: str
    boundary: str
    dtype: Literal["fp32", "bf16"]
    precision: Literal["fp32", "bf16"]
    device: str
    rows: int
    frames: int
    width: int

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return (4 if self.dtype == "fp32" else 2) * self.frames * self.width

    @property
    def bytes(self) -> int:
        """Of all features."""
        return self.rows * self.row_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array: rows, F, D."""
        return self.rows, self.frames, self.width

    @property
    def on_disk(self) -> type[np.generic]:
        """Type of a value, in numpy."""
        return np.float32 if self.dtype == "fp32" else np.uint16

    @property
    def on_device(self) -> torch.dtype:
        """Type of a value, in torch."""
        return torch.float32 if self.dtype == "fp32" else torch.bfloat16

    @property
    def name(self) -> str:
        """Of the folder: a hash of all of the above and of the format."""
        words = json.dumps([STORE.format, STORE.version, asdict(self)], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(words.encode())

    @property
    def description(self) -> str:
        """In words, as a run's identity has it."""
        return f"{self.boundary} in {self.dtype}, made in {self.precision} on {self.device}"


def is_whole(folder: Path, of: FeaturesKey) -> bool:
    """Whether a folder holds these features; their rows are checked when they are read.

    Raises:
        UserError: it holds something else, or its files do not belong together.
    """
    try:
        return STORE.is_whole(folder, of)
    except ValueError as error:
        raise UserError(
            f"cache {folder}",
            got=str(error),
            expected=f"what {of.description} of this data set and model is",
            cure="remove that folder: it is made again; or choose another --cache-dir",
        ) from error


class Features:
    """Features that are whole, open for reading by any number of threads.

    Args:
        folder: of the cache.
        key: of what must be in it.

    Raises:
        UserError: it is not there, or is something else.
    """

    def __init__(self, folder: Path, key: FeaturesKey) -> None:
        if not is_whole(folder, key):
            raise UserError(
                f"cache {folder}",
                got="no such folder on this node",
                expected="the one that rank 0 has written",
                cure="give a --cache-dir on a file system that all nodes share",
                this_rank_only=True,
            )
        self.key = key
        self._path = folder / STORE.array
        self._sums: NDArray[np.uint64] = np.load(folder / CHECKSUMS, allow_pickle=False)
        self._file = os.open(self._path, os.O_RDONLY)
        self._offset = os.fstat(self._file).st_size - key.bytes

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> "Features":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read_batch(self, rows: NDArray[np.int64], into: NDArray[np.uint8]) -> None:
        """Read rows into a batch.

        Args:
            rows: int64 [B], of the data set; -1 for padding.
            into: uint8 [B, row_bytes], written; zeros for padding.

        Raises:
            UserError: a row is damaged, also after a second read.
        """
        for k, row in enumerate(rows.tolist()):
            if row < 0:
                into[k] = 0
                continue
            if self._read(row, into[k]) != self._sums[row]:
                log.warning("row %d: checksum mismatch in %s, reading again", row, self._path)
                found = self._read(row, into[k])
                if found != self._sums[row]:
                    raise self._damaged(row, found)

    def _read(self, row: int, into: NDArray[np.uint8]) -> int:
        """Read a row to where it belongs; its checksum, -1 if it is cut."""
        at = self._offset + row * self.key.row_bytes
        count = os.preadv(self._file, [into.data], at)
        return xxhash.xxh3_64_intdigest(into.data) if count == self.key.row_bytes else -1

    def _damaged(self, row: int, found: int) -> UserError:
        return UserError(
            f"damaged cache: row {row} of {self._path}, "
            f"offset {self._offset + row * self.key.row_bytes}",
            got="fewer bytes" if found < 0 else f"checksum {found:016x}",
            expected=f"{self.key.row_bytes} bytes with {int(self._sums[row]):016x}",
            cure="remove that folder: the same command makes it again and, with --resume auto, "
            "goes on",
            this_rank_only=True,
        )
