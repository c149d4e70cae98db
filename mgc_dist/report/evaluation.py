"""What an evaluation leaves behind: SPLIT.json, confusion matrix, reliability, predictions.

One JSON file holds every figure; nothing in it depends on where or on how many ranks it was made.
"""

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from mgc_dist.data.tables import plain
from mgc_dist.files import replace_text, replacing
from mgc_dist.report import canvas, gallery
from mgc_dist.scoring import intervals, shared_genres, subgroups
from mgc_dist.scoring.intervals import LeftOut
from mgc_dist.scoring.metrics import Reliability, scores
from mgc_dist.scoring.score import SplitScores, mean_probability
from mgc_dist.scoring.subgroups import Subgroups
from mgc_dist.scoring.written import (
    Bounds,
    EvaluationFigures,
    GenreFigures,
    GenresInCommon,
    Intervals,
    Prediction,
    ReliabilityBins,
    SubgroupFigures,
    Temperature,
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was measured on what.

    Attributes:
        name: of the files.
        run: name of the run folder.
        dataset_id: of the shards.
        genres: in label order.
        in_common: what the genres are, where they are not all that the model knows.
        track_ids: of the split's tracks, ascending as in `SplitScores`.
        groups: of the same tracks, None where unknown.
        temperature: that the logits of the result are divided by, None if by none.
        aligned: bool [M], whether the bias model is right; None without its table.
        subgroups: of tracks and rows; None without.
    """

    name: str
    run: str
    dataset_id: str
    genres: tuple[str, ...]
    track_ids: tuple[str, ...]
    groups: tuple[str | None, ...]
    in_common: GenresInCommon | None = None
    temperature: float | None = None
    aligned: NDArray[np.bool_] | None = None
    subgroups: Subgroups | None = None


def summary(subject: Subject, result: SplitScores) -> EvaluationFigures:
    """Every figure of a split as JSON: track level first, segments beside it.

    Args:
        subject: what was measured.
        result: of the walk.
    """
    units = intervals.units_of(subject.groups)
    left_out = {
        unit: intervals.leave_out(
            result.labels, result.guesses, cluster, genres=len(subject.genres)
        )
        for unit, cluster in units.items()
    }
    unit, first = next(iter(left_out.items()))
    per_genre = _per_genre(subject, result, first)
    seen = {genre: row for genre, row in per_genre.items() if row["support"]}
    lowest = min(seen, key=lambda genre: seen[genre]["recall"] or 0.0)
    figures: EvaluationFigures = {
        "split": result.split,
        "name": subject.name,
        "dataset_id": subject.dataset_id,
        "run": subject.run,
        "aggregate": result.aggregate,
        "genres": list(subject.genres),
        "in_common": subject.in_common,
        "track": result.track.summary(),
        "segment": result.segment.summary(),
        "aggregates": {way: found.summary() for way, found in result.aggregates.items()},
        "intervals": _intervals(subject, result, left_out),
        "per_genre": per_genre,
        "confusion": result.track.confusion.tolist(),
        "reliability": _bins(result.track.reliability),
        "temperature": _tempered(subject, result),
        "subgroups": _subgroups(subject, result, units[unit]),
        "worst_genre": {"name": lowest, "recall": seen[lowest]["recall"]},
    }
    return cast(EvaluationFigures, _without_nan(figures))


def write(run: Path, subject: Subject, result: SplitScores, figures: EvaluationFigures) -> None:
    """Write RUN/evaluation/NAME.json and its pictures, and RUN/predictions/NAME.*.

    Args:
        run: the run folder.
        subject: what was measured.
        result: of the walk.
        figures: from `summary`; its file is written last.
    """
    folder = run / "evaluation"
    track = result.track
    told = f"{subject.run}, {subject.name}: {track.count} tracks, accuracy {track.accuracy:.3f}"
    if words := shared_genres.shortly(figures):
        told += f"\n{words}"
    _write_confusion_csv(folder / f"confusion-{subject.name}.csv", subject, track.confusion)
    for entry in gallery.EVALUATION:
        section = entry(figures)
        for drawing in section.drawings if section else ():
            title = f"{drawing.title}\n{told}"
            path = folder / f"{drawing.name}-{subject.name}.png"
            canvas.save(drawing.figure, path, title)
    write_predictions(run / "predictions" / f"{subject.name}.jsonl", subject, result)
    with replacing(run / "predictions" / f"{subject.name}.logits.npy") as file:
        np.save(file, result.logits, allow_pickle=False)
    replace_text(folder / f"{subject.name}.json", json.dumps(figures, indent=1, ensure_ascii=False))


def write_predictions(path: Path, subject: Subject, result: SplitScores) -> None:
    """One JSON line a track: id, group, truth, prediction, probabilities, subgroups.

    Args:
        path: of the .jsonl file; its folder is made.
        subject: what was measured.
        result: of the split.
    """
    genres, lines = subject.genres, []
    of_track = subject.subgroups.of_track if subject.subgroups else [None] * len(result.tracks)
    for place, row in enumerate(result.probabilities):
        line: Prediction = {
            "track": subject.track_ids[place],
            "group": subject.groups[place],
            "truth": genres[result.labels[place]],
            "prediction": genres[result.guesses[place]],
            "probabilities": {g: float(p) for g, p in zip(genres, row, strict=True)},
            "bias_aligned": None if subject.aligned is None else bool(subject.aligned[place]),
            "subgroup": of_track[place],
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(lines))


def _write_confusion_csv(path: Path, subject: Subject, confusion: NDArray[np.int64]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(plain(("truth", *subject.genres)))
    writer.writerows(plain((g, *row)) for g, row in zip(subject.genres, confusion, strict=True))
    replace_text(path, text.getvalue())


def _intervals(subject: Subject, result: SplitScores, left_out: dict[str, LeftOut]) -> Intervals:
    def of(found: LeftOut) -> Bounds:
        bounds = {
            name: intervals.of_figure(
                result.track.figures[name],
                intervals.deviation(without),
                clusters=len(without),
                items=result.track.count,
            )
            for name, without in found.figures.items()
        }
        return {name: list(each) for name, each in bounds.items() if each}

    return {
        "level": intervals.LEVEL,
        "tracks": of(left_out["tracks"]),
        "groups": of(left_out["groups"]) if "groups" in left_out else None,
        "known_groups": len({group for group in subject.groups if group is not None}),
    }


def _per_genre(subject: Subject, result: SplitScores, left_out: LeftOut) -> dict[str, GenreFigures]:
    rows: dict[str, GenreFigures] = {}
    for label, row in enumerate(result.track.per_genre()):
        bounds = left_out.of_genre(label, row["recall"] or 0.0, row["f1"] or 0.0, row["support"])
        row["recall_interval"], row["f1_interval"] = (each and list(each) for each in bounds)
        rows[subject.genres[label]] = row
    return rows


def _bins(reliability: Reliability) -> ReliabilityBins:
    return {
        "edges": reliability.edges.tolist(),
        "count": reliability.count.tolist(),
        "confidence": reliability.confidence.tolist(),
        "accuracy": reliability.accuracy.tolist(),
    }


def _tempered(subject: Subject, result: SplitScores) -> Temperature | None:
    """The temperature of all figures, and what the mean probability would be without it."""
    if subject.temperature is None:
        return None
    mean, guess = mean_probability(result.logits, result.row_track, 1 / subject.temperature)
    found = scores(mean, result.labels, guess)
    return {
        "value": subject.temperature,
        "fitted_on": "validation",
        "aggregate": "mean-prob",
        "without": {"accuracy": found.accuracy, "nll": found.nll, "ece": found.ece},
    }


def _subgroups(
    subject: Subject, result: SplitScores, cluster: NDArray[np.int64]
) -> SubgroupFigures | None:
    if subject.subgroups is None:
        return None
    found, genres = subject.subgroups, subject.genres
    right = result.guesses == result.labels
    groups = subgroups.figures(found.of_track, right, result.labels, genres, cluster)
    for name, of in groups.items():
        if of["count"]:
            inside = np.array([each == name for each in found.of_track])
            of["calibration"] = _calibration(result, inside)
    of_row = found.of_row
    if of_row is None:
        by_track = dict(zip(result.tracks.tolist(), found.of_track, strict=True))
        of_row = [by_track[track] for track in result.row_track.tolist()]
    row_right = result.logits.argmax(axis=1) == result.row_label
    segments = subgroups.figures(of_row, row_right, result.row_label, genres, result.row_track)
    return {
        "source": found.source,
        "groups": groups,
        "segment": {
            name: {"count": each["count"], "accuracy": each["accuracy"]}
            for name, each in segments.items()
        },
        "worst_group": subgroups.worst(groups),
    }


def _calibration(result: SplitScores, inside: NDArray[np.bool_]) -> dict[str, float]:
    """Figures of calibration over some of the tracks, bool [M]."""
    found = scores(result.probabilities[inside], result.labels[inside], result.guesses[inside])
    return {name: found.figures[name] for name in ("ece", "ece_floor", "overconfidence")}


def _without_nan(value: object) -> object:
    """JSON knows no NaN: null stands for what is not defined."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
