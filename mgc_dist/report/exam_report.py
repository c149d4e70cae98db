"""An exam, shown: on the terminal, as a part of the page, and two exams side by side."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from mgc_dist.report import canvas, figures
from mgc_dist.report.canvas import SECOND
from mgc_dist.report.figures import Bar, Line
from mgc_dist.report.gallery import cell
from mgc_dist.report.section import Drawing, Mistake, Section, Table, Tile
from mgc_dist.scoring import exams
from mgc_dist.scoring.exams import Bands, Exam, Heard

if TYPE_CHECKING:  # it imports torch, which compare does not need
    from mgc_dist.report.dossier import Dossier

_COLUMNS = ("transformation", "accuracy", "95 %", "changed", "lost", "won", "p", "reading")
_ABOUT = (
    "Changed: share of tracks with another answer. Lost and won: tracks that are right only "
    "untouched, and only transformed. p: McNemar's, corrected for all lines (Holm). Reading: "
    "accuracy with the last layer fitted anew on training segments that are transformed alike."
)
_VERDICTS = (
    "Last layer: at least half of the loss comes back with it, so what lies below still tells the "
    "genre. Below: less does. A band is relied upon where the same band of another segment, as "
    "loud, costs answers; where only its lack or noise does, that was unfamiliar."
)


def show(exam: Exam) -> None:
    """Print the worst strength of each transformation, and what is over all of them."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(_grid(f"Exam of {exam.run}, {exam.name}: {_subject(exam)}", _worst(exam)))
    console.print(f"{_ABOUT} {_VERDICTS}")
    console.print(f"Intervals {_unit(exam)}. {_summary(exam)}")
    if exam.bands:
        console.print(_bands_told(exam.bands))


def write(exam: Exam, path: Path) -> None:
    """Draw the accuracies as a PNG."""
    title = f"{exam.run}, {exam.name}: {_subject(exam)}"
    canvas.save(_accuracies(exam).figure, path, title)


def section(dossier: "Dossier") -> Section | None:
    """The part of the page; None where there is no exam of the model."""
    if dossier.exam is None:
        return None
    exam, folder = dossier.exam
    name, strength = exam.worst
    least = next(each for each in exam.transformations if (each.name, each.strength) == exam.worst)
    drawings = [_accuracies(exam)] + ([_kept(exam.bands)] if exam.bands else [])
    return Section(
        title="What changes its answers",
        tiles=(
            Tile(value=cell(exam.untouched), name="untouched", below=f"{exam.tracks} tracks"),
            Tile(
                value=cell(least.accuracy),
                name="at worst",
                below=f"{name} {strength:g} {least.unit}",
            ),
            Tile(value=cell(exam.always_right), name="right under all"),
        ),
        drawings=tuple(drawings),
        paragraphs=(
            f"{len(exam.transformations)} changes that keep a genre, on the {exam.split} split. "
            f"{_summary(exam)}",
            *([_bands_told(exam.bands)] if exam.bands else []),
            f"{_ABOUT} {_VERDICTS}",
        ),
        folded=(
            ("every transformation", _table("exam", exam.transformations)),
            ("by genre", _by_genre(exam)),
        ),
        mistakes=tuple(
            found for n, each in enumerate(exam.heard) if (found := _mistake(n, each, folder))
        ),
    )


def beside(runs: Sequence[Path], name: str) -> list[Exam]:
    """Exams of that name of several runs; none where one of them has none, or of other tracks."""
    files = [run / "exam" / f"{name}.json" for run in runs]
    if not all(file.is_file() for file in files):
        return []
    found = [exams.read(file) for file in files]
    return found if len({(each.dataset_id, each.seed) for each in found}) == 1 else []


def show_beside(found: Sequence[Exam]) -> None:
    """Print the accuracies of several exams, a column each."""
    if not found:
        return
    grid = Grid(title="Exams", title_justify="left")
    for place, column in enumerate(("transformation", *(each.run for each in found))):
        grid.add_column(column, justify="right" if place else "left", no_wrap=True)
    grid.add_row("untouched", *(cell(each.untouched) for each in found))
    by_key = [{_named(line): line for line in each.transformations} for each in found]
    for name in by_key[0]:
        lines = [each.get(name) for each in by_key]
        grid.add_row(name, *(f"{line.accuracy:.3f}" if line else "-" for line in lines))
    grid.add_row("right under all", *(cell(each.always_right) for each in found))
    Console(highlight=False, markup=False, soft_wrap=True).print(grid)


def _subject(exam: Exam) -> str:
    return f"{exam.tracks} tracks, accuracy {exam.untouched:.3f} untouched"


def _unit(exam: Exam) -> str:
    known = exam.unit == "groups"
    return "over artists" if known else "by track; artists unknown, so too narrow"


def _named(line: exams.Line) -> str:
    return f"{line.name} {line.strength:g} {line.unit}".rstrip()


def _worst(exam: Exam) -> list[exams.Line]:
    """The worst strength of each transformation, the worst first."""
    order = exams.worst(exam.transformations, len(exam.transformations))
    lines = {(line.name, line.strength): line for line in exam.transformations}
    return [lines[key] for key in order]


