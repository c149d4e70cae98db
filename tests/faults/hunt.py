"""`make hunt`: random faults to every command of the whole way, and the proof that nothing stays.

A way is packing, bias pass, training (with staging, a cache, saves, validations and its report),
evaluation and export, on 1 to 3 ranks, with dropout. Signals hit any process of a command's tree at
any time; then the same command is given again. A way must end with the files of one that nothing
happened to: the same names, and the same bytes of shards, logits and weights; no process is left.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before deepspeed, which would compute on a GPU

import argparse
import contextlib
import ctypes
import importlib
import json
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from conftest import NOISY, write_model, write_tracks
from harness import (
    Job,
    alive,
    be_a_command,
    children,
    new_try,
    until,
    variables_of,
    weights_hash,
)
from rich.console import Console
from rich.table import Table

from mgc_dist.bias_model.table import read_header
from mgc_dist.files import sha256

SIGNALS = ("KILL", "KILL", "TERM", "INT", "STOP and CONT")
ALL_OF_THEM = 0.25
"""Share of the faults that hit all processes of a tree, as Ctrl-C and Slurm do."""
TRAINING_ITSELF = 0.7
"""Share of the faults to a training that come after its start."""
GRACE_S = 5.0
"""How long ranks outlive one that failed before they are asked to end, as launchers do."""
END_S = 90.0
"""How long a command may take to end; what takes longer hangs."""
_PR_SET_CHILD_SUBREAPER = 36
NAMES_OF_A_TRY = ("heartbeats", "tensorboard", ".opened")
"""Folders whose files are named after a run's tries, or after their place."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command of the way.

    Attributes:
        name: for people.
        verb: of the command.
        words: after it.
        world: ranks; 0 for a process that is no rank.
        is_done: whether it need not be given again.
    """

    name: str
    verb: str
    words: tuple[str | Path, ...]
    world: int
    is_done: Callable[[], bool] = lambda: False


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A line of faults.jsonl."""

    seed: int
    way: str
    ranks: int
    stage: str
    process: str
    signal: str
    at_s: float
    codes: list[int | None]
    outcome: str


@dataclass
class Hunt:
    """What is hunted with, and what was found.

    Attributes:
        work: folder of everything.
        seed: of the faults.
        faults, problems: so far.
        times: seconds of an undisturbed stage, by its name and number of ranks.
    """

    work: Path
    seed: int
    faults: list[Fault] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    times: dict[tuple[str, int], float] = field(default_factory=dict)


def stages(hunt: Hunt, way: Path, world: int) -> list[Stage]:
    """The commands of a way in its folder."""
    shards, run, out = way / "shards", way / "run", way / "exported"
    tracks, on_cpu = hunt.work / "tracks", ("--device", "cpu")
    staged = (*on_cpu, "--stage-dir", way / "node", "--stage-timeout-s", "60")
    pack: tuple[str | Path, ...] = ("--data", tracks, "--groups", tracks / "artists.csv")
    pack += ("--segment-s", "0.5", "--hop-s", "0.25", "--rows-per-shard", "20", "--jobs", "2")
    pack += ("--validation-fraction", "0.3", "--test-fraction", "0.3", "--out", shards)
    bias = ("--shards", shards, "--backbone", "logmel", "--folds", "2", "--batch", "4", *staged)
    train: tuple[str | Path, ...] = ("--shards", shards, "--run", run, *staged)
    train += ("--model", hunt.work / "noisy.json", "--cache", "cnn", "--resume", "auto")
    train += ("--epochs", "3", "--global-batch", "10", "--micro-batch", "3", "--lr", "1e-3")
    train += ("--checkpoint-every-epochs", "0.15", "--validate-every-epochs", "0.5")
    train += ("--log-every-steps", "1", "--max-tries", "1000", "--hang-timeout-s", "30")
    return [
        Stage(name="packing", verb="shard", words=pack, world=0),
        Stage(name="bias pass", verb="bias", words=bias, world=world),
        Stage(name="training", verb="train", words=train, world=world),
        Stage(name="evaluation", verb="evaluate", words=(run, *staged), world=world),
        Stage(name="export", verb="export", words=(run, out), world=0, is_done=out.exists),
    ]


