"""The data plane of up to 512 ranks, one after another on one machine, with real files.

Each simulated rank opens the shards, plans its batches for one epoch and reads them with the
reader that training has, checksums and all; nothing is computed. For every world it is checked that

- every training row was read exactly once, by some rank,
- all ranks took the same number of micro batches, and steps,
- step for step the same rows were read as at world 1,

and told how many bytes a rank reads, how much of a step is padding, and what a rank pays before
its first batch. The run ends with an error if a check fails. No network and no parallel file
system is part of this: what a file server makes of 512 clients is not measured.

    python benchmarks/dataplane.py --json benchmarks/results/dataplane.json
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import measure
import numpy as np
from numpy.typing import NDArray

from mgc_dist import shard
from mgc_dist.config import ShardConfig
from mgc_dist.data import record
from mgc_dist.data.order import Plan, lay_out, training_batches
from mgc_dist.data.reader import Reader, ShardSet

WORLDS = (1, 8, 64, 512)
GLOBAL_BATCH, MICRO_BATCH = 1024, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--global-batch", type=int, default=GLOBAL_BATCH)
    parser.add_argument("--tracks", type=int, default=1000, help="tracks of 30 s")
    parser.add_argument("--folder", type=Path, help="keep the data here, or find it here")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        shards = prepare(options.folder or Path(temporary), options.tracks)
        alone = read_as(1, shards, options.global_batch)
        found = {}
        for world in options.worlds:
            read = alone if world == 1 else read_as(world, shards, options.global_batch)
            refuse_wrong(world, read, alone)
            found[str(world)] = summary(read)
    content = {
        "benchmark": "dataplane",
        "date": str(date.today()),
        "machine": measure.machine(),
        "rows": int(sum(len(rows) for rows in alone["steps"])),
        "global_batch": options.global_batch,
        "worlds": found,
    }
    print(json.dumps(content))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{table(content)}")


def prepare(folder: Path, tracks: int) -> Path:
    """Synthetic tracks in GTZAN's layout, packed."""
    shards = folder / "shards"
    if not (shards / "manifest.json").is_file():
        with contextlib.redirect_stdout(io.StringIO()):
            data = measure.tracks(folder, tracks)
            shard.run(ShardConfig(data=data, out=shards, split="stratified"))
    return shards


def read_as(world: int, folder: Path, global_batch: int) -> dict[str, Any]:
    """What all ranks of a world read in one epoch.

    Returns:
        `steps`: rows of each step, sorted, int64 [D]; `micro_batches` and `bytes` of each rank;
        `first_batch_s`: seconds of each rank to its first batch; `read_s`: of all in all;
        `padding`: share of slots.
    """
    parts: list[list[NDArray[np.int64]]] = []
    counts, sizes, firsts = [], [], []
    began = time.perf_counter()
    for rank in range(world):
        started = time.perf_counter()
        with ShardSet(folder) as shards:
            plan = plan_of(shards, global_batch)
            layout = lay_out(
                global_batch=global_batch, world=world, largest_micro_batch=MICRO_BATCH
            )
            parts = parts or [[] for _ in range(plan.steps)]
            batches = training_batches(plan, layout, rank, 0)
            count = rows = 0
            with Reader(shards, "train", batches, read_ahead=4, pin=False) as reader:
                for batch in reader:
                    if count == 0:
                        firsts.append(time.perf_counter() - started)
                    true = batch.row[batch.row >= 0].numpy()
                    parts[batch.plan.step].append(true)
                    count, rows = count + 1, rows + len(true)
            counts.append(count)
            sizes.append(rows * record.record_bytes(shards.manifest.segment_samples))
    return {
        "steps": [np.sort(np.concatenate(rows)) for rows in parts],
        "micro_batches": counts,
        "bytes": sizes,
        "first_batch_s": firsts,
        "read_s": time.perf_counter() - began,
        "padding": layout.waste,
    }


def plan_of(shards: ShardSet, global_batch: int) -> Plan:
    first, stop = shards.rows_of("train")
    rows = stop - first
    return Plan(rows=rows, total=rows, global_batch=global_batch, seed=0)


def refuse_wrong(world: int, read: dict[str, Any], alone: dict[str, Any]) -> None:
    """End where a world lost, repeated or moved a row, or its ranks are not in step.

    Raises:
        SystemExit: with what is wrong.
    """
    rows = np.concatenate(read["steps"])
    if len(np.unique(rows)) != len(rows) or len(rows) != sum(map(len, alone["steps"])):
        raise SystemExit(f"{world} ranks: {len(rows)} rows read, {len(np.unique(rows))} different")
    if len(set(read["micro_batches"])) != 1:
        raise SystemExit(f"{world} ranks: micro batches from {sorted(set(read['micro_batches']))}")
    same = [np.array_equal(a, b) for a, b in zip(read["steps"], alone["steps"], strict=True)]
    if not all(same):
        raise SystemExit(f"{world} ranks: step {same.index(False)} has other rows than one rank's")


def summary(read: dict[str, Any]) -> dict[str, Any]:
    return {
        "steps": len(read["steps"]),
        "micro_batches_a_rank": read["micro_batches"][0],
        "padding": round(read["padding"], 4),
        "mb_a_rank": spread([size / 1e6 for size in read["bytes"]]),
        "first_batch_s": spread(read["first_batch_s"]),
        "read_s_all_ranks": round(read["read_s"], 2),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def table(content: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| ranks | steps | micro batches a rank | padding | MB a rank: median (min to max) | "
        "to the first batch, s | all ranks, one after another, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for world, found in content["worlds"].items():
        size, first = found["mb_a_rank"], found["first_batch_s"]
        cells = [
            *(world, found["steps"], found["micro_batches_a_rank"]),
            f"{100 * found['padding']:.0f} %",
            f"{size['median']:g} ({size['min']:g} to {size['max']:g})",
            f"{first['median']:.3f} ({first['min']:.3f} to {first['max']:.3f})",
            found["read_s_all_ranks"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
