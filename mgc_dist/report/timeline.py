"""Probabilities of genres over the time of one file: merged to rows for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Neighbouring segments of a file, merged.

    Attributes:
        start_s: start of the first one.
        end_s: end of the last one.
        segments: how many.
        probabilities: float64 [K], their mean.
    """

    start_s: float
    end_s: float
    segments: int
    probabilities: NDArray[np.float64]

    @property
    def best(self) -> int:
        """Label of the most probable genre."""
        return int(self.probabilities.argmax())


def merge(
    starts_s: Sequence[float],
    probabilities: NDArray[np.float64],
    *,
    segment_s: float,
    most: int,
) -> list[Stretch]:
    """At most `most` stretches of equally many neighbours (the last may be shorter).

    Args:
        starts_s: start of each segment, S of them, ascending.
        probabilities: float64 [S, K].
        segment_s: length of a segment.
        most: stretches; 1 or more.
    """
    size = -(-len(starts_s) // most)
    return [
        Stretch(
            start_s=starts_s[first],
            end_s=starts_s[min(first + size, len(starts_s)) - 1] + segment_s,
            segments=len(probabilities[first : first + size]),
            probabilities=probabilities[first : first + size].mean(axis=0),
        )
        for first in range(0, len(starts_s), size)
    ]


def clock(seconds: float) -> str:
    """`1:05.5`, and hours where there are any; tenths only where they are not zero."""
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    shown = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{shown}" if hours else f"{minutes}:{shown}"
