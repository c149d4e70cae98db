"""Every launcher that docs/launchers.md names starts a training of two ranks."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import _free_port
from deepspeed.launcher import runner
from test_launcher import ROOT
from torch.distributed.run import get_args_parser

from mgc_dist import cli
from mgc_dist.config import BiasConfig, DoctorConfig, EvaluateConfig, TrainConfig, knobs

BIN = Path(sys.executable).parent
PAGE = (ROOT / "docs" / "launchers.md").read_text()
SHOWN = {line.split()[0]: line for line in re.findall(r"^\w.*launch/train.*--run.*", PAGE, re.M)}
"""Command lines of the page, by their launcher."""
IN_A_TEST = {
    "torchrun": "--master_port PORT",
    "accelerate": "--multi_gpu --main_process_port PORT",
    "mpirun": "--allow-run-as-root --oversubscribe",
}
"""What its options lack without a GPU, on two cores, as root in a container."""
SMALL = "--model logmel-cnn --freeze none --loss ce --epochs 0.4 --global-batch 8 --device cpu"


def started(command: str, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user types it, on CPUs."""
    command = command.replace("PORT", str(_free_port()))
    first, *rest = [*shlex.split(command), *map(str, words)]
    place = shutil.which(first, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if place is None:
        pytest.skip(f"{first} is not installed: its start is not tested")
    bare = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.run(
        [place, *rest],
        cwd=ROOT,
        env=bare | {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("launcher", IN_A_TEST)
def test_a_training_of_two_ranks(launcher: str, shards: Path, tmp_path: Path) -> None:
    """As the page has it; deepspeed and python are in test_launcher.py, srun in tests/slurm."""
    command = SHOWN[launcher].replace("-- launch", "launch").replace("--preset gtzan", SMALL)
    command = command.replace("runs/a", str(tmp_path / "run")).replace("29501", "PORT")
    before = "launch/train.py" if launcher != "mpirun" else "python"
    command = command.replace(before, f"{IN_A_TEST[launcher]} {before}", 1)
    done = started(command, "--shards", shards)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "DONE").exists()
    assert json.loads((tmp_path / "run" / "env.json").read_text())["world"] == 2


def test_the_page_names_them_all() -> None:
    assert set(SHOWN) == {*IN_A_TEST, "deepspeed", "srun", "python"}
    for line in SHOWN.values():
        words = line.partition("launch/train.py")[2].split()
        assert cli.parse("train", TrainConfig, words).output.run == Path("runs/a")


def flags(config_type: type[Any]) -> Iterator[str]:
    for name, hint in knobs.hints(config_type).items():
        if dataclasses.is_dataclass(knobs.bare(hint)):
            yield from flags(knobs.bare(hint))
        else:
            yield knobs.flag(name)


def test_no_other_flag_is_taken_for_one_of_a_launchers() -> None:
    """Python's argparse looks at all words, also at those after the script's name."""
    every = {"--preset", "--config", "--debug", "--run-folder"}
    for command in (TrainConfig, BiasConfig, EvaluateConfig, DoctorConfig):
        every |= set(flags(command))
    every -= {"--run"}
    words = [word for flag in sorted(every) for word in (flag, "x")]
    for parser in (get_args_parser(), launch_command_parser()):
        assert parser.parse_args(["launch/train.py", *words]).training_script_args == words
    assert runner.parse_args(["launch/train.py", *words, "--run", "x"]).user_args[:2] == words[:2]
    aside = get_args_parser().parse_args(["--", "launch/train.py", "--run", "x"])
    assert aside.training_script_args == ["--run", "x"], "the other way that the page names"
    with pytest.raises(SystemExit):  # if this no longer fails, --run-folder may go
        get_args_parser().parse_args(["launch/train.py", "--run", "x"])


def test_gpus_that_deepspeed_does_not_heed_are_told(shards: Path, tmp_path: Path) -> None:
    words = ("--shards", shards, "--loss", "ce", "--model", "logmel-cnn", "--freeze", "none")
    command = f"deepspeed --num_gpus 1 --master_port PORT launch/train.py --run {tmp_path / 'run'}"
    done = started(command, *words, "--dry-run", CUDA_VISIBLE_DEVICES="6,7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CUDA_VISIBLE_DEVICES=6,7 was set, and deepspeed's --num_gpus does not" in done.stderr
    assert "deepspeed --include localhost:6,7 takes those" in done.stderr
