"""Numbers to figures; each is drawn once, for files, for the page and for TensorBoard."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mgc_dist.report.canvas import (
    INK,
    MAIN,
    ON,
    SECOND,
    SOFT,
    WIDTH,
    blank,
    short,
    styled,
    tell,
)
from mgc_dist.report.timeline import clock
from mgc_dist.scoring.written import ReliabilityBins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MOST_POINTS = 300
"""Of a line; longer ones are drawn as means of neighbours."""
MARKS = "os^Dv<>Phx"
_SHARES = (0, 0.25, 0.5, 0.75, 1)

Point = tuple[float, float]
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart.

    Attributes:
        name: for the legend; "" keeps it out.
        points: (x, y), x ascending; those that are not finite are left out.
        color: of the canvas.
        faint: whether it is only the background of another one.
        dots: whether each point is marked.
    """

    name: str
    points: Sequence[Point]
    color: str = MAIN
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar from 0 to 1.

    Attributes:
        name: beside it.
        value: 0 to 1, or None where there is none.
        interval: its 95 % interval.
        mark: a second figure, drawn as a diamond.
        note: behind the value, such as a count.
    """

    name: str
    value: float | None
    interval: Sequence[float] | None = None
    mark: float | None = None
    note: str = ""


@styled
def confusion(counts: Sequence[Sequence[int]], genres: Sequence[str]) -> "Figure":
    """A confusion matrix: counts, shaded by their share of the row.

    Args:
        counts: [K, K], rows are the truth.
        genres: K names; numbers stand for them if there are not K.
    """
    from matplotlib.patches import Rectangle

    size = len(counts)
    whole = list(genres) if len(genres) == size else [str(k) for k in range(size)]
    names = [short(name) for name in whole]
    margin = 26 + 6.6 * max(map(len, names))
    cell = max(24.0, (WIDTH - margin) / size)
    figure = blank(margin + 8 + cell * size, margin + cell * size)
    axes = figure.add_subplot(xlim=(0, size), ylim=(size, 0), aspect="equal")
    for truth, row in enumerate(counts):
        total = sum(row)
        for guess, count in enumerate(row):
            share = count / total if total else 0.0
            color = MAIN if truth == guess else SECOND
            patch = Rectangle((guess, truth), 1, 1, color=color, alpha=0.04 + 0.96 * share, lw=0)
            told = f"{whole[truth]} taken for {whole[guess]}: {count} of {total}"
            tell(axes.add_patch(patch), told)
            if count:
                color = ON if share > 0.5 else INK
                axes.text(guess + 0.5, truth + 0.5, f"{count}", ha="center", va="center", c=color)
    middles = [k + 0.5 for k in range(size)]
    axes.set_xticks(middles, names, rotation=45, ha="left", rotation_mode="anchor", color=INK)
    axes.set_yticks(middles, names, color=INK)
    axes.xaxis.tick_top()
    axes.set_xlabel("predicted")
    axes.xaxis.set_label_position("top")
    axes.set_ylabel("truth")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


@styled
def reliability(bins: ReliabilityBins) -> "Figure":
    """Accuracy over confidence, bin by bin, and how many tracks are in each.

    Args:
        bins: `edges` of the bins, their `count`, mean `confidence` and `accuracy`; what is not
            finite, or None, is not drawn.
    """
    edges = [float(edge or 0) for edge in bins["edges"]]
    figure = blank(390)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = []
    for low, high, count, sure, right in zip(
        edges, edges[1:], bins["count"], bins["confidence"], bins["accuracy"], strict=False
    ):
        if count and sure is not None and right is not None:
            told = f"{count:g} tracks: confidence {sure:.3f}, right {right:.3f}"
            for axes, value, color in ((above, right, MAIN), (below, count, SOFT)):
                (bar,) = axes.bar(low, value, high - low, align="edge", color=color, alpha=0.55)
                tell(bar, told)
            filled.append((sure, right))
    above.plot(
        *zip(*filled, strict=True), "D", c=SECOND, ms=6, clip_on=False, label="at mean confidence"
    )
    above.plot((0, 1), (0, 1), "--", c=SOFT, lw=1, label="calibrated")
    above.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    above.legend(loc="upper left")
    below.set(xlabel="confidence: probability of the predicted genre", ylabel="tracks")
    _counts(below.yaxis)
    return figure


@styled
def bars(drawn: Sequence[Bar], *, level: float | None = None) -> "Figure":
    """Horizontal bars from 0 to 1, with intervals.

    Args:
        drawn: the bars, from the top.
        level: of a dashed vertical line.
    """
    figure = blank(34 + 24 * len(drawn))
    axes = figure.add_subplot(xlim=(0, 1), ylim=(len(drawn) - 0.4, -0.6), xticks=_SHARES)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(drawn)), [short(bar.name, 20) for bar in drawn], color=INK)
    axes.tick_params(axis="y", pad=8)
    axes.grid(visible=False, axis="y")
    if level is not None:
        axes.axvline(level, c=SOFT, lw=1, ls="--")
    for place, bar in enumerate(drawn):
        if bar.value is None:
            _beside(axes, 0, place, f"none {bar.note}", 6, color=SOFT, size=10)
            continue
        told = f"{bar.name}: {bar.value:.3f}"
        (patch,) = axes.barh(place, bar.value, 0.66, color=MAIN, alpha=0.55)
        if bar.interval:
            told += f", {bar.interval[0]:.3f} to {bar.interval[1]:.3f}"
            axes.plot(bar.interval, (place, place), "|-", c=INK, lw=1.3, ms=8, clip_on=False)
        tell(patch, told)
        if bar.mark is not None:
            (mark,) = axes.plot(bar.mark, place, "D", c=SECOND, ms=6, clip_on=False)
            tell(mark, f"{bar.name}: {bar.mark:.3f}")
        _beside(axes, 1, place, f"{bar.value:.2f}", 8)
        _beside(axes, 1, place, bar.note, 38, color=SOFT, size=10)
    return figure


def _counts(axis: "Axis") -> None:
    """Few ticks, whole and short: 25k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(4, integer=True))
    axis.set_major_formatter(EngFormatter(sep=""))


