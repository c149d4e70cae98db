"""Figures as inline SVG: drawn for the width of a phone, growing with the page, its CSS colours.

A figure is 360 units wide, as many as a phone has pixels, and its text 12 units high. Every
figure has a role, a label for those who do not see it, and a <title> on each mark.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mgc_dist.report.markup import Html, join, tag

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
MOST_POINTS = 300
"""Of a line; longer ones are drawn as means of neighbours."""

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart.

    Attributes:
        name: for the legend; "" keeps it out.
        points: (x, y), x ascending; those that are not finite are left out.
        style: CSS class: main, second, faint.
        dots: whether each point is marked.
    """

    name: str
    points: Sequence[Point]
    style: str = "main"
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
    interval: tuple[float, float] | None = None
    mark: float | None = None
    note: str = ""


def lines(
    label: str,
    drawn: Sequence[Line],
    *,
    x_title: str,
    y_title: str,
    y_range: tuple[float, float] | None = None,
    level: tuple[float, str] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    height: int = 230,
) -> Html:
    """A chart of lines.

    Args:
        label: what it shows, for those who do not see it.
        drawn: the lines; at least one point among them.
        x_title: below the axis.
        y_title: beside the axis.
        y_range: of the values, where it does not follow from them.
        level: a dashed horizontal line and its name.
        marks: dotted vertical lines and their names.
        height: in units of which the width has 360.
    """
    kept = [(line, _thinned(_finite(line.points))) for line in drawn]
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    x_ticks, (low_x, high_x) = _ticks(min(xs), max(xs))
    y_ticks, (low_y, high_y) = _ticks(*(y_range or (min(ys), max(ys))))
    at_x = _scale(low_x, high_x, LEFT, WIDTH - RIGHT)
    at_y = _scale(low_y, high_y, height - BOTTOM, TOP)
    parts = [_axes(x_ticks, y_ticks, at_x, at_y, height, x_title, y_title)]
    if level:
        y = at_y(level[0])
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="level"))
        parts.append(_text(WIDTH - RIGHT, y - 4, level[1], "end small"))
    for x, name in marks:
        place = at_x(x)
        parts.append(
            tag(
                "line",
                tag("title", name),
                x1=place,
                x2=place,
                y1=TOP,
                y2=height - BOTTOM,
                class_="mark",
            )
        )
    for line, points in kept:
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        parts.append(tag("polyline", points=path, class_=f"line {line.style}"))
        if line.dots or len(points) == 1:
            parts += [
                tag(
                    "circle",
                    tag("title", f"{line.name}: {y:.4g} at {x:.4g}"),
                    cx=at_x(x),
                    cy=at_y(y),
                    r=3,
                    class_=f"dot {line.style}",
                )
                for x, y in points
            ]
    return join(legend(drawn), frame(label, height, *parts))


def legend(drawn: Sequence[Line]) -> Html | None:
    """Names of lines beside their colours, where there is more than one."""
    named = [line for line in drawn if line.name]
    if len(named) < 2:
        return None
    items = (
        tag("span", tag("i", class_=f"key {line.style}", aria_hidden="true"), line.name)
        for line in named
    )
    return tag("p", *items, class_="legend")


def bars(label: str, drawn: Sequence[Bar], *, level: tuple[float, str] | None = None) -> Html:
    """Horizontal bars from 0 to 1, with intervals.

    Args:
        label: what it shows, for those who do not see it.
        drawn: the bars, from the top.
        level: a dashed vertical line and its name.
    """
    left = min(150, 14 + 6.3 * max(len(bar.name) for bar in drawn))
    right, step = 84, 24
    height = TOP + step * len(drawn) + 24
    at = _scale(0, 1, left, WIDTH - right)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = at(tick)
        parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=height - 24, class_="grid"))
        parts.append(_text(x, height - 8, f"{tick:g}", "middle small"))
    for number, bar in enumerate(drawn):
        parts.append(_bar(bar, TOP + step * number, step, left, at))
    if level:
        x = at(level[0])
        parts.append(
            tag(
                "line",
                tag("title", level[1]),
                x1=x,
                x2=x,
                y1=TOP,
                y2=height - 24,
                class_="level",
            )
        )
    return frame(label, height, *parts)


