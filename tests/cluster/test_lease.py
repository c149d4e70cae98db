"""The lease of a run folder, and the record of attempts."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mgc_dist.cluster import lease
from mgc_dist.errors import PeerLost, UserError


def test_a_free_folder_is_taken_and_given_back(tmp_path: Path) -> None:
    held = lease.acquire(tmp_path, "a")
    assert held.is_ours()
    held.check()
    content = json.loads((tmp_path / "lease.json").read_text())
    assert (content["attempt"], content["pid"]) == ("a", os.getpid())
    held.release()
    assert not (tmp_path / "lease.json").exists()
    held.release()


def test_a_holder_that_is_silent_is_taken_over_and_learns_of_it(tmp_path: Path) -> None:
    older = lease.acquire(tmp_path, "older")  # its process lives, without a heartbeat
    began = time.monotonic()
    newer = lease.acquire(tmp_path, "newer", stale_s=0.6)
    assert time.monotonic() - began >= 0.6
    with pytest.raises(PeerLost, match="attempt newer") as error:
        older.check()
    assert error.value.exit_code == 2
    older.release()
    assert newer.is_ours(), "what is another's is not given back"


def test_a_holder_with_a_heartbeat_is_left_alone(tmp_path: Path) -> None:
    lease.acquire(tmp_path, "older")
    beat = lease.heartbeat_file(tmp_path, "older", 0)
    beat.parent.mkdir()
    pid = os.fork()
    if pid == 0:
        time.sleep(0.4)
        beat.write_text("I live")
        os._exit(0)
    with pytest.raises(UserError, match=rf"a run that is going on: process {os.getpid()} on"):
        lease.acquire(tmp_path, "newer", stale_s=20)
    os.waitpid(pid, 0)


def test_two_that_take_a_folder_at_once_do_not_spoil_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slow: the second begins to write before the first has ended."""
    sync = os.fsync
    pid = os.fork()
    if pid == 0:
        os.fsync = lambda handle: time.sleep(0.6)  # type: ignore[assignment]
        lease.acquire(tmp_path, "one")
        os._exit(0)
    time.sleep(0.2)
    monkeypatch.setattr(os, "fsync", lambda handle: (time.sleep(1.0), sync(handle)))
    held = lease.acquire(tmp_path, "two")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert held.is_ours(), "the last one has it, and the other can see so"
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


def test_a_process_is_told_from_a_later_one_of_its_number() -> None:
    here = lease.this_process()
    assert not here.seen_dead()
    other = replace(here, started_ticks=here.started_ticks - 1)
    assert other.seen_dead()
    assert not replace(other, host="elsewhere").seen_dead(), "nothing is known of other machines"
    inside = replace(other, pid_space="pid:[1]")
    assert not inside.seen_dead(), "nothing is known of the numbers of another container"
    assert (here.where, inside.where) == (
        f"process {os.getpid()} on {here.host}",
        f"process {os.getpid()} on {here.host} in namespace pid:[1]",
    )
    assert lease.process_of(asdict(here)) == here
    old = asdict(here)
    del old["pid_space"]
    assert not lease.process_of(old).seen_dead()


def test_a_run_that_lives_in_another_container_is_not_taken_over(tmp_path: Path) -> None:
    """The same host name, process numbers of its own: it beats, so it lives."""
    own = ["unshare", "--pid", "--fork", "--mount-proc", "--user", "--map-root-user"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces may be made here")
    code = f"""
import sys, time
from dataclasses import asdict, replace
from pathlib import Path
from mgc_dist.cluster import lease
run = Path({str(tmp_path)!r})
beat = lease.heartbeat_file(run, "inside", 0)
beat.parent.mkdir()
lease.acquire(run, "inside")
print("taken", flush=True)
while not (run / "over").exists():
    beat.write_text(str(time.time()))
    time.sleep(0.05)
"""
    inside = subprocess.Popen([*own, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert inside.stdout
        assert inside.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=r"a run that is going on.* in namespace pid:\["):
            lease.acquire(tmp_path, "outside", stale_s=120)
    finally:
        (tmp_path / "over").touch()
        inside.wait(60)


def test_a_lease_that_cannot_be_read_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lease.acquire(tmp_path, "ours")

    def away(self: Path, **kwargs: str) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", away)
        with pytest.raises(OSError, match="Stale file handle"):
            held.check()
        assert held.seems_ours()
        held.release()
    held.check()
    (tmp_path / "lease.json").write_text('{"attempt": "theirs"}')
    assert not held.seems_ours()


def test_tries_without_progress_are_counted(tmp_path: Path) -> None:
    assert lease.fruitless_tries(tmp_path, 0) == 0
    for attempt, seen, outcome in (
        ("a", 0, "failed"),
        ("b", 0, None),
        ("c", 20, "stopped"),
        ("d", 20, None),
        ("e", 20, "failed"),
    ):
        lease.record_start(tmp_path, attempt, seen, 2)
        if outcome:
            lease.record_end(tmp_path, attempt, seen, outcome)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": "cut by a k')
    assert lease.fruitless_tries(tmp_path, 20) == 2, "a stop on request ends the count"
    lease.record_start(tmp_path, "f", 20, 2)
    assert lease.fruitless_tries(tmp_path, 20) == 3, "what a kill has cut swallows no line"
    assert lease.fruitless_tries(tmp_path, 40) == 0, "a checkpoint was gained"
