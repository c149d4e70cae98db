"""The packed reduction: read one step late, alike on all ranks; the meter; the journal."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from metrics import read_metrics, step_event, validation_event

from mgc_dist.cluster import ranks
from mgc_dist.cluster.stop import Stop
from mgc_dist.journal import Journal, read_status
from mgc_dist.training.meters import Laggards, Meter, Tally


def reduce_on_two_ranks() -> tuple[list[bool], list[float]]:
    stops, losses = [], []
    with ranks.join("cpu") as peers:
        tally = Tally(peers)
        for step in range(4):
            tally.add(torch.tensor(1.0 + step))
            tally.add(torch.tensor(float(peers.rank)))
            asked = step == 1 and peers.rank == 1
            stops.append(tally.reduce(asked))
            if step != 2:  # reading now or later changes nothing
                losses.append(tally.latest())
    return stops, losses


def test_all_ranks_read_the_same_one_step_late() -> None:
    found = run_ranks(2, reduce_on_two_ranks)
    assert found[0] == found[1]
    stops, losses = found[0]
    assert stops == [False, False, True, False]
    assert losses == [2 * (1 + step) + 1 for step in (0, 1, 3)]


def test_a_loss_that_is_not_finite_is_passed_on() -> None:
    with ranks.join("cpu") as peers:
        tally = Tally(peers)
        tally.add(torch.tensor(math.nan))
        tally.reduce(False)
        assert math.isnan(tally.latest())


def look() -> list[str]:
    with ranks.join("cpu") as peers:
        laggards = Laggards()
        return [laggards.all_look(2.0 if peers.rank == 1 else 1.0, peers) for _ in range(4)]


def test_a_slow_rank_is_named_after_three_windows() -> None:
    said = "rank 1 is slow: 2.00 s of reading and forward passes, median 1.00 s"
    assert run_ranks(3, look) == [["", "", said, said]] * 3


def test_meter_leaves_pauses_out() -> None:
    class Waiting:
        wait_s = 0.0

    reader = Waiting()
    meter = Meter(reader, samples_seen=100, step=7)  # type: ignore[arg-type]
    time.sleep(0.1)
    reader.wait_s = 0.05
    with meter.paused():
        time.sleep(0.3)
    window = meter.read(110, 9)
    assert window.own_s == pytest.approx(0.05)
    assert window.segments_per_s == pytest.approx(100, rel=0.3)
    assert window.step_s == pytest.approx(0.05, rel=0.3)
    assert window.wait_share == pytest.approx(0.5, rel=0.3)
    assert meter.read(110, 9).segments_per_s == 0  # a new window; nothing has been done in it


def test_stop_records_and_survives_repetition() -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        stop = Stop().listen()
        assert stop.signal == 0
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert stop.signal == number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_journal_appends_lines_and_replaces_the_status(tmp_path: Path) -> None:
    assert read_status(tmp_path) == {}
    assert read_metrics(tmp_path, "step") == []
    for loss in (1.5, 1.25):
        journal = Journal(tmp_path, writes=True)
        journal.write(step_event(1, loss=loss))
        journal.write(validation_event(10))
        journal.status("running", samples_seen=3)
        journal.close()
    assert [line["loss"] for line in read_metrics(tmp_path, "step")] == [1.5, 1.25]
    assert read_status(tmp_path) == {"state": "running", "samples_seen": 3}
    silent = Journal(tmp_path, writes=False)
    silent.write(step_event(1))
    silent.status("done")
    silent.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 4


def test_journal_keeps_what_a_full_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from mgc_dist import journal as module

    write, full = module.write_at, [False]

    def writing(file, offset, data):
        if full[0]:
            write(file, offset, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, offset, data)

    monkeypatch.setattr(module, "write_at", writing)
    journal = Journal(tmp_path, writes=True)
    for number in range(4):
        full[0] = number in (1, 2)
        journal.write(step_event(number))
    journal.close()
    assert [line["step"] for line in read_metrics(tmp_path, "step")] == [0, 1, 2, 3]


def test_journal_goes_on_after_a_line_that_a_kill_has_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "st')
    journal = Journal(tmp_path, writes=True)
    journal.write(step_event(2, loss=math.nan))
    journal.close()
    found = read_metrics(tmp_path, "step")
    assert [line["step"] for line in found] == [1, 2]
    assert found[1]["loss"] is None
