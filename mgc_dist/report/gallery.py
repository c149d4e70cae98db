"""The figures of an evaluation: each is one entry of EVALUATION, on the page and as a PNG.

An entry is given the JSON that an evaluation writes, or the part of it that a validation has. It
returns a section of the page, whose drawings become files too, or None without its numbers.
"""

from collections.abc import Callable

from mgc_dist.report import figures
from mgc_dist.report.figures import Bar
from mgc_dist.report.section import Drawing, Section, Table
from mgc_dist.scoring import shared_genres
from mgc_dist.scoring.metrics import METRICS
from mgc_dist.scoring.written import EvaluationFigures, GroupFigures


def confusion(evaluation: EvaluationFigures) -> Section | None:
    """What is taken for what."""
    counts, genres, split = evaluation["confusion"], evaluation["genres"], evaluation["split"]
    rows = tuple((genre, *map(str, row)) for genre, row in zip(genres, counts, strict=True))
    sentence = shared_genres.told(evaluation)
    told = f" All of it {sentence}." if sentence else ""
    drawing = Drawing(
        name="confusion",
        title="Confusion matrix",
        label=f"Confusion matrix of {len(genres)} genres over the tracks of the {split} split",
        figure=figures.confusion(counts, genres),
        about=f"Tracks of the {split} split; shade is the share of the true genre." + told,
    )
    table = Table(label="confusion matrix", columns=("truth \\ predicted", *genres), rows=rows)
    return Section(
        title="What is taken for what", drawings=(drawing,), folded=(("as a table", table),)
    )


def recall(evaluation: EvaluationFigures) -> Section | None:
    """Recall and F1 of each genre."""
    if not evaluation.get("per_genre"):
        return None
    drawn = [
        Bar(
            name=genre,
            value=values["recall"] if values["support"] else None,
            interval=values.get("recall_interval"),
            mark=values["f1"] if values["support"] else None,
            note=f"of {values['support']}",
        )
        for genre, values in evaluation["per_genre"].items()
    ]
    worst, chance = evaluation.get("worst_genre"), 1 / len(drawn)
    told = f" The worst is {worst['name']} ({worst['recall']:.3f})." if worst else ""
    drawing = Drawing(
        name="recall",
        title="Recall by genre",
        label=_values("Recall by genre", drawn),
        figure=figures.bars(drawn, level=chance),
        about=f"Bar: recall, with its 95 % interval; diamond: F1; dashed: chance, {chance:.3f}."
        + told,
    )
    return Section(title="Genre by genre", drawings=(drawing,))


def reliability(evaluation: EvaluationFigures) -> Section | None:
    """Whether probabilities mean what they say."""
    bins = evaluation.get("reliability")
    if not bins:
        return None
    track, fitted = evaluation["track"], evaluation.get("temperature")
    told = f"Expected calibration error {cell(track.get('ece'))}"
    if track.get("ece_floor") is not None:  # version 0.1.0 did not report it
        told += f" (a perfectly calibrated model of this size: {cell(track['ece_floor'])})"
    if fitted and "without" in fitted:  # version 0.1.0 did not report with the temperature
        without = fitted["without"]
        told += (
            f" with the logits divided by {fitted['value']:.2f}, a temperature fitted on the "
            f"{fitted.get('fitted_on', 'validation')} split (NLL {cell(track.get('nll'))}); "
            f"{cell(without['ece'])} without it (NLL {cell(without['nll'])})"
        )
    filled = sum(count > 0 for count in bins["count"])
    drawing = Drawing(
        name="reliability",
        title="Reliability",
        label=f"Reliability: accuracy over confidence in {filled} bins. {told}.",
        figure=figures.reliability(bins),
        about="A bar is a bin of confidence, its height the share that is right; on the dashed "
        "line, confidence is right as often as it says. Below: how many tracks.",
    )
    return Section(
        title="Does it know when it is right?",
        drawings=(drawing,),
        paragraphs=(f"{told}. {_gap(track.get('overconfidence'))}".rstrip(),),
    )


def _gap(overconfidence: float | None) -> str:
    if overconfidence is None:
        return ""
    way = "above" if overconfidence >= 0 else "below"
    return f"Mean confidence is {abs(overconfidence):.3f} {way} the accuracy."


def groups(evaluation: EvaluationFigures) -> Section | None:
    """Accuracy where the shortcut helps and where it misleads, or by the user's groups."""
    given = evaluation.get("subgroups")
    if not given or not given.get("groups"):
        return None
    drawn = [
        Bar(
            name=name,
            value=values["accuracy"] if values["count"] else None,
            interval=values.get("interval"),
            note=f"of {values['count']}",
        )
        for name, values in given["groups"].items()
    ]
    worst = given.get("worst_group")
    told = f"The worst is {worst['name']}: {worst['accuracy']:.3f}." if worst else ""
    drawing = Drawing(
        name="groups",
        title="Track accuracy by group",
        label=_values("Accuracy by group", drawn),
        figure=figures.bars(drawn),
        about=f"Groups: {given['source']}. Bars with 95 % intervals. {told}",
    )
    genres = sorted({g for values in given["groups"].values() for g in values.get("genres", {})})
    rows = tuple((g, *(_in_group(of, g) for of in given["groups"].values())) for g in genres)
    table = Table(label="groups by genre", columns=("genre", *given["groups"]), rows=rows)
    return Section(
        title="Groups",
        drawings=(drawing,),
        tables=_calibration(given["groups"]),
        folded=(("by genre", table),) if rows else (),
    )


def _calibration(groups: dict[str, GroupFigures]) -> tuple[Table, ...]:
    """Calibration by group; nothing of files that version 0.1.0 wrote."""
    known = {name: of["calibration"] for name, of in groups.items() if "calibration" in of}
    keys = ("ece", "ece_floor", "overconfidence")
    columns = ("group", *(METRICS[key].head for key in keys))
    rows = tuple((name, *(cell(of[key]) for key in keys)) for name, of in known.items())
    return (Table(label="calibration by group", columns=columns, rows=rows),) if rows else ()


EVALUATION: tuple[Callable[[EvaluationFigures], Section | None], ...] = (
    confusion,
    recall,
    reliability,
    groups,
)
"""In the order of the page. Who adds a figure adds it here, and nowhere else."""


def cell(value: object) -> str:
    """A figure in a sentence or table."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _values(what: str, drawn: list[Bar]) -> str:
    told = (f"{bar.name} {bar.value:.2f}" for bar in drawn if bar.value is not None)
    return f"{what}: {', '.join(told)}"


def _in_group(values: GroupFigures, genre: str) -> str:
    found = (values.get("genres") or {}).get(genre)
    return f"{found['accuracy']:.2f} of {found['count']}" if found and found["count"] else "-"
