"""What a bias table knows, before anyone trains with it; `report/bias_report` shows it.

A bias model that knows the task destroys product of experts, one that knows nothing leaves plain
cross-entropy: both are said in words. Figures of the training split are out of fold where the
table is ours. A row or track is bias-aligned if the bias model names its genre, else
bias-conflicting; a track is judged by the mean probability of its segments.

Its JSON is `scoring.written.BiasReport`.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.bias_model.table import BiasTable
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.tracks import SPLITS, group_key
from mgc_dist.scoring.calibration import is_at_bound
from mgc_dist.scoring.metrics import (
    effective_sample_size,
    expected_calibration_error,
    scores,
    track_means,
)
from mgc_dist.scoring.written import BiasGenre, BiasReport

TOO_GOOD = 0.9
"""Accuracy on the training rows above which a warning is printed: at 0.915 product of experts
had taught the demo's main model little after six epochs, at 0.745 it learned (docs/log.md,
2026-11-22)."""
GENRE_TOO_GOOD = 0.95
"""The same for a single genre: the bias model named metal in 98 % of its segments, and twice the
main model never named it (docs/log.md, 2026-11-22)."""


def paths_of(table: Path) -> tuple[Path, Path]:
    """Where the report of a table is: JSON and picture, in its folder or beside its file."""
    if table.is_dir():
        return table / "report.json", table / "report.png"
    return table.with_name(f"{table.name}.report.json"), table.with_name(f"{table.name}.report.png")


def make(
    table: BiasTable, manifest: Manifest, label: NDArray[np.int64], track: NDArray[np.int64]
) -> BiasReport:
    """Figures of each split, and of the training rows' truth, as this module's docstring lists.

    Args:
        table: checked against the data set.
        manifest: manifest of the data set.
        label: int64 [N].
        track: int64 [N], position of each row's track in the manifest.
    """
    splits: dict[str, dict[str, float]] = {}
    genres: dict[str, dict[str, BiasGenre]] = {}
    truth = np.empty(0)
    for split in SPLITS:
        rows = slice(*manifest.splits[split])
        probability = np.exp(table.log_probability[rows].astype(np.float64))  # [rows, K]
        ece = expected_calibration_error(probability, label[rows])
        splits[split] = scores(probability, label[rows]).summary() | {"ece": ece}
        genres[split] = _per_genre(probability, label[rows], track[rows], manifest.genres)
        if split == "train":
            truth = probability[np.arange(len(probability)), label[rows]]
    counts, _ = np.histogram(truth, bins=10, range=(0, 1))
    header = table.header
    report: BiasReport = {
        "backbone": table.name,
        "layers": list(header.layers) if header else None,
        "folds": header.folds if header else None,
        "temperature": header.temperature if header else None,
        "fold_status": table.fold_status,
        "dataset_id": manifest.dataset_id,
        "table_sha256": table.sha256,
        "splits": splits,
        "truth_histogram": counts.tolist(),
        "effective_sample_size": effective_sample_size(1 - truth),
        "per_genre": genres.pop("train"),
        "per_genre_of": genres,
        "warnings": [],
    }
    report["warnings"] = _warnings(report, _lone_genres(table, manifest))
    return report


def _lone_genres(table: BiasTable, manifest: Manifest) -> list[str]:
    """Genres all of whose training tracks lie in one fold: their head has never heard them."""
    folds: dict[str, set[int]] = {genre: set() for genre in manifest.genres}
    for track in manifest.tracks:
        if table.header and track.split == "train":
            folds[track.genre].add(table.header.fold_of[group_key(track.id, track.group)])
    return [genre for genre, of in folds.items() if len(of) == 1]


def _per_genre(
    probability: NDArray[np.float64],
    label: NDArray[np.int64],
    track: NDArray[np.int64],
    genres: tuple[str, ...],
) -> dict[str, BiasGenre]:
    right = probability.argmax(axis=1) == label  # [rows]
    tracks, of_track = track_means(probability, track)  # [M], [M, K]
    genre_of = np.empty(len(tracks), np.int64)
    genre_of[np.searchsorted(tracks, track)] = label
    track_right = of_track.argmax(axis=1) == genre_of  # [M]
    found: dict[str, BiasGenre] = {}
    for k, genre in enumerate(genres):
        mine, my_tracks = right[label == k], track_right[genre_of == k]
        found[genre] = {
            "rows": len(mine),
            "accuracy": float(mine.mean()) if len(mine) else 0.0,
            "aligned_rows": int(mine.sum()),
            "conflicting_rows": int((~mine).sum()),
            "aligned_tracks": int(my_tracks.sum()),
            "conflicting_tracks": int((~my_tracks).sum()),
        }
    return found


def _warnings(report: BiasReport, lone: list[str]) -> list[str]:
    said, train, genres = [], report["splits"]["train"], report["per_genre"]
    if report["fold_status"] == "unknown":
        said.append(
            f"the fold status of {report['backbone']} is unknown: if its model was fitted on "
            "training rows, it knows their genres better than it would know new ones, and the "
            "main model is taught to look away from what it needs"
        )
    if lone:
        said.append(
            f"all training tracks of {', '.join(lone)} are in one fold: the head that judges them "
            "has never heard the genre, and its logits say nothing about it; a genre needs "
            "training tracks by at least two artists"
        )
    if train["accuracy"] > TOO_GOOD:
        said.append(
            f"a bias model that is right in {100 * train['accuracy']:.0f} % of the training "
            f"segments (above {100 * TOO_GOOD:.0f} %) explains the task itself, and product of "
            "experts may teach the main model little: at 0.915 it had learned little after six "
            "epochs, at 0.745 it learned (docs/log.md). Compare with --loss ce, or lower --beta"
        )
    easy = {g: of["accuracy"] for g, of in genres.items() if of["accuracy"] > GENRE_TOO_GOOD}
    if easy:
        listed = ", ".join(f"{genre} ({100 * share:.0f} %)" for genre, share in easy.items())
        said.append(
            f"the bias model nearly always names {listed}: product of experts leaves the main "
            "model nothing to learn there; at 98 % it never named the genre in two of our runs "
            "(docs/log.md)"
        )
    if train["nll"] >= math.log(len(genres)):
        said.append(
            f"the bias model's NLL of {train['nll']:.2f} on the training rows is not below that of "
            f"guessing ({math.log(len(genres)):.2f}): it explains nothing that the loss could "
            "discount"
        )
    temperature = report["temperature"]
    if temperature is not None and is_at_bound(temperature):
        said.append(
            f"the temperature ran to its bound ({temperature:.2f}): the heads do not carry over "
            "to artists that they have not seen; try fewer --folds, another --layer or a smaller "
            "--head-c"
        )
    return said
