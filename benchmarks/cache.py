"""Training from a cache of the frozen part's output, against computing it at every step.

    python benchmarks/cache.py --json benchmarks/results/cache.json

A wav2vec2 with random weights, forward and backward of one segment of 3 s in one thread, without
SpecAugment; the ways of a size take turns, each in a process of its own, because the peak of its
memory counts. `gain` is what the FLOPs let expect. Then reading: rows of such a cache (bf16, 305
kB), shuffled, checksums verified, from the page cache, in CPU microseconds a row.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from freezing import SIZES
from measure import machine

from mgc_dist import files
from mgc_dist.config import ModelConfig
from mgc_dist.data.features import STORE, Features, FeaturesKey
from mgc_dist.data.rowstore import CHECKSUMS, RowFile
from mgc_dist.models import flops
from mgc_dist.models.main import build_main

LENGTH = 48_000
ROWS = 512


def ways(size: str) -> dict[str, tuple[str, str]]:
    """Name -> --freeze, --cache."""
    half = f"layers:{SIZES[size]['num_hidden_layers'] // 2}"
    return {
        "CNN frozen": ("feature_encoder", "none"),
        "CNN frozen, cache cnn": ("feature_encoder", "cnn"),
        "half frozen": (half, "none"),
        "half frozen, cache cnn": (half, "cnn"),
        "half frozen, cache trunk": (half, "trunk"),
    }


def measure(way: str, size: str, runs: int) -> tuple[list[float], float, float]:
    """CPU seconds of each pass, the peak of the memory in GiB, and the gain that FLOPs promise."""
    torch.set_num_threads(1)
    freeze, cache = ways(size)[way]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.json"
        file.write_text(json.dumps({"model_type": "wav2vec2", **SIZES[size]}))
        model = build_main(
            str(file),
            [str(genre) for genre in range(10)],
            freeze=freeze,
            frozen_layers=ModelConfig(freeze=freeze).frozen_layers,
            activation_checkpointing=False,
            seed=0,
            segment_samples=LENGTH,
            sample_rate=16_000,
            cache=cache,
            spec_augment=False,
        ).train()
    wave, gain = torch.randint(-9000, 9000, (1, LENGTH), dtype=torch.int16), 1.0
    if model.boundary is not None:
        work = flops.count(model, LENGTH)
        assert work is not None
        gain = work.training / work.above(model.boundary).training
        with torch.no_grad():
            wave = model(wave, only_below=True)
    seconds = []
    for _ in range(runs + 1):
        started = time.process_time()
        model(wave).logsumexp(1).sum().backward()
        seconds.append(time.process_time() - started)
        model.zero_grad()
    return seconds[1:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, gain


def reading(runs: int) -> list[float]:
    """CPU microseconds a row."""
    facts = FeaturesKey(
        dataset_id="random",
        frozen="",
        boundary="layers:12",
        dtype="bf16",
        precision="bf16",
        device="cpu",
        rows=ROWS,
        frames=149,
        width=1024,
    )
    rng, found = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = (facts.rows, facts.frames, facts.width)
        values = rng.integers(0, 1 << 16, shape, np.uint16)
        path = folder / STORE.array
        with RowFile(path, folder / "ledger", "random", shape=shape, dtype=np.uint16) as file:
            file.put("all", 0, values)
            np.save(folder / CHECKSUMS, file.checksums())
        digest = files.fingerprint(folder / CHECKSUMS)
        content = {"format": STORE.format, "format_version": STORE.version}
        content |= vars(facts) | {"checksums_xxh3_128": digest}
        (folder / STORE.header).write_text(json.dumps(content))
        into = np.zeros((32, facts.row_bytes), np.uint8)
        with Features(folder, facts) as cached:
            for _ in range(runs + 1):
                order, started = rng.permutation(facts.rows), time.process_time()
                for first in range(0, facts.rows, 32):
                    cached.read_batch(order[first : first + 32], into)
                found.append(1e6 * (time.process_time() - started) / facts.rows)
    return found[1:]


def spread(values: list[float]) -> dict[str, float]:
    """Three significant digits of minimum, median and maximum."""
    three = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value:.3g}") for name, value in three.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=[*SIZES])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    found: dict[str, Any] = {}
    for size in words.sizes:
        seconds: dict[str, list[float]] = {way: [] for way in ways(size)}
        peaks, gains = dict.fromkeys(seconds, 0.0), dict.fromkeys(seconds, 1.0)
        for _ in range(words.runs):
            for way in seconds:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    took, peak_gib, gains[way] = pool.apply(measure, (way, size, 2))
                seconds[way].append(min(took))
                peaks[way] = max(peaks[way], peak_gib)
        found[size] = {
            way: {
                "cpu_seconds": spread(seconds[way]),
                "peak_gib": round(peaks[way], 2),
                "gain": round(gains[way], 3),
            }
            for way in seconds
        }
    line = {
        "benchmark": "cache",
        "machine": machine(),
        "sizes": found,
        "reading_cpu_us": spread(reading(words.runs)),
    }
    print(json.dumps(line))
    if words.json:
        words.json.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
