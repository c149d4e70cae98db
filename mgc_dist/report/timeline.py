"""Probabilities of genres over the time of one file: merged to rows for a terminal, and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def draw(
    path: Path,
    title: str,
    genres: Sequence[str],
    starts_s: Sequence[float],
    probabilities: NDArray[np.float64],
    *,
    hop_s: float,
) -> None:
    """A picture: a row a genre, the most probable on top; darker is more probable.

    Args:
        path: a .png, .svg or .pdf file; its folder is made.
        title: above it.
        genres: K names in label order.
        starts_s: start of each segment, S of them.
        probabilities: float64 [S, K].
        hop_s: from a segment's start to the next one's; a segment is drawn that wide.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    mean = probabilities.mean(axis=0)
    order = np.argsort(-mean, kind="stable")
    figure = Figure(figsize=(9, 1.6 + 0.34 * len(genres)), layout="constrained")
    axes = figure.add_subplot(xlabel="start of the segment, min:s")
    edges = [*starts_s, starts_s[-1] + hop_s]
    rows = np.arange(len(genres) + 1) - 0.5
    image = axes.pcolormesh(edges, rows, probabilities[:, order].T, cmap="Blues", vmin=0, vmax=1)
    best = probabilities[:, order].argmax(axis=1)
    middles = [start + hop_s / 2 for start in starts_s]
    dots = 40 if len(starts_s) <= 60 else 40 * 60 / len(starts_s)
    axes.scatter(middles, best, s=max(3.0, dots), color="darkorange", edgecolors="none", zorder=3)
    names = [f"{genres[k]}  {mean[k]:.2f}" for k in order]
    axes.set_yticks(range(len(genres)), names, parse_math=False)  # a $ is a letter of a name
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MultipleLocator(_tick_s(edges[-1])))
    axes.xaxis.set_major_formatter(lambda second, _: clock(max(0.0, second)))
    told = f"{title}\ndot: most probable genre of the segment"
    axes.set_title(told, fontsize=10, loc="left", parse_math=False)
    figure.colorbar(image, ax=axes, label="probability", shrink=0.9, pad=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _tick_s(length_s: float) -> float:
    """The shortest usual time of a clock of which at most ten go into a length."""
    usual = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    return next((step for step in usual if length_s / step <= 10), length_s / 10)
