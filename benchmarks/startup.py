"""From the first command to a validated model: where the time goes besides the steps.

    python benchmarks/startup.py --json benchmarks/results/startup.json
    python benchmarks/startup.py --render benchmarks/results/startup.json

- `small`: 1,000 synthetic tracks of 30 s, as many as GTZAN has: packed, a log-mel bias pass, one
  epoch of a tiny wav2vec2 on two ranks (so tiny that what is not a step shows), evaluation. The
  commands are those that the docs show, each from its start to its end.
- `large`: wav2vec2-large's weights (random, from a folder of 1.3 GB), half of the layers frozen,
  two steps of four rows on one rank: what loading, saving and exporting take at the real size.

Synthesising the tracks and making the folder of weights is not timed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any

from measure import between_marks, machine, tracks, versions, write
from step import PACKAGES, PAGE, ROOT, SIZES, free_port, prepare

from mgc_dist.files import json_lines
from mgc_dist.journal import METRICS


def command(words: Sequence[str | Path]) -> tuple[float, float]:
    """Run a command to its end; when it began, and when it ended, in seconds since 1970."""
    quiet = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    began = time.time()
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=os.environ | quiet | {"PATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{words[0]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return began, time.time()


def launched(script: str, ranks: int) -> list[str]:
    """The beginning of a command line: DeepSpeed's launcher, at a port of its own."""
    words = ["deepspeed", "--log_level", "error", "--num_gpus", str(ranks)]
    return [*words, "--master_port", str(free_port()), f"launch/{script}.py"]


def timeline(run: Path, began: float, ended: float) -> dict[str, float]:
    """The parts of a training command, from its metrics."""
    at: dict[str, float] = {}
    for event in json_lines(run / METRICS):
        at[event["event"]] = event["time_s"]  # the last of its kind
    marks = {
        "train: launcher, imports, model, engine": ("", "start"),
        "train: the steps": ("start", "step"),
        "train: checkpoint": ("step", "checkpoint"),
        "train: validation and export": ("checkpoint", "validation"),
        "train: report, end": ("validation", ""),
    }
    at |= {"": began}
    ends = at | {"": ended}
    return {name: round(ends[after] - at[before], 2) for name, (before, after) in marks.items()}


def small(folder: Path, count: int, jobs: int) -> dict[str, float]:
    """The whole way of a data set."""
    music, shards, run = tracks(folder, count), folder / "shards", folder / "run"
    python = [sys.executable, "-m"]
    for old in (shards, run):
        shutil.rmtree(old, ignore_errors=True)
    found: dict[str, float] = {}
    began, ended = command(
        [*python, "mgc_dist.shard", "--data", music, "--out", shards, "--jobs", str(jobs)]
    )
    found["shard"] = round(ended - began, 2)
    began, ended = command(
        [*launched("bias", 2), "--shards", shards, "--backbone", "logmel", "--device", "cpu"]
    )
    found["bias pass, heads, report"] = round(ended - began, 2)
    (folder / "tiny.json").write_text(json.dumps(SIZES["tiny"].main))
    words = [*launched("train", 2), "--shards", shards, "--run", run, "--epochs", "1"]
    words += ["--model", folder / "tiny.json", "--freeze", "feature_encoder", "--device", "cpu"]
    began, ended = command(words)
    found |= timeline(run, began, ended)
    began, ended = command([*launched("evaluate", 2), run, "--device", "cpu"])
    found["evaluate"] = round(ended - began, 2)
    return found


def large(folder: Path) -> dict[str, float]:
    """Training at the real size, with hardly any steps."""
    import torch
    from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

    prepare(folder, "large")
    weights, run = folder / "weights", folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(**SIZES["large"].main)).save_pretrained(weights)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(weights)
    words = [*launched("train", 1), "--shards", folder / "shards", "--loss", "ce", "--run", run]
    words += ["--model", weights, "--freeze", "layers:12", "--device", "cpu"]
    words += ["--epochs", "0.16", "--global-batch", "4", "--micro-batch", "4"]
    began, ended = command(words)
    return timeline(run, began, ended)


def table(content: dict[str, Any]) -> str:
    """The figures as Markdown."""
    where, parts = content["machine"], content["parts"]
    lines = [
        f"{content['date']}, {where['cores']} cores ({where['cpu']}), {content['tracks']:,} "
        f"tracks; load of the machine before: {content['load_before']:g}.",
        "",
        "| seconds | " + " | ".join(parts) + " |",
        "|---|" + "---|" * len(parts),
    ]
    for name in parts.get("small", parts.get("large", {})):
        cells = [f"{found[name]:.1f}" if name in found else "" for found in parts.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    totals = [f"{sum(found.values()):.1f}" for found in parts.values()]
    lines.append("| " + " | ".join(["**all**", *totals]) + " |")
    return "\n".join(lines)


def render(content: dict[str, Any], page: str) -> str:
    """The page with the table between its marks."""
    return between_marks(page, "startup", "startup", table(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=["small", "large"], default=["small", "large"]
    )
    parser.add_argument("--tracks", type=int, default=1000, help="of `small`")
    parser.add_argument("--jobs", type=int, default=0, help="of packing; 0: one a core")
    parser.add_argument("--folder", type=Path, help="keep the data here, or find it here")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--render", type=Path, help="write a result's table into docs, and stop")
    words = parser.parse_args()
    if words.render:
        page = render(json.loads(words.render.read_text()), PAGE.read_text(encoding="utf-8"))
        PAGE.write_text(page, encoding="utf-8")
        return
    load, parts = os.getloadavg()[0], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (words.folder or Path(temporary)).resolve()
        for part in words.parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
            with redirect_stdout(sys.stderr):
                one = folder / part
                parts[part] = (
                    small(one, words.tracks, words.jobs) if part == "small" else large(one)
                )
            print(f"{part}: {json.dumps(parts[part])}", file=sys.stderr, flush=True)
    content = {
        "benchmark": "startup",
        "date": str(date.today()),
        "load_before": round(load, 2),
        "tracks": words.tracks,
        "machine": machine(),
        "versions": versions(PACKAGES),
        "parts": parts,
    }
    print(json.dumps(content))
    if words.json:
        write(words.json, content)
    print(f"\n{table(content)}")


if __name__ == "__main__":
    main()
