"""`make soak`: one run under many random faults, twice, and the proof that nothing was lost.

The first soak keeps two ranks, and must end with the weights of an uninterrupted run, to the bit.
The second one changes between 1, 2 and 4 ranks after every fault, and must end no further from an
uninterrupted run than twice what those differ by. Both have dropout and SpecAugment, and in both
a ledger of consumed rows must show every row exactly as planned.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before deepspeed, which would compute on a GPU

import argparse
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Job, attempts_of, losses_of, start, until, weights_hash, weights_of
from rich.console import Console
from rich.table import Table

from mgc_dist import cli
from mgc_dist.config import TrainConfig
from mgc_dist.data.order import Plan
from mgc_dist.data.reader import ShardSet

DEMO = cli.PRESETS / "wav2vec2-demo.json"
MODEL = "noisy.json"

KINDS = {  # signal, ranks, times; the weights make hangs rare, because they take long
    "KILL to one rank": (signal.SIGKILL, "one", 1, 6),
    "KILL to all ranks": (signal.SIGKILL, "all", 1, 3),
    "TERM to one rank": (signal.SIGTERM, "one", 1, 3),
    "TERM to all ranks, twice": (signal.SIGTERM, "all", 2, 3),
    "INT to all ranks": (signal.SIGINT, "all", 1, 3),
    "USR1 to one rank, twice": (signal.SIGUSR1, "one", 2, 3),
    "STOP to one rank (a hang)": (signal.SIGSTOP, "one", 1, 1),
}
MOMENTS = {"at a step": 6, "in a save": 3, "at the start": 2}
HANG_TIMEOUT_S = 15.0
MICRO_BATCH = 4
"""The same on 1, 2 and 4 ranks: dropout is drawn for each micro batch."""


@dataclass
class Outcome:
    """What became of one soak.

    Attributes:
        events: (kind, moment, exit codes, seconds until all ranks had ended).
        problems: what must not have happened.
    """

    events: list[tuple[str, str, list[int | None], float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Soak:
    """Settings of one soak.

    Attributes:
        name: of its run folders.
        work: folder of everything.
        epochs: of each run.
        worlds: numbers of ranks to draw from.
        kills: faults.
        seed: of the faults.
    """

    name: str
    work: Path
    epochs: float
    worlds: tuple[int, ...]
    kills: int
    seed: int

    def settings(self, run: Path) -> TrainConfig:
        """The demo's training, on the CPU, with a ledger of rows."""
        words = ["--preset", "demo", "--shards", str(self.work / "shards"), "--run", str(run)]
        words += ["--model", str(self.work / MODEL), "--micro-batch", str(MICRO_BATCH)]
        words += ["--epochs", str(self.epochs), "--device", "cpu"]
        words += ["--resume", "auto", "--row-ledger", "--max-tries", "1000"]
        words += ["--checkpoint-every-epochs", "0.2", "--log-every-steps", "1"]
        words += ["--hang-timeout-s", str(HANG_TIMEOUT_S)]
        return cli.parse("train", TrainConfig, words)


def prepare(work: Path) -> None:
    """The demo's data set and bias table, by the ordinary commands."""
    if (work / "shards" / "bias" / "report.json").exists():
        return
    python, data, shards = sys.executable, work / "data", work / "shards"
    steps: list[list[str | Path]] = [
        [python, "-m", "mgc_dist.synth", data, "--preset", "demo"],
        [python, "-m", "mgc_dist.shard", "--preset", "demo", "--out", shards],
        [python, "launch/bias.py", "--preset", "demo", "--shards", shards, "--device", "cpu"],
    ]
    steps[1] += ["--data", data / "genres_original", "--groups", data / "artists.csv"]
    for step in steps:
        subprocess.run([str(word) for word in step], check=True, stdout=subprocess.DEVNULL)


def undisturbed(soak: Soak, world: int) -> Path:
    """A run that nothing happens to."""
    run = soak.work / f"{soak.name}-whole-{world}"
    if not (run / "DONE").exists():
        job = start(soak.settings(run), soak.work / "tries", world=world)
        assert job.wait(3600) == [0] * world, job.said
    return run


def draw(rng: np.random.Generator, weights: dict[str, int]) -> str:
    shares = np.array(list(weights.values()), float)
    return str(rng.choice(list(weights), p=shares / shares.sum()))


