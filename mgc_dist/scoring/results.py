"""What `evaluate` wrote about a run, read back: truths and predictions by track, no model."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist import cli
from mgc_dist.errors import UserError
from mgc_dist.scoring import shared_genres


@dataclass(frozen=True, kw_only=True)
class Result:
    """Predictions of a run on a split.

    Attributes:
        run: its folder.
        dataset_id: of the shards that were measured.
        aggregate: how segments were made into tracks.
        genres: in label order.
        in_common: what the genres are, where they are not all that the model knows; else "".
        tracks: ids, sorted.
        groups: of the tracks, None where unknown.
        label, guess: int64 [M].
        subgroups: a name or None for each track.
    """

    run: Path
    dataset_id: str
    aggregate: str
    genres: tuple[str, ...]
    in_common: str
    tracks: tuple[str, ...]
    groups: tuple[str | None, ...]
    label: NDArray[np.int64]
    guess: NDArray[np.int64]
    subgroups: tuple[str | None, ...]


def read(run: Path, name: str) -> Result:
    """Read RUN/evaluation/NAME.json and RUN/predictions/NAME.jsonl.

    Raises:
        UserError: they are not there, or not as `evaluate` writes them.
    """
    figures, predictions = (
        run / "evaluation" / f"{name}.json",
        run / "predictions" / f"{name}.jsonl",
    )
    for path in (figures, predictions):
        if not path.is_file():
            there = sorted(found.stem for found in figures.parent.glob("*.json"))
            raise UserError(
                f"run {run}",
                got=f"no {path}" + (f", but {', '.join(there)}" if there else ""),
                expected="a run that has been evaluated",
                cure=f"{cli.launched('evaluate')} {run}; or choose with --split or --name",
            )
    try:
        content = json.loads(figures.read_text(encoding="utf-8"))
        text = predictions.read_text(encoding="utf-8").removesuffix("\n")
        lines = [json.loads(line) for line in text.split("\n")]  # a name may hold U+2028
        lines.sort(key=lambda line: str(line["track"]))
        genres = tuple(content["genres"])
        number = {genre: label for label, genre in enumerate(genres)}
        if len(lines) != content["track"]["count"]:
            raise ValueError(f"{len(lines)} tracks, and {content['track']['count']} in {figures}")
        return Result(
            run=run,
            dataset_id=str(content["dataset_id"]),
            aggregate=str(content["aggregate"]),
            genres=genres,
            in_common=shared_genres.named(content),
            tracks=tuple(str(line["track"]) for line in lines),
            groups=tuple(line["group"] for line in lines),
            label=np.array([number[line["truth"]] for line in lines], np.int64),
            guess=np.array([number[line["prediction"]] for line in lines], np.int64),
            subgroups=tuple(line["subgroup"] for line in lines),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"predictions {predictions}",
            got=f"{type(error).__name__}: {error}",
            expected="predictions as this version of evaluate writes them",
            cure=f"evaluate again: {cli.launched('evaluate')} {run}",
        ) from error


def refuse_other_genres(one: Result, other: Result) -> None:
    """Check that both or none were measured on genres in common only, and on the same ones.

    Raises:
        UserError: it is not so: fewer genres are easier to tell apart.
    """
    if one.in_common != other.in_common:
        whole = "on all genres of the model"
        raise UserError(
            f"evaluations of {one.run} and {other.run}",
            got=f"{one.in_common or whole}, and {other.in_common or whole}",
            expected="the same genres for both",
            cure="evaluate both on the same shards, with the same --genre-map",
        )


def refuse_different(one: Result, other: Result) -> None:
    """Check that two runs were measured on the same tracks in the same way.

    Raises:
        UserError: another data set, other genres, tracks, truths, or another aggregate.
    """
    refuse_other_genres(one, other)
    for what, first, second in (
        ("genres", ", ".join(one.genres), ", ".join(other.genres)),
        ("tracks", *_differing_tracks(one, other)),
        ("truths", *_differing_truths(one, other)),
        ("data set", one.dataset_id[:12], other.dataset_id[:12]),
        ("--aggregate", one.aggregate, other.aggregate),
    ):
        if first != second:
            raise UserError(
                f"{what} of {one.run} and {other.run}",
                got=f"{first} and {second}",
                expected="the same for both",
                cure=f"evaluate both on the same shards: {cli.launched('evaluate')} RUN --data "
                "SHARDS --name NAME",
            )


def _differing_tracks(one: Result, other: Result) -> tuple[str, str]:
    first, second = set(one.tracks), set(other.tracks)
    if first == second:
        return "", ""
    only = sorted(first - second), sorted(second - first)
    shown = [f"{len(names)} of its own" + (f" ({names[0]})" if names else "") for names in only]
    return f"{len(first)} tracks, {shown[0]}", f"{len(second)} tracks, {shown[1]}"


def _differing_truths(one: Result, other: Result) -> tuple[str, str]:
    if one.tracks != other.tracks or one.genres != other.genres:
        return "", ""
    places = np.flatnonzero(one.label != other.label)
    if not len(places):
        return "", ""
    track = one.tracks[places[0]]
    labels = (one.genres[one.label[places[0]]], other.genres[other.label[places[0]]])
    return f"{track} {labels[0]}", f"{track} {labels[1]}"