def _bar(bar: Bar, top: float, step: float, left: float, at: Scale) -> Html:
    middle = top + step / 2
    most = int((left - 10) / 6.3)
    name = bar.name if len(bar.name) <= most else bar.name[: most - 1] + "…"
    parts = [_text(left - 6, middle + 4, name, "end", whole=bar.name)]
    if bar.value is None:
        return join(*parts, _text(at(0) + 6, middle + 4, f"none {bar.note}", "small"))
    parts.append(
        tag(
            "rect",
            x=at(0),
            y=top + 4,
            width=max(0.5, at(bar.value) - at(0)),
            height=step - 8,
            class_="bar",
        )
    )
    shown = f"{bar.name}: {bar.value:.3f}"
    if bar.interval:
        low, high = (at(value) for value in bar.interval)
        shown += f", {bar.interval[0]:.3f} to {bar.interval[1]:.3f}"
        ends = f"M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"
        whisker = f"{ends}M{low:.1f} {middle}H{high:.1f}"
        parts.append(tag("path", d=whisker, class_="whisker"))
    if bar.mark is not None:
        x = at(bar.mark)
        diamond = f"M{x:.1f} {middle - 5}l5 5l-5 5l-5 -5z"
        parts.append(tag("path", tag("title", f"{bar.mark:.3f}"), d=diamond, class_="diamond"))
    parts.append(_text(at(1) + 8, middle + 4, f"{bar.value:.2f}", ""))
    parts.append(_text(at(1) + 38, middle + 4, bar.note, "small"))
    return tag("g", tag("title", shown), *parts)


def columns(label: str, counts: Sequence[float], *, x_title: str, y_title: str) -> Html:
    """A histogram over equal parts of 0 to 1.

    Args:
        label: what it shows, for those who do not see it.
        counts: of each part.
        x_title: below the axis.
        y_title: beside the axis.
    """
    height = 200
    y_ticks, (low, high) = _ticks(0, max([*counts, 1]))
    at_x, at_y = _scale(0, 1, LEFT, WIDTH - RIGHT), _scale(low, high, height - BOTTOM, TOP)
    parts = [_axes([0, 0.2, 0.4, 0.6, 0.8, 1], y_ticks, at_x, at_y, height, x_title, y_title)]
    width = 1 / len(counts)
    for number, count in enumerate(counts):
        edges = f"{number * width:.2g} to {(number + 1) * width:.2g}"
        parts.append(
            tag(
                "rect",
                tag("title", f"{edges}: {count:g}"),
                x=at_x(number * width) + 1,
                y=at_y(count),
                width=at_x(width) - at_x(0) - 2,
                height=at_y(0) - at_y(count),
                class_="bar",
            )
        )
    return frame(label, height, *parts)


def reliability(
    label: str, confidence: Sequence[float], accuracy: Sequence[float], count: Sequence[float]
) -> Html:
    """Accuracy over confidence, a circle a bin whose area is its count; the diagonal is ideal.

    Args:
        label: what it shows, for those who do not see it.
        confidence: mean of each bin.
        accuracy: share of each bin that is right.
        count: tracks in each bin; empty bins are not drawn.
    """
    height, most = 300, max([*count, 1])
    ticks = [0, 0.25, 0.5, 0.75, 1]
    at_x, at_y = _scale(0, 1, LEFT, WIDTH - RIGHT), _scale(0, 1, height - BOTTOM, TOP)
    parts = [_axes(ticks, ticks, at_x, at_y, height, "confidence", "share that is right")]
    parts.append(tag("line", x1=at_x(0), y1=at_y(0), x2=at_x(1), y2=at_y(1), class_="level"))
    bins = [b for b in zip(confidence, accuracy, count, strict=True) if b[2]]
    path = " ".join(f"{at_x(sure):.1f},{at_y(right):.1f}" for sure, right, _ in bins)
    parts.append(tag("polyline", points=path, class_="line main"))
    for sure, right, size in bins:
        told = f"{size:g} tracks: confidence {sure:.3f}, right {right:.3f}"
        parts.append(
            tag(
                "circle",
                tag("title", told),
                cx=at_x(sure),
                cy=at_y(right),
                r=3 + 9 * math.sqrt(size / most),
                class_="bubble",
            )
        )
    return frame(label, height, *parts)


