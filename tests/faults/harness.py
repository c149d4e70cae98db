"""Ranks as real processes that faults are done to: signals, kills, full disks, damaged files.

Each rank is a fork of the test process (torch, transformers and deepspeed are imported once) that
runs the `train` command as `launch/train.py` does, with its own environment, output file and exit
code. A fault that lies inside a rank is a function that patches this process before the command
starts. No fault hook is in the product.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import _free_port, import_once
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from metrics import read_metrics

from mgc_dist import cli, train
from mgc_dist.config import TrainConfig
from mgc_dist.journal import read_status
from mgc_dist.training import checkpoint
from mgc_dist.training.logbook import Logbook

Patch = Callable[[int], None]


def slow(*values: Any) -> Any:
    """The rest of a grid, for `make test-slow`; .ci/run leaves it out."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.grid])


@dataclass
class Job:
    """Ranks of one try."""

    folder: Path
    pids: list[int]
    codes: list[int | None] = field(default_factory=list)

    def wait(self, timeout_s: float = 600.0) -> list[int | None]:
        """Exit codes (-9 for a kill); what still lives after the time is killed: None."""
        deadline = time.monotonic() + timeout_s
        self.codes = [self._code(pid, deadline) for pid in self.pids]
        return self.codes

    def _code(self, pid: int, deadline: float) -> int | None:
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    @property
    def said(self) -> str:
        """What all ranks have printed."""
        files = sorted(self.folder.glob("rank*.txt"))
        return "\n".join(file.read_text(errors="replace") for file in files)


def start(settings: TrainConfig, work: Path, *, world: int = 2, patch: Patch | None = None) -> Job:
    """Start the ranks of a training run."""
    import_once()
    file, environments = prepare(settings, work, world)
    pids = []
    for rank, environment in enumerate(environments):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            be_a_rank(file.with_name(f"rank{rank}.txt"), environment, file, patch)
        pids.append(pid)
    return Job(folder=file.parent, pids=pids)


def prepare(settings: TrainConfig, work: Path, world: int = 1) -> tuple[Path, list[dict[str, str]]]:
    """Write the settings into a new folder; the file, and the variables of each rank."""
    file = new_try(work) / "config.yaml"
    file.write_text(cli.dump("train", settings))
    return file, variables_of(world)


def new_try(work: Path) -> Path:
    """A folder for what the processes of a try print."""
    work.mkdir(parents=True, exist_ok=True)
    folder = work / f"try-{len(list(work.glob('try-*')))}"
    folder.mkdir()
    return folder


def variables_of(world: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    port, environments = str(_free_port()), []
    for rank in range(world):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
        environment = {key: str(value) for key, value in numbers.items()}
        environments.append(environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    return environments


def be_a_rank(out: Path, environment: dict[str, str], file: Path, patch: Patch | None) -> None:
    be_a_command(train.main, ["train", "--config", str(file)], out, environment, patch)


def be_a_command(
    main: Callable[[], NoReturn],
    words: list[str],
    out: Path,
    environment: dict[str, str],
    patch: Patch | None = None,
) -> NoReturn:
    """End this fork as a command of these words would end."""
    code = 1
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(environment)
        if patch:
            patch(int(environment["RANK"]))
        sys.argv = words
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def children(pid: int) -> list[int]:
    """Processes whose parent this is."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def alive(pids: list[int]) -> list[int]:
    """Those that run, or are stopped."""
    return [
        pid
        for pid in pids
        if Path(f"/proc/{pid}/stat").exists()
        and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def steps_taken(run: Path) -> int:
    """Steps that the run has written down."""
    return int(max((line["step"] for line in read_metrics(run, "step")), default=0))


def at_step(step: int, rank: int, act: Callable[[], Any]) -> Patch:
    """A patch that acts once on a rank after it has taken a step (counted from 1)."""

    def patch(this: int) -> None:
        note = Logbook.all_note

        def acting(self: Any, now: int, *rest: Any) -> None:
            if this == rank and now + 1 == step:
                act()
            note(self, now, *rest)

        Logbook.all_note = acting  # type: ignore[method-assign]

    return patch


def slow_steps(seconds: float) -> Patch:
    """A patch that makes every step take longer, so that there is time for a signal."""

    def patch(this: int) -> None:
        note = Logbook.all_note

        def napping(self: Any, *rest: Any) -> None:
            time.sleep(seconds)
            note(self, *rest)

        Logbook.all_note = napping  # type: ignore[method-assign]

    return patch


def both(*patches: Patch) -> Patch:
    """All patches, one after another."""

    def patch(rank: int) -> None:
        for one in patches:
            one(rank)

    return patch


def die() -> None:
    """As an OOM kill, or a power cut for this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def weights_of(run: Path, stage: int = 2) -> dict[str, torch.Tensor]:
    """The full weights in the newest checkpoint, put together by DeepSpeed's own tool."""
    newest = sorted((run / checkpoint.FOLDER).glob("step-*"))[-1]
    if stage == 0:
        file = newest / "mp_rank_00_model_states.pt"
        return dict(torch.load(file, weights_only=False)["module"])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = get_fp32_state_dict_from_zero_checkpoint(str(newest.parent), newest.name)
    return dict(found)


def weights_hash(run: Path, stage: int = 2) -> str:
    """sha256 of the full weights in the newest checkpoint."""
    weights, digest = weights_of(run, stage), hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def assert_survived(
    job: Job, run: Path, whole: str, *, codes: list[int | None], message: str
) -> None:
    """The three assertions of every fault: exit codes, message, and the final weights.

    Args:
        job: the try that met the fault, waited for.
        run: the run folder, after the run has been completed.
        whole: hash of the final weights of a run that was never disturbed.
        codes: that the ranks of `job` must have ended with.
        message: that one of them must have printed.
    """
    assert job.codes == codes, job.said
    assert message in job.said
    assert read_status(run)["state"] == "done"
    assert weights_hash(run) == whole


def losses_of(run: Path) -> list[float]:
    """The loss of every step, the last one that was written where one was repeated."""
    found = {int(line["step"]): line["loss"] for line in read_metrics(run, "step")}
    return [found[step] for step in sorted(found)]


def attempts_of(run: Path) -> list[dict[str, Any]]:
    """The record of attempts."""
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
