"""The parts of a page that say how good the model is: verdict, figures, mistakes, conclusions."""

from dataclasses import replace

from mgc_dist import cli
from mgc_dist.report import beside, figures
from mgc_dist.report.canvas import SECOND
from mgc_dist.report.dossier import Decider, Dossier
from mgc_dist.report.figures import Line
from mgc_dist.report.gallery import cell
from mgc_dist.report.section import Drawing, Mistake, Section, Table, Tile
from mgc_dist.report.tables import by_unit
from mgc_dist.scoring import shared_genres
from mgc_dist.scoring.metrics import METRICS
from mgc_dist.scoring.written import EvaluationFigures, Prediction

MOST_WRONG = 8
"""Mistakes that are shown."""


def verdict(dossier: Dossier) -> Section:
    """The figures that count, first, and which evaluations are of another model by now."""
    notes = []
    if dossier.main is not None:
        tiles = _of_evaluation(dossier.main[1])
        if sentence := shared_genres.told(dossier.main[1]):
            notes.append(f"All of it {sentence}.")
    elif dossier.best is not None:
        tiles = (
            Tile(value=cell(dossier.best.track_accuracy), name="validation track accuracy"),
            Tile(value=cell(dossier.best.track_macro_f1), name="validation macro-F1"),
        )
        notes.append(
            "Not evaluated yet. These are the figures that chose the model, so they flatter it; "
            f"{cli.launched('evaluate')} {dossier.run} measures the test split."
        )
    else:
        state = dossier.status.get("state", "unknown")
        tiles = ()
        notes.append(f"Neither validated nor evaluated yet; the run's state is {state}.")
    if dossier.outdated:
        notes.append(
            f"Not shown: {', '.join(dossier.outdated)}, measured on a model that best/ does not "
            "hold any more, or damaged. Evaluate again."
        )
    return Section(tiles=tiles, paragraphs=(_chosen(dossier),) if tiles else (), notes=tuple(notes))


def _of_evaluation(evaluation: EvaluationFigures) -> tuple[Tile, ...]:
    track, genres = evaluation["track"], len(evaluation["genres"])
    sizes = [sum(row) for row in evaluation["confusion"]]
    return (
        Tile(
            value=cell(track["accuracy"]),
            name="track accuracy",
            below=_interval(evaluation, "accuracy"),
        ),
        Tile(
            value=cell(track["macro_f1"]), name="macro-F1", below=_interval(evaluation, "macro_f1")
        ),
        Tile(value=str(track["count"]), name=f"tracks of the {evaluation['split']} split"),
        Tile(
            value=cell(1 / genres),
            name=f"chance, {genres} genres",
            below=f"naming the largest genre: {max(sizes) / max(1, sum(sizes)):.3f}",
        ),
    )


def _chosen(dossier: Dossier) -> str:
    best = dossier.best
    if best is None:
        return "Which epoch the model is from is not known: the run folder has no validation."
    by = {  # runs of version 0.1.0 chose by macro-F1, and did not write so
        "nll": f"for the least NLL over tracks of the validation split ({cell(best.track_nll)})",
        "macro-f1": f"by macro-F1 on the validation split ({cell(best.track_macro_f1)})",
        "last": "because it was the last one that was validated",
    }[best.select]
    return f"The model is that of epoch {best.epoch:.2f}, chosen {by}."


def _interval(evaluation: EvaluationFigures, name: str) -> str:
    intervals = evaluation.get("intervals")
    unit, bounds = by_unit(intervals)[0] if intervals else ("", {})
    if not intervals or name not in bounds:
        return ""
    low, high = bounds[name]
    level = 100 * intervals.get("level", 0.95)
    return f"{level:.0f} % interval {low:.3f} to {high:.3f} {unit}"


def details(dossier: Dossier) -> Section | None:
    """Every scalar figure of the main evaluation, and the other evaluations."""
    if dossier.main is None:
        return None
    name, main = dossier.main
    ways = [(f"tracks, {way}", values) for way, values in (main.get("aggregates") or {}).items()]
    kinds = [*(ways or [("tracks", main["track"])]), ("segments", main["segment"])]
    keys = ("count", *METRICS)
    tables = [
        Table(
            label="all figures",
            columns=("unit", "count", *(metric.head for metric in METRICS.values())),
            rows=tuple((unit, *(cell(of.get(key)) for key in keys)) for unit, of in kinds),
        )
    ]
    others = [
        (f"{other} {shared_genres.shortly(of)}".rstrip(), of["track"])
        for other, of in dossier.evaluations.items()
        if other != name
    ]
    if others:
        few = ("count", "accuracy", "macro_f1")
        tables.append(
            Table(
                label="other evaluations",
                columns=("other evaluation", "tracks", "accuracy", "macro-F1"),
                rows=tuple((other, *(cell(of.get(key)) for key in few)) for other, of in others),
            )
        )
    told = (
        f"Split {main['split']}, data set {str(main.get('dataset_id'))[:12]}; a track "
        f"is judged by the {main.get('aggregate', 'mean-prob')} of its segments."
    )
    return Section(title="Figures", tables=tuple(tables), paragraphs=(told, *_intervals(main)))


