"""The events of a run as TensorBoard reads them: scalars over `samples_seen`, confusion matrices.

Event files are written here, with the `tensorboard` package's own messages and record format, and
not by torch's SummaryWriter: that one writes in a thread, which a full disk ends for good and a
fork loses. One event is one append; one that cannot be written is dropped, since metrics.jsonl
holds the same.
"""

import io
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgc_dist.files import write_at

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

log = logging.getLogger(__name__)

AXIS = "samples_seen"
_NO_SCALARS = frozenset({AXIS, "step", "epoch", "total"})
_NAMES = {"step": "train"}
_VERSION = "brain.Event:2"
"""What readers look for at the start of an event file."""


class Board:
    """Writes a run's events into event files; makes none before the first.

    The event `start` of a resumed run makes TensorBoard forget the points after the checkpoint, so
    that steps which were undone and done again are not shown twice. Nothing that goes wrong here
    reaches the run: it is told once, and the run goes on.

    Args:
        folder: RUN/tensorboard.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: FileIO | None = None
        self._genres: Sequence[str] = ()
        self._told = False

    def add(self, event: str, values: Mapping[str, object]) -> None:
        """Add one event of the journal; those without `samples_seen` are no points of a curve.

        Args:
            event: `start` (which may bring `genres`), `step` (shown as train), `validation`, ...
            values: numbers become scalars `EVENT/KEY`, `confusion` (int [K, K]) a picture.
        """
        seen = values.get(AXIS)
        if not isinstance(seen, int):
            return
        try:
            self._add(_NAMES.get(event, event), values, seen)
        except Exception as error:  # a convenience must not end a run
            if not self._told:
                log.warning("%s: %s: %s", self._folder, type(error).__name__, error)
            self._told = True

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None

    def _add(self, group: str, values: Mapping[str, object], seen: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        if group == "start":
            genres = values.get("genres")
            self._genres = genres if isinstance(genres, list) else ()
            forget = SessionLog(status=SessionLog.START)
            self._write(Event(step=seen + 1, session_log=forget))
            return
        found = [
            Summary.Value(tag=f"{group}/{key}", simple_value=value)
            for key, value in scalars(values)
        ]
        confusion = values.get("confusion")
        if isinstance(confusion, list):
            side, png = picture(confusion, self._genres)
            image = Summary.Image(height=side, width=side, colorspace=4, encoded_image_string=png)
            found.append(Summary.Value(tag=f"{group}/confusion", image=image))
        if found:
            self._write(Event(step=seen, summary=Summary(value=found)))

    def _write(self, event: "Event") -> None:
        """Append one event, whole or not at all, behind the version that a file begins with."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        records, now = io.BytesIO(), time.time()
        event.wall_time = now
        if self._file is None:
            self._folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}"
            self._file = (self._folder / f"{name}.{os.getpid()}").open("xb", 0)
        end = self._file.seek(0, 2)
        for item in (event,) if end else (Event(wall_time=now, file_version=_VERSION), event):
            RecordWriter(records).write(item.SerializeToString())
        try:
            write_at(self._file, end, records.getvalue())
        except OSError:
            self._file.truncate(end)
            raise


def scalars(values: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """The finite numbers of an event by name, those of a mapping as KEY/NAME."""
    for key, value in values.items():
        named: dict[str, Any] = value if isinstance(value, dict) else {"": value}
        for name, number in named.items():
            if key in _NO_SCALARS or isinstance(number, bool):
                continue
            if isinstance(number, int | float) and math.isfinite(number):
                yield f"{key}/{name}" if name else key, float(number)


def picture(confusion: Sequence[Sequence[int]], genres: Sequence[str]) -> tuple[int, bytes]:
    """A confusion matrix as a square PNG.

    Args:
        confusion: counts [K, K], rows are the truth.
        genres: K names; numbers stand for them if there are none.

    Returns:
        Its side in pixels, and the PNG.
    """
    from matplotlib.figure import Figure

    names = genres if len(genres) == len(confusion) else [str(k) for k in range(len(confusion))]
    side = 2.0 + 0.4 * len(confusion)
    figure = Figure(figsize=(side, side), layout="constrained", dpi=80)
    axes = figure.add_subplot(xlabel="predicted", ylabel="truth")
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)  # a $ is a letter of a name
    for truth, row in enumerate(confusion):
        for guess, count in enumerate(row):
            if count:
                color = "white" if shares[truth][guess] > 0.5 else "black"
                axes.text(guess, truth, str(count), ha="center", va="center", color=color)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return round(side * 80), file.getvalue()
