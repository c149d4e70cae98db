"""Numbers to PNG files: confusion matrix, reliability, differences, seeds.

Colours are Okabe and Ito's, which colour-blind people tell apart; shapes differ as well.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mgc_dist.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
MARKS = "os^Dv<>Phx"


def confusion(path: Path, counts: NDArray[np.int64], genres: Sequence[str], title: str) -> None:
    """Draw a confusion matrix; rows are the truth.

    Args:
        path: of the PNG.
        counts: int64 [K, K].
        genres: in label order.
        title: of the picture.
    """
    side = 2.2 + 0.55 * len(genres)
    figure = _figure(side + 0.8, side)
    axes = figure.add_subplot()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(genres)), genres, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(genres)), genres)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    for (truth, guess), count in np.ndenumerate(counts):
        if count:
            color = "white" if share[truth, guess] > 0.5 else "black"
            axes.text(guess, truth, str(count), ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true genre")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def reliability(
    path: Path,
    edges: NDArray[np.float64],
    count: NDArray[np.int64],
    confidence: NDArray[np.float64],
    accuracy: NDArray[np.float64],
    title: str,
) -> None:
    """Draw accuracy against confidence, and how many tracks have which confidence.

    Args:
        path: of the PNG.
        edges: float64 [bins + 1].
        count: int64 [bins].
        confidence: float64 [bins], NaN where empty.
        accuracy: float64 [bins], NaN where empty.
        title: of the picture.
    """
    figure = _figure(5.2, 5.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = count > 0
    widths = np.diff(edges)
    above.bar(
        edges[:-1][filled],
        accuracy[filled],
        widths[filled],
        align="edge",
        color=BLUE,
        edgecolor="white",
        label="accuracy of the bin",
    )
    above.plot(
        confidence[filled],
        accuracy[filled],
        "D",
        color=ORANGE,
        markeredgecolor="white",
        label="at its mean confidence",
    )
    above.plot((0, 1), (0, 1), "--", color=GREY, label="calibrated")
    above.set_ylabel("share of tracks that are right")
    above.set_ylim(0, 1.02)
    above.legend(loc="upper left", fontsize=9)
    below.bar(edges[:-1], count, widths, align="edge", color=GREY, edgecolor="white")
    below.set_ylabel("tracks")
    below.set_xlabel("confidence: probability of the predicted genre")
    below.set_xlim(0, 1)
    below.yaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def differences(
    path: Path,
    rows: Sequence[tuple[str, float, tuple[float, float] | None]],
    title: str,
    label: str,
    emphasised: int = 0,
) -> None:
    """Draw differences with intervals, one a line, the first at the top.

    Args:
        path: of the PNG.
        rows: name, difference and, where there is one, interval, as shares.
        title: of the picture.
        label: of the axis.
        emphasised: first rows that stand apart, such as the overall figures.
    """
    figure = _figure(7.0, 2.1 + 0.34 * len(rows))
    axes = figure.add_subplot()
    axes.axvline(0, color=GREY, linewidth=1)
    for place, (_, value, interval) in enumerate(rows):
        low, high = interval or (value, value)
        unsure = interval is None or low <= 0 <= high
        color = GREY if unsure else BLUE if value > 0 else ORANGE
        whole = place < emphasised
        axes.plot((100 * low, 100 * high), (place, place), color=color, lw=3 if whole else 1.8)
        face = color if interval else "white"
        mark = "D" if whole else "o"
        axes.plot(100 * value, place, mark, color=color, markersize=7, markerfacecolor=face)
    if emphasised:
        axes.axhline(emphasised - 0.5, color=GREY, linewidth=0.6, linestyle=":")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    note = "grey: the interval holds 0; hollow: all tracks alike, no interval"
    # of the figure: it is longer than the axis where names are long
    figure.supxlabel(f"{label}\n{note}", fontsize=9)
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def seeds(path: Path, panels: Mapping[str, Mapping[str, Mapping[int, float]]], title: str) -> None:
    """Draw a point a run: settings as lines, seeds as marks, the mean as a bar; a panel a figure.

    Args:
        path: of the PNG.
        panels: figure -> settings -> seed -> share; settings are the same in every panel.
        title: of the picture.
    """
    settings = list(next(iter(panels.values())))
    numbers = sorted({seed for panel in panels.values() for one in panel.values() for seed in one})
    figure = _figure(2.2 + 2.9 * len(panels), 2.2 + 0.55 * len(settings))
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, panel) in zip(columns, panels.items(), strict=True):
        for place, values in enumerate(panel.values()):
            for seed, value in values.items():
                rank = numbers.index(seed)
                offset = 0.36 * (rank / max(1, len(numbers) - 1) - 0.5) if len(numbers) > 1 else 0
                mark = MARKS[rank % len(MARKS)]
                axes.plot(100 * value, place + offset, mark, color=BLUE, markersize=6, alpha=0.8)
            if values:
                mean = 100 * float(np.mean(list(values.values())))
                axes.plot((mean, mean), (place - 0.3, place + 0.3), color=ORANGE, lw=2.5, zorder=1)
        axes.set_xlabel(f"{name}, %")
        axes.grid(axis="x", color="#DDDDDD")
        axes.set_axisbelow(True)
        axes.margins(x=0.12)
    columns[0].set_yticks(range(len(settings)), settings)
    columns[0].set_ylim(len(settings) - 0.5, -0.5)
    handles = [
        *(
            columns[0].plot([], [], MARKS[rank % len(MARKS)], color=BLUE, label=f"seed {seed}")[0]
            for rank, seed in enumerate(numbers)
        ),
        columns[0].plot([], [], color=ORANGE, linewidth=2.5, label="mean")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # half a second, only where something is drawn

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ is a letter of a genre's name
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