def _intervals(main: EvaluationFigures) -> list[str]:
    intervals = main.get("intervals")
    lines: list[str] = []
    if not intervals:
        return lines
    for unit, bounds in by_unit(intervals):
        told = ", ".join(
            f"{key.replace('_', ' ')} {low:.3f} to {high:.3f}"
            for key, (low, high) in bounds.items()
        )
        known = f" ({intervals.get('known_groups')} known)" if unit == "over artists" else ""
        lines.append(f"Intervals {unit}{known}: {told}.")
    return lines


def mistakes(dossier: Dossier) -> Section | None:
    """The tracks that are wrong with the highest probability, to be listened to."""
    if dossier.main is None:
        return None
    title = "Most confidently wrong"
    wrong = [line for line in dossier.predictions if line["truth"] != line["prediction"]]
    if not dossier.predictions:
        note = "The predictions of the tracks are not in the run folder."
        return Section(title=title, notes=(note,))
    if not wrong:
        return Section(title=title, notes=("No track is wrong.",))
    wrong.sort(key=lambda line: (-line["probabilities"][line["prediction"]], line["track"]))
    shown = wrong[:MOST_WRONG]
    deciders = dossier.deciders(shown)
    told = f"{len(wrong)} of {len(dossier.predictions)} tracks are wrong. "
    heard = "Listen to the segment that gave the wrong genre its highest probability."
    unheard = (
        "Their segments cannot be heard here: the shards, or the logits of this evaluation, are "
        "not where they were."
    )
    return Section(
        title=title,
        paragraphs=(told + heard,) if deciders else (),
        notes=() if deciders else (told + unheard,),
        mistakes=tuple(
            _mistake(n, line, deciders.get(line["track"])) for n, line in enumerate(shown)
        ),
    )


def _mistake(number: int, line: Prediction, decider: Decider | None) -> Mistake:
    track, wrong, truth = line["track"], line["prediction"], line["truth"]
    mistake = Mistake(
        track=track,
        wrong=wrong,
        wrong_share=line["probabilities"][wrong],
        truth=truth,
        truth_share=line["probabilities"][truth],
    )
    if decider is None:
        return mistake
    start_s = decider.start_s[decider.segment]
    told = list(zip(decider.start_s, decider.wrong, strict=True))
    true = list(zip(decider.start_s, decider.truth, strict=True))
    figure = figures.lines(
        (Line(name=wrong, points=told), Line(name=truth, points=true, color=SECOND)),
        x_title="start of the segment, s",
        y_title="probability",
        y_range=(0, 1),
        marks=((start_s, "the segment that decided"),),
        height=180,
    )
    drawing = Drawing(
        name=f"mistake-{number}",
        title=track,
        label=f"Probability of {wrong} and of {truth} over the segments of {track}",
        figure=figure,
    )
    return replace(mistake, drawing=drawing, start_s=start_s, wav=decider.wav)


def _of_the_loss(dossier: Dossier, loss: str) -> str:
    pair = beside.with_ce(dossier)
    if pair is None:
        return (
            f"It says nothing about whether the loss {loss} helped. That takes the same run with "
            "--loss ce, compared on the same tracks, and several seeds."
        )
    low, high, unit = beside.accuracy_bounds(pair)
    helped = "helped" if low > 0 else "hurt" if high < 0 else "made no difference that is shown"
    return (
        f"On these tracks the loss {loss} {helped}: its accuracy less that of --loss ce is "
        f"{pair['accuracy']['difference']:+.3f} (95 % {low:+.3f} to {high:+.3f} {unit}). One "
        "training each: other seeds may say otherwise."
    )


def conclusions(dossier: Dossier) -> Section:
    """What may be said after this, and what not."""
    lines = []
    if dossier.main is None:
        lines.append("Nothing about other music yet: only the validation split was looked at.")
    else:
        _, main = dossier.main
        track, split = main["track"], main["split"]
        intervals = main.get("intervals")
        unit, named = by_unit(intervals)[0] if intervals else ("", {})
        bounds = named.get("accuracy")
        span = (
            f", with a 95 % interval of {bounds[0]:.3f} to {bounds[1]:.3f} {unit}" if bounds else ""
        )
        lines.append(
            f"One training with one seed has an accuracy of {track['accuracy']:.3f} on "
            f"{track['count']} tracks of one {split} split{span}. The interval is about which "
            "music was drawn, not about other seeds or other collections."
        )
        if split != "test":
            lines.append(f"The {split} split was used in making the model, so it flatters it.")
    objective = dossier.config.objective if dossier.config else None
    if objective and not objective.needs_bias:
        lines.append("Plain cross-entropy: the run to compare a debiased one with.")
    else:
        lines.append(_of_the_loss(dossier, objective.description if objective else "unknown"))
    limits = "Tracks of one artist in training and test raise the figures of any model; "
    lines.append(limits + "what this split controls is said above.")
    return Section(title="What may be concluded", bullets=tuple(lines))
