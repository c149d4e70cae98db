"""What an exam shows: figures of each transformation against the untouched music, and controls.

The unit is the track. Intervals and differences leave artists out where they are known. P-values
are McNemar's, corrected by Holm for all that was tried.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mgc_dist.errors import UserError
from mgc_dist.scoring import intervals
from mgc_dist.scoring.metrics import confusion_of, precision_recall_f1

if TYPE_CHECKING:  # it imports torch, which compare does not need
    from mgc_dist.scoring.score import SplitScores

Verdict = Literal["no loss", "last layer", "below", "undecided"]
Reading = Literal["unfamiliar", "relied upon"]
Key = tuple[str, float]
"""A transformation's name, and a strength."""
WORST = 3
"""Transformations that are controlled where not all are."""


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Accuracy on transformed tracks, against the same tracks untouched.

    Attributes:
        accuracy: of transformed tracks.
        interval: of it, 95 %; None of fewer than two artists.
        difference: transformed minus untouched.
        difference_interval: 95 %; None where nothing differs.
    """

    accuracy: float
    interval: list[float] | None
    difference: float
    difference_interval: list[float] | None


@dataclass(frozen=True, kw_only=True)
class Control(Drop):
    """The same with the last layer fitted anew, on training segments that are transformed alike.

    Attributes:
        recovered: share of the loss that the new layer makes good; None where nothing was lost.
        verdict: `no loss` where the model's own difference may be zero; `last layer` where at
            least half of the loss comes back, so that what lies below still tells the genre;
            `below` where less does, and the loss that stays is not by chance; else `undecided`.
    """

    recovered: float | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Line(Drop):
    """A transformation at a strength.

    Attributes:
        name, unit, strength, about: as in `models.transformations`.
        changed: share of the tracks whose answer is another one.
        lost, won: tracks that are right only untouched, and only transformed.
        p: McNemar's, exact.
        p_corrected: for all lines of the exam.
        per_genre: recall of each genre; None of one without tracks.
        control: with the last layer fitted anew; None where that was not asked for.
        reading: of a loss by a band that was taken out or filled: `relied upon` where the same
            band of other segments costs answers too, else `unfamiliar`; None of anything else.
    """

    name: str
    unit: str
    strength: float
    about: str
    changed: float
    lost: int
    won: int
    p: float
    p_corrected: float
    per_genre: dict[str, float | None]
    control: Control | None = None
    reading: Reading | None = None


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A track whose right answer was changed.

    Attributes:
        name, strength: of the transformation.
        track, truth, answer: its id, genre, and the genre that is heard now.
        share, truth_share: their probabilities, transformed.
        start_s: of each segment, ascending.
        before, after: probability of the truth in each segment, untouched and transformed.
        segment: which one decided: the new answer is surest there.
        file: WAV of that segment, in the exam's folder.
    """

    name: str
    strength: float
    track: str
    truth: str
    answer: str
    share: float
    truth_share: float
    start_s: list[float]
    before: list[float]
    after: list[float]
    segment: int
    file: str


@dataclass(frozen=True, kw_only=True)
class Bands:
    """How little of the spectrum keeps the answers, over some segments.

    Attributes:
        edges_hz: of the bands, evenly spaced on the mel scale.
        segments: that were searched.
        kept: mean number of bands without which the answer would be another one.
        by_genre: of segments with that answer, how often each band is kept.
        fooled: share of other segments that get the same answer, when these bands of theirs are
            replaced; None where all answers are the same.
    """

    edges_hz: list[float]
    segments: int
    kept: float
    by_genre: dict[str, list[float]]
    fooled: float | None


