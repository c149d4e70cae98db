"""Signs of life: heartbeats of all ranks, and a thread that ends a rank that hangs.

A rank that waits in a collective for a peer that hangs cannot help itself: the thread does. It
writes the stacks of all threads to the log, says which rank was last seen where, and ends the
process: leaving a broken process group in order may block for minutes. The launcher, or srun
with --kill-on-bad-exit, then ends the rest.
"""

import faulthandler
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from mgc_dist.cli import leave
from mgc_dist.cluster.lease import Lease, heartbeat_file, process_of, this_process
from mgc_dist.cluster.stop import Stop
from mgc_dist.errors import EXIT_TEMPORARY, PeerLost, exit_code_of

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""Between heartbeats."""
_LOOK_S = 0.5
_EMPTY = {"step": 0, "phase": "", "time_s": 0.0, "error": "", "exit_code": 0}


@contextmanager
def start_limit(rank: int, timeout_s: float) -> Iterator[None]:
    """A block that waits for all ranks; one that takes longer ends the process with code 75.

    For DeepSpeed's initialisation, which makes process groups that wait half an hour for a rank
    that hangs, whatever time-out the first group was given; no heartbeat is there yet.

    Args:
        rank: who we are.
        timeout_s: that the block may take.
    """

    def give_up() -> None:
        try:
            log.error(
                "rank %d has waited %.0f s for the other ranks to start: one is lost or hangs; "
                "ending it, nothing was touched",
                *(rank, timeout_s),
            )
            _dump_stacks()
        finally:
            leave(EXIT_TEMPORARY)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watch:
    """Heartbeat of this rank, and an eye on its progress, its launcher and its lease.

    Args:
        lease: of the run folder; only rank 0 looks whether it is still ours.
        rank, world: who we are.
        stop: is told when the launcher is gone.
        hang_timeout_s: without progress for so long, the process ends with exit code 75.
    """

    def __init__(
        self, lease: Lease, rank: int, world: int, stop: Stop, *, hang_timeout_s: float
    ) -> None:
        self._lease, self._rank, self._world, self._stop = lease, rank, world, stop
        self._hang_timeout_s = hang_timeout_s
        self._step, self._phase, self._since_s = 0, "start", time.monotonic()
        self._file = heartbeat_file(lease.run, lease.attempt, rank)
        self._writes: Path | None = None
        self._written = (0, 0)
        self._over = threading.Event()
        self._process = asdict(this_process())
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._file.parent.mkdir(exist_ok=True)
        if self._rank == 0:
            for old in self._file.parent.glob("*.json"):
                if not old.name.startswith(f"{self._lease.attempt}-"):
                    old.unlink(missing_ok=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is None or isinstance(error, PeerLost):
            self._beat()  # how far it came
        else:  # for the peers to read
            self._beat(error=str(error), exit_code=exit_code_of(error))

    def progress(self, step: int, phase: str) -> None:
        """Say that this rank has come on: called at every micro step and every batch.

        Args:
            step: optimizer steps taken.
            phase: what is being done now.
        """
        self._step, self._phase, self._since_s = step, phase, time.monotonic()

    @contextmanager
    def writing(self, step: int, phase: str, folders: Path) -> Iterator[None]:
        """A block that may take longer than a hang, for as long as files below `folders` change.

        All ranks are in it, those too that only wait for the others' files.

        Args:
            step: optimizer steps taken.
            phase: what is being done now.
            folders: a folder, or several such as `RUN/best*`, of which only the files of this
                block change.
        """
        self.progress(step, phase)
        self._written, self._writes = _size_below(folders), folders
        try:
            yield
        finally:
            self._writes = None
            self.progress(step, phase)

    def lost(self, error: BaseException) -> PeerLost:
        """The exception for a collective that failed, naming the rank that is to blame."""
        deadline = time.monotonic() + 2.5 * BEAT_S
        # a killed process closes its connections some time before it is seen to be dead
        while not (names := self._missing(sure=True)) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = names or self._missing()
        said = " ".join(str(error).split())[:200]
        who = "; ".join(names) or "no rank is seen to be missing"
        codes = [int(b["exit_code"]) for b in map(self._seen, range(self._world)) if b]
        return PeerLost(
            f"rank {self._rank} at step {self._step + 1} ({self._phase}) lost its peers: {who} "
            f"({type(error).__name__}: {said}); the last checkpoint is untouched",
            next((code for code in codes if code), EXIT_TEMPORARY),
        )

    def _run(self) -> None:
        beat_at_s = time.monotonic() + BEAT_S
        while not self._over.wait(_LOOK_S):
            if not self._stop.signal and self._stop.launcher_is_gone():
                log.warning("rank %d: the launcher is gone, stopping", self._rank)
                self._stop.record(signal.SIGTERM)
            now = time.monotonic()
            if now >= beat_at_s:
                beat_at_s = now + BEAT_S
                self._beat()
                if self._rank == 0:
                    self._look_at_lease()
            if self._writes and now - self._since_s > self._hang_timeout_s / 2:
                self._look_at_files(self._writes)
            if now - self._since_s > self._hang_timeout_s:
                self._give_up(now - self._since_s)

    def _beat(self, **ended: str | int) -> None:
        content = {"rank": self._rank, "step": self._step, "phase": self._phase, **ended}
        try:
            aside = self._file.with_suffix(".tmp")
            aside.write_text(json.dumps(content | self._process | {"time_s": time.time()}))
            aside.replace(self._file)
        except FileNotFoundError:  # rank 0 has removed what a refused try had made
            pass
        except OSError as error:  # a full disk is met, and told, where something counts
            log.warning("rank %d: no heartbeat: %s", self._rank, error)

    def _look_at_files(self, folders: Path) -> None:
        before, self._written = self._written, _size_below(folders)
        if self._written != before:
            self._since_s = time.monotonic()

    def _look_at_lease(self) -> None:
        try:
            self._lease.check()
        except PeerLost as error:
            log.error("%s", error)
            leave(error.exit_code)
        except OSError as error:  # the file server is away: the commit will look again
            log.warning("rank %d: the lease cannot be seen: %s", self._rank, error)

    def _give_up(self, seconds: float) -> NoReturn:
        try:
            names = "; ".join(self._missing()) or "no other rank is seen to be missing"
            log.error(
                "rank %d has come no further for %.0f s, at step %d (%s): %s; ending it, the last "
                "checkpoint is untouched",
                *(self._rank, seconds, self._step + 1, self._phase, names),
            )
            _dump_stacks()
            self._beat()  # how far it came
        finally:  # whatever cannot be said
            leave(EXIT_TEMPORARY)

    def _missing(self, *, sure: bool = False) -> list[str]:
        """Ranks that have failed, died or fallen silent, in words.

        Unless only those are asked for that are surely to blame, also ranks that were never seen
        or that were last seen somewhere else.
        """
        names = []
        for rank in range(self._world):
            beat = self._seen(rank) if rank != self._rank else None
            if rank == self._rank:
                continue
            if beat is None:
                names += [] if sure else [f"rank {rank} was never seen"]
                continue
            process, age_s = process_of(beat), time.time() - float(beat["time_s"])
            here = (int(beat["step"]), beat["phase"])
            last = f"last seen at step {here[0] + 1} ({here[1]}) {age_s:.0f} s ago"
            if beat["error"]:
                names.append(f"rank {rank} ({process.where}) has ended: {beat['error']}")
            elif process.seen_dead():
                names.append(f"rank {rank} ({process.where}) is gone, {last}")
            elif age_s > 2 * BEAT_S + _LOOK_S:
                names.append(f"rank {rank} ({process.where}) is silent, {last}")
            elif not sure and here != (self._step, self._phase):
                names.append(f"rank {rank} ({process.where}) is elsewhere, {last}")
        return names

    def _seen(self, rank: int) -> dict[str, Any] | None:
        path = heartbeat_file(self._lease.run, self._lease.attempt, rank)
        try:
            content = json.loads(path.read_text())
            process_of(content)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return _EMPTY | dict(content)


def _size_below(folders: Path) -> tuple[int, int]:
    """Files below folders and their bytes; one that goes away meanwhile is not counted."""
    sizes = []
    found = folders.parent.glob(folders.name)
    for place, _, names in itertools.chain.from_iterable(map(os.walk, found)):
        for name in names:
            with suppress(OSError):
                sizes.append(os.stat(os.path.join(place, name)).st_size)
    return len(sizes), sum(sizes)


def _dump_stacks() -> None:
    for file in _log_files():
        with suppress(OSError):  # a notebook's stderr has no `fileno`
            faulthandler.dump_traceback(file, all_threads=True)


def _log_files() -> list[TextIO]:
    """Where stacks go: stderr, and the log file of rank 0."""
    handlers = logging.getLogger("mgc_dist").handlers
    streams = [h.stream for h in handlers if isinstance(h, logging.FileHandler)]
    return [sys.stderr, *(stream for stream in streams if stream)]
