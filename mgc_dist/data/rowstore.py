"""Rows of one size in a folder: an array, and a header, written last, that says what it is of.

While a pass fills it, the array has a temporary name and a ledger beside it lists the batches that
it holds, with their checksums: a killed pass goes on with those that are missing or, after a
crash of the machine, are not as they were written. Space is taken before the pass, and a full disk
is an error, not a SIGBUS.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO, FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import DTypeLike, NDArray

from mgc_dist.data.ledger import Ledger
from mgc_dist.files import fingerprint, replace_text, replacing, write_at

CHECKSUMS = "checksums.npy"


class RowsOf(Protocol):
    """What rows are of: a frozen dataclass, which the header repeats."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array, rows first."""

    @property
    def on_disk(self) -> type[np.generic]:
        """Type of a value in the array."""


@dataclass(frozen=True, kw_only=True)
class RowStore:
    """A kind of folder: the names of its files, and what its header calls it.

    Attributes:
        name: of the files.
        format, version: in the header; another one is refused.
        noun: in messages.
        keeps_checksums: whether a file holds the xxh3_64 of each row, for readers of single rows.
            The header has the hash of that file then, else that of the array.
    """

    name: str
    format: str
    version: int
    noun: str
    keeps_checksums: bool

    @property
    def array(self) -> str:
        """Name of the array, a plain .npy file."""
        return f"{self.name}.npy"

    @property
    def header(self) -> str:
        """Name of the header."""
        return f"{self.name}.json"

    @property
    def partial(self) -> str:
        """Name of the array while it fills."""
        return f"{self.name}.npy.tmp"

    @property
    def ledger(self) -> str:
        """Name of the ledger while the array fills."""
        return f"{self.name}.jsonl.tmp"

    def is_whole(self, folder: Path, of: RowsOf) -> bool:
        """Whether a folder holds just these rows.

        Raises:
            ValueError: it holds others, or its files do not belong together.
        """
        if not (folder / self.header).is_file():
            return False
        try:
            content = json.loads((folder / self.header).read_text(encoding="utf-8"))
            wanted = self._about(of)
            other = [key for key in wanted if content.get(key) != wanted[key]]
            if other:
                raise ValueError(f"{self.noun} of another {', '.join(other)}")
            vouched = CHECKSUMS if self.keeps_checksums else self.array
            if fingerprint(folder / vouched) != content[self._digest_key]:
                raise ValueError(f"{vouched} with another xxh3_128 than {self.header} says")
            self.open(folder, of)
        except (OSError, ValueError, KeyError, AttributeError, EOFError) as error:
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
        return True

    def open(self, folder: Path, of: RowsOf) -> NDArray[Any]:
        """The rows, memory-mapped; `is_whole` has looked at them.

        Raises:
            ValueError: the array is of another shape or type.
        """
        rows: NDArray[Any] = np.load(folder / self.array, mmap_mode="r", allow_pickle=False)
        if (rows.dtype, rows.shape) != (np.dtype(of.on_disk), of.shape):
            raise ValueError(f"{self.array} of {rows.dtype} {rows.shape}")
        return rows

    def begin(self, folder: Path, of: RowsOf, work: Mapping[str, object]) -> "RowFile":
        """The array to fill, as far as an earlier pass has come.

        Args:
            folder: is made.
            of: what the rows are of.
            work: what else their digits depend on, such as the size of a batch.
        """
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / self.partial
        header, array = folder / self.header, folder / self.array
        if not part.exists() and not header.exists() and array.exists():
            array.rename(part)  # killed between the last two renames
        name = json.dumps(asdict(of) | dict(work))
        return RowFile(part, folder / self.ledger, name, shape=of.shape, dtype=of.on_disk)

    def finish(self, file: "RowFile", folder: Path, of: RowsOf) -> None:
        """Flush, write the checksums, take the final name, and write what it is.

        Raises:
            RuntimeError: a row is missing.
        """
        sums = file.checksums()
        file.sync()
        part, vouched = folder / self.partial, folder / self.partial
        if self.keeps_checksums:
            vouched = folder / CHECKSUMS
            with replacing(vouched) as sums_file:
                np.save(sums_file, sums)
        content = self._about(of) | {self._digest_key: fingerprint(vouched)}
        (folder / self.header).unlink(missing_ok=True)
        part.replace(folder / self.array)
        replace_text(folder / self.header, json.dumps(content, indent=1))
        (folder / self.ledger).unlink()

    @property
    def _digest_key(self) -> str:
        return "checksums_xxh3_128" if self.keeps_checksums else "xxh3_128"

    def _about(self, of: RowsOf) -> dict[str, Any]:
        return {"format": self.format, "format_version": self.version} | asdict(of)


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
        self.rows, self._dtype = shape[0], np.dtype(dtype)
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

    def holds(self, batch: str) -> bool:
        """Whether a batch is there as it was written; reads it."""
        entry = self._ledger.done.get(batch, {})
        first, sums = entry.get("first"), entry.get("checksums")
        if not isinstance(first, int) or not isinstance(sums, list):
            return False
        at = self._offset + first * self._stride
        data = os.pread(self._file.fileno(), len(sums) * self._stride, at)
        return _checksums(data, self._stride) == sums

    def put(self, batch: str, first: int, values: NDArray[np.float32]) -> None:
        """Write a batch, then say in the ledger that it is there.

        Args:
            batch: its name.
            first: its first row.
            values: float32 [rows of the batch, ...]; kept as bfloat16 where the file is of uint16,
                because numpy has no such type.
        """
        if self._dtype == np.uint16:
            values = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
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