@dataclass(frozen=True, kw_only=True)
class Exam:
    """An exam, as RUN/exam/NAME.json has it.

    Attributes:
        run, name, split, dataset_id, weights: what was examined on what.
        genres: in label order.
        seed: of what is drawn.
        unit: of intervals: `groups` (artists), or `tracks` where they are unknown.
        tracks, segments: how many.
        untouched: accuracy, and its interval.
        refitted: accuracy of the last layer fitted anew on untouched training segments.
        transformations: in the order of the exam.
        worst: name and strength of the least accuracy.
        always_right: share of tracks that are right under all of them, and untouched.
        heard: changed answers to listen to.
        bands: None where they were not asked for.
    """

    run: str
    name: str
    split: str
    dataset_id: str
    weights: str
    genres: list[str]
    seed: int
    unit: str
    tracks: int
    segments: int
    untouched: float
    untouched_interval: list[float] | None
    refitted: float | None
    transformations: list[Line]
    worst: Key
    always_right: float
    heard: list[Heard]
    bands: Bands | None

    def to_json(self) -> str:
        """Text of the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def read(path: Path) -> Exam:
    """Read an exam.

    Raises:
        UserError: it is not as `exam` writes it.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lines = [
            Line(**each | {"control": Control(**each["control"]) if each["control"] else None})
            for each in found["transformations"]
        ]
        name, strength = found["worst"]
        return Exam(
            **found
            | {
                "transformations": lines,
                "worst": (name, strength),
                "heard": [Heard(**each) for each in found["heard"]],
                "bands": Bands(**found["bands"]) if found["bands"] else None,
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"exam {path}",
            got=f"{type(error).__name__}: {error}",
            expected="an exam as this version writes it",
            cure=f"remove {path}, and examine the run again",
        ) from error


def drop(
    before: "SplitScores", after: "SplitScores", cluster: NDArray[np.int64], genres: int
) -> dict[str, Any]:
    """The fields of `Drop`.

    Args:
        before: untouched.
        after: transformed; the same tracks.
        cluster: of the tracks, int64 [M].
        genres: K.
    """
    left = [
        intervals.leave_out(of.labels, of.guesses, cluster, genres=genres) for of in (before, after)
    ]
    without = left[1].figures["accuracy"]
    accuracy = after.track.accuracy
    difference = accuracy - before.track.accuracy
    own = intervals.of_figure(
        accuracy, intervals.deviation(without), clusters=len(without), items=len(cluster)
    )
    error = intervals.deviation(without - left[0].figures["accuracy"])
    bounds = intervals.of_difference(difference, error, clusters=len(without))
    return {
        "accuracy": accuracy,
        "interval": own and list(own),
        "difference": difference,
        "difference_interval": bounds and list(bounds),
    }


def lines(
    untouched: "SplitScores",
    found: Mapping[Key, "SplitScores"],
    about: Mapping[Key, tuple[str, str]],
    cluster: NDArray[np.int64],
    genres: Sequence[str],
) -> list[Line]:
    """Figures of each transformation, without controls.

    Args:
        untouched: of the split as it is.
        found: of the same tracks, transformed.
        about: unit and words of each.
        cluster: of the tracks, int64 [M].
        genres: names in label order.
    """
    right = untouched.guesses == untouched.labels
    tests = {}
    for key, after in found.items():
        now = after.guesses == after.labels
        tests[key] = int((right & ~now).sum()), int((now & ~right).sum())
    values = [intervals.mcnemar(*test) for test in tests.values()]
    made = []
    for (key, after), p, corrected in zip(
        found.items(), values, intervals.holm(values), strict=True
    ):
        lost, won = tests[key]
        made.append(
            Line(
                **drop(untouched, after, cluster, len(genres)),
                name=key[0],
                strength=key[1],
                unit=about[key][0],
                about=about[key][1],
                changed=float((after.guesses != untouched.guesses).mean()),
                lost=lost,
                won=won,
                p=p,
                p_corrected=corrected,
                per_genre=_per_genre(after, genres),
            )
        )
    swapped = {line.strength: line for line in made if line.name == "band-swap"}
    return [
        replace(line, reading="relied upon" if _is_loss(swapped[line.strength]) else "unfamiliar")
        if line.name in _OF_BANDS and line.strength in swapped and _is_loss(line)
        else line
        for line in made
    ]


_OF_BANDS = ("band-stop", "band-noise", "band-swap")


def _per_genre(of: "SplitScores", genres: Sequence[str]) -> dict[str, float | None]:
    confusion = confusion_of(of.labels, of.guesses, len(genres))
    recall = precision_recall_f1(confusion)[1]
    has = confusion.sum(axis=1) > 0
    return {name: float(recall[k]) if has[k] else None for k, name in enumerate(genres)}


def worst(found: Sequence[Line], count: int = WORST) -> list[Key]:
    """The worst strength of the transformations of the least accuracy, the worst first."""
    chosen: dict[str, float] = {}
    for line in sorted(found, key=lambda line: line.accuracy):  # stable
        chosen.setdefault(line.name, line.strength)
    return list(chosen.items())[:count]


def controlled(
    line: Line,
    before: "SplitScores",
    after: "SplitScores",
    cluster: NDArray[np.int64],
    genres: int,
) -> Line:
    """The same line with its control.

    Args:
        line: of the model as it is.
        before: of a last layer fitted anew on untouched training segments, untouched.
        after: of one fitted on transformed ones, transformed.
        cluster: of the tracks, int64 [M].
        genres: K.
    """
    found = Drop(**drop(before, after, cluster, genres))
    recovered = 1 - found.difference / line.difference if line.difference < 0 else None
    control = Control(
        **asdict(found), recovered=recovered, verdict=_verdict(line, found, recovered)
    )
    return replace(line, control=control)


def _verdict(line: Line, refitted: Drop, recovered: float | None) -> Verdict:
    if recovered is None or not _is_loss(line):
        return "no loss"
    if recovered >= 0.5:
        return "last layer"
    return "below" if _is_loss(refitted) else "undecided"


def _is_loss(of: Drop) -> bool:
    """Whether a difference is below zero by more than chance."""
    bounds = of.difference_interval
    return of.difference < 0 and (bounds is None or bounds[1] < 0)


def always_right(scores: Sequence["SplitScores"]) -> float:
    """Share of tracks that are right in all of them."""
    return float(np.all([each.guesses == each.labels for each in scores], axis=0).mean())
