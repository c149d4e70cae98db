"""Checkpoints that are complete or invisible.

Saved aside, listed with their hashes, flushed, renamed; only then is `latest` moved and an old
one deleted. DeepSpeed alone writes `latest` before other ranks have saved, and loads a flipped
bit without a word.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mgc_dist.errors import UserError
from mgc_dist.files import replace_text, sha256, sync
from mgc_dist.ranks import Ranks

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-(\d{8})")


def all_commit(
    run: Path,
    step: int,
    ranks: Ranks,
    save: Callable[[Path, str], None],
    *,
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """Save a checkpoint on all ranks and make it visible (a collective).

    Args:
        run: the run folder.
        step: optimizer steps done.
        ranks: who takes part.
        save: writes a rank's part into a folder under a tag (a collective).
        facts: recorded in its manifest, such as world size and stage.
        keep: newest checkpoints to keep.

    Returns:
        The folder of the checkpoint.
    """
    root, tag = run / FOLDER, f"tmp-{step:08d}"
    final = root / f"step-{step:08d}"
    if ranks.is_first:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
    ranks.barrier()
    save(root, tag)
    ranks.barrier()
    if ranks.is_first:
        _write_manifest(root / tag, {"step": step, **facts})
        shutil.rmtree(final, ignore_errors=True)
        (root / tag).rename(final)
        sync(root)
        replace_text(root / "latest", final.name)
        _set_aside_newer(root, final)
        _retain(root, keep)
    ranks.barrier()
    return final


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    found = sorted(_steps(run / FOLDER), reverse=True)
    for folder in found:
        reason = damage(folder)
        if not reason:
            return folder
        log.warning("passing over checkpoint %s: %s", folder.name, reason)
    if found:
        raise UserError(
            f"checkpoints in {run / FOLDER}",
            got=f"{len(found)} damaged, none whole",
            expected="one that is as it was written",
            cure="start another run folder with --run, or restore one from a copy",
        )
    return None


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint: "" if every file is as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name}: {path.stat().st_size} bytes, expected {entry['bytes']}"
            if sha256(path) != entry["sha256"]:
                return f"{name}: another sha256 than its manifest says"
    except FileNotFoundError as error:
        return f"no file {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    return ""


def facts(folder: Path) -> dict[str, Any]:
    """What the manifest of a whole checkpoint says besides its files."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key != "files"}


def _steps(root: Path) -> list[Path]:
    return [path for path in root.glob("step-*") if _STEP.fullmatch(path.name)]


def _remove_leftovers(root: Path) -> None:
    for path in (*root.glob("tmp-*"), *root.glob("del-*")):
        log.info("removing half-written %s", path.name)
        shutil.rmtree(path)


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        name = str(path.relative_to(folder))
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    replace_text(folder / MANIFEST, json.dumps({**content, "files": files}, indent=1))
    sync(folder)


def _set_aside_newer(root: Path, final: Path) -> None:
    """A run that was resumed from an older checkpoint leaves the newer ones behind."""
    for path in _steps(root):
        if path.name > final.name:
            log.warning("setting aside %s, which this run has not come from", path.name)
            aside = root / f"aside-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def _retain(root: Path, keep: int) -> None:
    for old in sorted(_steps(root))[:-keep]:
        doomed = root / old.name.replace("step-", "del-")
        old.rename(doomed)  # a half-deleted one must not look like a checkpoint
        shutil.rmtree(doomed)
