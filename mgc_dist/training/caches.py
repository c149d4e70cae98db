"""The folder of caches: which runs have used which one, and what may go."""

import json
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mgc_dist.data.features import STORE
from mgc_dist.errors import UserError
from mgc_dist.files import json_lines, locked

LOCK = "lock"
USES = "used.jsonl"
_NAME = re.compile(r"[0-9a-f]{32}")
_DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A cache on disk.

    Attributes:
        folder: of the cache.
        bytes: that it takes.
        about: what it holds; of a pass that was cut, that it is not whole.
        used_at_s: when a run last began to read it, in seconds since 1970; else its last change.
        runs: the run folders that have named themselves.
    """

    folder: Path
    bytes: int
    about: str
    used_at_s: float
    runs: tuple[str, ...]

    def __str__(self) -> str:
        day = time.strftime("%Y-%m-%d", time.localtime(self.used_at_s))
        runs = ", ".join(self.runs) or "no run that named itself"
        return f"{self.folder.name}  {self.bytes / 1e6:.1f} MB  {self.about}  {day}  {runs}"


def note_use(folder: Path, run: Path) -> None:
    """Write down that a run reads a cache; one that belongs to another user is read without."""
    line = json.dumps({"run": str(run.resolve()), "time_s": round(time.time(), 3)})
    with suppress(OSError), (folder / USES).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def listed(root: Path) -> list[Kept]:
    """The caches of a folder, the one that was used last at the end."""
    folders = [each for each in root.iterdir() if each.is_dir() and _NAME.fullmatch(each.name)]
    return sorted(map(_kept, folders), key=lambda each: each.used_at_s)


def _kept(folder: Path) -> Kept:
    files = [path.stat() for path in folder.iterdir()]
    uses = json_lines(folder / USES)
    times = [float(use.get("time_s", 0)) for use in uses] or [each.st_mtime for each in files]
    return Kept(
        folder=folder,
        bytes=sum(each.st_size for each in files),
        about=_about(folder / STORE.header),
        used_at_s=max(times, default=folder.stat().st_mtime),
        runs=tuple(dict.fromkeys(str(use.get("run")) for use in uses)),
    )


def _about(header: Path) -> str:
    try:
        content = json.loads(header.read_text(encoding="utf-8"))
        return f"{content['boundary']} in {content['dtype']} of {content['dataset_id'][:12]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "not whole"


def chosen(found: Sequence[Kept], names: Sequence[str], unused_days: float | None) -> list[Kept]:
    """The caches that are named, and those that no run has used for so many days.

    Raises:
        UserError: a name is that of no cache, or of several.
    """
    doomed = []
    for name in names:
        named = [each for each in found if name and each.folder.name.startswith(name)]
        if len(named) != 1:
            raise UserError(
                f"--remove {name}",
                got=f"{len(named)} caches of that name",
                expected="one",
                cure=f"there are {', '.join(each.folder.name for each in found) or 'none'}",
            )
        doomed += named
    if unused_days is not None:
        before_s = time.time() - unused_days * _DAY_S
        doomed += [each for each in found if each.used_at_s < before_s and each not in doomed]
    return doomed


def remove(cache: Kept) -> None:
    """Remove a cache.

    Raises:
        UserError: a training is making it.
    """
    with locked(cache.folder / LOCK, wait_s=0, purpose=f"removing cache {cache.folder}"):
        (cache.folder / STORE.header).unlink(missing_ok=True)  # what is half removed is not whole
        shutil.rmtree(cache.folder)
