"""metrics.jsonl as a stranger reads it: JSON lines, without the types of mgc_dist.events."""

from pathlib import Path
from typing import Any

from mgc_dist.events import StepEvent, ValidationEvent
from mgc_dist.files import json_lines


def read_metrics(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of one kind of event, in order; a line that a kill has cut is left out."""
    return [line for line in json_lines(run / "metrics.jsonl") if line["event"] == event]


def step_event(step: int, **values: Any) -> StepEvent:
    """A step with any figures."""
    figures = {"samples_seen": 10 * step, "epoch": 0.5, "loss": 1.5, "lr": 1e-5, "head_lr": 1e-3}
    figures |= {"grad_norm": 1.0, "step_s": 0.125, "segments_per_s": 100.0}
    figures |= {"data_wait_share": 0.002, "peak_memory_gib": 1.25}
    return StepEvent(step=step, **(figures | values))


def validation_event(samples_seen: int, **values: Any) -> ValidationEvent:
    """A validation with any figures."""
    figures = {"epoch": 1.0, "track_accuracy": 0.5, "track_macro_f1": 0.5, "track_nll": 1.0}
    figures |= {"segment_accuracy": 0.5, "confusion": [[1, 0], [0, 1]]}
    return ValidationEvent(samples_seen=samples_seen, **(figures | values))