def matrix(label: str, counts: Sequence[Sequence[int]], names: Sequence[str]) -> Html:
    """A confusion matrix: counts, shaded by their share of the row.

    Args:
        label: what it shows, for those who do not see it.
        counts: [K, K], rows are the truth.
        names: of the K genres.
    """
    longest = min(14, max(map(len, names)))
    left = top = 22 + 6.3 * longest
    cell = max(22.0, (WIDTH - left - 4) / len(names))
    width, height = left + cell * len(names) + 4, top * 0.86 + cell * len(names) + 4
    top *= 0.86
    parts = [_text(2, 14, "truth ↓   predicted →", "small")]
    for number, name in enumerate(names):
        short = name if len(name) <= 14 else name[:13] + "…"
        middle = cell * (number + 0.5)
        parts.append(_text(left - 6, top + middle + 4, short, "end", whole=name))
        x, y = left + middle + 4, top - 6
        parts.append(_text(x, y, short, "", whole=name, turn=f"rotate(-60 {x:.1f} {y:.1f})"))
    for truth, row in enumerate(counts):
        total = sum(row)
        for guess, count in enumerate(row):
            share = count / total if total else 0.0
            told = f"{names[truth]} taken for {names[guess]}: {count} of {total}"
            x, y = left + cell * guess, top + cell * truth
            parts.append(
                tag(
                    "rect",
                    tag("title", told),
                    x=x,
                    y=y,
                    width=cell - 1,
                    height=cell - 1,
                    class_="cell right" if truth == guess else "cell",
                    fill_opacity=round(0.04 + 0.96 * share, 3),
                )
            )
            if count:
                dark = " on" if share > 0.5 else ""
                parts.append(_text(x + cell / 2, y + cell / 2 + 4, str(count), f"middle{dark}"))
    return frame(label, height, *parts, width=width)


def frame(label: str, height: float, *parts: Html, width: float = WIDTH) -> Html:
    """The frame of a figure: as wide as its place, and scrolled where 360 units are too few."""
    wide = f"min-width:{width * 0.9:.0f}px" if width > WIDTH else None
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        aria_label=label,
        style=wide,
    )


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    at_x: Scale,
    at_y: Scale,
    height: float,
    x_title: str,
    y_title: str,
) -> Html:
    parts = []
    bottom = height - BOTTOM
    for tick in y_ticks:
        y = at_y(tick)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(_text(LEFT - 6, y + 4, _number(tick), "end small"))
    for tick in x_ticks:
        parts.append(_text(at_x(tick), bottom + 15, _number(tick), "middle small"))
    x, y = 11, (bottom + TOP) / 2
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 5, x_title, "middle small"))
    parts.append(_text(x, y, y_title, "middle small", turn=f"rotate(-90 {x} {y:.1f})"))
    return tag("g", *parts)


def _text(
    x: float, y: float, text: str, style: str, *, whole: str = "", turn: str | None = None
) -> Html:
    full = tag("title", whole) if whole and whole != text else None
    return tag("text", full, text, x=x, y=y, class_=style or None, transform=turn)


def _scale(low: float, high: float, first: float, last: float) -> Scale:
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _ticks(low: float, high: float) -> tuple[list[float], tuple[float, float]]:
    """Round numbers that cover a range, four to seven of them, and the first and last."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(step * k, 12) for k in range(first, last + 1)]
    return ticks, (ticks[0], ticks[-1])


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:g}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: list[Point]) -> list[Point]:
    size = -(-len(points) // MOST_POINTS)
    if size < 2:
        return points
    blocks = (points[k : k + size] for k in range(0, len(points), size))
    return [
        (sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block))
        for block in blocks
    ]
