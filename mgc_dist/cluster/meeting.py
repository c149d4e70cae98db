"""Where ranks meet before they form a process group, and make sure that they are alike.

A collective that a rank enters with other code, flags or data hangs, or gives a wrong result
without a word. So ranks first tell rank 0 what they see, through the key-value store that rank 0
serves at MASTER_ADDR:MASTER_PORT, and all hear its verdict. A rank that fails before the
process group stands says so there, and the others end instead of waiting.
"""

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch.distributed import (  # type: ignore[attr-defined]
    DistNetworkError,
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from mgc_dist.cluster.seat import MET, Seat, seat, some_of
from mgc_dist.errors import EXIT_TEMPORARY, PeerLost, UserError

log = logging.getLogger(__name__)

Facts = dict[str, str]

WAIT_S = 600.0
"""How long ranks wait for each other where the caller does not say."""
_TELL_AFTER_S = 30.0
_LOOK_S = 0.1
_FAREWELL_S = 5.0
_LIBRARIES = ("torch", "deepspeed", "transformers", "numpy")


class Meeting:
    """The ranks of a command, not yet in a process group.

    Attributes:
        seat: of this process.
        store: that they share; of its own where a process is alone.
        wait_s: how long they wait for each other.
        is_over: the process group stands, whose ranks notice by themselves who is missing.
    """

    def __init__(self, here: Seat, store: Store, wait_s: float) -> None:
        self.seat, self.store, self.wait_s = here, store, wait_s
        self.is_over = False
        self._topics = 0

    def all_tell(self, topic: str, said: Facts, judge: Callable[[list[Facts]], None]) -> None:
        """Tell rank 0 something and hear what it makes of what all have told (a collective).

        Args:
            topic: what it is about, for people.
            said: by this rank.
            judge: called on rank 0 with what each rank has said, in the order of ranks.

        Raises:
            UserError: the one that `judge` raised, on every rank.
            PeerLost: a rank has failed, or has told nothing for too long.
        """
        number, rank = self._topics, self.seat.rank
        try:
            verdict: dict[str, Any]
            self.store.set(f"{number}/{rank}", json.dumps(said))
            if rank == 0:
                verdict = self._verdict(topic, judge)
                self.store.set(f"{number}/verdict", json.dumps(verdict))
            else:
                self.store.wait([f"{number}/verdict"], timedelta(seconds=self.wait_s))
                verdict = json.loads(self.store.get(f"{number}/verdict"))
        except RuntimeError as error:  # of the store: rank 0 is gone, or silent
            reason = str(error).splitlines()[0]
            raise PeerLost(f"rank {rank} heard nothing from rank 0: {reason}") from error
        self._topics += 1
        if verdict.get("lost"):
            raise PeerLost(verdict["lost"], verdict["exit_code"])
        if verdict:
            raise UserError(**verdict)

    def _verdict(self, topic: str, judge: Callable[[list[Facts]], None]) -> dict[str, Any]:
        """What rank 0 answers: {} where all is well."""
        key = f"{self._topics}/"
        silent, began_s, told = list(range(self.seat.world)), time.monotonic(), False
        while silent := [rank for rank in silent if not self.store.check([f"{key}{rank}"])]:
            waited_s = time.monotonic() - began_s
            if self.store.check(["failed"]):
                failed: dict[str, Any] = json.loads(self.store.get("failed"))
                return failed
            names = some_of(silent)
            if waited_s > self.wait_s:
                return {
                    "lost": f"of {self.seat.world} ranks, {names} told nothing about their "
                    f"{topic} for {waited_s:.0f} s: they hang, or never started",
                    "exit_code": EXIT_TEMPORARY,
                }
            if waited_s > _TELL_AFTER_S and not told:
                told = True
                log.warning("waiting for ranks %s of %d: %s", names, self.seat.world, topic)
            time.sleep(_LOOK_S)
        facts = [json.loads(self.store.get(f"{key}{k}")) for k in range(self.seat.world)]
        try:
            judge(facts)
        except UserError as error:
            return error.parts
        return {}

    def all_same(self, topic: str, facts: Facts) -> None:
        """Refuse ranks that differ in a fact from rank 0 (a collective).

        Raises:
            UserError: they do; it names the fact, the rank, its host and both values.
        """
        where = socket.gethostname()
        self.all_tell(topic, facts | {_HOST: where}, refuse_others)

    def group_store(self) -> Store:
        """The store for the process group, which has names of its own."""
        return PrefixStore("group", self.store)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends, if they still listen."""
        code = error.exit_code if isinstance(error, UserError) else EXIT_TEMPORARY
        who = f"rank {self.seat.rank} ({socket.gethostname()})"
        key = "failed" if self.seat.rank else f"{self._topics}/verdict"
        with suppress(RuntimeError):
            content = {"lost": f"{who} has ended: {error}", "exit_code": code}
            self.store.set(key, json.dumps(content))

    def leave(self) -> None:
        """Go; rank 0, whose process holds the store, when the others have heard all of it."""
        others = [f"left/{rank}" for rank in range(1, self.seat.world)]
        deadline = time.monotonic() + _FAREWELL_S
        with suppress(RuntimeError):
            if self.seat.rank:
                self.store.set(f"left/{self.seat.rank}", "")
                return
            while not self.store.check(others) and time.monotonic() < deadline:
                time.sleep(_LOOK_S)


_HOST = "host"


def refuse_others(said: list[Facts]) -> None:
    """Refuse what differs between ranks.

    Args:
        said: the facts of each rank, with its `host`.

    Raises:
        UserError: for the first difference.
    """
    first = said[0]
    for rank, facts in enumerate(said):
        for name in first:
            if name != _HOST and facts.get(name) != first[name]:
                raise UserError(
                    f"{name} on rank {rank} ({facts[_HOST]})",
                    got=facts.get(name, "nothing"),
                    expected=f"{first[name]}, as on rank 0 ({first[_HOST]})",
                    cure="start the same command with the same code and data on every node",
                )


@contextmanager
def meet(flags: Facts | None = None, *, wait_s: float = WAIT_S) -> Iterator[Meeting]:
    """Meet the other ranks (a collective), who must have the same code, libraries and flags.

    Args:
        flags: of the command line, as `cli.flags_of` gives them.
        wait_s: how long to wait for a rank.

    Raises:
        UserError: the launcher's variables contradict, rank 0 cannot listen or cannot be
            reached, or a rank is different.
        PeerLost: a rank has failed, or does not come.
    """
    here = seat()
    meeting = Meeting(here, _store(here, wait_s), wait_s)
    try:
        if here.world > 1:
            meeting.all_same(
                "flags and code", {"code": code_hash(), **_versions(), **(flags or {})}
            )
            meeting.all_tell("places", {_HOST: socket.gethostname(), "address": address()}, _tell)
        yield meeting
    except BaseException as error:
        if here.world > 1 and not meeting.is_over and not isinstance(error, PeerLost):
            meeting.fail(error)
        raise
    finally:
        if here.world > 1 and not meeting.is_over:
            meeting.leave()


def _store(here: Seat, wait_s: float) -> Store:
    """A store of this meeting alone: ranks may meet more than once in the same processes."""
    if here.address is None:
        return HashStore()
    if here not in _open:
        _open[here] = _first_store(here, wait_s)
        MET.add(here.port)
    store = _open[here]
    try:
        store.set_timeout(timedelta(seconds=wait_s))
        meetings = store.add(f"meetings of rank {here.rank}", 1)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise PeerLost(f"rank {here.rank} heard nothing from rank 0: {said}") from error
    return PrefixStore(f"meeting {meetings}", store)


_open: dict[Seat, Store] = {}
"""Stores of this process, which live as long as it does (`seat.MET`)."""


def _first_store(here: Seat, wait_s: float) -> Store:
    elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            str(here.address),
            here.port,
            world_size=here.world,
            is_master=here.rank == 0 and not elastic,
            timeout=timedelta(seconds=wait_s),
            wait_for_workers=False,
        )
    except DistNetworkError as error:
        raise UserError(
            f"rank 0's address {here.address}:{here.port} (MASTER_ADDR, MASTER_PORT)",
            got=str(error).splitlines()[0],
            expected="a free port there that every rank can reach",
            cure="if another job uses the port: deepspeed --master_port 29501 launch/...",
            this_rank_only=True,
        ) from error
    except RuntimeError as error:  # DistStoreError
        said = str(error).splitlines()[0]
        raise PeerLost(f"rank {here.rank} waited for rank 0 in vain: {said}") from error
    return PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _tell(said: list[Facts]) -> None:
    """Log which ranks are where."""
    log.info("%s", describe(said))


def describe(said: list[Facts]) -> str:
    """`4 ranks on 2 hosts: n1 (192.0.2.11) 0-1, n2 (192.0.2.12) 2-3`."""
    ranks: dict[str, list[int]] = {}
    for rank, facts in enumerate(said):
        ranks.setdefault(f"{facts[_HOST]} ({facts['address']})", []).append(rank)
    shown = [f"{host} {_span(numbers)}" for host, numbers in ranks.items()]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    counts = f"{_count(len(said), 'rank')} on {_count(len(ranks), 'host')}"
    return f"{counts}: {', '.join(shown[:8])}{more}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _span(numbers: list[int]) -> str:
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return " ".join(map(str, numbers))


def address() -> str:
    """The address from which this host reaches rank 0; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        return f"no way to rank 0: {error.strerror}"


def code_hash() -> str:
    """sha256 of the source of this package, all wings, 12 digits."""
    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _versions() -> Facts:
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