def _few_cells(line: exams.Line) -> tuple[str, ...]:
    """What fits on a terminal."""
    bounds = f"{line.interval[0]:.2f}-{line.interval[1]:.2f}" if line.interval else "-"
    numbers = (f"{line.accuracy:.3f}", bounds, f"{line.changed:.3f}", f"{line.p_corrected:.2g}")
    return (f"{line.name} {line.strength:g}", *numbers, *(_cells(line)[-1:]))


def _cells(line: exams.Line) -> tuple[str, ...]:
    bounds = f"{line.interval[0]:.3f} to {line.interval[1]:.3f}" if line.interval else "-"
    of = line.control
    told = [f"{of.accuracy:.3f}", of.verdict] if of else []
    control = ", ".join([*told, *([line.reading] if line.reading else [])]) or "-"
    numbers = (f"{line.changed:.3f}", str(line.lost), str(line.won), f"{line.p_corrected:.2g}")
    return (_named(line), f"{line.accuracy:.3f}", bounds, *numbers, control)


def _grid(title: str, lines: Sequence[exams.Line]) -> Grid:
    grid = Grid(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(("worst strength", *_COLUMNS[1:4], *_COLUMNS[6:])):
        grid.add_column(column, justify="right" if place else "left", no_wrap=True)
    for line in lines:
        grid.add_row(*_few_cells(line))
    return grid


def _table(label: str, lines: Sequence[exams.Line]) -> Table:
    return Table(label=label, columns=_COLUMNS, rows=tuple(_cells(line) for line in lines))


def _by_genre(exam: Exam) -> Table:
    rows = tuple(
        (_named(line), *(cell(line.per_genre[genre]) for genre in exam.genres))
        for line in _worst(exam)
    )
    return Table(label="recall by genre", columns=("worst strength", *exam.genres), rows=rows)


def _summary(exam: Exam) -> str:
    name, strength = exam.worst
    again = "" if exam.refitted is None else f" (with the last layer anew {exam.refitted:.3f})"
    return (
        f"Untouched {exam.untouched:.3f}{again}; {exam.always_right:.3f} of the tracks are right "
        f"untouched and under all; {name} {strength:g} is the worst."
    )


def _accuracies(exam: Exam) -> Drawing:
    drawn = [
        Bar(
            name=_named(line),
            value=line.accuracy,
            interval=line.interval,
            mark=line.control.accuracy if line.control else None,
        )
        for line in _worst(exam)
    ]
    return Drawing(
        name="exam",
        title="Accuracy under the worst strength of each change",
        label=f"Track accuracy from {drawn[0].name} to {drawn[-1].name}",
        figure=figures.bars(drawn, level=exam.untouched),
        about=f"Dashed: untouched. Bars with 95 % intervals {_unit(exam)}. A diamond: with the "
        "last layer fitted anew on training segments that are changed alike.",
    )


def _bands_told(bands: Bands) -> str:
    whole = len(bands.edges_hz) - 1
    fooled = (
        ""
        if bands.fooled is None
        else f" Put into other music, they carry it in {bands.fooled:.0%}."
    )
    return (
        f"Of {whole} bands of the spectrum, {bands.kept:.1f} suffice for an answer, on the mean "
        f"over {bands.segments} segments.{fooled}"
    )


def _kept(bands: Bands) -> Drawing:
    middles = [(a + b) / 2 for a, b in zip(bands.edges_hz, bands.edges_hz[1:], strict=False)]
    shares = list(bands.by_genre.values())
    means = [sum(each) / len(shares) for each in zip(*shares, strict=True)]
    points = list(zip(middles, means, strict=True))
    line = Line(name="", points=points, color=SECOND, dots=True)
    return Drawing(
        name="bands",
        title="Bands that an answer needs",
        label=f"Share of answers that keep each of {len(means)} bands",
        figure=figures.lines([line], x_title="Hz", y_title="share of answers", y_range=(0, 1)),
        about="Mean over genres. A band is kept where the answer would be another one without it.",
    )


def _mistake(number: int, heard: Heard, folder: Path) -> Mistake | None:
    file = folder / heard.file
    if not file.is_file():
        return None
    figure = figures.lines(
        (
            Line(name="untouched", points=list(zip(heard.start_s, heard.before, strict=True))),
            Line(
                name="changed",
                points=list(zip(heard.start_s, heard.after, strict=True)),
                color=SECOND,
            ),
        ),
        x_title="start of the segment, s",
        y_title=f"probability of {canvas.short(heard.truth)}",
        y_range=(0, 1),
        marks=((heard.start_s[heard.segment], "the segment that decided"),),
        height=180,
    )
    title = f"{heard.track}, {heard.name} {heard.strength:g}"
    return Mistake(
        track=title,
        wrong=heard.answer,
        wrong_share=heard.share,
        truth=heard.truth,
        truth_share=heard.truth_share,
        drawing=Drawing(
            name=f"exam-{number}",
            title=title,
            label=f"Probability of {heard.truth} over the segments of {title}",
            figure=figure,
        ),
        start_s=heard.start_s[heard.segment],
        wav=base64.b64encode(file.read_bytes()).decode("ascii"),
    )
