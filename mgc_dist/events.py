"""What can happen in a run: a line of metrics.jsonl each, units in the names of the fields.

A field whose default is None is written only where it has a value. An event of an older version
lacks the fields that came later: they have their defaults.
"""

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        time_s: seconds since 1970; set when it is written.
        samples_seen: positions of the order that were consumed by then.
    """

    name: ClassVar[str]
    time_s: float = field(default=0.0, compare=False)
    samples_seen: int = 0

    def values(self) -> dict[str, Any]:
        """The fields that are written, in order, without the time."""
        return {
            _key(each): value
            for each in fields(self)[1:]
            if (value := getattr(self, each.name)) is not None or each.default is not None
        }


@dataclass(frozen=True, kw_only=True)
class StartEvent(Event):
    """A try begins; what came after its `samples_seen` before is undone."""

    name = "start"
    world: int = 1
    genres: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StepEvent(Event):
    """A step that was told of.

    Attributes:
        step: counted from 1.
        loss, grad_norm: None where they were not finite.
        lr, head_lr: of the backbone (of its last layer) and of the head.
        beta, mean_gain: how much the bias counts, where the loss has either.
        step_s, segments_per_s, data_wait_share: over the steps since the last event.
        model_tflop_per_s, mfu: of each rank.
        peak_memory_gib: of rank 0.
    """

    name = "step"
    step: int
    epoch: float
    loss: float | None
    lr: float
    head_lr: float
    grad_norm: float | None
    beta: float | None = None
    mean_gain: float | None = None
    step_s: float
    segments_per_s: float
    model_tflop_per_s: float | None = None
    mfu: float | None = None
    data_wait_share: float
    peak_memory_gib: float


@dataclass(frozen=True, kw_only=True)
class ValidationEvent(Event):
    """The validation split was walked.

    Attributes:
        exported: whether this model was written to RUN/best.
        select: what models are chosen by; version 0.1.0 did not write it.
        select_loss: what it amounts to, less is better; None where it was not finite, or not
            written, as by version 0.1.0.
        segments_not_finite: segments whose logits were not.
        confusion: tracks, [truth][guess].
    """

    name = "validation"
    exported: bool = False
    select: str = "macro-f1"
    select_loss: float | None = None
    segments_not_finite: int = 0
    epoch: float
    track_accuracy: float
    track_macro_f1: float
    track_nll: float | None
    segment_accuracy: float
    confusion: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class EmaValidationEvent(Event):
    """The same for the averages of the weights (`--ema-decay`), after the weights themselves.

    Attributes:
        exported: whether they were written to RUN/best-ema.
        select, select_loss, segments_not_finite: as above.
    """

    name = "ema_validation"
    exported: bool = False
    select: str
    select_loss: float | None = None
    segments_not_finite: int = 0
    epoch: float
    track_accuracy: float
    track_macro_f1: float
    track_nll: float | None
    segment_accuracy: float


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent(Event):
    """A checkpoint was saved, in `save_s` seconds."""

    name = "checkpoint"
    save_s: float


@dataclass(frozen=True, kw_only=True)
class SaveFailedEvent(Event):
    """A checkpoint, or the best model, could not be written at a step counted from 1."""

    name = "save_failed"
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class RefusedEvent(Event):
    """A step was not taken, because a number in it was not finite."""

    name = "refused"
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ChangedEvent(Event):
    """The run goes on with another setting (`--change`).

    Attributes:
        knob: as people are told of it.
        before, now: its values.
    """

    name = "changed"
    knob: str = field(metadata={"key": "name"})
    before: str
    now: str


@dataclass(frozen=True, kw_only=True)
class DoneEvent(Event):
    """The plan is done."""

    name = "done"


@dataclass(frozen=True, kw_only=True)
class StoppedEvent(Event):
    """The run was stopped on request, and all was saved."""

    name = "stopped"


KINDS: dict[str, type[Event]] = {
    kind.name: kind
    for kind in (
        *(StartEvent, StepEvent, ValidationEvent, EmaValidationEvent, CheckpointEvent),
        *(SaveFailedEvent, RefusedEvent, ChangedEvent, DoneEvent, StoppedEvent),
    )
}
E = TypeVar("E", bound=Event)


def _key(of: "Field[Any]") -> str:
    """How a field is called in the file."""
    return str(of.metadata.get("key", of.name))


def parsed(line: Mapping[str, Any]) -> Event | None:
    """The event of a line of metrics.jsonl; None where it is of no known kind, or lacks a field."""
    kind = KINDS.get(str(line.get("event")))
    if kind is None:
        return None
    known = {_key(each): each.name for each in fields(kind)}
    try:
        return kind(**{known[key]: value for key, value in line.items() if key in known})
    except TypeError:
        return None


def only(events: Iterable[Event], kind: type[E]) -> list[E]:
    """The events of one kind, in order."""
    return [event for event in events if isinstance(event, kind)]
