"""Figures: marks lie where the numbers say, no text reaches over the edge, files are whole."""

import math
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mgc_dist.report import canvas, figures
from mgc_dist.report.figures import Bar, Line

GENRES = ["$\\frac$", "an uncommonly long name of a genre", *"cdefghij"]
LABEL = "difference in points (recall of a genre, accuracy of a subgroup), 95 % over groups"


def confusion() -> Figure:
    return figures.confusion(np.random.default_rng(0).integers(0, 30, (10, 10)).tolist(), GENRES)


def many() -> Figure:
    return figures.confusion([[1] * 40] * 40, [f"genre {k}" for k in range(40)])


def reliability() -> Figure:
    share = [None, 0.0, 0.5, 1.0, None]
    bins = {"edges": [0, 0.2, 0.4, 0.6, 0.8, 1], "count": [0, 5, 10, 100, 0]}
    return figures.reliability(bins | {"confidence": share, "accuracy": share})


def bars() -> Figure:
    drawn = [Bar(name=g, value=1.0, interval=(0, 1), mark=1.0, note="of 1234") for g in GENRES]
    return figures.bars([*drawn, Bar(name="none", value=None, note="of 0")], level=0.1)


def lines() -> Figure:
    drawn = [Line(name=g, points=[(0, 1e5), (1, 3e5)], dots=True) for g in GENRES[:2]]
    return figures.lines(
        drawn, x_title="x", y_title="y", marks=[(1, "m")], level=(2e5, "a long name"), height=180
    )


def bias() -> Figure:
    return figures.bias([5] * 10, {genre: (100_000, k) for k, genre in enumerate(GENRES)}, 0.95)


def differences() -> Figure:
    rows = [(f"{genre} (29)", 0.1, (-0.1, 0.2)) for genre in GENRES]
    return figures.differences([*rows, ("alike", 0.0, None)], LABEL, 2)


def seeds() -> Figure:
    settings = {
        f"loss=poe beta={beta} lr=0.0001": {s: 0.5 + s / 10 for s in range(12)} for beta in range(4)
    }
    return figures.seeds(
        {
            "accuracy": settings | {"none": {}},
            "accuracy of bias-conflicting": settings | {"none": {}},
        }
    )


def timeline() -> Figure:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(10), 40)
    return figures.timeline(GENRES, [1.5 * k for k in range(40)], probabilities, hop_s=1.5)


ALL = (confusion, many, reliability, bars, lines, bias, differences, seeds, timeline)


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("title", ["", "a run of a long name, test-of-mine: 100 tracks " * 2])
def test_no_text_is_clipped(draw: Callable[[], Figure], title: str, tmp_path: Path) -> None:
    figure = draw()
    canvas.save(figure, tmp_path / "new" / "a.png", title)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    box = figure.get_tightbbox(renderer)  # of all that is drawn, in inches
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01
    (path,) = (tmp_path / "new").iterdir()
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_bar_stands_where_its_bin_is() -> None:
    bins = {"edges": [0, 0.5, 1], "count": [0, 4]}
    found = figures.reliability(bins | {"confidence": [None, 0.9], "accuracy": [None, 0.75]})
    above, below = found.axes
    (bar,) = above.patches
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (0.5, 0.5, 0.75)
    assert [bar.get_height() for bar in below.patches] == [4]


def test_bars_are_as_long_as_their_values() -> None:
    drawn = [Bar(name="a", value=0.5, interval=(0.25, 0.75), mark=0.5), Bar(name="b", value=1.0)]
    (axes,) = figures.bars([*drawn, Bar(name="none", value=None)], level=0.25).axes
    assert [bar.get_width() for bar in axes.patches] == [0.5, 1.0]
    level, whisker, diamond = axes.lines
    assert list(level.get_xdata()) == [0.25, 0.25]
    assert list(whisker.get_xdata()) == [0.25, 0.75]
    assert list(diamond.get_xdata()) == [0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "none"]


