"""Checkpoints that are complete or invisible.

    tmp-00000120/     every rank writes its part, flushes it and hashes it
    MANIFEST.json     names, sizes and hashes of all files; flushed
    step-00000120/    by one rename, if the run folder is still ours
    latest            only now, for stock tools; nothing here reads it
    del-00000080/     older ones are renamed before they are deleted

A kill at any of these points leaves the checkpoint before it the newest whole one (a property
test). DeepSpeed alone writes `latest` before other ranks have saved, and loads a flipped bit
without a word. Renaming and hashing are the caller's rank 0; hashing is shared by all ranks.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mgc_dist.cluster.lease import Lease
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.errors import EXIT_NO_CHECKPOINT, UserError
from mgc_dist.files import replace_text, sha256, sync

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 2
HEADROOM = 1.2
"""Free space that a save asks for, as a multiple of what it will write."""
_STEP = re.compile(r"step-(\d{8})")
_ORIGIN = "came-from.txt"


class SaveFailed(Exception):
    """A checkpoint could not be written; what it had written is removed, the last one is kept."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file of a checkpoint, as it was written.

    Attributes:
        name: below the checkpoint's folder.
        bytes: its size.
        sha256: of its content.
    """

    name: str
    bytes: int
    sha256: str


def all_commit(
    run: Path,
    step: int,
    ranks: Ranks,
    save: Callable[[Path, str], list[Path]],
    *,
    facts: dict[str, Any],
    keep: int,
    lease: Lease,
    expected_bytes: int = 0,
) -> Path:
    """Save a checkpoint on all ranks and make it visible (a collective).

    Args:
        run: the run folder.
        step: optimizer steps done.
        ranks: who takes part.
        save: writes a rank's part into a folder under a tag and returns its files; an OSError or
            RuntimeError in it must come after its last collective.
        facts: recorded in its manifest, such as world size and stage.
        keep: newest checkpoints to keep.
        lease: looked at just before the rename.
        expected_bytes: that will be written; refused at once if the disk has not the room.

    Returns:
        The folder of the checkpoint.

    Raises:
        SaveFailed: on every rank, if any rank could not write.
        PeerLost: another process has taken the run folder over.
    """
    root, tag = run / FOLDER, f"tmp-{step:08d}"
    _all_agree(ranks, lambda: _prepare(root, tag, expected_bytes), root / tag)
    written: list[Written] = []
    reason = ""
    try:
        written = [_finished(path, root / tag) for path in save(root, tag)]
    except (OSError, RuntimeError) as error:
        if ranks.is_broken(error):
            raise
        reason = f"rank {ranks.rank}: {_said(error)}"
    parts = ranks.all_gather((written, reason))
    reasons = [said for _, said in parts if said]
    if reasons:
        _all_agree(ranks, lambda: _failed(reasons), root / tag)
    files = sorted((file for part, _ in parts for file in part), key=lambda file: file.name)

    def publish() -> None:
        _refuse_unseen(root / tag, files)
        content = {"format_version": FORMAT_VERSION, "step": step, **facts}
        _write_manifest(root / tag, content, files)
        lease.check()
        _publish(root, tag, step, keep)

    _all_agree(ranks, publish, root / tag)
    return root / f"step-{step:08d}"


def set_out_from(run: Path, folder: Path) -> None:
    """Write down, before the first step, that a run goes on from a checkpoint that was named.

    Newer checkpoints, which the run will not have come from, are set aside. One from another run
    is named in a file, which counts until the first checkpoint of this run: without both, a kill
    before it would bring back the way that was left (rank 0).
    """
    root = run / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    is_own = folder.resolve().parent == root.resolve()
    _set_aside_newer(root, folder.name if is_own else "")
    (root / _ORIGIN).unlink(missing_ok=True)
    if not is_own:
        replace_text(root / _ORIGIN, str(folder.resolve()))
    sync(root)


def _origin(root: Path) -> list[Path]:
    """The checkpoint of another run that this one goes on from, if it has none of its own."""
    path = root / _ORIGIN
    return [Path(path.read_text(encoding="utf-8"))] if path.is_file() else []


def all_newest(run: Path, ranks: Ranks) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over (a collective).

    Raises:
        UserError: there are checkpoints, but none is whole; with exit code 65.
    """
    root = run / FOLDER
    found = ranks.all_decide(lambda: _newest_first(root) or _origin(root))
    reasons = []
    for folder in found:
        reason = all_damage(folder, ranks)
        if not reason:
            return folder
        reasons.append(f"{folder.name}: {reason}")
        if ranks.is_first:
            log.warning("passing over checkpoint %s: %s", folder.name, reason)
    if found:
        raise UserError(
            f"checkpoints in {root}",
            got=f"{len(found)} damaged, none whole ({'; '.join(reasons)})",
            expected="one that is as it was written",
            cure="restore one from a copy, or begin again with --fresh: nothing is deleted",
            exit_code=EXIT_NO_CHECKPOINT,
        )
    return None


def _newest_first(root: Path) -> list[Path]:
    """The checkpoints; where there is none, one that a kill left between two renames."""
    if not _steps(root):
        for path in root.glob("del-*"):
            path.rename(root / path.name.replace("del-", "step-"))
    return sorted(_steps(root), reverse=True)


def all_damage(folder: Path, ranks: Ranks) -> str:
    """As `damage`, the files shared out over the ranks (a collective)."""
    reasons = ranks.all_gather(damage(folder, part=ranks.rank, of=ranks.world))
    return next((reason for reason in reasons if reason), "")


