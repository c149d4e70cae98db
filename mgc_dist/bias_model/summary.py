"""What a bias table knows, before anyone trains with it: text, report.json, report.png.

A bias model that knows the task destroys product of experts, one that knows nothing leaves plain
cross-entropy: both are said in words. Figures of the training split are out of fold where the
table is ours. A row or track is bias-aligned if the bias model names its genre, else
bias-conflicting; a track is judged by the mean probability of its segments.

report.json, a page may read it:

    {"backbone": str,                    the model, or the file of a table from elsewhere
     "layers": [int, ...] or null,       null, as the next two, for a table from elsewhere
     "folds": int or null,
     "temperature": float or null,
     "fold_status": "out-of-fold" or "unknown",
     "dataset_id": str,
     "table_sha256": str,
     "splits": {SPLIT: {"count": int, "accuracy": float, "nll": float, "ece": float,
                        "balanced_accuracy": float, "macro_f1": float}},      over segments
     "truth_histogram": [10 counts],     training rows by the probability given to the truth
     "effective_sample_size": float,     of the weights 1 - b_y over the training rows
     "per_genre": {GENRE: {"rows": int, "accuracy": float,                    training split
                           "aligned_rows": int, "conflicting_rows": int,
                           "aligned_tracks": int, "conflicting_tracks": int}},
     "per_genre_of": {"validation": as per_genre, "test": as per_genre},
     "warnings": [str, ...]}
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mgc_dist.bias_model.table import BiasTable
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.tracks import SPLITS, group_key
from mgc_dist.files import replace_text, replacing
from mgc_dist.scoring.calibration import is_at_bound
from mgc_dist.scoring.metrics import (
    effective_sample_size,
    expected_calibration_error,
    scores,
    track_means,
)

if TYPE_CHECKING:
    from rich.table import Table

Report = dict[str, Any]

TOO_GOOD = 0.9
"""Accuracy on the training rows above which a warning is printed: at 0.915 product of experts
had taught the demo's main model little after six epochs, at 0.745 it learned (docs/log.md,
2026-11-22)."""
GENRE_TOO_GOOD = 0.95
"""The same for a single genre: the bias model named metal in 98 % of its segments, and twice the
main model never named it (docs/log.md, 2026-11-22)."""


def make(
    table: BiasTable, found: Manifest, label: NDArray[np.int64], track: NDArray[np.int64]
) -> Report:
    """Figures of each split, and of the training rows' truth, as this module's docstring lists.

    Args:
        table: checked against the data set.
        found: manifest of the data set.
        label: int64 [N].
        track: int64 [N], position of each row's track in the manifest.
    """
    splits: dict[str, dict[str, float]] = {}
    genres: dict[str, dict[str, dict[str, float]]] = {}
    truth = np.empty(0)
    for split in SPLITS:
        rows = slice(*found.splits[split])
        probability = np.exp(table.log_probability[rows].astype(np.float64))  # [rows, K]
        ece = expected_calibration_error(probability, label[rows])
        splits[split] = scores(probability, label[rows]).summary() | {"ece": ece}
        genres[split] = _per_genre(probability, label[rows], track[rows], found.genres)
        if split == "train":
            truth = probability[np.arange(len(probability)), label[rows]]
    counts, _ = np.histogram(truth, bins=10, range=(0, 1))
    header = table.header
    report: Report = {
        "backbone": table.name,
        "layers": list(header.layers) if header else None,
        "folds": header.folds if header else None,
        "temperature": header.temperature if header else None,
        "fold_status": table.fold_status,
        "dataset_id": found.dataset_id,
        "table_sha256": table.sha256,
        "splits": splits,
        "truth_histogram": counts.tolist(),
        "effective_sample_size": effective_sample_size(1 - truth),
        "per_genre": genres.pop("train"),
        "per_genre_of": genres,
    }
    return report | {"warnings": _warnings(report, _lone_genres(table, found))}


def _lone_genres(table: BiasTable, found: Manifest) -> list[str]:
    """Genres all of whose training tracks lie in one fold: their head has never heard them."""
    folds: dict[str, set[int]] = {genre: set() for genre in found.genres}
    for track in found.tracks:
        if table.header and track.split == "train":
            folds[track.genre].add(table.header.fold_of[group_key(track.id, track.group)])
    return [genre for genre, of in folds.items() if len(of) == 1]


def _per_genre(
    probability: NDArray[np.float64],
    label: NDArray[np.int64],
    track: NDArray[np.int64],
    genres: tuple[str, ...],
) -> dict[str, dict[str, float]]:
    right = probability.argmax(axis=1) == label  # [rows]
    tracks, of_track = track_means(probability, track)  # [M], [M, K]
    genre_of = np.empty(len(tracks), np.int64)
    genre_of[np.searchsorted(tracks, track)] = label
    track_right = of_track.argmax(axis=1) == genre_of  # [M]
    found = {}
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


def _warnings(report: Report, lone: list[str]) -> list[str]:
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


def paths_of(table: Path) -> tuple[Path, Path]:
    """Where the report of a table is: JSON and picture, in its folder or beside its file."""
    if table.is_dir():
        return table / "report.json", table / "report.png"
    return table.with_name(f"{table.name}.report.json"), table.with_name(f"{table.name}.report.png")


def write(table: Path, report: Report) -> None:
    """Write the picture, then the JSON file."""
    text, picture = paths_of(table)
    draw(picture, report)
    replace_text(text, json.dumps(report, indent=1, ensure_ascii=False))


def show(report: Report) -> None:
    """Print the report."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    ours = report["fold_status"] == "out-of-fold"
    shown = Table(title=_title(report))
    for column in ("split", "logits", "rows", "accuracy", "NLL", "ECE"):
        shown.add_column(column, justify="left" if column in ("split", "logits") else "right")
    for split, figures in report["splits"].items():
        kind = "out of fold" if split == "train" else "mean of heads"
        values = (f"{figures[name]:.3f}" for name in ("accuracy", "nll", "ece"))
        shown.add_row(split, kind if ours else "as given", str(figures["count"]), *values)
    console.print(shown)
    console.print(_genre_table(report))
    console.print(
        f"probability given to the truth (training rows{', out of fold' if ours else ''}):"
    )
    counts = report["truth_histogram"]
    for tenth, count in enumerate(counts):
        bar = "█" * round(40 * count / max(counts))
        console.print(f"  {tenth / 10:.1f}-{(tenth + 1) / 10:.1f} {count:6d} {bar}")
    rows, size = report["splits"]["train"]["count"], report["effective_sample_size"]
    console.print(
        f"effective sample size of the weights 1 - b_y: {size:.0f} of {rows} rows "
        f"({100 * size / rows:.0f} %)"
    )
    for warning in report["warnings"]:
        console.print(f"Warning: {warning}.", markup=False)


