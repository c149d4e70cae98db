"""metrics.jsonl and status.json of a run folder: one line an event, units in the key names."""

import json
import time
from pathlib import Path
from typing import TextIO

from mgc_dist.files import replace_text

METRICS = "metrics.jsonl"
STATUS = "status.json"

Value = str | int | float | None | list[float] | dict[str, float]


class Journal:
    """Appends events; does nothing on ranks that do not write, and no file before the first.

    Args:
        run: the run folder.
        writes: whether this rank writes (rank 0).
    """

    def __init__(self, run: Path, *, writes: bool) -> None:
        self._run = run
        self._writes = writes
        self._file: TextIO | None = None

    def write(self, event: str, **values: Value) -> None:
        """Append one event with the time, and flush."""
        if self._writes:
            self._file = self._file or (self._run / METRICS).open("a", encoding="utf-8")
            line = {"event": event, "time_s": round(time.time(), 3)} | values
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def status(self, state: str, **values: Value) -> None:
        """Replace status.json: `running`, `stopped`, `failed` or `done`."""
        if self._writes:
            replace_text(self._run / STATUS, json.dumps({"state": state} | values, indent=1))

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


def read_status(run: Path) -> dict[str, object]:
    """What status.json says; {} if there is none."""
    path = run / STATUS
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def read_metrics(run: Path, event: str) -> list[dict[str, float]]:
    """The lines of one kind of event, in order."""
    path = run / METRICS
    if not path.is_file():
        return []
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == event]
