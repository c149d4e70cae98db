"""What a bias table knows, before anyone trains with it; `report/bias_report` shows it.

A bias model that knows the task destroys product of experts, one that knows nothing leaves plain
cross-entropy: both are said in words. Figures of the training split are out of fold where the
table is ours. A row or track is bias-aligned if the bias model names its genre, else
bias-conflicting; a track is judged by the mean probability of its segments.

Its JSON is `scoring.written.BiasReport`.
"""

import json
import math
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from mgc_dist.bias_model.probe_share import share
from mgc_dist.bias_model.table import BiasTable
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.tracks import SPLITS, group_key
from mgc_dist.scoring.calibration import is_at_bound
from mgc_dist.scoring.metrics import effective_sample_size, scores, track_means
from mgc_dist.scoring.written import BiasGenre, BiasReport, ProbeFigures

MUCH = 0.5
"""Nats of beta * KL(b || uniform) from which product of experts is said to change much. With linear
models on tag features of GTZAN's tracks, beta 0.5 (about as much) cost 0.3 to 4.3 points of
accuracy, and beta 1 up to 24 (docs/log.md, 2026-11-28)."""
KNOWS = 0.8
"""Share of the main model's probe from which a bias model is said to know the task itself."""
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


def probe_of(path: Path, table: BiasTable) -> ProbeFigures | None:
    """The probe in the report of a table, where the report is of this very table."""
    try:
        report = json.loads(paths_of(path)[0].read_text(encoding="utf-8"))
        if report["table_sha256"] == table.sha256:
            return cast(ProbeFigures | None, report.get("probe"))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def make(
    table: BiasTable,
    manifest: Manifest,
    label: NDArray[np.int64],
    track: NDArray[np.int64],
    probe: ProbeFigures | None = None,
) -> BiasReport:
    """Figures of each split, and of the training rows' truth, as this module's docstring lists.

    Args:
        table: checked against the data set.
        manifest: manifest of the data set.
        label: int64 [N].
        track: int64 [N], position of each row's track in the manifest.
        probe: of the main model on the table's folds; None where it was not made.
    """
    splits: dict[str, dict[str, float]] = {}
    genres: dict[str, dict[str, BiasGenre]] = {}
    truth, divergence = np.empty(0), 0.0
    for split in SPLITS:
        rows = slice(*manifest.splits[split])
        probability = np.exp(table.log_probability[rows].astype(np.float64))  # [rows, K]
        splits[split] = scores(probability, label[rows]).summary()
        genres[split] = _per_genre(probability, label[rows], track[rows], manifest.genres)
        if split == "train":
            truth = probability[np.arange(len(probability)), label[rows]]
            divergence = math.log(len(manifest.genres)) - float(entr(probability).sum(1).mean())
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
        "divergence": divergence,
        "probe": probe,
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


def warning_of_beta(report: BiasReport, beta: float) -> str | None:
    """What a product of experts with this largest weight changes, where that is much."""
    nats = beta * report.get("divergence", 0.0)
    if nats < MUCH:
        return None
    return (
        f"--beta {beta:g} times the bias model's KL from uniform is {nats:.2f} nats (of "
        f"{math.log(len(report['per_genre'])):.2f}): the loss changes much. On features of GTZAN "
        "without a known shortcut, about 0.5 nats cost 0.3 to 4.3 points of accuracy, and 1 nat up "
        "to 24 (docs/log.md). It is a good choice only against a shortcut that you know: train the "
        "same with --loss ce, and compare"
    )


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
    probe = report.get("probe")
    known = share(train["accuracy"], probe, len(genres)) if probe else None
    if probe and known is not None and known >= KNOWS:
        said.append(
            f"the bias model knows {100 * known:.0f} % of what a linear probe of {probe['model']} "
            f"knows beyond chance (accuracy {train['accuracy']:.3f} and {probe['accuracy']:.3f}, "
            "same folds): unless all of that is a shortcut, product of experts takes away the task "
            "itself. Compare with --loss ce, lower --beta, or choose a smaller bias model"
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
