"""Figures are well-formed SVG whose marks lie where the numbers say."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from mgc_dist.report import svg
from mgc_dist.report.markup import Html
from mgc_dist.report.svg import Bar, Line

Element = ElementTree.Element


def parse(text: Html) -> Element:
    return ElementTree.fromstring(f"<div>{text}</div>")


def of_class(root: Element, name: str) -> Iterator[Element]:
    return (e for e in root.iter() if name in e.get("class", "").split())


def numbers(text: str | None) -> list[float]:
    return [float(x) for x in re.findall(r"-?[\d.]+(?:e-?\d+)?", text or "")]


def test_bars_are_as_long_as_their_values() -> None:
    drawn = [
        Bar(name="a", value=0.5, interval=(0.25, 0.75), mark=0.5, note="of 4"),
        Bar(name="b", value=1.0),
        Bar(name="none", value=None),
    ]
    root = parse(svg.bars("label", drawn, level=(0.25, "chance")))
    first, second = of_class(root, "bar")
    assert float(second.get("width", 0)) == pytest.approx(2 * float(first.get("width", 0)), abs=0.1)
    left, whole = float(first.get("x", 0)), float(second.get("width", 0))
    (whisker,) = of_class(root, "whisker")
    low, high = numbers(whisker.get("d"))[0], numbers(whisker.get("d"))[3]
    assert (low - left) / whole == pytest.approx(0.25, abs=1e-3)
    assert (high - left) / whole == pytest.approx(0.75, abs=1e-3)
    (level,) = of_class(root, "level")
    assert (float(level.get("x1", 0)) - left) / whole == pytest.approx(0.25, abs=1e-3)
    (whole,) = root.findall("svg")
    assert (whole.get("role"), whole.get("aria-label")) == ("img", "label")
    assert "a: 0.500, 0.250 to 0.750" in ElementTree.tostring(root, "unicode")


def test_lines_keep_order_scale_and_gaps() -> None:
    points = [(0.0, 1.0), (1.0, 3.0), (2.0, float("nan")), (4.0, 2.0)]
    root = parse(
        svg.lines(
            "label",
            [Line(name="one", points=points, dots=True), Line(name="two", points=[(2.0, 2.0)])],
            x_title="x",
            y_title="y",
            marks=[(2.0, "here")],
            level=(2.0, "half"),
        )
    )
    line, _ = of_class(root, "line")
    x0, y0, x1, y1, x2, y2 = numbers(line.get("points"))
    assert (x2 - x0) == pytest.approx(4 * (x1 - x0), abs=0.3)
    assert y1 < y2 < y0, "SVG's y goes down"
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert len(list(of_class(root, "dot"))) == 4
    (mark,) = of_class(root, "mark")
    assert float(mark.get("x1", 0)) == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert [e.text or "".join(e.itertext()) for e in root.findall("p/span")] == ["one", "two"]


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-9, 1e9])
def test_a_line_that_is_flat(value: float) -> None:
    flat = [(0.0, value), (1.0, value)]
    root = parse(svg.lines("l", [Line(name="", points=flat)], x_title="x", y_title="y"))
    (line,) = of_class(root, "line")
    _, y0, _, y1 = numbers(line.get("points"))
    assert y0 == y1
    assert svg.TOP <= y0 <= 230 - svg.BOTTOM


def test_long_lines_are_thinned_to_means() -> None:
    points = [(float(k), float(k % 2)) for k in range(100_000)]
    root = parse(svg.lines("l", [Line(name="", points=points)], x_title="x", y_title="y"))
    (line,) = of_class(root, "line")
    places = numbers(line.get("points"))
    assert len(places) <= 2 * svg.MOST_POINTS
    assert max(places[1::2]) - min(places[1::2]) < 1, "zeros and ones alternate: all means are 0.5"


def test_matrix_shades_by_row_and_names_by_truth() -> None:
    root = parse(svg.matrix("l", [[3, 1], [0, 0]], ["a", "a very long name of a genre"]))
    cells = list(of_class(root, "cell"))
    shades = [float(cell.get("fill-opacity", 0)) for cell in cells]
    assert shades == pytest.approx([0.04 + 0.96 * 0.75, 0.04 + 0.96 * 0.25, 0.04, 0.04], abs=1e-3)
    assert ["right" in cell.get("class", "") for cell in cells] == [True, False, False, True]
    titles = ["".join(e.itertext()) for e in root.iter("title")]
    assert "a taken for a very long name of a genre: 1 of 4" in titles
    assert "a very long name of a genre" in titles


def test_a_matrix_of_many_genres_scrolls() -> None:
    names = [f"genre {k}" for k in range(40)]
    root = parse(svg.matrix("l", [[0] * 40] * 40, names))
    (whole,) = root.findall("svg")
    assert float(numbers(whole.get("style"))[0]) > 700
    _, _, width, height = numbers(whole.get("viewBox"))
    for cell in of_class(root, "cell"):
        right = float(cell.get("x", 0)) + float(cell.get("width", 0))
        assert right <= width
        assert float(cell.get("y", 0)) + float(cell.get("height", 0)) <= height


def test_columns_and_bubbles() -> None:
    root = parse(svg.columns("l", [4, 0, 2, 0], x_title="x", y_title="y"))
    heights = [float(bar.get("height", 0)) for bar in of_class(root, "bar")]
    assert heights[1] == heights[3] == 0
    assert heights[0] == pytest.approx(2 * heights[2], abs=0.1)
    root = parse(svg.reliability("l", [0.5, 0.9], [0.5, 0.8], [1, 4]))
    small, large = of_class(root, "bubble")
    diagonal = next(of_class(root, "level"))
    ends = [float(diagonal.get(key, 0)) for key in ("x1", "y1", "x2", "y2")]
    place = (float(small.get("cx", 0)), float(small.get("cy", 0)))
    assert place == pytest.approx(((ends[0] + ends[2]) / 2, (ends[1] + ends[3]) / 2), abs=0.1)
    assert float(large.get("r", 0)) == pytest.approx(12)
    assert float(small.get("r", 0)) == pytest.approx(7.5)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3.0, 7.0), (2e-5, 1.9e-4), (0.4, 0.41), (0.0, 12345.0)]
)
def test_axes_cover_what_is_drawn(low: float, high: float) -> None:
    points = [(low, low), (high, high)]
    root = parse(svg.lines("l", [Line(name="", points=points)], x_title="x", y_title="y"))
    grid = list(of_class(root, "grid"))
    assert 3 <= len(grid) <= 8
    (line,) = of_class(root, "line")
    x0, y0, x1, y1 = numbers(line.get("points"))
    assert svg.LEFT - 0.1 <= x0 < x1 <= svg.WIDTH - svg.RIGHT + 0.1
    assert svg.TOP - 0.1 <= y1 < y0 <= 230 - svg.BOTTOM + 0.1