def test_lines_leave_out_what_is_not_finite() -> None:
    points = [(0.0, 1.0), (1.0, 3.0), (2.0, math.nan), (4.0, 2.0)]
    line = Line(name="one", points=points)
    (axes,) = figures.lines([line], x_title="x", y_title="y", marks=[(2.0, "here")]).axes
    mark, one = axes.lines
    assert list(mark.get_xdata()) == [2.0, 2.0]
    assert list(one.get_xdata()) == [0.0, 1.0, 4.0]
    assert list(one.get_ydata()) == [1.0, 3.0, 2.0]


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-9, 1e9])
def test_a_line_that_is_flat(value: float) -> None:
    line = Line(name="", points=[(0.0, value), (1.0, value)])
    (axes,) = figures.lines([line], x_title="x", y_title="y").axes
    low, high = axes.get_ylim()
    assert low < value < high


def test_long_lines_are_thinned_to_means() -> None:
    points = [(float(k), float(k % 2)) for k in range(100_000)]
    (axes,) = figures.lines([Line(name="", points=points)], x_title="x", y_title="y").axes
    values = axes.lines[0].get_ydata()
    assert 100 < len(values) <= figures.MOST_POINTS
    assert set(values) == {0.5}, "zeros and ones alternate"


def test_a_matrix_is_shaded_by_row_and_tells_of_each_cell() -> None:
    figure = figures.confusion([[3, 1], [0, 0]], ["a", "a very long name of a genre"])
    cells = figure.axes[0].patches
    assert [cell.get_alpha() for cell in cells] == pytest.approx([0.76, 0.28, 0.04, 0.04])
    colors = [cell.get_facecolor()[:3] for cell in cells]
    assert colors[0] == colors[3] != colors[1] == colors[2]
    text = canvas.inline(figure, "x", "l")
    assert "a taken for a very long name of a genre: 1 of 4</title>" in text


def test_the_bias_figure_shows_what_is_left_to_learn() -> None:
    upper, lower = figures.bias([4, 0, 2], {"easy": (96, 4), "hard": (1, 3)}, 0.95).axes
    assert [bar.get_height() for bar in upper.patches] == [4, 0, 2]
    assert [(b.get_x(), b.get_width()) for b in lower.patches] == [(0, 96), (96, 4), (0, 1), (1, 3)]
    assert [text.get_text() for text in lower.texts] == ["96 % !", "25 %"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize("segments", [1, 40])
def test_a_timeline_in_any_format(suffix: str, segments: int, tmp_path: Path) -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), segments)
    path = tmp_path / "new" / f"x{suffix}"
    starts = [1.5 * k for k in range(segments)]
    figure = figures.timeline(("a", "$b", "$\\c$"), starts, probabilities, hop_s=1.5)
    canvas.save(figure, path, "no $\\frac$ formula")
    begin = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(begin)


@pytest.mark.parametrize("draw", ALL)
def test_a_page_gets_text_its_own_colours_and_a_label(draw: Callable[[], Figure]) -> None:
    figure = draw()
    root = ElementTree.fromstring(canvas.inline(figure, "name", "what it shows"))
    assert (root.tag, root.get("role"), root.get("aria-label")) == ("svg", "img", "what it shows")
    assert {e.tag for e in root.iter()} & {"text"}, "text is text, not paths"
    assert not {e.tag for e in root.iter()} & {"style", "metadata"}, "of the whole page"
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("name-") for name in ids)
    width = 72 * figure.get_size_inches()[0]
    assert ("min-width" in root.get("style", "")) == (width > canvas.WIDTH), "wide ones scroll"
    if draw is not timeline:  # whose colour map is not of a page
        colors = " ".join(e.get("style", "") for e in root.iter())
        assert "var(--soft)" in colors
        assert "font-family" not in colors
        assert "#" not in colors.replace("url(#", "").replace("#ffffff", "")


def test_colours_can_be_told_apart() -> None:
    light, dark = zip(*canvas.PALETTE.values(), strict=True)
    assert len(set(light)) == len(light)
    assert len(set(dark)) == len(dark)
