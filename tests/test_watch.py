"""Heartbeats, and what they say of a rank that is missing."""

import json
import os
import time
from pathlib import Path

import pytest

from mgc_dist import lease, watch
from mgc_dist.errors import UserError
from mgc_dist.stop import Stop


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
        assert "on elsewhere) is silent, last seen at step 7 (computing) 30 s ago" in str(
            found.lost(RuntimeError("time-out"))
        )
        peer(held, host="elsewhere", phase="reading", time_s=time.time() + 5)
        assert "is elsewhere, last seen at step 7 (reading)" in str(
            found.lost(RuntimeError("time-out"))
        )
        peer(held, error="no space", exit_code=74)
        lost = found.lost(RuntimeError("closed by peer"))
        assert "has ended: no space" in str(lost)
        assert lost.exit_code == 74, "the peers end as the rank that failed did"


def test_an_error_is_left_for_the_peers(held: lease.Lease) -> None:
    def fail() -> None:
        with watching(held):
            raise UserError("--x", got=1, expected="2", cure="3")

    with pytest.raises(UserError):
        fail()
    beat = json.loads(lease.heartbeat_file(held.run, "ours", 0).read_text())
    assert beat["error"].startswith("--x: got 1")
    assert beat["exit_code"] == 2


def test_a_heartbeat_tells_where_the_rank_is(held: lease.Lease) -> None:
    with watching(held) as found:
        found.progress(3, "saving")
        time.sleep(1.2)
        beat = json.loads(lease.heartbeat_file(held.run, "ours", 0).read_text())
    assert (beat["step"], beat["phase"], beat["pid"]) == (3, "saving", os.getpid())
