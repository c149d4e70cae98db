"""Rows of one size in one file that fills batch by batch, each with its checksum.

While a pass runs, the file has a temporary name and a ledger beside it lists the batches that it
holds: a killed pass goes on with those that are missing or, after a crash of the machine, are not
as they were written. Space is taken before the pass, and a full disk is an error, not a SIGBUS.
"""

import os
from collections.abc import Sequence
from io import BytesIO, FileIO
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash
from numpy.typing import DTypeLike, NDArray

from mgc_dist.data.ledger import Ledger
from mgc_dist.files import write_at


class RowFile:
    """A .npy file that fills, and the ledger of what it holds. Use it as a context manager.

    Args:
        part: path while it fills; what is there of the same size is gone on with.
        ledger: path of the ledger.
        work: names exactly what is written; a ledger of another work is begun again.
        shape: of the array, rows first.
        dtype: of the array.

    Raises:
        OSError: there is no space for all of it.
    """

    def __init__(
        self, part: Path, ledger: Path, work: str, *, shape: Sequence[int], dtype: DTypeLike
    ) -> None:
        head = _npy_head(shape, np.dtype(dtype))
        self.rows = shape[0]
        self._offset = len(head)
        self._stride = np.dtype(dtype).itemsize * int(np.prod(shape[1:]))
        size = len(head) + self.rows * self._stride
        if not part.exists() or part.stat().st_size != size:
            ledger.unlink(missing_ok=True)
            with part.open("wb") as new:
                new.write(head)
                new.flush()
                _reserve(new.fileno(), size, part)
        self._ledger = Ledger(ledger, work)
        self._file = FileIO(part, "r+")

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ledger.__exit__(kind, error, trace)
        self._file.close()

    @property
    def batches(self) -> int:
        """Batches that the ledger lists."""
        return len(self._ledger.done)

    def holds(self, batch: str) -> bool:
        """Whether a batch is there as it was written; reads it."""
        entry = self._ledger.done.get(batch, {})
        first, sums = entry.get("first"), entry.get("checksums")
        if not isinstance(first, int) or not isinstance(sums, list):
            return False
        place = self._offset + first * self._stride
        data = os.pread(self._file.fileno(), len(sums) * self._stride, place)
        return _checksums(data, self._stride) == sums

    def put(self, batch: str, first: int, values: NDArray[np.generic]) -> None:
        """Write a batch, then say in the ledger that it is there.

        Args:
            batch: its name.
            first: its first row.
            values: [rows of the batch, ...] in the file's dtype.
        """
        data = np.ascontiguousarray(values).data.cast("B")
        write_at(self._file, self._offset + first * self._stride, data)
        note(self._ledger, batch, first, _checksums(data, self._stride))

    def checksums(self) -> NDArray[np.uint64]:
        """xxh3_64 of each row's bytes, uint64 [rows].

        Raises:
            RuntimeError: the ledger lacks a row.
        """
        found = np.zeros(self.rows, np.uint64)
        there = np.zeros(self.rows, bool)
        for entry in self._ledger.done.values():
            first, sums = int(entry["first"]), entry["checksums"]
            found[first : first + len(sums)] = np.array(sums, np.uint64)
            there[first : first + len(sums)] = True
        if not there.all():
            raise RuntimeError(f"row {int(there.argmin())} is missing at the end of a pass")
        return found

    def sync(self) -> None:
        """Flush the file to the disk."""
        os.fsync(self._file.fileno())


def note(ledger: Ledger, batch: str, first: int, sums: list[int]) -> None:
    """Say that a batch is in the file."""
    entry = {"id": batch, "first": first, "checksums": sums}
    ledger.add(entry)
    ledger.done[batch] = entry


def _checksums(data: bytes | memoryview, stride: int) -> list[int]:
    view = memoryview(data)
    return [xxhash.xxh3_64_intdigest(view[at : at + stride]) for at in range(0, len(view), stride)]


def _reserve(handle: int, size: int, path: Path) -> None:
    """Take the disk space before the pass, not as far as it goes in the middle of it."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def _npy_head(shape: Sequence[int], dtype: "np.dtype[np.generic]") -> bytes:
    """The first bytes of a .npy file, as numpy itself would write them."""
    file = BytesIO()
    facts = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue()