def disturb(soak: Soak, run: Path) -> Outcome:
    """Start, disturb, start again, until all faults have happened; then to the end."""
    rng, outcome = np.random.default_rng(soak.seed), Outcome()
    shutil.rmtree(run, ignore_errors=True)  # of an earlier soak
    settings = soak.settings(run)
    for number in range(soak.kills):
        world = int(rng.choice(soak.worlds))
        kind = draw(rng, {name: weight for name, (*_, weight) in KINDS.items()})
        if world == 1 and "STOP" in kind:
            kind = "KILL to one rank"
        moment = draw(rng, MOMENTS)
        job = start(settings, soak.work / "tries", world=world)
        wait_for(moment, run, job, rng)
        victims = [int(rng.integers(world))] if KINDS[kind][1] == "one" else list(range(world))
        began = time.monotonic()
        hit(job, kind, victims)
        judge(outcome, job, kind, moment, victims, began)
        print(
            f"{soak.name} {number + 1}/{soak.kills}: {kind} {moment} on {world}: {job.codes}",
            flush=True,
        )
        if (run / "DONE").exists():
            outcome.problems.append(f"the run ended after {number + 1} faults: raise --epochs")
            return outcome
    world = int(rng.choice(soak.worlds))
    job = start(settings, soak.work / "tries", world=world)
    if job.wait(3600) != [0] * world:
        outcome.problems.append(f"the last try ended with {job.codes}: {job.said[-2000:]}")
    return outcome


def wait_for(moment: str, run: Path, job: Job, rng: np.random.Generator) -> None:
    """Let the run come to the moment of the fault."""
    if moment == "at the start":
        time.sleep(float(rng.uniform(0.5, 3.0)))
        return
    until(lambda: "starting at samples_seen" in job.said, 120)
    time.sleep(float(rng.uniform(0.5, 4.0)))
    if moment == "in a save":
        deadline = time.monotonic() + 10
        root = run / "checkpoints"
        while not list(root.glob("tmp-*")) and time.monotonic() < deadline:
            time.sleep(0.001)


def hit(job: Job, kind: str, victims: list[int]) -> None:
    number, _, times, _ = KINDS[kind]
    for _ in range(times):
        for rank in victims:
            job.signal(rank, number)
        time.sleep(0.05 * (times > 1))
    if number == signal.SIGSTOP:  # the others end by themselves; then the stopped one is removed
        others = [pid for rank, pid in enumerate(job.pids) if rank not in victims]
        until(lambda: all(ended(pid) for pid in others), 240)
        for rank in victims:
            job.signal(rank, signal.SIGKILL)


