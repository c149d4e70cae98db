"""Heartbeats, and what they say of a rank that is missing."""

import json
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from mgc_dist import console
from mgc_dist.cluster import lease, watch
from mgc_dist.cluster.stop import Stop
from mgc_dist.errors import UserError


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lease.Lease:
    monkeypatch.setattr(watch, "BEAT_S", 0.1)
    return lease.acquire(tmp_path, "ours")


def peer(held: lease.Lease, **changes: object) -> None:
    """Write rank 1's heartbeat: a child that has ended, unless said otherwise."""
    pid = os.fork()
    if pid == 0:
        file = lease.heartbeat_file(held.run, held.attempt, 1)
        facts = vars(lease.this_process()) | {"step": 6, "phase": "computing"}
        file.write_text(json.dumps(facts | {"time_s": time.time()} | changes))
        os._exit(0)
    os.waitpid(pid, 0)


def watching(held: lease.Lease) -> watch.Watch:
    return watch.Watch(held, 0, 2, Stop(), hang_timeout_s=60)


def test_the_missing_rank_is_named(held: lease.Lease) -> None:
    with watching(held) as found:
        found.progress(7, "computing")
        assert "rank 1 was never seen" in str(found.lost(RuntimeError("closed by peer")))
        peer(held)
        lost = found.lost(RuntimeError("closed by peer"))
        assert "rank 1 (process" in str(lost)
        assert "is gone, last seen at step 7 (computing)" in str(lost)
        assert lost.exit_code == 75
        peer(held, host="elsewhere", time_s=time.time() - 30)
        lost = str(found.lost(RuntimeError("time-out")))
        silent = re.search(
            r"on elsewhere\) is silent, last seen at step 7 \(computing\) (\d+) s ago", lost
        )
        assert silent, lost
        assert int(silent[1]) >= 30
        peer(held, host="elsewhere", phase="reading", time_s=time.time() + 5)
        assert "is elsewhere, last seen at step 7 (reading)" in str(
            found.lost(RuntimeError("time-out"))
        )
        peer(held, error="no space", exit_code=74)
        lost = found.lost(RuntimeError("closed by peer"))
        assert "has ended: no space" in str(lost)
        assert lost.exit_code == 74, "the peers end as the rank that failed did"


def test_a_long_save_is_no_hang_while_its_files_change(
    held: lease.Lease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes many times the time-out; once nothing changes any more, it is one."""
    left, looks = threading.Event(), 0

    def growing(folder: Path) -> tuple[int, int]:
        nonlocal looks
        assert folder == tmp_path / "checkpoints"
        looks += 1
        return 1, min(looks, 5)

    monkeypatch.setattr(watch, "_LOOK_S", 0.01)
    monkeypatch.setattr(watch, "_size_below", growing)
    monkeypatch.setattr(watch, "leave", lambda code: left.set())
    with (
        watch.Watch(held, 0, 1, Stop(), hang_timeout_s=0.2) as found,
        found.writing(3, "saving", tmp_path / "checkpoints"),
    ):
        while looks < 5:
            assert not left.is_set()
            time.sleep(0.01)
        assert left.wait(60)


def test_what_is_written_is_seen_below_a_folder(tmp_path: Path) -> None:
    assert watch._size_below(tmp_path / "none") == (0, 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    (tmp_path / "c").write_bytes(b"12")
    assert watch._size_below(tmp_path) == (2, 5)
    assert watch._size_below(tmp_path / "a*") == (1, 3)


def test_an_error_is_left_for_the_peers(held: lease.Lease) -> None:
    def fail() -> None:
        with watching(held):
            raise UserError("--x", got=1, expected="2", cure="3")

    with pytest.raises(UserError):
        fail()
    beat = json.loads(lease.heartbeat_file(held.run, "ours", 0).read_text())
    assert beat["error"].startswith("--x: got 1")
    assert beat["exit_code"] == 2


def test_a_file_server_that_is_away_ends_nothing(
    held: lease.Lease, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("mgc_dist"), "propagate", True)
    left: list[int] = []
    monkeypatch.setattr(watch, "leave", left.append)
    read = lease._read

    def away(path: Path) -> object:
        if path.name == lease.LEASE:
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(lease, "_read", away)
    with watching(held):
        time.sleep(1.2)
    assert "the lease cannot be seen" in caplog.text
    assert not left


def test_a_rank_that_hangs_ends_though_nobody_reads_what_it_says(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)  # as `| tee`, killed by the same Ctrl-C
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stdout.write("what a library printed")
        console.start_logging(0)
        held = lease.acquire(tmp_path, "ours")
        with watch.Watch(held, 0, 1, Stop(), hang_timeout_s=0.1):
            time.sleep(20)
        os._exit(0)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75


def test_a_heartbeat_tells_where_the_rank_is(held: lease.Lease) -> None:
    with watching(held) as found:
        found.progress(3, "saving")
        time.sleep(1.2)
        beat = json.loads(lease.heartbeat_file(held.run, "ours", 0).read_text())
    assert (beat["step"], beat["phase"], beat["pid"]) == (3, "saving", os.getpid())
