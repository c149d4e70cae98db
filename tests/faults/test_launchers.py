"""Ranks end with their launcher: TERM, INT and KILL to its processes, Ctrl-C on a terminal."""

import os
import pty
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import _free_port
from harness import (
    Job,
    alive,
    assert_survived,
    children,
    slow,
    start,
    steps_taken,
    until,
    weights_hash,
)
from test_launcher import DEEPSPEED, ROOT
from trainings import config

from mgc_dist import cli
from mgc_dist.journal import read_status

KNOBS: dict[str, Any] = {"checkpoint_every_epochs": 2.0, "resume": "auto", "epochs": 25.0}


@pytest.fixture(scope="module")
def long(shards: Path, table: Path, noisy: Path, tmp_path_factory: Any) -> str:
    """Hash of the final weights of a run of 165 steps that nothing happened to."""
    work = tmp_path_factory.mktemp("long")
    job = start(config(shards, noisy, work / "run", **KNOBS), work)
    assert job.wait() == [0, 0], job.said
    return weights_hash(work / "run")


EVENTS = ["KILL to deepspeed", "Ctrl-C on a terminal", slow("TERM to deepspeed")]
EVENTS += map(slow, ("INT to deepspeed", "TERM to launch.py", "KILL to launch.py"))


@pytest.mark.parametrize("event", EVENTS)
def test_the_launcher_is_ended(
    event: str, shards: Path, noisy: Path, long: str, tmp_path: Path
) -> None:
    run, file, log = tmp_path / "run", tmp_path / "config.yaml", tmp_path / "rank0.txt"
    settings = config(shards, noisy, run, **KNOBS)
    file.write_text(cli.dump("train", settings))
    command = [DEEPSPEED, "--log_level", "error", "--num_gpus", "2"]
    command += ["--master_port", str(_free_port()), "launch/train.py", "--config", str(file)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        for number in (signal.SIGINT, signal.SIGHUP):  # background jobs inherit them ignored
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(command[0], command, environment)
    started: list[int] = []
    try:
        until(lambda: steps_taken(run) >= 3, 300)
        launch = next(child for child in children(pid))
        ranks = children(launch)
        started = [pid, launch, *ranks]
        assert len(ranks) == 2
        if event.startswith("Ctrl-C"):
            os.write(terminal, b"\x03")
        else:
            kind, _, whom = event.partition(" to ")
            os.kill(pid if whom == "deepspeed" else launch, getattr(signal, f"SIG{kind}"))
        until(lambda: not alive(ranks), 200)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        for process in alive(started):
            os.kill(process, signal.SIGKILL)
        os.close(terminal)
    assert read_status(run)["state"] == "stopped"
    assert (run / "REQUEUE").exists()
    assert 3 <= int(str(read_status(run)["samples_seen"])) // 10 < 165
    again = start(settings, tmp_path)
    assert again.wait() == [0, 0], again.said
    said = Job(folder=tmp_path, pids=[], codes=[code])
    assert said.said.count("Traceback") <= 1, "none but that of DeepSpeed's launcher"
    assert f'File "{ROOT}/launch/' not in said.said
    assert_survived(said, run, long, codes=[code], message="saved; --resume auto goes on")
