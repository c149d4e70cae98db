"""Who may write into a run folder: a lease, and the record of attempts.

Of two processes on one run folder only the newer may commit. `lease.json` names its holder and
is written once, when it is taken; that the holder lives is seen from its process (same host) and
from its heartbeat, which is watched for a change, so that clocks of two hosts need not agree.
A holder that was cut off and comes back finds another name in the lease before it renames
anything, and ends. Locks of the file system are not used: they are not reliable on every NFS.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mgc_dist.errors import PeerLost, UserError
from mgc_dist.files import json_lines, sync

log = logging.getLogger(__name__)

LEASE = "lease.json"
ATTEMPTS = "attempts.jsonl"
HEARTBEATS = "heartbeats"
STALE_S = 20.0
"""A holder that shows no sign of life for so long has lost its lease; four heartbeats."""
SEEN_WITHIN_S = 60.0
"""NFS may hide for so long what another node has just made: the longest life of its attributes."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that can be told from all others, also from a later one of the same number.

    Attributes:
        host, boot_id: the machine, and which start of it.
        pid, started_ticks: the process, and when the kernel started it.
        pid_space: in which its number counts; containers of one host have their own. "" of a
            process of version 0.1.0.
    """

    host: str
    boot_id: str
    pid: int
    started_ticks: int
    pid_space: str = ""

    @property
    def where(self) -> str:
        """As in a message."""
        inside = "" if self._is_of_our_space else f" in namespace {self.pid_space}"  # as in lsns
        return f"process {self.pid} on {self.host}{inside}"

    @property
    def _is_of_our_space(self) -> bool:
        return self.pid_space in ("", _pid_space())

    def seen_dead(self) -> bool:
        """Whether it ran where its number can be looked up, and runs no more."""
        if (self.host, self.boot_id) != (socket.gethostname(), _boot_id()):
            return False
        if not self._is_of_our_space:
            return False
        return _started_ticks(self.pid) != self.started_ticks


def this_process() -> Process:
    """The process that calls."""
    pid = os.getpid()
    return Process(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid=pid,
        started_ticks=_started_ticks(pid),
        pid_space=_pid_space(),
    )


def process_of(content: dict[str, Any]) -> Process:
    """A process from its fields in a JSON file.

    Raises:
        KeyError, TypeError: it has not all of them.
    """
    return Process(
        host=str(content["host"]),
        boot_id=str(content["boot_id"]),
        pid=int(content["pid"]),
        started_ticks=int(content["started_ticks"]),
        pid_space=str(content.get("pid_space", "")),
    )


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to write into a run folder.

    Attributes:
        run: the folder.
        attempt: name of this try, different from all others.
    """

    run: Path
    attempt: str

    def is_ours(self) -> bool:
        """Whether nobody has taken the folder over.

        Raises:
            OSError: it cannot be seen, as while a file server is away; nothing is known then.
        """
        content = _read(self.run / LEASE)
        return content is not None and content.get("attempt") == self.attempt

    def seems_ours(self) -> bool:
        """Whether nothing says that somebody has taken the folder over."""
        try:
            return self.is_ours()
        except OSError:
            return True

    def comes_into_view(self) -> bool:
        """Whether this rank, on its host, sees the lease that rank 0 has taken."""
        deadline = time.monotonic() + SEEN_WITHIN_S
        while not (seen := self.is_ours()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return seen

    def check(self) -> None:
        """Refuse to go on if another process has taken the folder over.

        Raises:
            PeerLost: it has; with exit code 2, because starting again would disturb it.
            OSError: it cannot be seen.
        """
        if not self.is_ours():
            holder = _read(self.run / LEASE) or {}
            raise PeerLost(
                f"run folder {self.run}: {holder.get('host', 'somebody')} has taken it over "
                f"(attempt {holder.get('attempt', 'unknown')}); nothing more is written from here",
                exit_code=2,
            )

    def release(self) -> None:
        """Give the folder up, if it is still ours."""
        with contextlib.suppress(OSError):  # a lease that is left behind is taken over
            if self.is_ours():
                (self.run / LEASE).unlink(missing_ok=True)


def acquire(run: Path, attempt: str, *, stale_s: float = STALE_S) -> Lease:
    """Take a run folder, waiting at most `stale_s` to see whether its holder lives.

    Args:
        run: the folder; must exist.
        attempt: from `new_attempt`.
        stale_s: how long a holder may show no sign of life.

    Raises:
        UserError: another process is at work in it.
    """
    content = _read(run / LEASE)
    if content is not None:
        _wait_out(run, content, stale_s)
    taken = {"attempt": attempt, **asdict(this_process()), "taken_at_s": round(time.time(), 3)}
    aside = run / f"{LEASE}.{attempt}"  # a name of its own: two may take the folder at once
    aside.write_text(json.dumps(taken), encoding="utf-8")
    sync(aside)
    aside.replace(run / LEASE)
    return Lease(run=run, attempt=attempt)


def holder_of(run: Path) -> Process | None:
    """Whose name the lease of a run folder bears, if it can be read."""
    try:
        return process_of(_read(run / LEASE) or {})
    except (OSError, KeyError, TypeError, ValueError):
        return None


def forget(run: Path) -> None:
    """Remove the traces of a try that began nothing, and the folder if it is empty then."""
    shutil.rmtree(run / HEARTBEATS, ignore_errors=True)
    with contextlib.suppress(OSError):
        run.rmdir()


def new_attempt() -> str:
    """A name for a try, with the Slurm job and its restarts where there are any."""
    job = os.environ.get("SLURM_JOB_ID", "local")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}.{secrets.token_hex(4)}"


