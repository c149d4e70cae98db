"""Checkpoints: complete or invisible; damaged ones are named and passed over."""

import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgc_dist import checkpoint
from mgc_dist.errors import UserError
from mgc_dist.ranks import Ranks

ALONE = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def commit(run: Path, step: int, keep: int = 10, save=None) -> Path:
    def write(root: Path, tag: str) -> None:
        (root / tag / "part").mkdir(parents=True)
        (root / tag / "weights.pt").write_bytes(bytes([step]) * 1000)
        (root / tag / "part" / "optimizer.pt").write_bytes(b"x" * 300)

    return checkpoint.all_commit(
        run, step, ALONE, save or write, facts={"world": 1, "zero_stage": 2}, keep=keep
    )


def test_commit_and_find(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    first, second = commit(tmp_path, 9), commit(tmp_path, 10)
    assert checkpoint.newest(tmp_path) == second
    assert checkpoint.facts(second) == {"step": 10, "world": 1, "zero_stage": 2}
    assert (tmp_path / "checkpoints" / "latest").read_text() == second.name
    assert checkpoint.damage(first) == ""


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        commit(tmp_path, step, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*-*"))
    assert names == ["step-00000004", "step-00000005"]


def test_a_failed_save_leaves_the_previous_one_newest(tmp_path: Path) -> None:
    good = commit(tmp_path, 1)

    def fail(root: Path, tag: str) -> None:
        (root / tag).mkdir()
        (root / tag / "weights.pt").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        commit(tmp_path, 2, save=fail)
    assert checkpoint.newest(tmp_path) == good
    assert commit(tmp_path, 2) == checkpoint.newest(tmp_path)
    assert not list((tmp_path / "checkpoints").glob("tmp-*"))


FILES = ("weights.pt", "part/optimizer.pt", "MANIFEST.json")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES[:2]),
    kind=st.sampled_from(["cut", "flip", "remove"]),
    where=st.floats(0, 0.999),
)
def test_any_damage_falls_back_to_the_one_before(
    tmp_path: Path, name: str, kind: str, where: float
) -> None:
    good, bad = commit(tmp_path, 1), commit(tmp_path, 2)
    path = bad / name
    content = bytearray(path.read_bytes())
    place = int(where * len(content))
    if kind == "remove":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[:place])
    else:
        content[place] ^= 4
        path.write_bytes(content)
    assert checkpoint.damage(bad)
    assert checkpoint.newest(tmp_path) == good


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 0.999))
def test_a_manifest_cut_anywhere_is_damage(tmp_path: Path, where: float) -> None:
    folder = commit(tmp_path, 1)
    whole = (folder / "MANIFEST.json").read_bytes()
    (folder / "MANIFEST.json").write_bytes(whole[: int(where * len(whole))])
    assert checkpoint.damage(folder).startswith("MANIFEST.json")


def test_what_is_passed_over_is_named_and_nothing_starts_from_scratch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mgc_dist"), "propagate", True)
    commit(tmp_path, 1)
    newest = commit(tmp_path, 2)
    (newest / "weights.pt").unlink()
    checkpoint.newest(tmp_path)
    assert "passing over checkpoint step-00000002: no file weights.pt" in caplog.text
    (tmp_path / "checkpoints" / "step-00000001" / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="2 damaged, none whole"):
        checkpoint.newest(tmp_path)


def test_newer_ones_are_set_aside_by_a_run_that_went_back(tmp_path: Path) -> None:
    for step in (10, 30, 40):
        commit(tmp_path, step)
    again = commit(tmp_path, 20, keep=2)
    assert checkpoint.newest(tmp_path) == again
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*-*"))
    assert names == [
        "aside-step-00000030",
        "aside-step-00000040",
        "step-00000010",
        "step-00000020",
    ]


def test_latest_is_only_a_hint(tmp_path: Path) -> None:
    good = commit(tmp_path, 1)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000099")
    (tmp_path / "checkpoints" / "step-junk").mkdir()
    assert checkpoint.newest(tmp_path) == good
    assert json.loads((good / "MANIFEST.json").read_text())["files"].keys() == set(FILES[:2])
