"""Events: what is written of one is read back as it was, and older files are read."""

import json
import math
from pathlib import Path

from metrics import step_event, validation_event

from mgc_dist.events import ChangedEvent, Event, SaveFailedEvent, StartEvent, StepEvent, only
from mgc_dist.journal import Journal, read_events


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    events: list[Event] = [
        StartEvent(samples_seen=0, world=2, genres=["blues", "日本の曲"]),
        step_event(1, beta=0.5),
        step_event(2, mean_gain=0.25, grad_norm=None, mfu=0.5, model_tflop_per_s=3.5),
        validation_event(20, exported=True, select="nll", select_loss=0.5),
        ChangedEvent(samples_seen=20, knob="--lr", before="1e-05", now="2e-05"),
        SaveFailedEvent(samples_seen=20, step=2, reason="no room"),
    ]
    journal = Journal(tmp_path, writes=True)
    for event in events:
        journal.write(event)
    journal.close()
    found = read_events(tmp_path)
    assert found == events
    assert all(event.time_s > 1.7e9 for event in found)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines[:2]] == ["start", "step"]
    assert "mfu" not in lines[1], "no value, no key"
    assert lines[2]["grad_norm"] is None, "a norm that was not finite is said"
    assert lines[4]["name"] == "--lr", "as version 0.1.0 called it"


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path, writes=True)
    journal.write(step_event(1, loss=math.nan))
    journal.close()
    (step,) = only(read_events(tmp_path), StepEvent)
    assert step.loss is None


def test_lines_of_other_versions(tmp_path: Path) -> None:
    lines = [
        {"event": "start", "time_s": 5.0, "samples_seen": 0},
        {"event": "moon", "time_s": 6.0},
        {"event": "step", "time_s": 7.0, "step": 1},
        {"event": "checkpoint", "time_s": 8.0, "samples_seen": 3, "save_s": 0.5, "later": 1},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"event": "st')
    found = read_events(tmp_path)
    assert [event.name for event in found] == ["start", "checkpoint"], "no step without figures"
    assert [event.time_s for event in found] == [5.0, 8.0]
