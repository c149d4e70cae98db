"""The demo over seeds: the chosen epoch beside the last one, with and without debiasing.

    python benchmarks/demo.py --json benchmarks/results/demo.json

For each seed (of music, split, folds, weights and order): what `make demo` does,
by the same commands on two ranks. Then each training's last checkpoint goes on in a run folder of
its own, which only validates it, and is measured as well. What is finished in `--work` is not done
again.
"""

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from measure import machine, versions
from shortcut import do, summary

from mgc_dist.training.checkpoint import FOLDER

DEEPSPEED = [Path(sys.executable).with_name("deepspeed"), "--log_level", "error", "--num_gpus", 2]
LOSSES = {"poe": "product of experts, beta 0.5", "ce": "plain cross-entropy"}
FIGURES = ("accuracy", "macro_f1", "nll", "ece")


def prepare(folder: Path, seed: int) -> None:
    """Tracks, shards and bias table of a seed."""
    data, shards = folder / "data", folder / "shards"
    words = ["-m", "mgc_dist.synth", data, "--preset", "demo", "--seed", seed]
    do(words, data / "artists.csv")
    words = ["-m", "mgc_dist.shard", "--preset", "demo", "--data", data / "genres_original"]
    words += ["--groups", data / "artists.csv", "--out", shards, "--seed", seed]
    do(words, shards / "manifest.json")
    words = [*DEEPSPEED, "launch/bias.py", "--preset", "demo", "--shards", shards, "--seed", seed]
    do([*words, "--device", "cpu"], shards / "bias" / "report.json")


def train(folder: Path, seed: int, loss: str, epochs: float | None) -> dict[str, Any]:
    """Figures of the chosen epoch and of the last one, over the test tracks."""
    chosen, last = folder / loss, folder / f"{loss}-last"
    words = [*DEEPSPEED, "launch/train.py", "--preset", "demo", "--shards", folder / "shards"]
    words += ["--loss", loss, "--seed", seed, "--device", "cpu"]
    words += ["--epochs", epochs] if epochs else []
    do([*words, "--run", chosen, "--resume", "auto"], chosen / "DONE")
    newest = max((chosen / FOLDER).glob("step-*"))
    do([*words, "--run", last, "--resume", newest], last / "DONE")
    found = {"epoch": best_epoch(chosen)}
    for name, run in (("chosen", chosen), ("last", last)):
        words = [*DEEPSPEED, "launch/evaluate.py", run, "--device", "cpu"]
        do(words, run / "evaluation" / "test.json")
        track = json.loads((run / "evaluation" / "test.json").read_text())["track"]
        found |= {f"{name}_{figure}": track[figure] for figure in FIGURES}
    print(f"seed {seed}, {loss}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def best_epoch(run: Path) -> float:
    """Of the model in RUN/best."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return float([line["epoch"] for line in lines if line.get("exported")][-1])


def table(content: dict[str, Any]) -> str:
    """The result as Markdown: by seed, the chosen epoch and the last one."""
    lines = ["| loss | seed | chosen epoch | accuracy | NLL | last epoch: accuracy | NLL |"]
    lines += ["|---" * 7 + "|"]
    for loss, runs in content["results"].items():
        for seed, run in enumerate(runs):
            cells = [LOSSES[loss], str(seed), f"{run['epoch']:.1f}"]
            for name in ("chosen", "last"):
                cells += [f"{run[f'{name}_accuracy']:.3f}", f"{run[f'{name}_nll']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, help="those of the preset")
    parser.add_argument("--work", type=Path, help="keep everything here, and go on from it")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    words = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {loss: [] for loss in LOSSES}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(words.seeds):
            folder = (words.work or Path(temporary)).resolve() / f"seed-{seed}"
            prepare(folder, seed)
            for loss, runs in results.items():
                runs.append(train(folder, seed, loss, words.epochs))
    content: dict[str, Any] = {
        "benchmark": "demo",
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions(("mgc_dist", "torch", "deepspeed")),
        "results": results,
        "over_seeds": {
            loss: {key: summary([run[key] for run in runs]) for key in runs[0]}
            for loss, runs in results.items()
        },
    }
    print(json.dumps(content))
    if words.json:
        words.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{table(content)}")


if __name__ == "__main__":
    main()
