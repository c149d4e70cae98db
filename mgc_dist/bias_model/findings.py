"""The body of `audit`: what tells the genre, what leaks, which labels are doubted."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgc_dist.bias_model import doubts, families
from mgc_dist.bias_model.families import PROBE, Traits
from mgc_dist.bias_model.heads import CrossFit
from mgc_dist.config import AuditConfig
from mgc_dist.console import progress
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.packing import card
from mgc_dist.scoring import intervals

LEAST_GAIN = 0.1
"""A family is named if it is surely so far from chance towards certainty: less is no shortcut that
a model would live on. Rhythm alone takes the best family to 0.23 (median) of 160 planted tracks at
a chance of 0.1, so that in much larger sets it may be named for it (docs/benchmarks.md)."""
_USED = 6
"""Traits that are listed of a family."""
_SHOWN = 3
"""Genres of a family of which an example is heard."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was found in M tracks.

    Attributes:
        figures: as JSON has it.
        examples: family that is named -> numbers of tracks that show it.
        doubted: numbers of the doubted tracks, the surest doubt first.
    """

    figures: dict[str, Any]
    examples: dict[str, list[int]]
    doubted: list[int]


def examine(config: AuditConfig, shards: ShardSet) -> Audit:
    """Look at a data set.

    Args:
        config: folds, seed, processes.
        shards: all rows, as they were packed.

    Raises:
        UserError: a shard is damaged, or a fold would be empty.
    """
    found = shards.manifest
    fold = families.folds_of(found, config.folds, config.seed)  # refused before the pass
    gathered, probe = families.gather(shards, config.jobs)
    label, genres = families.labels(found), len(found.genres)
    units = intervals.units_of([track.group for track in found.tracks])
    unit, cluster = next(iter(units.items()))
    chance = float(np.bincount(label).max() / len(label))
    with progress("models", len(gathered), unit="families") as bar:
        fits = {
            family.name: families.fit(family.values, label, fold, genres)
            for family in bar.over(gathered)
        }
    judged = [
        _judged(family, fits[family.name], label, found.genres, cluster, chance)
        for family in gathered
    ]
    _correct(judged)
    judged.sort(key=lambda each: -each["accuracy"])
    named = [each["name"] for each in judged if each["named"]]
    labels_fit = families.fit(probe, label, fold, genres)
    doubted = _doubts(labels_fit, found, label)
    figures = {
        "dataset_id": found.dataset_id,
        "tracks": len(label),
        "artists": len({track.group for track in found.tracks if track.group}),
        "genres": list(found.genres),
        "folds": config.folds,
        "unit": unit,
        "chance": chance,
        "named_above": _threshold(chance),
        "families": judged,
        "inflation": _inflation(probe, labels_fit, found, label, config),
        "leaks": card.limits(found),
        "repetitions": _repetitions(shards.folder),
        "left_out": card.left_out(found),
        "doubts": doubted,
    }
    numbers = {track.id: number for number, track in enumerate(found.tracks)}
    return Audit(
        figures=figures,
        examples={name: _examples(fits[name], label) for name in named},
        doubted=[numbers[each["track"]] for each in doubted["tracks"]],
    )


def _threshold(chance: float) -> float:
    return chance + LEAST_GAIN * (1 - chance)


def _judged(
    family: Traits,
    fitted: CrossFit,
    label: NDArray[np.int64],
    genres: Sequence[str],
    cluster: NDArray[np.int64],
    chance: float,
) -> dict[str, Any]:
    right = fitted.log_probability.argmax(axis=1) == label
    interval = intervals.of_share(right, cluster)
    return {
        "name": family.name,
        "about": family.about,
        "accuracy": float(right.mean()),
        "interval": list(interval) if interval else None,
        "p": intervals.p_above(right, cluster, _threshold(chance)),
        "uses": families.used(family, fitted, genres, _USED),
    }


def _correct(judged: list[dict[str, Any]]) -> None:
    """Correct the p-values for the number of families, and say which are named."""
    for each, p in zip(judged, intervals.holm([each["p"] for each in judged]), strict=True):
        each |= {"p": p, "named": p < (1 - intervals.LEVEL) / 2}


def _inflation(
    probe: NDArray[np.float32],
    apart: CrossFit,
    found: Manifest,
    label: NDArray[np.int64],
    config: AuditConfig,
) -> dict[str, Any] | None:
    """How much better the probe is where its folds split artists; None without any known."""
    groups = [track.group for track in found.tracks]
    if not any(groups):
        return None
    fold = families.folds_of(found, config.folds, config.seed, by_artist=False)
    mixed = families.fit(probe, label, fold, len(found.genres))
    rights = [
        (each.log_probability.argmax(axis=1) == label).astype(np.float64) for each in (mixed, apart)
    ]
    _, place = np.unique(intervals.clusters_of(groups), return_inverse=True)
    items, gains = np.bincount(place), np.bincount(place, rights[0] - rights[1])
    error = intervals.deviation((gains.sum() - gains) / (items.sum() - items))
    difference = float(gains.sum() / items.sum())
    interval = intervals.of_difference(difference, error, clusters=len(items))
    return {
        "probe": PROBE,
        "random": float(rights[0].mean()),
        "by_artist": float(rights[1].mean()),
        "difference": difference,
        "interval": list(interval) if interval else None,
    }


def _repetitions(folder: Path) -> dict[str, Any]:
    """Pairs of tracks that packing has found to hold one recording; those of two genres apart."""
    path = folder / "repetitions.csv"
    if not path.is_file():
        return {"pairs": 0, "of_two_genres": []}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    differ = [row for row in rows if row["genre"] != row["its_genre"]]
    told = [f"{r['track']} ({r['genre']}) is {r['same_as']} ({r['its_genre']})" for r in differ]
    return {"pairs": len(rows), "of_two_genres": told}


def _doubts(fitted: CrossFit, found: Manifest, label: NDArray[np.int64]) -> dict[str, Any]:
    probability = np.exp(fitted.log_probability.astype(np.float64))
    right = probability.argmax(axis=1) == label
    doubted = doubts.find(probability, label)
    kept = np.ones(len(label), bool)
    kept[doubted.track] = False
    return {
        "model": PROBE,
        "accuracy": float(right.mean()),
        "accuracy_without": float(right[kept].mean()) if kept.any() else None,
        "share": float((~kept).mean()),
        "tracks": [
            {
                "track": found.tracks[track].id,
                "source": found.tracks[track].source,
                "genre": found.tracks[track].genre,
                "sounds_like": found.genres[guess],
                "probability": float(probability[track, guess]),
                "of_label": float(probability[track, label[track]]),
            }
            for track, guess in zip(doubted.track.tolist(), doubted.guess.tolist(), strict=True)
        ],
    }


def _examples(fitted: CrossFit, label: NDArray[np.int64]) -> list[int]:
    """Tracks that a family is surest of, each of another genre."""
    guess = fitted.log_probability.argmax(axis=1)
    sure = np.where(guess == label, fitted.log_probability.max(axis=1), -np.inf)
    shown: dict[int, int] = {}
    for track in np.argsort(-sure, kind="stable").tolist():
        if np.isfinite(sure[track]) and len(shown) < _SHOWN:
            shown.setdefault(int(label[track]), track)
    return list(shown.values())