def damage(folder: Path, *, part: int = 0, of: int = 1) -> str:
    """What is wrong with a checkpoint: "" if every file is as its manifest says.

    Args:
        folder: of the checkpoint.
        part: hash only every `of`-th file, from this one on; sizes of all are looked at.
        of: how many share the hashing.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            return f"{MANIFEST}: format version {content['format_version']} is not {FORMAT_VERSION}"
        if f"step-{content['step']:08d}" != folder.name or not content["files"]:
            return (
                f"{MANIFEST}: it is of step {content['step']}, with {len(content['files'])} files"
            )
        for number, (name, entry) in enumerate(content["files"].items()):
            path = folder / name
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{name}: {size} bytes, expected {entry['bytes']}"
            if number % of == part and sha256(path) != entry["sha256"]:
                return f"{name}: another sha256 than its manifest says"
        extra = {path.name for path in folder.rglob("*.pt")} - {
            Path(n).name for n in content["files"]
        }
        if extra:
            return f"{min(extra)}: not in its manifest"
        if _digest(content) != content["manifest_sha256"]:
            return f"{MANIFEST}: another sha256 than it says of itself"
    except FileNotFoundError as error:
        return f"no file {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    return ""


def facts(folder: Path) -> dict[str, Any]:
    """What the manifest of a whole checkpoint says besides its files."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in _OF_THE_FORMAT}


def newest_facts(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says of itself, not verified; {} where none says anything."""
    root = run / FOLDER
    for folder in sorted(_steps(root), reverse=True) or _origin(root):
        try:
            return facts(folder)
        except (OSError, ValueError, AttributeError) as error:
            log.debug("%s: %s", folder, error)
    return {}


def size_of_newest(root: Path) -> int:
    """Bytes of the newest checkpoint; 0 if there is none."""
    for folder in sorted(_steps(root), reverse=True)[:1]:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


_OF_THE_FORMAT = ("files", "format_version", "manifest_sha256")


def _all_agree(ranks: Ranks, act: Callable[[], None], temporary: Path) -> None:
    """Let rank 0 act; if it cannot, clear what was written and fail on every rank."""

    def attempt() -> str:
        try:
            act()
        except (OSError, SaveFailed) as error:
            shutil.rmtree(temporary, ignore_errors=True)  # at once: it may be what fills the disk
            return _said(error)
        return ""

    reason = ranks.all_decide(attempt)
    if reason:
        raise SaveFailed(reason)


def _failed(reasons: list[str]) -> None:
    raise SaveFailed("; ".join(reasons))


def _refuse_unseen(folder: Path, files: list[Written]) -> None:
    """Let rank 0 look at what the others say that they have written."""
    for file in files:
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.bytes:
            seen = "nothing" if size is None else f"{size} bytes"
            raise SaveFailed(
                f"{path}: rank 0 sees {seen} of the {file.bytes} bytes that were written: the run "
                "folder must be one that all nodes share"
            )


def _said(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    where = f"{name}: " if name else ""
    return f"{where}{getattr(error, 'strerror', None) or ' '.join(str(error).split())[:300]}"


def _prepare(root: Path, tag: str, expected_bytes: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    if (root / tag).exists():
        raise SaveFailed(f"{root / tag}: it is in the way and cannot be removed")
    free, needed = shutil.disk_usage(root).free, int(HEADROOM * expected_bytes)
    if free < needed:
        raise SaveFailed(f"{root}: {free:,} bytes free, {needed:,} needed")


def remove_leftovers(root: Path) -> None:
    """Remove what kills have left half written or half deleted, and say so."""
    for path in (*root.glob("tmp-*"), *root.glob("del-*")):
        log.info("removing half-written %s", path.name)
        _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder that counts no more; that it cannot be done is no reason to end a run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, _said(error))


def _finished(path: Path, folder: Path) -> Written:
    sync(path)
    size = path.stat().st_size
    return Written(name=str(path.relative_to(folder)), bytes=size, sha256=sha256(path))


def _write_manifest(folder: Path, content: dict[str, Any], files: list[Written]) -> None:
    entries = {}
    for file in files:
        entry = asdict(file)
        entries[entry.pop("name")] = entry
    whole = {**content, "files": entries}
    sealed = whole | {"manifest_sha256": _digest(whole)}
    replace_text(folder / MANIFEST, json.dumps(sealed, indent=1))
    sync(folder)


def _digest(content: dict[str, Any]) -> str:
    body = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _publish(root: Path, tag: str, step: int, keep: int) -> None:
    final = root / f"step-{step:08d}"
    if final.exists():  # a damaged one, or one that this run has gone back behind
        final.rename(root / f"del-{step:08d}")
    (root / tag).rename(final)
    sync(root)
    replace_text(root / "latest", final.name)
    _set_aside_newer(root, final.name)
    for old in (*sorted(_steps(root))[:-keep], *root.glob("del-*")):
        doomed = root / old.name.replace("step-", "del-")
        old.rename(doomed)  # a half-deleted one must not look like a checkpoint
        _remove(doomed)


def _steps(root: Path) -> list[Path]:
    return [path for path in root.glob("step-*") if _STEP.fullmatch(path.name)]


def _set_aside_newer(root: Path, name: str) -> None:
    """A run that goes on from an older checkpoint, or from none, leaves the newer ones behind."""
    for path in _steps(root):
        if path.name > name:
            log.warning("setting aside %s, which this run has not come from", path.name)
            aside = root / f"aside-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
