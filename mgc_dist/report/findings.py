"""The parts of a report that say how good the model is: verdict, genres, calibration, mistakes."""

from mgc_dist.report import svg
from mgc_dist.report.dossier import Decider, Dossier, Json
from mgc_dist.report.markup import Html, bullets, figure, join, note, section, table, tag
from mgc_dist.report.svg import Bar, Line
from mgc_dist.report.tables import by_unit
from mgc_dist.scoring.metrics import METRICS

MOST_WRONG = 8
"""Mistakes that are shown."""


def verdict(found: Dossier) -> Html:
    """The figures that count, first, and which evaluations are of another model by now."""
    if not found.outdated:
        return _figures_that_count(found)
    names = ", ".join(found.outdated)
    told = f"Not shown: {names}, measured on a model that best/ does not hold any more, or damaged"
    return join(_figures_that_count(found), note(f"{told}. Evaluate again."))


def _figures_that_count(found: Dossier) -> Html:
    if found.main is None:
        return _validation_only(found)
    _, figures = found.main
    track, split = figures["track"], figures["split"]
    genres = len(figures["genres"])
    tiles = (
        _tile(f"{track['accuracy']:.3f}", "track accuracy", _interval(figures, "accuracy")),
        _tile(f"{track['macro_f1']:.3f}", "macro-F1", _interval(figures, "macro_f1")),
        _tile(str(track["count"]), f"tracks of the {split} split", ""),
        _tile(f"{1 / genres:.3f}", f"chance, {genres} genres", _majority(figures)),
    )
    return join(tag("div", *tiles, class_="tiles"), tag("p", _chosen(found)))


def _validation_only(found: Dossier) -> Html:
    best, state = found.best, str(found.status.get("state", "unknown"))
    if best is None:
        return note(f"Neither validated nor evaluated yet; the run's state is {state}.")
    tiles = (
        _tile(f"{best['track_accuracy']:.3f}", "validation track accuracy", ""),
        _tile(f"{best['track_macro_f1']:.3f}", "validation macro-F1", ""),
    )
    return join(
        tag("div", *tiles, class_="tiles"),
        tag("p", _chosen(found)),
        note(
            "Not evaluated yet. These are the figures that chose the model, so they flatter it; "
            f"deepspeed launch/evaluate.py {found.run} measures the test split."
        ),
    )


def _tile(value: str, name: str, below: str) -> Html:
    return tag("div", tag("strong", value), tag("span", name), tag("small", below) if below else "")


def _chosen(found: Dossier) -> str:
    if found.best is None:
        return "Which epoch the model is from is not known: the run folder has no validation."
    best = found.best
    nll, macro_f1 = (_cell(best.get(name)) for name in ("track_nll", "track_macro_f1"))
    by = {  # runs of version 0.1.0 chose by macro-F1, and did not write so
        "nll": f"for the least NLL over tracks of the validation split ({nll})",
        "macro-f1": f"by macro-F1 on the validation split ({macro_f1})",
        "last": "because it was the last one that was validated",
    }[best.get("select", "macro-f1")]
    return f"The model is that of epoch {best['epoch']:.2f}, chosen {by}."


def _interval(figures: Json, name: str) -> str:
    intervals = figures.get("intervals")
    if not intervals:
        return ""
    unit, bounds = by_unit(intervals)[0]
    if name not in bounds:
        return ""
    level = f"{100 * intervals.get('level', 0.95):.0f} %"
    return f"{level} interval {bounds[name][0]:.3f} to {bounds[name][1]:.3f} {unit}"


def _majority(figures: Json) -> str:
    sizes = [sum(row) for row in figures["confusion"]]
    return f"naming the largest genre: {max(sizes) / max(1, sum(sizes)):.3f}"


def details(found: Dossier) -> Html | None:
    """Every scalar figure of the main evaluation, and the other evaluations."""
    if found.main is None:
        return None
    name, figures = found.main
    ways = figures.get("aggregates") or {}
    kinds = [(f"tracks, {way}", values) for way, values in ways.items()]
    kinds = [*(kinds or [("tracks", figures["track"])]), ("segments", figures["segment"])]
    keys = ("count", *METRICS)
    columns = ("unit", "count", *(metric.head for metric in METRICS.values()))
    rows = [(unit, *(_cell(values.get(key)) for key in keys)) for unit, values in kinds]
    parts = [
        tag(
            "p",
            f"Split {figures['split']}, data set {str(figures.get('dataset_id'))[:12]}; a track "
            f"is judged by the {figures.get('aggregate', 'mean-prob')} of its segments.",
        ),
        table("all figures", columns, rows),
    ]
    intervals: Json = figures.get("intervals") or {}
    for unit, bounds in by_unit(intervals) if intervals else ():
        told = ", ".join(
            f"{key.replace('_', ' ')} {low:.3f} to {high:.3f}"
            for key, (low, high) in bounds.items()
        )
        known = f" ({intervals.get('known_groups')} known)" if unit == "over artists" else ""
        parts.append(tag("p", f"Intervals {unit}{known}: {told}."))
    others = [item for item in found.evaluations.items() if item[0] != name]
    if others:
        parts.append(_others(others))
    return section("Figures", *parts)


