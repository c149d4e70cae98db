"""A run folder as training and evaluation leave it, from made-up figures and real shards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from mgc_dist import cli
from mgc_dist.bias_model import table as tables
from mgc_dist.config import DataConfig, RunConfig, TrainConfig
from mgc_dist.data import manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.events import DoneEvent, StartEvent, StepEvent, ValidationEvent
from mgc_dist.journal import Journal

ROWS, GLOBAL_BATCH, STEPS = 66, 10, 66


def write_training(run: Path, shards: Path, **sections: Any) -> None:
    """config.yaml, env.json, metrics.jsonl, attempts of ten epochs, killed once at step 40."""
    run.mkdir(parents=True)
    found = manifest.read(shards)
    config = TrainConfig(
        data=DataConfig(shards=shards), output=RunConfig(run=run, resume="auto"), **sections
    )
    (run / "config.yaml").write_text(cli.dump("train", config), encoding="utf-8")
    environment = {
        "versions": {"mgc_dist": "0.1.0", "torch": "2.11.0"},
        "world": 2,
        "device": "cpu",
        "dataset_id": found.dataset_id,
        "git": "0123abcd",
        "identity": {"bias table (--bias-table)": _table_of(shards)},
    }
    (run / "env.json").write_text(json.dumps(environment))
    (run / "ds_config.json").write_text(json.dumps({"torch_autocast": {"enabled": False}}))
    (run / "status.json").write_text(json.dumps({"state": "done"}))
    _write_metrics(run, list(found.genres))
    attempts = [
        {"attempt": "a", "samples_seen": 0, "world": 2, "event": "start"},
        {"attempt": "b", "samples_seen": 330, "world": 2, "event": "start"},
        {"attempt": "b", "samples_seen": 660, "event": "end", "outcome": "done"},
    ]
    (run / "attempts.jsonl").write_text("".join(json.dumps(a) + "\n" for a in attempts))


def _table_of(shards: Path) -> str:
    """sha256 of the bias table that stands beside the shards, if there is one."""
    there = (shards / "bias" / tables.HEADER).is_file()
    return tables.read_header(shards / "bias").table_sha256 if there else "none"


def _write_metrics(run: Path, genres: list[str]) -> None:
    random, best = np.random.default_rng(0), 0.0
    journal = Journal(run, writes=True)
    size = len(genres)
    for first, last in ((0, 40), (33, STEPS)):  # what came after step 33 is lost and done again
        journal.write(StartEvent(samples_seen=first * GLOBAL_BATCH, world=2, genres=genres))
        for step in range(first, last):
            seen = GLOBAL_BATCH * (step + 1)
            fall, factor = np.exp(-step / 30), min(1, (step + 1) / 6, (STEPS - step) / 60)
            event = StepEvent(
                step=step + 1,
                samples_seen=seen,
                epoch=round((seen - 1) / ROWS, 4),
                loss=float(0.4 + 1.9 * fall + 0.15 * random.normal() * fall),
                lr=2e-5 * factor,
                head_lr=1e-3 * factor,
                grad_norm=None if step % 9 == 0 else float(1 + random.random()),
                step_s=0.125,
                segments_per_s=round(100 + 5 * random.normal(), 2),
                model_tflop_per_s=395.76,
                mfu=0.4,
                data_wait_share=0.002,
                peak_memory_gib=1.25,
            )
            journal.write(event)
            if seen // ROWS > (seen - GLOBAL_BATCH) // ROWS:
                score = round(float(0.85 - 0.6 * fall + 0.02 * random.normal()), 4)
                hits = np.full((size, size), 1) + 9 * np.eye(size, dtype=int)
                better, best = score > best, max(score, best)
                check = ValidationEvent(
                    exported=better,
                    select="nll",
                    select_loss=1 - score / 2,
                    segments_not_finite=0,
                    samples_seen=seen,
                    epoch=round(seen / ROWS, 4),
                    track_accuracy=score,
                    track_macro_f1=score - 0.02,
                    track_nll=1 - score / 2,
                    segment_accuracy=score - 0.05,
                    confusion=hits.tolist(),
                )
                journal.write(check)
    journal.write(DoneEvent(samples_seen=STEPS * GLOBAL_BATCH))
    journal.close()


def write_evaluation(run: Path, shards: Path, *, name: str = "test", skill: float = 1.2) -> None:
    """evaluation/NAME.json, predictions/NAME.jsonl and .logits.npy of the shards' test split."""
    with ShardSet(shards) as data:
        found, (first, stop) = data.manifest, data.rows_of("test")
        label, track = data.labels[first:stop], data.tracks[first:stop]
    genres, random = list(found.genres), np.random.default_rng(1)
    logits = random.normal(size=(stop - first, len(genres))).astype(np.float32)
    offset = random.normal(size=(len(found.tracks), len(genres)))
    logits += offset[track].astype(np.float32)
    logits[np.arange(len(label)), label] += skill
    probability = softmax(logits.astype(np.float64), axis=1)
    ids = np.unique(track)
    of_track = np.stack([probability[track == k].mean(axis=0) for k in ids])
    truth = np.array([label[track == k][0] for k in ids])
    for folder in ("evaluation", "predictions"):
        (run / folder).mkdir(exist_ok=True)
    np.save(run / "predictions" / f"{name}.logits.npy", logits)
    with (run / "predictions" / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for k, row, right in zip(ids, of_track, truth, strict=True):
            line = {
                "track": found.tracks[k].id,
                "group": found.tracks[k].group,
                "truth": genres[right],
                "prediction": genres[int(row.argmax())],
                "probabilities": dict(zip(genres, row.tolist(), strict=True)),
                "bias_aligned": bool(k % 3),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    content = figures(of_track, truth, genres) | {
        "split": "test",
        "name": name,
        "dataset_id": found.dataset_id,
        "run": str(run),
    }
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(content))


def figures(probability: Any, truth: Any, genres: list[str]) -> dict[str, Any]:
    """The figures of an evaluation, but for its names."""
    guess, size = probability.argmax(axis=1), len(genres)
    labels = range(size)
    accuracy = float((guess == truth).mean())
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, guess, labels=labels, zero_division=0
    )
    scalars = {
        "count": len(truth),
        "accuracy": accuracy,
        "balanced_accuracy": float(recall.mean()),
        "macro_f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "nll": 1.25,
        "brier": 0.5,
        "ece": 0.125,
    }
    near = [max(0.0, accuracy - 0.1), min(1.0, accuracy + 0.1)]
    bins = np.minimum((probability.max(axis=1) * 10).astype(int), 9)
    count = np.bincount(bins, minlength=10)
    sure = np.bincount(bins, probability.max(axis=1), 10) / np.maximum(count, 1)
    right = np.bincount(bins, guess == truth, 10) / np.maximum(count, 1)
    named = [
        dict(zip(("precision", "recall", "f1"), map(float, row), strict=True))
        | {"support": int(n), "recall_interval": [max(0.0, row[1] - 0.2), min(1.0, row[1] + 0.2)]}
        for *row, n in zip(precision, recall, f1, support, strict=True)
    ]
    group = {"count": 12, "accuracy": 0.75, "interval": [0.5, 0.9]}
    by_genre = {genre: {"count": 4, "accuracy": 0.5} for genre in genres}
    return {
        "aggregate": "mean-prob",
        "genres": genres,
        "track": scalars,
        "segment": scalars | {"count": 999},
        "aggregates": {"mean-prob": scalars, "mean-logit": scalars, "vote": scalars},
        "intervals": {
            "level": 0.95,
            "tracks": {"accuracy": near, "balanced_accuracy": near, "macro_f1": near},
            "groups": {"accuracy": [max(0.0, accuracy - 0.15), min(1.0, accuracy + 0.15)]},
            "known_groups": 9,
        },
        "per_genre": dict(zip(genres, named, strict=True)),
        "confusion": confusion_matrix(truth, guess, labels=labels).tolist(),
        "reliability": {
            "edges": [k / 10 for k in range(11)],
            "count": count.tolist(),
            "confidence": sure.tolist(),
            "accuracy": right.tolist(),
        },
        "temperature": {
            "value": 1.4,
            "fitted_on": "validation",
            "without": {"accuracy": accuracy, "nll": 1.125, "ece": 0.0625},
        },
        "subgroups": {
            "source": "argmax of the bias table",
            "groups": {
                "bias-aligned": group | {"genres": by_genre},
                "bias-conflicting": group
                | {"accuracy": 0.25, "interval": [0.1, 0.5], "genres": by_genre},
            },
            "worst_group": {"name": "bias-conflicting", "accuracy": 0.25, "count": 12},
        },
        "worst_genre": {"name": genres[int(recall.argmin())], "recall": float(recall.min())},
    }


def bias_report(genres: list[str]) -> dict[str, Any]:
    """report.json of a bias table."""
    split = {"count": 66, "accuracy": 0.5, "nll": 1.5, "ece": 0.1}
    return {
        "backbone": "logmel",
        "layers": [-1],
        "folds": 2,
        "temperature": 1.2,
        "fold_status": "out of fold",
        "splits": {"train": split, "validation": split, "test": split},
        "truth_histogram": [20, 9, 7, 5, 4, 3, 3, 4, 5, 6],
        "effective_sample_size": 48.5,
        "per_genre": {
            genre: {
                "rows": 22,
                "accuracy": 0.5,
                "aligned_rows": 11,
                "conflicting_rows": 11,
                "aligned_tracks": 1,
                "conflicting_tracks": 1,
            }
            for genre in genres
        },
        "warnings": ["a bias model that knows the task"],
    }