def _beside(
    axes: "Axes", x: float, y: float, text: str, away: float, color: str = INK, size: float = 11
) -> None:
    """Write points away from a place on the right, where constrained layout leaves room for it."""
    axes.annotate(
        text,
        (x, y),
        (away, 0),
        textcoords="offset points",
        va="center_baseline",
        annotation_clip=False,
        color=color,
        fontsize=size,
    )


@styled
def lines(
    drawn: Sequence[Line],
    *,
    x_title: str,
    y_title: str,
    y_range: Pair | None = None,
    level: tuple[float, str] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    height: float = 230,
) -> "Figure":
    """A chart of lines.

    Args:
        drawn: the lines; at least one point among them.
        x_title: below the axis.
        y_title: beside the axis.
        y_range: of the values, where it does not follow from them.
        level: a dashed horizontal line and its name.
        marks: dotted vertical lines and their names.
        height: in points of which the width has 360.
    """
    figure = blank(height)
    axes = figure.add_subplot(xlabel=x_title, ylabel=y_title)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    if level:
        axes.axhline(level[0], c=SOFT, lw=1, ls="--")
        at = axes.get_yaxis_transform()
        axes.text(
            0.5, level[0], level[1], c=SOFT, ha="center", va="bottom", fontsize=10, transform=at
        )
    for x, name in marks:
        tell(axes.axvline(x, c=SOFT, lw=1, ls=":"), name)
    for line in drawn:
        points = _thinned([point for point in line.points if all(map(math.isfinite, point))])
        alpha, width = (0.45, 1) if line.faint else (1, 2)
        xs, ys = ([point[k] for point in points] for k in (0, 1))
        axes.plot(xs, ys, c=line.color, alpha=alpha, lw=width, label=short(line.name, 20) or None)
        for x, y in points if line.dots or len(points) == 1 else ():
            (dot,) = axes.plot(x, y, "o", c=line.color, ms=5, clip_on=False)
            tell(dot, f"{line.name}: {y:.4g} at {x:.4g}")
    if y_range:
        axes.set_ylim(*y_range)
    if sum(bool(line.name) for line in drawn) > 1:
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def _thinned(points: list[Point]) -> list[Point]:
    size = -(-len(points) // MOST_POINTS)
    blocks = (points[k : k + size] for k in range(0, len(points), size or 1))
    return [
        (sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block))
        for block in blocks
    ]


