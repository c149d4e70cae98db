"""Figures to files that a person looks at: confusion matrix as CSV and PNG, predictions."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.score import SplitScores


def write_confusion(
    folder: Path, name: str, confusion: NDArray[np.int64], genres: Sequence[str], title: str
) -> None:
    """Write NAME.csv and NAME.png; rows are the truth, columns the prediction.

    Args:
        folder: is made.
        name: of the files, without suffix.
        confusion: int64 [K, K].
        genres: in label order.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("truth", *genres))
        writer.writerows((genre, *row) for genre, row in zip(genres, confusion, strict=True))

    side = 2.2 + 0.55 * len(genres)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(genres)), genres, rotation=45, ha="right")
    axes.set_yticks(range(len(genres)), genres)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    axes.set_title(title, fontsize=11)
    for (truth, guess), count in np.ndenumerate(confusion):
        if count:
            color = "white" if share[truth, guess] > 0.5 else "black"
            axes.text(guess, truth, str(count), ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true genre")
    figure.savefig(folder / f"{name}.png", dpi=120)


def write_predictions(
    path: Path, result: SplitScores, track_ids: Sequence[str], genres: Sequence[str]
) -> None:
    """One JSON line a track: id, truth, prediction and all probabilities.

    Args:
        path: of the .jsonl file; its folder is made.
        result: of the split.
        track_ids: ids in the order of the manifest.
        genres: in label order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for track, row, label in zip(
            result.tracks, result.probabilities, result.labels, strict=True
        ):
            line = {
                "track": track_ids[track],
                "truth": genres[label],
                "prediction": genres[int(row.argmax())],
                "probabilities": {g: float(p) for g, p in zip(genres, row, strict=True)},
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def summary(result: SplitScores, genres: Sequence[str]) -> dict[str, object]:
    """Figures of a split as JSON: track level first, segments beside it, each genre."""
    return {
        "split": result.split,
        "track": result.track.summary(),
        "segment": result.segment.summary(),
        "per_genre": dict(zip(genres, result.track.per_genre(), strict=True)),
        "confusion": result.track.confusion.tolist(),
        "genres": list(genres),
    }