def give(stage: Stage, way: Path) -> Job:
    """Start the command; its ranks are forks, because imports take longer than the work."""
    folder, words = new_try(way.with_name(f"{way.name}-said")), list(map(str, stage.words))
    sys.stdout.flush()
    if not stage.world:
        out = os.open(folder / "rank0.txt", os.O_WRONLY | os.O_CREAT)
        command = [sys.executable, "-m", f"mgc_dist.{stage.verb}", *words]
        actions = [(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)]
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        os.close(out)
        return Job(folder=folder, pids=[pid])
    main, pids = importlib.import_module(f"mgc_dist.{stage.verb}").main, []
    for rank, environment in enumerate(variables_of(stage.world)):
        pid = os.fork()
        if pid == 0:
            be_a_command(main, [stage.verb, *words], folder / f"rank{rank}.txt", environment)
        pids.append(pid)
    return Job(folder=folder, pids=pids)


def tree(pids: list[int]) -> list[int]:
    """Processes, and all below them."""
    return [each for pid in pids for each in (pid, *tree(children(pid)))]


def end(job: Job) -> list[int | None]:
    """Exit codes of all; as under a launcher, ranks are asked to end after one that failed."""
    began, asked = time.monotonic(), False
    failed_at = began
    codes: dict[int, int] = {}
    while len(codes) < len(job.pids) and time.monotonic() - began < END_S:
        for pid in set(job.pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if not any(codes.values()):
            failed_at = time.monotonic()
        elif not asked and time.monotonic() - failed_at > GRACE_S:
            asked = True
            hit([pid for pid in job.pids if pid not in codes], signal.SIGTERM)
        time.sleep(0.02)
    late = [pid for pid in job.pids if pid not in codes]
    hit(late, signal.SIGKILL)
    for pid in late:
        os.waitpid(pid, 0)
    job.codes = [codes.get(pid) for pid in job.pids]
    return job.codes


def hit(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def disturb(hunt: Hunt, stage: Stage, way: Path, rng: np.random.Generator) -> None:
    """Give the command, and do one fault to it, if it does not end before."""
    job = give(stage, way)
    began, longest_s = time.monotonic(), 0.95 * hunt.times[stage.name, stage.world]
    kind = str(rng.choice(SIGNALS))
    if stage.name == "training" and rng.random() < TRAINING_ITSELF:
        until(lambda: "starting at samples_seen" in job.said or not alive(job.pids), END_S)
        longest_s *= 0.6
    time.sleep(float(rng.uniform(0, longest_s)))
    at_s, pids = time.monotonic() - began, tree(job.pids)
    running, moment = alive(pids), moment_of(stage, way, job)
    if not running:
        end(job)
        return
    is_all = rng.random() < ALL_OF_THEM
    victims = running if is_all else [int(rng.choice(running))]
    if kind == "STOP and CONT":
        hit(victims, signal.SIGSTOP)
        time.sleep(float(rng.uniform(0.2, 2)))
        hit(victims, signal.SIGCONT)
    else:
        hit(victims, getattr(signal, f"SIG{kind}"))
    codes = end(job)
    names = [_named(job, pid) for pid in victims]
    outcome = _judge(job, kind, pids)
    fault = Fault(
        seed=hunt.seed,
        way=way.name,
        ranks=max(1, stage.world),
        stage=moment,
        process="all" if is_all else names[0],
        signal=kind,
        at_s=round(at_s, 3),
        codes=codes,
        outcome=outcome,
    )
    hunt.faults.append(fault)
    with (hunt.work / "faults.jsonl").open("a") as file:
        file.write(json.dumps(asdict(fault)) + "\n")
    if outcome != "ended":
        hunt.problems.append(f"{fault}\n{job.said[-3000:]}")
    print(f"{len(hunt.faults)}: {fault.stage} on {fault.ranks}: {kind} to {fault.process}", codes)


def moment_of(stage: Stage, way: Path, job: Job) -> str:
    """What a training is at, as far as its files and its words tell; else the stage."""
    if stage.name != "training":
        return stage.name
    run, said = way / "run", job.said
    if "done; the best model" in said:
        return "training: report"
    for moment, pattern in (("save", "checkpoints/tmp-*"), ("best model", "best.*.tmp")):
        if any(run.glob(pattern)):
            return f"training: {moment}"
    if "step " in said:
        return "training: steps"
    return "training: cache" if "starting at samples_seen" in said else "training: start, staging"


def _named(job: Job, pid: int) -> str:
    return f"rank {job.pids.index(pid)}" if pid in job.pids else "a worker"


def _judge(job: Job, kind: str, pids: list[int]) -> str:
    """`ended`, or what must not be."""
    if None in job.codes:
        return "it hung"
    if kind == "STOP and CONT" and any(job.codes):
        return "it did not go on"
    if "was not foreseen" in job.said:
        return "without words"
    try:
        until(lambda: not alive(pids), 15)
    except AssertionError:
        hit(alive(pids), signal.SIGKILL)
        return "it left a process"
    return "ended"


def complete(hunt: Hunt, stage: Stage, way: Path) -> None:
    """Give the same command again, to its end."""
    if stage.is_done():
        return
    began = time.monotonic()
    job = give(stage, way)
    if any(code != 0 for code in end(job)):
        hunt.problems.append(f"{way.name}: {stage.name} ended with {job.codes}\n{job.said[-3000:]}")
    hunt.times.setdefault((stage.name, stage.world), time.monotonic() - began)


def files_of(way: Path) -> set[str]:
    """Names of all files, but of those that are named after tries."""
    return {
        str(path.relative_to(way))
        for path in way.rglob("*")
        if path.is_file() and not set(NAMES_OF_A_TRY) & set(path.parts)
    }


def bytes_of(way: Path) -> dict[str, str]:
    """What must be the same to the bit."""
    shards, run = way / "shards", way / "run"
    found = {path.name: sha256(path) for path in shards.iterdir() if path.is_file()}
    found |= {"bias table": read_header(shards / "bias").table_sha256}
    found |= {"weights": weights_hash(run)}
    for path in (run / "predictions" / "test.logits.npy", way / "exported" / "model.safetensors"):
        found[path.name] = sha256(path)
    return found


def compare(hunt: Hunt, way: Path, whole: Path) -> None:
    """Whether a way ended as one that nothing happened to."""
    try:
        ours, theirs = bytes_of(way), bytes_of(whole)
    except (OSError, ValueError, IndexError) as error:
        hunt.problems.append(f"{way.name}: {error}")
        return
    other = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    if other:
        hunt.problems.append(f"{way.name}: other bytes than undisturbed: {sorted(other)}")
    left = files_of(way) ^ files_of(whole)
    if left:
        hunt.problems.append(f"{way.name}: left over or missing: {sorted(left)}")


def undisturbed(hunt: Hunt, world: int) -> Path:
    """A way that nothing happens to."""
    way = hunt.work / f"whole-{world}"
    if not way.exists():
        for stage in stages(hunt, way, world):
            complete(hunt, stage, way)
    return way


def go(hunt: Hunt, faults: int, worlds: list[int]) -> None:
    """Ways, until all faults are done."""
    rng = np.random.default_rng(hunt.seed)
    while len(hunt.faults) < faults:
        world = int(rng.choice(worlds))
        whole = undisturbed(hunt, world)
        way = hunt.work / f"way-{len(list(hunt.work.glob('way-*-said')))}"
        for stage in stages(hunt, way, world):
            for _ in range(rng.integers(3) + (4 if stage.name == "training" else 1)):
                if len(hunt.faults) < faults and not stage.is_done():
                    disturb(hunt, stage, way, rng)
            complete(hunt, stage, way)
        compare(hunt, way, whole)
        shutil.rmtree(way)


def show(hunt: Hunt, console: Console) -> None:
    table = Table(title=f"{len(hunt.faults)} faults, seed {hunt.seed}")
    for column in ("stage", "faults", "signals", "to", "exit codes", "outcomes"):
        table.add_column(column)
    of_stage: dict[str, list[Fault]] = defaultdict(list)
    for fault in hunt.faults:
        of_stage[fault.stage].append(fault)
    for name, faults in of_stage.items():
        counts = [
            Counter(fault.signal for fault in faults),
            Counter(fault.process for fault in faults),
            Counter(str(code) for fault in faults for code in fault.codes),
            Counter(fault.outcome for fault in faults),
        ]
        cells = [", ".join(f"{word} {n}" for word, n in sorted(each.items())) for each in counts]
        table.add_row(name, str(len(faults)), *cells)
    console.print(table)
    for problem in hunt.problems:
        console.print(f"FAILED: {problem}", style="red", highlight=False, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/hunt"))
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    torch.set_num_threads(1)
    for module in ("transformers.models.wav2vec2.modeling_wav2vec2", "mgc_dist.training.command"):
        importlib.import_module(module)  # once, before the forks
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans become our children
    work = words.work.resolve()
    shutil.rmtree(work, ignore_errors=True)  # of an earlier hunt
    work.mkdir(parents=True)
    os.environ["TMPDIR"] = str(work)
    write_tracks(work / "tracks")
    write_model(work / "noisy.json", **NOISY)
    hunt = Hunt(work=work, seed=words.seed)
    go(hunt, words.faults, words.ranks)
    show(hunt, Console(width=130))
    sys.exit(1 if hunt.problems else 0)


if __name__ == "__main__":
    main()
