"""Shards from elsewhere to a folder of this node: once, checked, however many ranks ask.

Every rank calls `fetch`. The first to get the folder's lock copies, checks the sha256 of each
file against the manifest and publishes the manifest last; the others wait for the lock, with
a time limit, and find the manifest. A lock ends with its process, so a killed copy blocks
nobody: the next one goes on with the files that are whole. What has been compared is noted with
its times (`.checked.json`), and is hashed again when these change.

Others may write into a folder that this copies to: `--stage-dir /tmp/x` is read from a folder
below it that is this user's alone, and what a copy writes into is made anew, with mode 0700.

Bytes come through webdataset's gopen: folders, https:// (by curl), and `pipe:COMMAND` where
the user wrote the command. A shard's name, which comes from the manifest, may hold letters,
digits, - and _ only, so no manifest can reach a shell.
"""

import contextlib
import json
import os
import re
import select
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import BinaryIO, cast
from urllib.parse import unquote, urlparse

from mgc_dist.config import SourceConfig
from mgc_dist.data import manifest
from mgc_dist.data.manifest import Manifest
from mgc_dist.errors import UserError
from mgc_dist.files import locked, refuse_small_disk, replace_text, sha256, stamp_of, sync

STALLED_S = 120.0
"""Without a byte for so long, a transfer is given up."""
_LOCK, _INCOMING, _CHECKED = ".staging.lock", ".incoming", ".checked.json"
_BLOCK = 1 << 20


def at_hand(shards: Path, source: SourceConfig) -> Path:
    """Where this node reads a data set from, after copying it there if that is asked for.

    Args:
        shards: folder of the data set.
        source: where to copy it from first, and the folder of this node to read it from.

    Raises:
        UserError: what `fetch` raises; or --stage-dir names a variable that is not set here, or
            cannot hold a folder that is this user's alone.
    """
    timeout_s = source.stage_timeout_s
    if source.shards_from:
        fetch(shards, source.shards_from, timeout_s=timeout_s)
    if source.stage_dir is None:
        return shards
    parent = os.path.expandvars(os.path.expanduser(source.stage_dir))
    if "$" in parent:
        raise UserError(
            f"--stage-dir {source.stage_dir}",
            got=f"{parent} on {socket.gethostname()}",
            expected="variables that are set on every node",
            cure="name a folder of the node, such as /tmp",
            this_rank_only=True,
        )
    folder = _private(Path(parent)) / manifest.read(shards).dataset_id[:16]
    fetch(folder, str(shards), timeout_s=timeout_s)
    return folder


