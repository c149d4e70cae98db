"""SpecAugment drawn by row, against transformers' own: the price of a pass, in pairs.

    python benchmarks/masks.py --json benchmarks/results/masks.json

Eight rows of 3 s at the size of wav2vec2-large, on one core. A pass masks what the projection
gives, forward and backward. A pair is one pass each way, in random order; its figure is ours minus
theirs. The share is of a forward and backward pass of the large model: eight times one row's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from freezing import SIZES
from measure import between_marks, machine, versions, write
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from mgc_dist.encoders.masks import RowMasks

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
ROWS, SAMPLES, FRAMES = 8, 48_000, 149


def model_of(layers: int) -> Wav2Vec2ForSequenceClassification:
    """A large wav2vec2 with random weights and the masks of the published one."""
    settings = SIZES["large"] | {"num_hidden_layers": layers, "layerdrop": 0.0}
    config = Wav2Vec2Config(**settings, mask_time_prob=0.05, mask_feature_prob=0.02)
    return Wav2Vec2ForSequenceClassification(config).train()


def seconds(work: Callable[[], Tensor]) -> float:
    """CPU seconds of a forward and backward pass."""
    began = time.process_time()
    work().square().sum().backward()
    return time.process_time() - began


def measure(pairs: int) -> dict[str, Any]:
    """Milliseconds of a pass each way and of their differences, and of the whole model."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    base = model_of(layers=1).base_model
    theirs = base._mask_hidden_states
    masks = RowMasks(base)
    ways = {"ours": base._mask_hidden_states, "theirs": theirs}
    hidden = torch.randn(ROWS, FRAMES, base.config.hidden_size, requires_grad=True)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(pairs + 1):
        masks.draw = torch.arange(ROWS) + number * ROWS
        for name in rng.permutation(list(ways)).tolist():
            found[name].append(1000 * seconds(lambda way=ways[name]: way(hidden * 1.0)))
    apart = [a - b for a, b in zip(found["ours"][1:], found["theirs"][1:], strict=True)]
    whole = model_of(layers=SIZES["large"]["num_hidden_layers"])
    wave = torch.randn(1, SAMPLES)
    of_row = [1000 * seconds(lambda: whole(wave).logits) for _ in range(3)]
    return {
        "pairs": pairs,
        "ours_ms": statistics.median(found["ours"][1:]),
        "theirs_ms": statistics.median(found["theirs"][1:]),
        "difference_ms": np.quantile(apart, [0.05, 0.5, 0.95]).tolist(),
        "model_ms": ROWS * statistics.median(of_row[1:]),
    }


def render(result: dict[str, Any], page: str) -> str:
    """The page with the table of a result between its marks."""
    found = result["result"]
    low, middle, high = found["difference_ms"]
    lines = [
        f"`benchmarks/masks.py`, {result['date']}: {found['pairs']} pairs, {ROWS} rows of 3 s, "
        "the large model, one core.",
        "",
        "| SpecAugment, forward and backward | CPU ms a micro batch |",
        "|---|---|",
        f"| drawn by row (`encoders/masks.py`) | {found['ours_ms']:.2f} |",
        f"| transformers' own | {found['theirs_ms']:.2f} |",
        f"| difference in pairs, median (5 to 95 %) | {middle:.2f} ({low:.2f} to {high:.2f}) |",
        "",
        f"The difference is {abs(middle) / found['model_ms']:.4%} of a pass of the model "
        f"({found['model_ms'] / 1000:.1f} CPU s).",
    ]
    return between_marks(page, "masks", "masks", "\n".join(lines))


def main() -> None:
    """Entry of `python benchmarks/masks.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the result here, and the table into docs")
    words = parser.parse_args()
    result = {
        "benchmark": "masks",
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions(("torch", "transformers")),
        "result": measure(words.pairs),
    }
    print(json.dumps(result, indent=1))
    if words.json:
        write(words.json, result)
        PAGE.write_text(render(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