def _others(evaluations: list[tuple[str, Json]]) -> Html:
    columns = ("other evaluation", "tracks", "accuracy", "macro-F1")
    keys = ("count", "accuracy", "macro_f1")
    rows = [(name, *(_cell(one["track"].get(key)) for key in keys)) for name, one in evaluations]
    return table("other evaluations", columns, rows)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def confusion(found: Dossier) -> Html | None:
    """What is taken for what."""
    if found.main:
        _, figures = found.main
        counts, genres, split = figures["confusion"], figures["genres"], figures["split"]
    else:
        starts = [line for line in found.events if line.get("genres")]
        if not found.best or "confusion" not in found.best or not starts:
            return None
        counts, genres, split = found.best["confusion"], starts[-1]["genres"], "validation"
    label = f"Confusion matrix of {len(genres)} genres over the tracks of the {split} split"
    rows = [(genre, *map(str, row)) for genre, row in zip(genres, counts, strict=True)]
    as_table = table("confusion matrix", ("truth \\ predicted", *genres), rows)
    return section(
        "What is taken for what",
        figure(
            "Confusion matrix",
            svg.matrix(label, counts, genres),
            about=f"Tracks of the {split} split; shade is the share of the true genre.",
        ),
        tag("details", tag("summary", "as a table"), as_table),
    )


def by_genre(found: Dossier) -> Html | None:
    """Recall and F1 of each genre."""
    if found.main is None or not found.main[1].get("per_genre"):
        return None
    _, figures = found.main
    drawn = [
        Bar(
            name=genre,
            value=values["recall"] if values["support"] else None,
            interval=_pair(values.get("recall_interval")),
            mark=values["f1"],
            note=f"of {values['support']}",
        )
        for genre, values in figures["per_genre"].items()
    ]
    level = 1 / len(drawn)
    worst = figures.get("worst_genre")
    told = f" The worst is {worst['name']} ({worst['recall']:.3f})." if worst else ""
    label = "Recall by genre: " + ", ".join(
        f"{bar.name} {bar.value:.2f}" for bar in drawn if bar.value is not None
    )
    return section(
        "Genre by genre",
        figure(
            "Recall by genre",
            svg.bars(label, drawn, level=(level, f"chance {level:.3f}")),
            about="Bar: recall, with its 95 % interval; diamond: F1; dashed: chance." + told,
        ),
    )


def _pair(bounds: list[float] | None) -> tuple[float, float] | None:
    return (bounds[0], bounds[1]) if bounds else None


def calibration(found: Dossier) -> Html | None:
    """Whether probabilities mean what they say."""
    bins = found.main[1].get("reliability") if found.main else None
    if found.main is None or not bins:
        return None
    _, figures = found.main
    track, fitted = figures["track"], figures.get("temperature")
    told = f"Expected calibration error {_cell(track.get('ece'))}"
    if fitted and "without" in fitted:  # version 0.1.0 did not report with the temperature
        without = fitted["without"]
        told += (
            f" with the logits divided by {fitted['value']:.2f}, a temperature fitted on the "
            f"{fitted.get('fitted_on', 'validation')} split (NLL {_cell(track.get('nll'))}); "
            f"{_cell(without['ece'])} without it (NLL {_cell(without['nll'])})"
        )
    filled = [
        (sure, right, count)
        for sure, right, count in zip(
            bins["confidence"], bins["accuracy"], bins["count"], strict=True
        )
        if count
    ]
    confidence, accuracy, count = zip(*filled, strict=True)
    label = f"Reliability: accuracy over confidence in {len(filled)} bins. {told}."
    return section(
        "Does it know when it is right?",
        figure(
            "Reliability",
            svg.reliability(label, confidence, accuracy, count),
            about="A circle is a bin of confidence, its area the tracks in it; on the dashed "
            "line, confidence is right as often as it says.",
        ),
        tag("p", f"{told}."),
    )


