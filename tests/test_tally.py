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

from mgc_dist import ranks
from mgc_dist.journal import Journal, read_metrics, read_status
from mgc_dist.plan import Plan
from mgc_dist.stop import Stop
from mgc_dist.tally import Meter, NonFiniteLoss, Tally

PLAN = Plan(rows=10, total=40, global_batch=4, seed=0)


def reduce_on_two_ranks() -> tuple[list[bool], list[float]]:
    stops, losses = [], []
    with ranks.join("cpu") as peers:
        tally = Tally(peers)
        for step in range(4):
            tally.add(torch.tensor(1.0 + step))
            tally.add(torch.tensor(float(peers.rank)))
            signalled = signal.SIGUSR1 if step == 1 and peers.rank == 1 else 0
            stops.append(tally.reduce(step, PLAN, signalled))
            if step != 2:  # reading now or later changes nothing
                losses.append(tally.latest())
    return stops, losses


def test_all_ranks_read_the_same_one_step_late() -> None:
    found = run_ranks(2, reduce_on_two_ranks)
    assert found[0] == found[1]
    stops, losses = found[0]
    assert stops == [False, False, True, False]
    assert losses == [(2 * (1 + step) + 1) / 4 for step in (0, 1, 3)]


def test_a_loss_that_is_not_finite_names_step_and_rows() -> None:
    with ranks.join("cpu") as peers:
        tally = Tally(peers)
        tally.add(torch.tensor(math.nan))
        tally.reduce(2, PLAN, 0)
        rows = ", ".join(str(p) for p in PLAN.places(torch.arange(8, 12).numpy()))
        with pytest.raises(
            NonFiniteLoss, match=f"loss of step 3 is nan; its training rows are {rows}"
        ):
            tally.latest()


def test_meter_leaves_pauses_out() -> None:
    class Waiting:
        wait_s = 0.0

    reader = Waiting()
    meter = Meter(reader, samples_seen=100)  # type: ignore[arg-type]
    time.sleep(0.1)
    reader.wait_s = 0.05
    with meter.paused():
        time.sleep(0.3)
    rate, wait = meter.read(110)
    assert rate == pytest.approx(100, rel=0.3)
    assert wait == pytest.approx(0.5, rel=0.3)


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
        journal.write("step", loss=loss)
        journal.write("validation", track_accuracy=0.5)
        journal.status("running", samples_seen=3)
        journal.close()
    assert [line["loss"] for line in read_metrics(tmp_path, "step")] == [1.5, 1.25]
    assert read_status(tmp_path) == {"state": "running", "samples_seen": 3}
    silent = Journal(tmp_path, writes=False)
    silent.write("step", loss=9.0)
    silent.status("done")
    silent.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 4
