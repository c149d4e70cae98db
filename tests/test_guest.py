"""Commands called from Python: again and again in one process, which stays as it was."""

import asyncio
import faulthandler
import io
import logging
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks
from harness import weights_hash
from trainings import config, train_on

from mgc_dist import cli, evaluate, predict, train
from mgc_dist.config import EvaluateConfig, PredictConfig, TrainConfig
from mgc_dist.errors import UserError
from mgc_dist.training.logbook import Logbook


def state() -> dict[str, Any]:
    """What a process has that a command may change."""
    loggers = [logging.getLogger(name) for name in ("", "mgc_dist", "DeepSpeed", "transformers")]
    return {
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "faulthandler": faulthandler.is_enabled(),
        "logging": [(each.level, each.propagate, each.handlers[:]) for each in loggers],
        "environment": dict(os.environ),
        "group": torch.distributed.is_initialized(),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "streams": (sys.stdout, sys.stderr),
        "warnings": (warnings.filters[:], warnings.showwarning),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads of torch": torch.get_num_threads(),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "unpickled": set(torch.serialization.get_safe_globals()),
    }


def held() -> dict[str, Counter[str]]:
    """Open files by what they are, threads of Python and of C, child processes."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if link.is_symlink()]
    tasks = list(Path("/proc/self/task").iterdir())
    return {
        "files": Counter(target.split(":[")[0] for target in targets),
        "threads": Counter(thread.name for thread in threading.enumerate()),
        "tasks": Counter(read(task / "comm").strip() for task in tasks),
        "children": Counter(" ".join(read(task / "children") for task in tasks).split()),
    }


def read(path: Path) -> str:
    """What a file of a thread says; nothing if it has ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def left_behind(before: dict[str, Counter[str]], wait_s: float) -> dict[str, Counter[str]]:
    """What is held now and was not before; the kernel may see a thread after it was joined."""
    deadline = time.monotonic() + wait_s
    while True:
        now = held()
        left = {name: now[name] - before[name] for name in now if now[name] - before[name]}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def differing(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is not as it was, by name."""
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def called(
    command: Callable[[Any], Any], settings: Any, wait_s: float = 20.0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Call a command from Python; what is not as it was, and what is left behind."""
    before, kept = state(), held()
    command(settings)
    return differing(before, state()), left_behind(kept, wait_s)


def in_a_row(runs: dict[str, TrainConfig], music: Path) -> tuple[dict[str, str], list[Any]]:
    """Train, evaluate and predict in this process; hashes of weights, and what is not as it was."""
    waits_s = [0.0, *[20.0] * (len(runs) - 1)]  # the first leaves fonts and a store open
    changes = [called(train.run, *each) for each in zip(runs.values(), waits_s, strict=True)]
    run = next(iter(runs.values())).output.run
    changes.append(called(evaluate.run, EvaluateConfig(run=run, device="cpu")))
    changes.append(called(predict.run, PredictConfig(run=run, files=(music,), device="cpu")))
    hashes = {n: weights_hash(s.output.run, s.engine.zero_stage) for n, s in runs.items()}
    return hashes, changes


def in_a_thread(body: Callable[..., Any], *args: Any) -> Any:
    """Call a body in a thread, which may set no handlers of signals."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(body, *args).result()


KINDS: dict[str, dict[str, Any]] = {
    "zero 2, bf16": {"zero_stage": 2, "precision": "bf16"},
    "zero 2": {"zero_stage": 2},
    "zero 0, cross-entropy": {"zero_stage": 0, "loss": "ce"},
    "zero 3, cache": {"zero_stage": 3, "freeze": "feature_encoder", "cache": "cnn"},
}


@pytest.fixture(scope="module")
def alone(
    shards: Path, table: Path, noisy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """Hash of the weights of a kind of run in a process of its own."""

    @cache
    def found(kind: str) -> str:
        run = tmp_path_factory.mktemp("alone") / "run"
        train_on(1, short(shards, noisy, run, **KINDS[kind]))
        return weights_hash(run, KINDS[kind]["zero_stage"])

    return found


def short(shards: Path, model: Path, run: Path, **knobs: Any) -> TrainConfig:
    """Three steps, one checkpoint, one validation."""
    return config(shards, model, run, **({"epochs": 30 / 66, "checkpoint_every_epochs": 1} | knobs))


@pytest.mark.parametrize(
    ("kinds", "caller"),
    [
        (("zero 3, cache", "zero 2, bf16", "zero 2", "zero 0, cross-entropy"), ()),
        (("zero 0, cross-entropy", "zero 2", "zero 3, cache"), (in_a_thread,)),
    ],
)
def test_commands_follow_one_another_in_a_process(
    kinds: tuple[str, ...],
    caller: tuple[Callable[..., Any], ...],
    shards: Path,
    tracks: Path,
    noisy: Path,
    alone: Callable[[str], str],
    tmp_path: Path,
) -> None:
    runs = {kind: short(shards, noisy, tmp_path / kind, **KINDS[kind]) for kind in kinds}
    music = tracks / "blues" / "blues.00000.wav"
    ((hashes, changes),) = run_ranks(1, *caller, in_a_row, runs, music)
    assert hashes == {kind: alone(kind) for kind in kinds}
    assert [changed for changed, _ in changes] == [{}] * len(changes)
    (_, left), *later = changes
    assert [added for _, added in later] == [{}] * len(later)
    assert set(left) <= {"files", "tasks"}, "fonts and a store stay open after the first"


def interrupt(self: Any, now: int, *rest: Any) -> None:
    raise KeyboardInterrupt


def after_errors(settings: TrainConfig, refused: TrainConfig, broken: TrainConfig) -> list[Any]:
    """Train after trainings that have failed; what each try has changed."""
    before, changes = state(), []
    with pytest.raises(UserError, match="no such"):
        train.run(refused)
    changes.append(differing(before, state()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Logbook, "all_note", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.run(broken)
    changes.append(differing(before, state()))
    train.run(settings)
    return changes


def test_a_training_that_has_failed_leaves_a_process_that_can_train(
    shards: Path, noisy: Path, alone: Callable[[str], str], tmp_path: Path
) -> None:
    run, kind = tmp_path / "run", KINDS["zero 2"]
    refused = short(shards, tmp_path / "no such.json", tmp_path / "refused", **kind)
    broken = short(shards, noisy, tmp_path / "broken", zero_stage=3)
    settings = short(shards, noisy, run, **kind)
    assert run_ranks(1, after_errors, settings, refused, broken) == [[{}, {}]]
    assert weights_hash(run, 2) == alone("zero 2")


class Cell(io.StringIO):
    """What a notebook has in place of a terminal: `fileno` raises io.UnsupportedOperation."""


def in_a_notebook(*runs: TrainConfig) -> tuple[list[Any], str]:
    """Train in a running event loop; what has changed, and what was shown."""
    shown = Cell()
    sys.stdout = sys.stderr = shown

    async def cells() -> list[Any]:
        return [called(train.run, settings, 0.0)[0] for settings in runs]

    return asyncio.run(cells()), shown.getvalue()


def test_a_notebook_trains_and_evaluates(
    shards: Path, noisy: Path, alone: Callable[[str], str], tmp_path: Path
) -> None:
    names = ("one", "two")
    runs = [short(shards, noisy, tmp_path / name, **KINDS["zero 2"]) for name in names]
    ((changes, shown),) = run_ranks(1, in_a_notebook, *runs)
    assert changes == [{}, {}]
    assert shown.count("done; the best model") == 2
    assert [weights_hash(tmp_path / name, 2) for name in names] == [alone("zero 2")] * 2


def twice_and_evaluate(*runs: TrainConfig) -> list[Any]:
    """On each of two ranks."""
    changes = [called(train.run, runs[0], 0.0), called(train.run, runs[1])]
    evaluation = EvaluateConfig(run=runs[0].output.run, device="cpu")
    changes.append(called(evaluate.run, evaluation))
    # after the last one the other rank may have ended
    return [changed for changed, _ in changes] + [added for _, added in changes[1:-1]]


def test_two_ranks_train_twice_and_evaluate(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    names = ("first", "second", "alone")
    runs = [
        short(shards, noisy, tmp_path / n, zero_stage=s)
        for n, s in zip(names, (3, 2, 2), strict=True)
    ]
    assert run_ranks(2, twice_and_evaluate, *runs[:2]) == [[{}] * 4] * 2
    train_on(2, runs[2])
    assert weights_hash(tmp_path / "second") == weights_hash(tmp_path / "alone")


def run_block(code: str, folder: Path) -> None:
    """Run code in a folder, in a process that no launcher has started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.chdir(folder)
    exec(compile(code, "python.md", "exec"), {})


def test_the_way_that_the_docs_show(shards: Path, table: Path, noisy: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    file = tmp_path / "short.yaml"
    file.write_text(cli.dump("train", short(shards, noisy, tmp_path / "unused")))
    assert code.count('"--preset", "gtzan"') == 1
    run_ranks(1, run_block, code.replace('"--preset", "gtzan"', f'"--config", "{file}"'), tmp_path)
    done = sorted(path.parent.parent.name for path in tmp_path.glob("runs/*/evaluation/test.json"))
    assert done == ["gtzan-ce", "gtzan-poe"]