@styled
def bias(counts: Sequence[int], genres: Mapping[str, tuple[int, int]], easy: float) -> "Figure":
    """What a bias model knows: probability of the truth, rows of each genre with it and against.

    Args:
        counts: training rows by tenths of the probability that is given to the truth.
        genres: genre -> training rows that it names rightly, and others.
        easy: share of rightly named rows above which nothing is left to learn.
    """
    figure = blank(230 + 76 + 24 * len(genres))
    parts = figure.subplots(2 if genres else 1, 1, squeeze=False, height_ratios=_heights(genres))
    upper = parts[0, 0]
    for tenth, count in enumerate(counts):
        (bar,) = upper.bar(tenth / 10, count, 0.1, align="edge", color=MAIN, alpha=0.55, ec=INK)
        tell(bar, f"{tenth / 10:g} to {(tenth + 1) / 10:g}: {count}")
    _counts(upper.yaxis)
    upper.set(xlabel="probability given to the true genre", ylabel="training segments", xlim=(0, 1))
    if genres:
        _aligned(parts[1, 0], genres, easy)
        _counts(parts[1, 0].xaxis)
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def _heights(genres: Mapping[str, tuple[int, int]]) -> list[float]:
    return [230, 56 + 24 * len(genres)] if genres else [1]


def _aligned(axes: "Axes", genres: Mapping[str, tuple[int, int]], easy: float) -> None:
    for place, (genre, (aligned, conflicting)) in enumerate(genres.items()):
        rows, first = aligned + conflicting, not place
        for left, value, color, name in (
            (0, aligned, SECOND, "bias model is right"),
            (aligned, conflicting, MAIN, "bias model is wrong"),
        ):
            (bar,) = axes.barh(
                place, value, 0.66, left=left, color=color, alpha=0.7, label=name if first else None
            )
            tell(bar, f"{genre}: {name} in {value} of {rows}")
        share = aligned / rows if rows else 0.0
        _beside(axes, rows, place, f"{100 * share:.0f} %{' !' if share > easy else ''}", 4)
    most = max(1, *(sum(rows) for rows in genres.values()))
    axes.set_yticks(range(len(genres)), [short(genre, 20) for genre in genres], color=INK)
    axes.set(xlabel="training segments", xlim=(0, 1.25 * most), ylim=(len(genres) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")


@styled
def differences(
    rows: Sequence[tuple[str, float, Pair | None]], label: str, emphasised: int = 0
) -> "Figure":
    """Differences with intervals, one a line, the first at the top.

    Args:
        rows: name, difference and, where there is one, interval, as shares.
        label: of the axis.
        emphasised: first rows that stand apart, such as the overall figures.
    """
    figure = blank(100 + 25 * len(rows), 504)
    axes = figure.add_subplot()
    axes.axvline(0, c=SOFT, lw=1)
    for place, (_, value, interval) in enumerate(rows):
        low, high = interval or (value, value)
        unsure = interval is None or low <= 0 <= high
        color = SOFT if unsure else MAIN if value > 0 else SECOND
        whole = place < emphasised
        axes.plot((100 * low, 100 * high), (place, place), c=color, lw=3 if whole else 1.8)
        face = color if interval else "white"
        axes.plot(100 * value, place, "D" if whole else "o", c=color, ms=7, markerfacecolor=face)
    if emphasised:
        axes.axhline(emphasised - 0.5, c=SOFT, lw=0.6, ls=":")
    axes.set_yticks(range(len(rows)), [short(name, 40) for name, _, _ in rows], color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    note = "grey: the interval holds 0; hollow: all tracks alike, no interval"
    # of the figure: it is longer than the axis where names are long
    figure.supxlabel(f"{label}\n{note}", fontsize=9, color=SOFT)
    return figure


@styled
def seeds(panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> "Figure":
    """A point a run: settings as lines, seeds as marks, the mean as a bar; a panel a figure.

    Args:
        panels: figure -> settings -> seed -> share; settings are the same in every panel.
    """
    settings = list(next(iter(panels.values())))
    numbers = sorted({seed for panel in panels.values() for one in panel.values() for seed in one})
    mark_of = {seed: MARKS[rank % len(MARKS)] for rank, seed in enumerate(numbers)}
    offset_of = dict(zip(numbers, np.linspace(-0.18, 0.18, len(numbers)), strict=True))
    figure = blank(160 + 40 * len(settings), 160 + 210 * len(panels))
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, panel) in zip(columns, panels.items(), strict=True):
        for place, values in enumerate(panel.values()):
            for seed, value in values.items():
                at = place + (offset_of[seed] if len(numbers) > 1 else 0)
                axes.plot(100 * value, at, mark_of[seed], c=MAIN, ms=6, alpha=0.8)
            if values:
                mean = 100 * float(np.mean(list(values.values())))
                axes.plot((mean, mean), (place - 0.3, place + 0.3), c=SECOND, lw=2.5, zorder=1)
        axes.set_xlabel(f"{name}, %")
        axes.margins(x=0.12)
    columns[0].set_yticks(range(len(settings)), settings, color=INK)
    columns[0].set_ylim(len(settings) - 0.5, -0.5)
    handles = [
        *(columns[0].plot([], [], m, c=MAIN, label=f"seed {n}")[0] for n, m in mark_of.items()),
        columns[0].plot([], [], c=SECOND, lw=2.5, label="mean")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    return figure


@styled
def timeline(
    genres: Sequence[str],
    starts_s: Sequence[float],
    probabilities: NDArray[np.float64],
    *,
    hop_s: float,
) -> "Figure":
    """Genres over the time of a file: a row a genre, the most probable on top; darker is surer.

    Args:
        genres: K names in label order.
        starts_s: start of each segment, S of them.
        probabilities: float64 [S, K].
        hop_s: from a segment's start to the next one's; a segment is drawn that wide.
    """
    from matplotlib.ticker import MultipleLocator

    mean = probabilities.mean(axis=0)
    order = np.argsort(-mean, kind="stable")
    figure = blank(90 + 25 * len(genres), 648)
    axes = figure.add_subplot(xlabel="start of the segment, min:s; dot: its most probable genre")
    edges = [*starts_s, starts_s[-1] + hop_s]
    rows = np.arange(len(genres) + 1) - 0.5
    image = axes.pcolormesh(edges, rows, probabilities[:, order].T, cmap="Blues", vmin=0, vmax=1)
    best = probabilities[:, order].argmax(axis=1)
    middles = [start + hop_s / 2 for start in starts_s]
    dots = 40 if len(starts_s) <= 60 else 40 * 60 / len(starts_s)
    axes.scatter(middles, best, s=max(3.0, dots), color=SECOND, edgecolors="none", zorder=3)
    names = [f"{short(genres[k], 30)}  {mean[k]:.2f}" for k in order]
    axes.set_yticks(range(len(genres)), names, color=INK)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MultipleLocator(_tick_s(edges[-1])))
    axes.xaxis.set_major_formatter(lambda second, _: clock(max(0.0, second)))
    figure.colorbar(image, ax=axes, label="probability", shrink=0.9, pad=0.01)
    return figure


def _tick_s(length_s: float) -> float:
    """The shortest usual time of a clock of which at most ten go into a length."""
    usual = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    return next((step for step in usual if length_s / step <= 10), length_s / 10)


PICTURES: Mapping[str, Callable[[Any, Sequence[str]], "Figure"]] = {"confusion": confusion}
"""Of a run's events, for TensorBoard: key -> how its value is drawn, given the genres."""
