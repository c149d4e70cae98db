"""What a knob says of itself, where it stands: its range, and how it bears on a training's outcome.

    epochs: Annotated[float, Range(above=0, cure="10 is usual"), LEARNED] = 10.0

A field with these two is a whole knob of training: it is checked, it belongs to a run's identity,
`--change epochs` allows another value, and runs that differ in it are different settings.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from mgc_dist.errors import UserError

M = TypeVar("M")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The values that a number may have; None is always allowed where the type has it.

    Attributes:
        minimum, maximum: the value may be these.
        above, below: it may come near these.
        cure: what to do, or what is usual.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    cure: str

    def holds(self, value: float) -> bool:
        """Whether the value is one of the range; nan and infinity never are."""
        return math.isfinite(value) and all(
            (
                self.minimum is None or value >= self.minimum,
                self.maximum is None or value <= self.maximum,
                self.above is None or value > self.above,
                self.below is None or value < self.below,
            )
        )

    def __str__(self) -> str:
        least = f"above {self.above}" if self.minimum is None else str(self.minimum)
        most = f"below {self.below}" if self.maximum is None else str(self.maximum)
        return f"{least} to {most}"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """How a knob of training bears on the outcome.

    Attributes:
        identity: a checkpoint goes on only under the same value.
        change: the name after `--change` that allows another one; "" is the knob's own, and None
            means that no change is possible.
        condition: runs that differ in it are different settings where many are compared.
    """

    identity: bool = True
    change: str | None = ""
    condition: bool = True


LEARNED = Effect()
"""It changes what is learned."""
FIXED = Effect(change=None)
"""It changes what is learned, and an optimizer's state fits no other value."""
DRAWN = Effect(condition=False)
"""It changes what is learned by chance alone: a repetition of the same settings."""
FOUND = Effect(identity=False, condition=False)
"""It says where to look: the identity holds what was found there, under the knob's name."""
COMPARED = Effect(identity=False, change=None)
"""Checkpoints go on under another value, but settings that differ in it are compared."""


class Flat:
    """Marks a section whose knobs stand among its owner's in configuration files."""


FLAT = Flat()


def flag(name: str) -> str:
    """The flag of a knob: `--global-batch` of global_batch."""
    return f"--{name.replace('_', '-')}"


def hints(config_type: type[Any]) -> dict[str, Any]:
    """Type of each field by name, with its marks."""
    return typing.get_type_hints(config_type, include_extras=True)


def bare(hint: object) -> type[Any]:
    """A type without its marks."""
    is_marked = typing.get_origin(hint) is typing.Annotated
    return typing.cast(type[Any], typing.get_args(hint)[0] if is_marked else hint)


def mark(hint: object, kind: type[M]) -> M | None:
    """The mark of a kind that a type carries."""
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, kind)), None)


def effects(config_type: type[Any]) -> dict[str, Effect | None]:
    """Effect of every knob by name, those of sections too; None where it has none."""
    found: dict[str, Effect | None] = {}
    for name, hint in hints(config_type).items():
        section = bare(hint)
        if dataclasses.is_dataclass(section):
            found |= effects(typing.cast(type, section))
        else:
            found[name] = mark(hint, Effect)
    return found


def change_names(config_type: type[Any]) -> dict[str, tuple[str, ...]]:
    """Names after `--change`, and the knobs that each of them stands for."""
    found: dict[str, tuple[str, ...]] = {}
    for name, effect in effects(config_type).items():
        if effect and effect.change is not None:
            word = effect.change or flag(name).removeprefix("--")
            found[word] = (*found.get(word, ()), name)
    return found


def values(config: object) -> Iterator[tuple[str, Any]]:
    """Name and value of every knob, those of sections too."""
    for each in dataclasses.fields(typing.cast(Any, config)):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            yield from values(value)
        else:
            yield each.name, value


def check(config: object) -> None:
    """Check a section's values against the ranges of their fields.

    Raises:
        UserError: a value lies outside its range.
    """
    for name, hint in hints(type(config)).items():
        allowed, value = mark(hint, Range), getattr(config, name)
        if allowed and value is not None:
            require(flag(name), allowed.holds(value), value, str(allowed), allowed.cure)


def require(flag: str, ok: bool, got: object, expected: str, cure: str) -> None:
    """Check what no range of a single field can say.

    Raises:
        UserError: it is not so.
    """
    if not ok:
        raise UserError(flag, got=got, expected=expected, cure=cure)