def _title(report: Report) -> str:
    if report["fold_status"] == "unknown":
        return f"Bias report: {report['backbone']}, fold status unknown"
    many, layers = len(report["layers"]) > 1, ", ".join(map(str, report["layers"]))
    return (
        f"Bias report: {report['backbone']}, layer{'s' if many else ''} {layers}, "
        f"{report['folds']} folds, temperature {report['temperature']:.2f}"
    )


def _genre_table(report: Report) -> "Table":
    from rich.table import Table

    shown = Table(title="rows and tracks: named by the bias model (aligned) / not (conflicting)")
    shown.add_column("genre")
    for column in ("named", "train", "tracks", "valid.", "tracks", "test", "tracks"):
        shown.add_column(column, justify="right", no_wrap=True)
    for genre, mine in report["per_genre"].items():
        cells = [f"{100 * mine['accuracy']:.0f} %"]
        for of in (mine, *(report["per_genre_of"][split][genre] for split in SPLITS[1:])):
            cells += [f"{of[f'aligned_{u}']}/{of[f'conflicting_{u}']}" for u in ("rows", "tracks")]
        shown.add_row(genre, *cells)
    return shown


def draw(path: Path, report: Report) -> None:
    """Write the picture: probability of the truth, aligned and conflicting rows of each genre."""
    from matplotlib.figure import Figure

    genres = report["per_genre"]
    figure = Figure(figsize=(11, 1.6 + 0.34 * max(7, len(genres))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    ours = ", out of fold" if report["fold_status"] == "out-of-fold" else ""
    figures = (f"{s} {f['accuracy']:.3f}" for s, f in report["splits"].items())
    figure.suptitle(f"{_title(report)}\nsegment accuracy: {', '.join(figures)}", fontsize=11)
    left.bar(np.arange(10) / 10, report["truth_histogram"], 0.1, align="edge", color="0.5", ec="w")
    rows, size = report["splits"]["train"]["count"], report["effective_sample_size"]
    left.set_title(
        f"training rows{ours}; effective size of 1 - b: {size:.0f} of {rows}", fontsize=10
    )
    left.set_xlabel("probability given to the true genre")
    left.set_ylabel("training rows")
    left.set_xlim(0, 1)
    place = np.arange(len(genres))
    aligned = np.array([of["aligned_rows"] for of in genres.values()])
    conflicting = np.array([of["conflicting_rows"] for of in genres.values()])
    right.barh(place, aligned, color="tab:orange", label="aligned: the bias model names the genre")
    right.barh(place, conflicting, left=aligned, color="tab:blue", label="conflicting")
    for k, of in enumerate(genres.values()):
        mark = f" {100 * of['accuracy']:.0f} %{' !' if of['accuracy'] > GENRE_TOO_GOOD else ''}"
        right.text(aligned[k] + conflicting[k], k, mark, va="center", fontsize=9)
    right.set_yticks(place, list(genres))
    right.invert_yaxis()
    right.set_xlim(0, 1.15 * max(1, int((aligned + conflicting).max())))
    right.set_xlabel("training rows")
    right.set_title("what is left to learn: bias-conflicting rows", fontsize=10)
    right.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False
    )
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
