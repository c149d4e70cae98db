"""Tests of a GPU: asked for with `-m gpu` alone, told aloud where there is none, never missed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

OTHERS = """
import os
import pytest
import torch

torch.cuda.is_available = lambda: "PRETEND" in os.environ

@pytest.mark.gpu
def test_sees_the_gpu(tell):
    tell("just so many")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == "0"
    if "SKIPS" in os.environ:
        pytest.skip("by itself")

def test_is_rehearsed(device):
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    assert hidden == (device.type == "cpu")
"""
"""Three tests under our hooks, on a machine with a GPU if the environment says so."""


def run(folder: Path, *words: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of pytest on those tests."""
    (folder / "test_others.py").write_text(OTHERS)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -ra --strict-markers\nmarkers = gpu:\n")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": _path()} | variables
    command = [sys.executable, "-m", "pytest", "-p", "gpu_marker", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def _path() -> str:
    return os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_without_a_gpu_the_run_that_asks_fails(workers: tuple[str, ...], tmp_path: Path) -> None:
    code, said = run(tmp_path, "-m", "gpu", *workers)
    assert code == 1
    assert "NO GPU TEST RAN, and -m gpu asks for them" in said
    assert re.search(r"SKIPPED \[[12]\] .*NO GPU HERE", said)
    assert "2 skipped" in said
    assert "passed" not in said


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_with_a_gpu_the_tests_see_it(workers: tuple[str, ...], tmp_path: Path) -> None:
    code, said = run(tmp_path, "-m", "gpu", *workers, PRETEND="yes")
    assert code == 0, said
    assert "2 passed" in said
    assert said.count("test_sees_the_gpu: just so many") == 1
    assert "NO GPU TEST RAN" not in said


def test_tests_that_skip_themselves_do_not_count(tmp_path: Path) -> None:
    words = ("-m", "gpu", "-k", "sees")
    code, said = run(tmp_path, *words, PRETEND="yes", SKIPS="yes")
    assert code == 1
    assert "NO GPU TEST RAN" in said


@pytest.mark.parametrize("words", [(), ("-m", "not gpu")])
def test_any_other_run_hides_the_gpu_and_needs_none(words: tuple[str, ...], tmp_path: Path) -> None:
    code, said = run(tmp_path, *words, PRETEND="yes")
    assert code == 0, said
    assert "1 passed" in said
    assert ("2 deselected" in said) == bool(words)
    assert ("which is hidden: ask for these with -m gpu" in said) != bool(words)


def test_make_test_needs_no_gpu() -> None:
    makefile = (HERE.parent / "Makefile").read_text()
    for target in ("test", "test-slow"):
        (line,) = re.findall(rf"^{target}:.*\n(.*)$", makefile, re.MULTILINE)
        chosen = re.findall(r"^SLOW_TESTS \?= (.*)$", makefile, re.MULTILINE)
        assert "and not gpu" in line.replace("$(SLOW_TESTS)", *chosen)