def ended(pid: int) -> bool:
    """Whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def judge(
    outcome: Outcome, job: Job, kind: str, moment: str, victims: list[int], began: float
) -> None:
    """Whether the ranks ended as mgc_dist.errors promises."""
    # without a launcher, who waits for a dead rank 0 at the start connects twice, 82 s each
    codes = job.wait(300)
    outcome.events.append((kind, moment, codes, time.monotonic() - began))
    fatal = KINDS[kind][0] in (signal.SIGKILL, signal.SIGSTOP)
    for rank, code in enumerate(codes):
        allowed = (-signal.SIGKILL,) if fatal and rank in victims else (75,) if fatal else (0,)
        if code not in allowed:
            said = job.said[-3000:]
            outcome.problems.append(f"{kind} {moment}: rank {rank} ended with {code}:\n{said}")


def check_rows(soak: Soak, run: Path) -> tuple[int, int, list[str]]:
    """Rows that were checked, steps taken more than once, and what is not as planned."""
    with ShardSet(soak.work / "shards") as shards:
        first, end = shards.rows_of("train")
    optim = soak.settings(run).optim
    plan = Plan(
        rows=end - first,
        total=round(optim.epochs * (end - first)),
        global_batch=optim.global_batch,
        seed=soak.settings(run).output.seed,
    )
    worlds = {a["attempt"]: a["world"] for a in attempts_of(run) if a["event"] == "start"}
    executions: dict[int, list[list[int]]] = defaultdict(list)
    for attempt, world in worlds.items():
        parts: dict[int, list[list[int]]] = defaultdict(list)
        for file in (run / "rows").glob(f"{attempt}-rank*.jsonl"):
            for line in whole_lines(file):
                parts[line["step"]].append(line["rows"])
        for step, of_ranks in parts.items():
            if len(of_ranks) == world:
                executions[step].append(sorted(itertools.chain(*of_ranks)))
    problems = []
    for step in range(plan.steps):
        positions = np.arange(step * plan.global_batch, plan.seen_after(step))
        planned = sorted((plan.places(positions) + first).tolist())
        if not executions[step] or any(rows != planned for rows in executions[step]):
            problems.append(f"step {step + 1}: {executions[step]} instead of {planned}")
    seen = [row for step in range(plan.steps) for row in (executions[step] or [[]])[-1]]
    counts, epochs = Counter(seen), plan.total // plan.rows
    if plan.total % plan.rows == 0 and any(counts[r] != epochs for r in range(first, end)):
        problems.append("a row was not seen exactly once an epoch")
    repeated = sum(len(found) - 1 for found in executions.values())
    return len(seen), repeated, problems


def whole_lines(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut by a kill
            continue
    return found


def distance(a: Path, b: Path) -> float:
    """Largest difference of any weight."""
    ours, theirs = weights_of(a), weights_of(b)
    return max(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours)


def show(soak: Soak, outcome: Outcome, console: Console) -> None:
    table = Table(title=f"{soak.name}: faults that it survived")
    for column in ("fault", "times", "moments", "exit codes", "seconds until all had ended"):
        table.add_column(column)
    for kind in KINDS:
        mine = [event for event in outcome.events if event[0] == kind]
        if mine:
            moments = Counter(event[1] for event in mine)
            codes = sorted({str(code) for event in mine for code in event[2]})
            seconds = [event[3] for event in mine]
            table.add_row(
                kind,
                str(len(mine)),
                ", ".join(f"{moment} {count}" for moment, count in moments.items()),
                ", ".join(codes),
                f"{min(seconds):.1f} to {max(seconds):.1f}",
            )
    console.print(table)


def fixed_world(soak: Soak) -> tuple[Outcome, dict[str, Any]]:
    """Two ranks: the same bits."""
    whole, run = undisturbed(soak, 2), soak.work / soak.name
    outcome = disturb(soak, run)
    hashes = weights_hash(whole), weights_hash(run)
    if hashes[0] != hashes[1] or losses_of(whole) != losses_of(run):
        outcome.problems.append("other weights or losses than the uninterrupted run's")
    return outcome, {"sha256 uninterrupted": hashes[0], "sha256 disturbed": hashes[1]}


def changing_world(soak: Soak) -> tuple[Outcome, dict[str, Any]]:
    """1, 2 and 4 ranks: no further off than twice what these differ by."""
    wholes = [undisturbed(soak, world) for world in soak.worlds]
    apart = max(distance(a, b) for a, b in itertools.combinations(wholes, 2))
    run = soak.work / soak.name
    outcome = disturb(soak, run)
    off = min(distance(run, whole) for whole in wholes)
    if off > 2 * apart:
        outcome.problems.append(f"{off:.3g} from the nearest uninterrupted run")
    return outcome, {"uninterrupted 1, 2, 4 ranks apart": apart, "disturbed run off": off}


def write_noisy_model(work: Path) -> None:
    """The demo's model with the dropout and the masks of wav2vec2-large."""
    config = json.loads(DEMO.read_text())
    config |= {name: 0.1 for name in config if "dropout" in name}
    config |= {"apply_spec_augment": True, "mask_time_prob": 0.05, "mask_feature_prob": 0.02}
    (work / MODEL).write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/soak"))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=float, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(1)
    work = words.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    write_noisy_model(work)
    common: dict[str, Any] = {"work": work, "seed": words.seed, "kills": words.kills}
    fixed = Soak("fixed world", worlds=(2,), epochs=words.epochs, **common)
    changing = Soak("changing world", worlds=(1, 2, 4), epochs=words.epochs, **common)
    console, results = Console(width=130), {}
    for soak, act in ((fixed, fixed_world), (changing, changing_world)):
        began = time.monotonic()
        outcome, facts = act(soak)
        rows, repeated, problems = check_rows(soak, soak.work / soak.name)
        outcome.problems += problems
        show(soak, outcome, console)
        facts |= {"faults": len(outcome.events), "rows as planned": rows}
        facts |= {"steps taken again": repeated, "seconds": round(time.monotonic() - began)}
        for name, value in facts.items():
            console.print(f"  {name}: {value}", highlight=False)
        for problem in outcome.problems:
            console.print(f"  FAILED: {problem}", style="red", highlight=False, markup=False)
        results[soak.name] = facts | {"problems": outcome.problems}
    if words.json:
        words.json.write_text(json.dumps(results, indent=1))
    sys.exit(1 if any(found["problems"] for found in results.values()) else 0)


if __name__ == "__main__":
    main()
