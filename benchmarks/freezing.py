"""Frozen lower layers: taken out of the backward pass, against `requires_grad_(False)` alone.

    python benchmarks/freezing.py --json benchmarks/results/freezing.json

A wav2vec2 with random weights, forward and backward on one core; each way in a process of its
own, because the peak of its memory counts. `naive` is what one writes first: the parameters of
the CNN and the lower layers are marked, and autograd still goes through all of them.
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

import torch
from measure import machine

from mgc_dist.models.main import build_main

SIZES: dict[str, dict[str, Any]] = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    },
}
WAYS = ("none", "naive", "proper")


def measure(way: str, size: str, runs: int) -> tuple[list[float], float]:
    """Seconds of each pass, and the peak of the memory in GiB."""
    torch.set_num_threads(1)
    half = SIZES[size]["num_hidden_layers"] // 2
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.json"
        file.write_text(json.dumps({"model_type": "wav2vec2", **SIZES[size]}))
        model = build_main(
            str(file),
            [str(genre) for genre in range(10)],
            freeze=f"layers:{half}" if way == "proper" else "none",
            frozen_layers=half if way == "proper" else None,
            activation_checkpointing=False,
            seed=0,
            segment_samples=48_000,
            sample_rate=16_000,
        ).train()
    if way == "naive":
        base = model.net.base_model
        for part in (base.feature_extractor, base.feature_projection, base.encoder.pos_conv_embed):
            part.requires_grad_(False)
        base.encoder.layers[:half].requires_grad_(False)
    wave = torch.randint(-9000, 9000, (1, 48_000), dtype=torch.int16)
    seconds = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        model(wave).logsumexp(1).sum().backward()
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    return seconds[1:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*SIZES], default="large")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    found: dict[str, Any] = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak_gib = pool.apply(measure, (way, words.size, words.runs))
        spread = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
        spread_s = {name: round(value, 2) for name, value in spread.items()}
        found[way] = {"seconds": spread_s, "peak_gib": round(peak_gib, 2)}
    line = {"benchmark": "freezing", "size": words.size, "machine": machine(), "ways": found}
    print(json.dumps(line))
    if words.json:
        words.json.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
