"""metrics.jsonl and status.json of a run folder: one line an event, units in the key names.

The same events are drawn for TensorBoard (`board`); metrics.jsonl is the truth.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from mgc_dist import events
from mgc_dist.board import Board, Draw
from mgc_dist.errors import UserError
from mgc_dist.events import Event
from mgc_dist.files import json_lines, replace_text, write_at

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
BOARD = "tensorboard"
STATUS = "status.json"
ENVIRONMENT = "env.json"


class Journal:
    """Appends events; does nothing on ranks that do not write, and no file before the first.

    What cannot be written, as on a full disk, is kept and written when there is room again.

    Args:
        run: the run folder.
        writes: whether this rank writes (rank 0).
        pictures: how values of events are drawn for TensorBoard, by key.
    """

    def __init__(
        self, run: Path, *, writes: bool, pictures: Mapping[str, Draw] | None = None
    ) -> None:
        self._run = run
        self._writes = writes
        self._about: dict[str, Any] = {}
        self._file: FileIO | None = None
        self._kept = b""
        self._board = Board(run / BOARD, pictures or {})

    def write(self, event: Event) -> None:
        """Append one event with the time."""
        if self._writes:
            values = event.values()
            line = {"event": event.name, "time_s": round(time.time(), 3)} | values
            self._kept += json.dumps(_without_nan(line)).encode() + b"\n"
            try:
                self._flush()
            except OSError as error:
                log.warning("%s: %s; kept for later", self._run / METRICS, error.strerror)
            self._board.add(event.name, values)

    def _flush(self) -> None:
        if self._file is None:
            self._file = (self._run / METRICS).open(
                "r+b" if (self._run / METRICS).exists() else "xb", 0
            )
            end = self._file.seek(0, 2)
            if end and _last_byte(self._run / METRICS) != b"\n":  # a kill cut the last line
                self._kept = b"\n" + self._kept
        end = self._file.seek(0, 2)
        try:
            write_at(self._file, end, self._kept)
        except OSError:
            self._file.truncate(end)
            raise
        self._kept = b""

    def begin(self, **about: object) -> None:
        """What status.json shall say of this try from now on, whatever its state."""
        self._about = about

    def status(self, state: str, **values: object) -> None:
        """Replace status.json: `running`, `stopped`, `failed` or `done`."""
        if self._writes:
            content = {"state": state} | self._about | values
            try:
                replace_text(self._run / STATUS, json.dumps(content, indent=1))
            except OSError as error:
                log.warning("%s: %s", self._run / STATUS, error.strerror)

    def close(self) -> None:
        """Close the files."""
        self._board.close()
        if self._file:
            self._file.close()
            self._file = None


class RowLedger:
    """Which rows this rank consumed in which step, to prove that none was lost or repeated.

    Args:
        run: the run folder; files go into RUN/rows.
        attempt: name of this try.
        rank: who writes.
    """

    def __init__(self, run: Path, attempt: str, rank: int) -> None:
        (run / "rows").mkdir(exist_ok=True)
        self._file = (run / "rows" / f"{attempt}-rank{rank:05d}.jsonl").open("a", encoding="utf-8")
        self._rows: list[int] = []

    def add(self, rows: list[int]) -> None:
        """Rows of a micro batch, -1 for padding."""
        self._rows += [row for row in rows if row >= 0]

    def end_step(self, step: int) -> None:
        """Write down the rows of a step that has been taken."""
        line = {"step": step, "rows": self._rows, "time_s": time.time()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._rows = []


def read_status(run: Path) -> dict[str, object]:
    """What status.json says; {} if there is none."""
    path = run / STATUS
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def read_environment(run: Path) -> dict[str, Any]:
    """What env.json says of a training: `identity`, `dataset_id`, versions.

    Raises:
        UserError: it cannot be read, or lacks one of the first two.
    """
    path = run / ENVIRONMENT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        dict(content["identity"]), str(content["dataset_id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"file {path}",
            got=f"{type(error).__name__}: {error}",
            expected="what the training has written",
            cure="bring the whole run folder from where it was trained, or train again",
        ) from error
    return dict(content)


def read_events(run: Path) -> list[Event]:
    """The events of metrics.jsonl, in order; lines that are none are passed over."""
    return [event for line in json_lines(run / METRICS) if (event := events.parsed(line))]


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null stands for what is not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1)
