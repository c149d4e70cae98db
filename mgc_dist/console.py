"""What a person sees while a command runs: log lines, and bars on a terminal."""

import logging
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

_console = Console(stderr=True)
LINE_EVERY_S = 30.0
"""Between lines of progress where there is no terminal."""


def start_logging(rank: int, file: Path | None = None) -> None:
    """Send this package's records to stderr, and to a file: rank 0 from INFO, others WARNING.

    Args:
        rank: of this process.
        file: plain lines are appended to it.
    """
    where = "" if rank == 0 else f"[rank {rank} on {socket.gethostname()}] "
    plain = logging.Formatter(f"%(asctime)s {where}%(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = []
    if sys.stderr.isatty() and rank == 0:
        handlers.append(
            RichHandler(
                console=_console, show_path=False, show_level=False, log_time_format="%H:%M:%S"
            )
        )
    else:
        handlers.append(logging.StreamHandler())
        handlers[0].setFormatter(plain)
    if file:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].setFormatter(plain)
    package = logging.getLogger("mgc_dist")
    package.handlers[:] = handlers
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False


@contextmanager
def progress(
    title: str, total: int, *, unit: str = "batches", shown: bool = True, lines: bool = True
) -> Iterator["Bar"]:
    """A bar on a terminal; elsewhere a plain line now and then, so that log files stay plain.

    Args:
        title: what is being done.
        total: steps of it.
        unit: what a step is, for the rate.
        shown: False on ranks that stay silent.
        lines: False for what writes log lines of its own.
    """
    if not shown:
        yield Bar(None, None)
    elif not sys.stderr.isatty():
        yield Bar(None, _Lines(title, total, unit) if lines else None)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=_console) as display:
            display.add_task(title, total=total, note="", rate="")
            yield Bar(display, None, unit)


class _Lines:
    """Progress as lines, the first one after LINE_EVERY_S."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._started = self._last = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S:
            return
        self._last = now
        rate = done / (now - self._started)
        left = f", {(self._total - done) / rate:.0f} s left" if rate else ""
        sys.stderr.write(
            f"{self._title}: {done} of {self._total} {self._unit}, {rate:.1f}/s{left}\n"
        )


class Bar:
    """Moves the bar of `progress`."""

    def __init__(
        self, display: Progress | None, lines: _Lines | None, unit: str = "batches"
    ) -> None:
        self._display, self._lines, self._unit = display, lines, unit
        self._started = time.monotonic()

    def at(self, done: int, note: str = "") -> None:
        """Set how many steps are done, with a note behind the bar."""
        if self._lines:
            self._lines.at(done)
        if self._display:
            per_s = done / max(1e-9, time.monotonic() - self._started)
            self._display.update(
                self._display.task_ids[0],
                completed=done,
                note=note,
                rate=f"{per_s:.1f} {self._unit}/s",
            )

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Pass items through and move by one for each."""
        for done, item in enumerate(items, start=1):
            yield item
            self.at(done)
