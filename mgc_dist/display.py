"""What a person sees while a command runs: log lines, and bars on a terminal."""

import logging
import socket
import sys
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
        handlers.append(RichHandler(console=_console, show_path=False, show_level=False))
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
def progress(title: str, total: int, *, shown: bool) -> Iterator["Bar"]:
    """A bar on a terminal; nothing elsewhere, so that log files stay plain.

    Args:
        title: what is being done.
        total: steps of it.
        shown: False on ranks that stay silent.
    """
    if not (shown and sys.stderr.isatty()):
        yield Bar(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_console) as display:
        display.add_task(title, total=total, note="")
        yield Bar(display)


class Bar:
    """Moves the bar of `progress`."""

    def __init__(self, display: Progress | None) -> None:
        self._display = display

    def at(self, done: int, note: str = "") -> None:
        """Set how many steps are done, with a note behind the bar."""
        if self._display:
            self._display.update(self._display.task_ids[0], completed=done, note=note)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Pass items through and move by one for each."""
        for done, item in enumerate(items, start=1):
            yield item
            self.at(done)
