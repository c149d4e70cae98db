"""RUN/report.html: what a run learned, how well, and what may be said; one file without a script.

The page brings its figures, its style and its audio along, and forbids itself every request and
script by its own policy, so that it can be sent to others, opened anywhere and read on a phone.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jinja2
from markupsafe import Markup

from mgc_dist.files import replace_text
from mgc_dist.report import beside, canvas, exam_report, gallery, making, verdict
from mgc_dist.report.dossier import Dossier
from mgc_dist.report.section import Section
from mgc_dist.scoring.written import EvaluationFigures

log = logging.getLogger(__name__)

NAME = "report.html"

Part = Callable[[Dossier], Section | None]

_BEFORE: tuple[Part, ...] = (
    verdict.verdict,
    verdict.details,
    making.data,
    making.training,
    making.curves,
)
_AFTER: tuple[Part, ...] = (
    beside.section,
    exam_report.section,
    making.bias,
    verdict.mistakes,
    making.cost,
    making.commands,
    verdict.conclusions,
)
"""The figures of the evaluation stand between the two."""


def write(run: Path, shards: Path | None = None) -> Path:
    """Write the page of a run; parts whose files are missing or damaged are named in it.

    Args:
        run: the run folder.
        shards: that were evaluated; those of the training are found by config.yaml.

    Returns:
        RUN/report.html.
    """
    found = Dossier(run, shards)
    path = run / NAME
    replace_text(path, render(found.run.resolve().name, list(sections(found))))
    return path


def attempt(run: Path, shards: Path | None = None) -> None:
    """Write the page of a run that must not fail for its page: an error becomes a warning."""
    try:
        log.info("report: %s", write(run, shards))
    except Exception as error:
        log.warning("no %s: %s: %s", run / NAME, type(error).__name__, error)


def sections(dossier: Dossier) -> Iterator[Section]:
    """The parts of the page; files of another version must not cost more than their part."""
    figures = [(e.__name__, partial(_of_evaluation, e, dossier)) for e in gallery.EVALUATION]
    before, after = (
        [(p.__name__, partial(p, dossier)) for p in side] for side in (_BEFORE, _AFTER)
    )
    for name, part in (*before, *figures, *after):
        try:
            section = part()
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            log.warning("report without %s: %s: %s", name, type(error).__name__, error)
            note = f"The part {name} could not be made: its files are not as expected."
            section = Section(notes=(note,))
        if section:
            yield section


def _of_evaluation(
    entry: Callable[[EvaluationFigures], Section | None], dossier: Dossier
) -> Section | None:
    """A figure of the main evaluation, or before there is one, of the chosen validation."""
    if dossier.main:
        return entry(dossier.main[1])
    if not dossier.best or not dossier.genres:
        return None
    known: EvaluationFigures = {"confusion": dossier.best.confusion, "genres": dossier.genres}
    known["split"] = "validation"
    return entry(known)


def render(name: str, shown: list[Section]) -> str:
    """The page as HTML; every text in it is escaped.

    Args:
        name: of the run.
        shown: its parts.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mgc_dist.report", ""),
        autoescape=True,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    colors = [
        Markup(";").join(Markup(f"--{key}:{pair[k]}") for key, pair in canvas.PALETTE.items())
        for k in (0, 1)
    ]
    page = environment.get_template("page.html").render(name=name, sections=shown, colors=colors)
    return canvas.CONTROL.sub("\ufffd", page)
