"""The whole way on synthetic music: `make demo`, or `python launch/demo.py`.

Runs the ordinary commands one after another and prints each before it runs; what a stage has
finished is not done again. It computes on the CPU, on two DeepSpeed ranks.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

DATA, SHARDS = Path("data/demo"), Path("shards/demo")
RUNS = {"poe": Path("runs/demo-poe"), "ce": Path("runs/demo-ce")}
TIMES = Path("runs/demo-times.json")
PYTHON = sys.executable
DEEPSPEED = [str(Path(PYTHON).with_name("deepspeed")), "--log_level", "error", "--num_gpus", "2"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command, and the file that it writes last."""

    title: str
    command: list[str]
    product: Path


def stages() -> list[Stage]:
    synth = [PYTHON, "-m", "mgc_dist.synth", str(DATA), "--preset", "demo"]
    shard = [PYTHON, "-m", "mgc_dist.shard", "--preset", "demo"]
    on_cpu = ["--device", "cpu"]  # deepspeed's launcher sets CUDA_VISIBLE_DEVICES anew
    bias = [*DEEPSPEED, "launch/bias.py", "--preset", "demo", *on_cpu]
    plan = [
        Stage(title="synthetic tracks", command=synth, product=DATA / "artists.csv"),
        Stage(title="shards", command=shard, product=SHARDS / "manifest.json"),
        Stage(title="bias model", command=bias, product=SHARDS / "bias" / "report.json"),
    ]
    for loss, run in RUNS.items():
        train = [*DEEPSPEED, "launch/train.py", "--preset", "demo", "--resume", "auto"]
        train += ["--loss", loss, "--run", str(run), *on_cpu]
        evaluate = [*DEEPSPEED, "launch/evaluate.py", str(run), *on_cpu]
        result = run / "evaluation" / "test.json"
        plan.append(Stage(title=f"training, {loss}", command=train, product=run / "DONE"))
        plan.append(Stage(title=f"evaluation, {loss}", command=evaluate, product=result))
    compare = [PYTHON, "-m", "mgc_dist.compare", str(RUNS["ce"]), str(RUNS["poe"])]
    result = RUNS["poe"] / "comparison" / RUNS["ce"].name / "comparison.json"
    plan.append(Stage(title="comparison", command=compare, product=result))
    return plan


def run(stage: Stage, times: dict[str, float], console: Console) -> None:
    if stage.product.exists():
        console.print(f"[dim]{stage.title}: done before ({stage.product})")
        return
    shown = " ".join(word.replace(PYTHON, "python") for word in stage.command)
    shown = shown.replace(DEEPSPEED[0], "deepspeed")
    console.print(f"\n[bold]{stage.title}:[/] {shown}", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    code = subprocess.run(stage.command, env=environment, check=False).returncode
    if code or not stage.product.exists():
        console.print(f"{stage.title} ended with exit code {code}; run the command above alone.")
        sys.exit(code or 1)
    times[stage.title] = time.perf_counter() - started
    TIMES.parent.mkdir(exist_ok=True)
    TIMES.write_text(json.dumps(times, indent=1))


def show_results(times: dict[str, float], console: Console) -> None:
    bias = json.loads((SHARDS / "bias" / "report.json").read_text())["splits"]
    table = Table(title="Test split: artists that training has not heard (chance 0.10)")
    for column in ("model", "track accuracy", "track macro-F1", "segment accuracy"):
        table.add_column(column, justify="left" if column == "model" else "right")
    names = {"poe": "product of experts, beta 0.5", "ce": "plain cross-entropy"}
    for loss, name in names.items():
        found = json.loads((RUNS[loss] / "evaluation" / "test.json").read_text())
        track, segment = found["track"], found["segment"]
        cells = (track["accuracy"], track["macro_f1"], segment["accuracy"])
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    table.add_row("bias model (log-mel, linear)", "", "", f"{bias['test']['accuracy']:.3f}")
    console.print()
    console.print(table)
    console.print(
        f"bias model, out of fold on the training segments: {bias['train']['accuracy']:.3f}"
    )
    spent = Table(title="Time")
    spent.add_column("stage")
    spent.add_column("seconds", justify="right")
    for title, seconds in times.items():
        spent.add_row(title, f"{seconds:.0f}")
    spent.add_row("all", f"{sum(times.values()):.0f}")
    console.print(spent)
    track_file = DATA / "genres_original" / "jazz" / "jazz.00003.wav"
    console.print(
        "With the environment active (. .venv/bin/activate):\n"
        "Predict a file:      python -m mgc_dist.predict runs/demo-poe "
        f"{track_file}\n"
        "Look at the results: runs/demo-poe/report.html (one file, any browser)",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    os.chdir(Path(__file__).resolve().parent.parent)
    console = Console()
    times: dict[str, float] = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    for stage in stages():
        run(stage, times, console)
    show_results(times, console)


if __name__ == "__main__":
    main()