def _private(parent: Path) -> Path:
    """A folder below `parent` that is this user's alone; a name in /tmp may be anybody's.

    Raises:
        UserError: others may write into what bears its name, or nobody but them into `parent`.
    """
    folder = parent / f"mgc-{os.geteuid()}"
    try:
        _make_shared(parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except PermissionError as error:
        raise UserError(
            f"--stage-dir {parent}",
            got=f"{error.filename}: {error.strerror}",
            expected="a folder that this user may write into",
            cure="--stage-dir /tmp, or another folder for all, is shared by any number of users",
            this_rank_only=True,
        ) from error
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_ours or found.st_mode & 0o077:
        raise UserError(
            f"--stage-dir {parent}",
            got=f"{folder}: {stat.filemode(found.st_mode)} of user {found.st_uid}",
            expected=f"a folder of user {os.geteuid()} alone (drwx------)",
            cure="choose another --stage-dir, such as ~/staged; or remove that, if it is yours",
            this_rank_only=True,
        )
    return folder


def _make_shared(folder: Path) -> None:
    """Make a folder; in one for all users, such as /tmp, for all users, as sticky as that."""
    if folder.is_dir():
        return
    _make_shared(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        if folder.parent.stat().st_mode & 0o1002 == 0o1002:
            folder.chmod(0o1777)


def fetch(folder: Path, source: str, *, timeout_s: float) -> None:
    """Make `folder` hold the data set that lies at `source`.

    Args:
        folder: on this node; new, or holding the same data set, whole or in part.
        source: a folder, `https://HOST/PATH`, or `pipe:COMMAND` with {} for a file's name.
        timeout_s: how long to wait for another process that copies.

    Raises:
        UserError: the source cannot be read, holds other bytes than its manifest says, or
            `folder` holds another data set; or the wait was too long.
    """
    _url(source, manifest.NAME)  # a bad source is refused before anything is made
    incoming = folder / _INCOMING
    folder.mkdir(parents=True, exist_ok=True)
    purpose = f"copying {source} to {folder} (--stage-timeout-s)"
    with locked(folder / _LOCK, wait_s=timeout_s, purpose=purpose):
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(mode=0o700)
        _fetch(source, manifest.NAME, incoming / manifest.NAME)
        dataset = manifest.read(incoming)
        _refuse_other(folder, source, dataset)
        if not _is_whole(folder, dataset):
            (folder / manifest.NAME).unlink(missing_ok=True)
            _copy(folder, source, dataset)
            sync(folder)  # the names of the files, before the manifest vouches for them
            (incoming / manifest.NAME).replace(folder / manifest.NAME)
            replace_text(incoming / _CHECKED, json.dumps(_stamps(folder, dataset)))
            (incoming / _CHECKED).replace(folder / _CHECKED)
        shutil.rmtree(incoming)


def _refuse_other(folder: Path, source: str, dataset: Manifest) -> None:
    if (folder / manifest.NAME).is_file():
        here = manifest.read(folder)
        if here != dataset:
            raise UserError(
                f"--shards {folder}",
                got=f"another data set ({here.dataset_id[:12]}) or packing of it",
                expected=f"an empty folder, or {dataset.dataset_id[:12]} as in {source}",
                cure="choose another folder to copy into, or remove what is there",
                this_rank_only=True,
            )


def _is_whole(folder: Path, dataset: Manifest) -> bool:
    """Whether all is there, and nothing has changed since its sha256 was compared."""
    try:
        checked = json.loads((folder / _CHECKED).read_text(encoding="utf-8"))
        return bool(checked == _stamps(folder, dataset))
    except (OSError, ValueError):
        return False


def _stamps(folder: Path, dataset: Manifest) -> dict[str, str]:
    """File -> what changes with its content, and sha256 that the manifest gives."""
    known = {**dataset.files, manifest.NAME: ""}
    return {name: f"{stamp_of(folder / name)} {digest}" for name, digest in known.items()}


def _copy(folder: Path, source: str, dataset: Manifest) -> None:
    sizes = {shard.name: shard.bytes for shard in dataset.shards}
    missing = []
    for name, digest in dataset.files.items():
        path, size = folder / name, sizes.get(name)
        right_size = path.is_file() and size in (None, path.stat().st_size)
        if not right_size or sha256(path) != digest:
            missing.append((name, size, digest))
    refuse_small_disk(
        f"--shards {folder}",
        folder,
        sum(size or 0 for _, size, _ in missing),
        purpose=f" for what is in {source}",
        cure="choose a folder on another disk",
        this_rank_only=True,
    )
    for name, size, digest in missing:
        temporary = folder / _INCOMING / name
        for attempt in (1, 2):
            _fetch(source, name, temporary)
            got = sha256(temporary)
            if got == digest:
                break
            if attempt == 2:
                raise UserError(
                    f"{name} from {source}",
                    got=f"{temporary.stat().st_size} bytes with sha256 {got}, twice",
                    expected=f"{'' if size is None else f'{size} bytes with '}sha256 {digest}",
                    cure="the source is damaged, or does not belong to its manifest.json",
                    this_rank_only=True,
                )
        temporary.replace(folder / name)


def _url(source: str, name: str) -> str:
    """What gopen opens for a file of the source.

    Raises:
        UserError: the source is of a kind that is not read.
    """
    if source.startswith("pipe:"):
        if "{}" not in source:
            raise UserError(
                f"--shards-from {source}",
                got="a command without {}",
                expected="{} where the file's name belongs",
                cure="for example pipe:aws s3 cp s3://bucket/folder/{} -",
            )
        return source.replace("{}", name)
    scheme = urlparse(source).scheme
    if scheme in ("http", "https"):
        return f"{source.rstrip('/')}/{name}"
    if scheme not in ("", "file"):
        raise UserError(
            f"--shards-from {source}",
            got=f"{scheme}:",
            expected="a folder, https://..., or pipe:COMMAND",
            cure=f"say how to read it, for example pipe:aws s3 cp {source.rstrip('/')}/{{}} -",
        )
    return str(Path(unquote(urlparse(source).path) if scheme else source).resolve() / name)


def _fetch(source: str, name: str, into: Path) -> None:
    try:
        with into.open("wb") as file:
            for block in _blocks(source, name):
                file.write(block)
    except OSError as error:  # the node's disk: what the source does wrong is a UserError
        raise OSError(error.errno, error.strerror, str(into)) from error
    sync(into)


def _blocks(source: str, name: str) -> Iterator[bytes]:
    """The content of a file of the source; of a command only while it keeps sending.

    Raises:
        UserError: it cannot be read, or no byte has come for STALLED_S.
    """
    from webdataset.gopen import gopen

    stalled = False
    try:
        with gopen(_url(source, name)) as stream:
            process: Popen[bytes] | None = getattr(stream, "proc", None)  # files have none
            if process is None:
                while block := stream.read(_BLOCK):
                    yield block
                return
            pipe = cast(BinaryIO, process.stdout).fileno()
            while not stalled:
                ready, _, _ = select.select([pipe], [], [], STALLED_S)
                stalled = not ready
                if stalled:
                    process.kill()
                elif block := os.read(pipe, _BLOCK):
                    yield block
                else:
                    return
    except (OSError, ValueError) as error:
        ended = re.search(r"exit (-?\d+)", str(error))
        command = source if source.startswith("pipe:") else "curl (EXIT CODES in its manual)"
        got = f"exit code {ended[1]} of {command}" if ended else str(error)
        raise UserError(
            f"--shards-from {source}: {name}",
            got=f"no byte for {STALLED_S:g} s" if stalled else got,
            expected="to read it",
            cure="check that the source is whole and can be reached from this node",
            this_rank_only=True,
        ) from error
