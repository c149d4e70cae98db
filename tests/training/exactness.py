"""The table of exactness: how far trainings on other layouts are from one rank, dropout on.

    make exactness          # the whole grid; writes docs/exactness.md and its JSON

Each cell is a tiny wav2vec2 that is trained on one rank without a break, and again on other ranks
at the same stage, stopped at a random step and resumed on a random number of ranks, until it is
done. Compared are the loss of every step and the final weights, in float32.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import (
    NOISY,
    bias_config,
    make_table,
    run_ranks,
    shard_config,
    write_model,
    write_tracks,
)
from metrics import read_metrics
from safetensors.torch import load_file
from trainings import config, stop_after

from mgc_dist import shard, train
from mgc_dist.config import TrainConfig

ROOT = Path(__file__).parents[2]
PAGE, RESULT = ROOT / "docs" / "exactness.md", ROOT / "benchmarks" / "results" / "exactness.json"
WORLDS, STAGES = (1, 2, 3, 5), (0, 2, 3)
BOUND = 1e-5
"""Largest difference of a loss from one rank's, relative to it."""
PLAIN = {name: 0.0 for name in NOISY if name.endswith("dropout")}
KINDS: dict[str, dict[str, Any]] = {
    "dropout and SpecAugment": {},
    "with activation checkpointing": {"activation_checkpointing": True},
    "with --cache cnn": {"freeze": "feature_encoder", "cache": "cnn"},
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row of the table: what is trained, how it was laid out, how far it came from one rank."""

    kind: str
    stage: int
    micro_batch: int
    worlds: tuple[int, ...]
    steps: int
    loss: float
    weight: float


def train_through(settings: TrainConfig, world: int, chain: list[tuple[int, int]]) -> list[int]:
    """Train, stopped after some steps and resumed on other ranks; returns the worlds."""
    worlds = []
    for number, (stop, ranks) in enumerate([*chain, (-1, world)]):
        output = replace(settings.output, resume="auto" if number else "never")
        codes = run_ranks(ranks, partial(_train, stop), replace(settings, output=output))
        assert codes == [0] * ranks, codes
        worlds.append(ranks)
    return worlds


def _train(stop: int, settings: TrainConfig) -> int:
    if stop >= 0:
        stop_after(stop)
    return int(train.run(settings))


def outcome(run: Path) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """The loss of every step, and the final weights."""
    losses = {line["samples_seen"]: line["loss"] for line in read_metrics(run, "step")}
    return np.array([losses[seen] for seen in sorted(losses)]), load_file(
        run / "best" / "model.safetensors"
    )


def measure(
    work: Path, cells: list[tuple[str, int, int, int]], *, chains: int, seed: int = 0
) -> Iterator[Cell]:
    """Train each cell and its reference.

    Args:
        work: an empty folder.
        cells: kind, ZeRO stage, micro batch, ranks at the end; kind `masks only` has no dropout.
        chains: stops of each run, at random steps, on random ranks.
        seed: of the stops.
    """
    rng = np.random.default_rng(seed)
    write_tracks(work / "music")
    shard.run(shard_config(work / "music", work / "shards"))
    run_ranks(1, make_table, bias_config(work / "shards"))
    noisy = write_model(work / "noisy.json", **NOISY)
    masked = write_model(work / "masked.json", **(NOISY | PLAIN))
    references: dict[tuple[str, int], tuple[np.ndarray, dict[str, torch.Tensor]]] = {}
    for kind, stage, micro, world in cells:
        knobs = KINDS.get(kind, {}) | {"zero_stage": stage, "select": "last", "micro_batch": micro}
        make = partial(config, work / "shards", masked if kind == MASKS else noisy)
        whole = (kind, stage)
        if whole not in references:
            run = work / f"reference-{len(references)}"
            train_through(make(run, **knobs), 1, [])
            references[whole] = outcome(run)
        run = work / "run"
        steps = len(references[whole][0])
        stops = sorted(rng.choice(np.arange(1, steps - 1), chains, replace=False).tolist())
        chain = [(stop, int(rng.choice(WORLDS[:3]))) for stop in stops]
        worlds = train_through(make(run, **knobs), world, chain)
        losses, weights = outcome(run)
        expected, wanted = references[whole]
        yield Cell(
            kind=kind,
            stage=stage,
            micro_batch=micro,
            worlds=tuple(worlds),
            steps=steps,
            loss=float(np.abs(losses / expected - 1).max()),
            weight=max(float((weights[name] - wanted[name]).abs().max()) for name in wanted),
        )
        shutil.rmtree(run)


MASKS = "SpecAugment alone, other micro batches"


def grid() -> list[tuple[str, int, int, int]]:
    """All cells."""
    layouts = [(kind, stage, 2, world) for kind in KINDS for stage in STAGES for world in WORLDS]
    return layouts + [(MASKS, 2, micro, world) for micro in (2, 4, 8) for world in WORLDS]


def table(cells: list[dict[str, Any]]) -> str:
    """The page."""
    worst = max(cell["loss"] for cell in cells)
    lines = [
        "# Exactness",
        "",
        "A run gives the same weights on any number of GPUs, but for rounding, with dropout and",
        "SpecAugment on. `make exactness` has made this table. Each run was stopped at a random",
        "step and resumed on other ranks. It is compared with one rank that was not stopped: the",
        f"loss of each step (largest relative difference, {worst:.1e} at most), and the final",
        "weights (largest difference). float32, on two CPU cores.",
        "",
        "| trained | ZeRO | micro batch | on ranks | loss | weights |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        ranks = " then ".join(map(str, cell["worlds"]))
        lines.append(
            f"| {cell['kind']} | {cell['stage']} | {cell['micro_batch']} | {ranks} "
            f"| {cell['loss']:.1e} | {cell['weight']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the whole grid, or write the page from its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--render", action="store_true", help="write the page from the JSON")
    if not parser.parse_args().render:
        with tempfile.TemporaryDirectory() as folder:
            cells = []
            for cell in measure(Path(folder), grid(), chains=1):
                cells.append(asdict(cell))
                print(json.dumps(cells[-1]), flush=True)
        RESULT.write_text(json.dumps({"bound": BOUND, "cells": cells}, indent=1) + "\n")
    cells = json.loads(RESULT.read_text())["cells"]
    PAGE.write_text(table(cells))
    sys.exit(any(cell["loss"] > BOUND for cell in cells))


if __name__ == "__main__":
    main()
