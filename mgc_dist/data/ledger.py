"""Finished work, a JSON line each, so that a killed command goes on where it was."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from mgc_dist.files import replace_text


class Ledger:
    """An append-only file of what is done, valid for one work only.

    Use it as a context manager. A line that a kill has cut is dropped.

    Args:
        path: of the file.
        work: names the work exactly; lines of another work are dropped.
    """

    def __init__(self, path: Path, work: str) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = _read(path, work)
        lines = [json.dumps({"work": work}), *map(json.dumps, self.done.values())]
        replace_text(path, "\n".join(lines) + "\n")
        self._file = path.open("a", encoding="utf-8")

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry; its `id` is the key under which `done` has it next time."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _read(path: Path, work: str) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # whole ones
    if not lines or _parsed(lines[0]) != {"work": work}:
        return {}
    done = {}
    for line in lines[1:]:
        entry = _parsed(line)
        if not isinstance(entry.get("id"), str):
            break
        done[entry["id"]] = entry
    return done


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
