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
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    if not entries or entries[0] != {"work": work}:
        return {}
    return {str(entry["id"]): entry for entry in entries[1:]}