def subgroups(found: Dossier) -> Html | None:
    """Accuracy where the shortcut helps and where it misleads, or by the user's groups."""
    given = found.main[1].get("subgroups") if found.main else None
    if not given or not given.get("groups"):
        return None
    drawn = [
        Bar(
            name=name,
            value=values["accuracy"] if values["count"] else None,
            interval=_pair(values.get("interval")),
            note=f"of {values['count']}",
        )
        for name, values in given["groups"].items()
    ]
    worst = given.get("worst_group")
    told = f"The worst is {worst['name']}: {worst['accuracy']:.3f}." if worst else ""
    genres = sorted({g for values in given["groups"].values() for g in values.get("genres", {})})
    rows = [
        (genre, *(_in_group(values, genre) for values in given["groups"].values()))
        for genre in genres
    ]
    label = "Accuracy by group: " + ", ".join(
        f"{bar.name} {bar.value:.2f}" for bar in drawn if bar.value is not None
    )
    return section(
        "Groups",
        figure(
            "Track accuracy by group",
            svg.bars(label, drawn),
            about=f"Groups: {given['source']}. Bars with 95 % intervals. {told}",
        ),
        tag(
            "details",
            tag("summary", "by genre"),
            table("groups by genre", ("genre", *given["groups"]), rows),
        )
        if rows
        else None,
    )


def _in_group(values: Json, genre: str) -> str:
    cell = (values.get("genres") or {}).get(genre)
    if not cell or not cell["count"]:
        return "-"
    return f"{cell['accuracy']:.2f} of {cell['count']}"


def mistakes(found: Dossier) -> Html | None:
    """The tracks that are wrong with the highest probability, to be listened to."""
    if found.main is None:
        return None
    title = "Most confidently wrong"
    wrong = [line for line in found.predictions if line["truth"] != line["prediction"]]
    if not found.predictions:
        return section(title, note("The predictions of the tracks are not in the run folder."))
    if not wrong:
        return section(title, note("No track is wrong."))
    wrong.sort(key=lambda line: (-line["probabilities"][line["prediction"]], line["track"]))
    shown = wrong[:MOST_WRONG]
    deciders = found.deciders(shown)
    told = f"{len(wrong)} of {len(found.predictions)} tracks are wrong. Listen to the segment "
    parts: list[Html] = [
        tag("p", told + "that gave the wrong genre its highest probability.")
        if deciders
        else note(
            f"{len(wrong)} of {len(found.predictions)} tracks are wrong. Their segments cannot be "
            "heard here: the shards, or the logits of this evaluation, are not where they were."
        )
    ]
    cards = [_mistake(line, deciders.get(line["track"])) for line in shown]
    return section(title, *parts, tag("div", *cards, class_="cards"))


def _mistake(line: Json, decider: Decider | None) -> Html:
    wrong, truth = line["prediction"], line["truth"]
    sure, true = (line["probabilities"][genre] for genre in (wrong, truth))
    parts = [
        tag("h3", line["track"]),
        tag("p", tag("b", wrong), f" {sure:.3f}, but it is ", tag("b", truth), f" {true:.3f}"),
    ]
    if decider:
        start_s = decider.start_s[decider.segment]
        label = f"{line['track']} at {start_s:g} s, taken for {wrong}; truth {truth}"
        parts.append(
            svg.lines(
                f"Probability of {wrong} and of {truth} over the segments of {line['track']}",
                (
                    Line(name=wrong, points=list(zip(decider.start_s, decider.wrong, strict=True))),
                    Line(
                        name=truth,
                        points=list(zip(decider.start_s, decider.truth, strict=True)),
                        style="second",
                    ),
                ),
                x_title="start of the segment, s",
                y_title="probability",
                y_range=(0, 1),
                marks=((start_s, "the segment that decided"),),
                height=170,
            )
        )
        source = f"data:audio/wav;base64,{decider.wav}"
        parts.append(tag("audio", controls=True, preload="metadata", src=source, aria_label=label))
        parts.append(tag("small", f"The segment from {start_s:g} s (dotted)."))
    return tag("article", *parts)


def conclusions(found: Dossier) -> Html:
    """What may be said after this, and what not."""
    lines = []
    if found.main is None:
        lines.append("Nothing about other music yet: only the validation split was looked at.")
    else:
        _, figures = found.main
        track, split = figures["track"], figures["split"]
        bounds = ((figures.get("intervals") or {}).get("tracks") or {}).get("accuracy")
        span = f", with a 95 % interval of {bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
        lines.append(
            f"One training with one seed has an accuracy of {track['accuracy']:.3f} on "
            f"{track['count']} tracks of one {split} split{span}. The interval is about which "
            "tracks were drawn, not about other seeds or other collections."
        )
        if split != "test":
            lines.append(f"The {split} split was used in making the model, so it flatters it.")
    objective = found.config.objective if found.config else None
    if objective and not objective.needs_bias:
        lines.append("Plain cross-entropy: the run to compare a debiased one with.")
    else:
        loss = objective.description if objective else "unknown"
        lines.append(
            f"It says nothing about whether the loss {loss} helped. That takes the same run with "
            "--loss ce, compared on the same tracks, and several seeds."
        )
    limits = "Tracks of one artist in training and test raise the figures of any model; "
    lines.append(limits + "what this split controls is said above.")
    return section("What may be concluded", bullets(lines))
