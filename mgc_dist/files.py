"""Files that are complete or invisible: written aside, flushed, renamed; locks; hashes."""

import fcntl
import glob
import hashlib
import json
import os
import resource
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from mgc_dist.errors import UserError

_OTHER_FILES = 256
"""Open files that a process has besides its shards, generously."""


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """xxh3_128 of a file's content, in hex: for equality, at an eighth of sha256's cost."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that was appended to, a line each; [] if it is not there.

    What a kill has cut is left out. Lines end at a line feed only: a name may hold U+2028.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.split("\n"):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def stamp_of(path: Path) -> str:
    """Place, size and times of a file: changes whenever its content may have changed.

    The time of change alone does not tell: archives may give all of their files one.
    """
    facts = path.stat()
    times = f"{facts.st_mtime_ns} {facts.st_ctime_ns}"
    return f"{path.resolve()} {facts.st_ino} {facts.st_size} {times}"


def most_open(wanted: int) -> int:
    """How many of so many files this process may hold open; its limit is raised as far as it may.

    256 are left for all else. At least 1.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _OTHER_FILES))


def nearest(path: Path) -> Path:
    """A path, or the nearest folder above it that is there already."""
    return next(each for each in (path, *path.parents) if each.exists())


def refuse_small_disk(
    what: str,
    folder: Path,
    needed: int,
    *,
    purpose: str = "",
    cure: str,
    this_rank_only: bool = False,
) -> None:
    """Check that a folder's disk has room for so many bytes.

    Args:
        what: flag and folder, as they were given.
        folder: on that disk; it exists.
        needed: in bytes.
        purpose: of them, after their number, such as ` for the shards`.
        cure: what to do about it.
        this_rank_only: whether other ranks may have room.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            what,
            got=f"{free / 1e9:.2f} GB of free space",
            expected=f"{needed / 1e9:.2f} GB{purpose}",
            cure=cure,
            this_rank_only=this_rank_only,
        )


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that takes `path`'s place when the block ends without an error."""
    temporary = _aside(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # at once: it may be what fills the disk
        raise


def _aside(path: Path) -> Path:
    """A temporary name that no other thread has; what killed ones of this host left is removed."""
    ours = f"{path.name}.{socket.gethostname()}-"
    for left in path.parent.glob(f"{glob.escape(ours)}*.tmp"):
        if not Path("/proc", left.name.removeprefix(ours).removesuffix(".tmp")).exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f"{ours}{threading.get_native_id()}.tmp")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill that takes `path`'s place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _aside(path)
    temporary.mkdir()
    old = replaced(path)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # at once: it may be what fills the disk
        raise
    shutil.rmtree(old, ignore_errors=True)


def replaced(path: Path) -> Path:
    """Where `replacing_folder` puts the folder before it, between its two renames."""
    return path.with_name(path.name + ".old")


def replace_text(path: Path, text: str) -> None:
    """Replace a file's content, as UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_at(file: FileIO, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write into an open file at an offset, all of it.

    Raises:
        OSError: the disk is full or fails; it names the file.
    """
    view, handle, written = memoryview(data), file.fileno(), 0
    try:
        while written < len(view):
            written += os.pwrite(handle, view[written:], offset + written)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from error


@contextmanager
def locked(path: Path, *, wait_s: float, purpose: str) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends.

    Args:
        path: of the lock file; removed when the lock is let go.
        wait_s: how long to wait for another process to let go.
        purpose: what the lock is for, in the error message.

    Raises:
        UserError: another process still holds it after that time.
    """
    deadline = time.monotonic() + wait_s
    while (handle := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise UserError(
                purpose,
                got=f"another process at it for more than {wait_s:g} s (lock {path})",
                expected="to have the folder alone",
                cure="wait for it, or end it",
                this_rank_only=True,
            )
        time.sleep(0.1)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it looks at the inode
        os.close(handle)


def _try_lock(path: Path) -> int | None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == os.stat(path).st_ino:  # not one that its holder removed
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None
