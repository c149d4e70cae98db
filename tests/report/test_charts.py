"""Pictures: written whole, and no text reaches over the edge."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mgc_dist.report import figures as charts

GENRES = ["$\\frac$", "an uncommonly long name of a genre", *"cdefghij"]
LABEL = "difference in points (recall of a genre, accuracy of a subgroup), 95 % over groups"


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that is drawn."""
    kept: list[Figure] = []
    figure = charts._figure

    def keep(width: float, height: float) -> Figure:
        kept.append(figure(width, height))
        return kept[-1]

    monkeypatch.setattr(charts, "_figure", keep)
    return kept


def draw_all(folder: Path) -> None:
    rng = np.random.default_rng(0)
    charts.confusion(folder / "a.png", rng.integers(0, 30, (10, 10)), GENRES, "a title")
    count = np.array([0, 5, 10, 100, 0])
    share = np.where(count > 0, np.linspace(0, 1, 5), np.nan)
    charts.reliability(folder / "b.png", np.linspace(0, 1, 6), count, share, share, "a title")
    rows = [(f"{genre} (29)", 0.1, (-0.1, 0.2)) for genre in GENRES]
    charts.differences(folder / "c.png", [*rows, ("alike", 0.0, None)], "a title", LABEL, 2)
    settings = {
        f"loss=poe beta={beta} lr=0.0001": {s: 0.5 + s / 10 for s in range(12)} for beta in range(4)
    }
    panels = {"accuracy": settings, "accuracy of bias-conflicting": settings | {"none": {}}}
    panels["accuracy"] = settings | {"none": {}}
    charts.seeds(folder / "d.png", panels, "a title")


def test_no_text_is_clipped(figures: list[Figure], tmp_path: Path) -> None:
    draw_all(tmp_path / "new")
    assert len(figures) == 4
    for figure in figures:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        box = figure.get_tightbbox(renderer)  # of all that is drawn, in inches
        width, height = figure.get_size_inches()
        assert min(box.x0, box.y0) >= -0.01
        assert box.x1 <= width + 0.01
        assert box.y1 <= height + 0.01


def test_files_are_pictures_and_nothing_is_left_aside(tmp_path: Path) -> None:
    draw_all(tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["a.png", "b.png", "c.png", "d.png"]
    for name in names:
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


def test_a_bar_stands_where_its_bin_is(figures: list[Figure], tmp_path: Path) -> None:
    count, share = np.array([0, 4]), np.array([np.nan, 0.75])
    charts.reliability(tmp_path / "b.png", np.array([0, 0.5, 1.0]), count, share, share, "t")
    above, below = figures[0].axes
    (bar,) = above.patches
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (0.5, 0.5, 0.75)
    assert [bar.get_height() for bar in below.patches] == [0, 4]