def heartbeat_file(run: Path, attempt: str, rank: int) -> Path:
    """Where a rank of an attempt writes that it lives."""
    return run / HEARTBEATS / f"{attempt}-rank{rank:05d}.json"


def record_start(run: Path, attempt: str, samples_seen: int, world: int) -> None:
    """Add this try to the record of attempts."""
    _append(
        run, {"attempt": attempt, "samples_seen": samples_seen, "world": world, "event": "start"}
    )


def record_end(run: Path, attempt: str, samples_seen: int, outcome: str) -> None:
    """Add how a try ended; a killed one leaves no such line, nor may a full disk hide its error."""
    line = {"attempt": attempt, "samples_seen": samples_seen, "event": "end", "outcome": outcome}
    try:
        _append(run, line)
    except OSError as error:
        log.warning("%s: %s", run / ATTEMPTS, error.strerror)


def fruitless_tries(run: Path, samples_seen: int) -> int:
    """How many tries in a row, up to now, started where we start and gained nothing.

    A try that was stopped on request does not count, nor do those before it.
    """
    tries: dict[str, dict[str, Any]] = {}
    for line in json_lines(run / ATTEMPTS):
        if line.get("event") == "start":
            tries[str(line.get("attempt"))] = dict(line)
        elif str(line.get("attempt")) in tries:
            tries[str(line.get("attempt"))]["outcome"] = line.get("outcome")
    count = 0
    for past in reversed(tries.values()):
        if past.get("samples_seen") != samples_seen or past.get("outcome") in ("stopped", "done"):
            break
        count += 1
    return count


def _wait_out(run: Path, content: dict[str, Any], stale_s: float) -> None:
    attempt = str(content.get("attempt"))
    try:
        holder = process_of(content)
    except (KeyError, TypeError, ValueError):
        log.warning("taking over %s: its %s cannot be read", run, LEASE)
        return
    if holder.seen_dead():
        log.info("taking over %s from %s, which is gone", run, holder.where)
        return
    log.info("%s is held by %s; waiting for a sign of life", run, holder.where)
    beat, deadline = heartbeat_file(run, attempt, 0), time.monotonic() + stale_s
    first = _bytes(beat)
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if holder.seen_dead() or not (run / LEASE).exists():
            return
        if _bytes(beat) != first:
            raise UserError(
                f"--run {run}",
                got=f"a run that is going on: {holder.where}",
                expected="to have the folder alone",
                cure=f"wait for it, or end it: kill {holder.pid} on {holder.host}",
            )
    log.warning("taking over %s from %s: silent for %.0f s", run, holder.where, stale_s)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _append(run: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line | {"time_s": round(time.time(), 3)}) + "\n"
    before = _bytes(run / ATTEMPTS)
    if before and not before.endswith(b"\n"):  # a kill cut the last line: do not add to it
        text = "\n" + text
    with (run / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(text)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_space() -> str:
    """The namespace of process numbers that this process lives in."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started_ticks(pid: int) -> int:
    """When the kernel started a process, in clock ticks since the boot; -1 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
