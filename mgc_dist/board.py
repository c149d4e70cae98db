"""The events of a run as TensorBoard reads them: scalars over `samples_seen`, and pictures.

torch's SummaryWriter writes in a thread that ends at the first full disk. So it is waited for after
every event, and replaced when it has failed; metrics.jsonl holds what is lost by that.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

AXIS = "samples_seen"
Draw = Callable[[Any, Sequence[str]], "Figure"]
_NO_SCALARS = frozenset({AXIS, "step", "epoch", "total"})
_NAMES = {"step": "train"}
_ROOM = 1 << 16
"""Bytes that must fit on the disk before a writer is made again: its thread fails loudly."""


class Board:
    """Writes a run's events into event files; makes none before the first.

    The event `start` of a resumed run makes TensorBoard forget the points after the checkpoint, so
    that steps which were undone and done again are not shown twice. Nothing that goes wrong here
    reaches the run: it is told once, and the run goes on.

    Args:
        folder: RUN/tensorboard.
        pictures: key of an event -> how its value is drawn, given the run's genres.
    """

    def __init__(self, folder: Path, pictures: Mapping[str, Draw]) -> None:
        self._folder = folder
        self._pictures = pictures
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._genres: Sequence[str] = ()
        self._told = False

    def add(self, event: str, values: Mapping[str, object]) -> None:
        """Add one event of the journal; those without `samples_seen` are no points of a curve.

        Args:
            event: `start` (which may bring `genres`), `step` (shown as train), `validation`, ...
            values: numbers become scalars `EVENT/KEY`, those that `pictures` knows pictures.
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
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._writer:
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = None

    def _add(self, group: str, values: Mapping[str, object], seen: int) -> None:
        if group == "start":
            self.close()
            genres = values.get("genres")
            self._genres = genres if isinstance(genres, list) else ()
            self._purge_step = seen + 1
            return
        writer = self._opened()
        for key, value in scalars(values):
            writer.add_scalar(f"{group}/{key}", value, seen)
        for key in self._pictures.keys() & values.keys():
            figure = self._pictures[key](values[key], self._genres)
            writer.add_figure(f"{group}/{key}", figure, seen, close=False)
        writer.flush()
        self._purge_step = None

    def _opened(self) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._folder.mkdir(exist_ok=True)
            if self._told:
                room = self._folder / "room"
                try:
                    room.write_bytes(bytes(_ROOM))
                finally:
                    room.unlink(missing_ok=True)
            self._writer = SummaryWriter(self._folder, purge_step=self._purge_step)
        return self._writer


def scalars(values: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """The finite numbers of an event by name."""
    for key, value in values.items():
        if key in _NO_SCALARS or isinstance(value, bool):
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            yield key, float(value)
