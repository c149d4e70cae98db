"""Checkpoints: complete or invisible; damaged ones are named and passed over."""

import errno
import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgc_dist.cluster.lease import Lease
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.errors import PeerLost, UserError
from mgc_dist.training import checkpoint

ALONE = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def commit(run: Path, step: int, keep: int = 10, save=None, room: int = 0) -> Path:
    def write(root: Path, tag: str) -> list[Path]:
        paths = [root / tag / "weights.pt", root / tag / "part" / "optimizer.pt"]
        paths[1].parent.mkdir(parents=True)
        paths[0].write_bytes(bytes([step]) * 1000)
        paths[1].write_bytes(b"x" * 300)
        return paths

    (run / "lease.json").write_text('{"attempt": "ours"}')
    return checkpoint.all_commit(
        run,
        step,
        ALONE,
        save or write,
        facts={"world": 1, "zero_stage": 2},
        keep=keep,
        lease=Lease(run=run, attempt="ours"),
        expected_bytes=room,
    )


def newest(run: Path) -> Path | None:
    return checkpoint.all_newest(run, ALONE)


def test_commit_and_find(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    first, second = commit(tmp_path, 9), commit(tmp_path, 10)
    assert newest(tmp_path) == second
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

    def fail(root: Path, tag: str) -> list[Path]:
        (root / tag).mkdir()
        (root / tag / "weights.pt").write_bytes(b"half")
        raise OSError(28, "disk full", "weights.pt")

    with pytest.raises(checkpoint.SaveFailed, match=r"rank 0: weights.pt: disk full"):
        commit(tmp_path, 2, save=fail)
    assert not list((tmp_path / "checkpoints").glob("tmp-*")), "removed at once"
    with pytest.raises(checkpoint.SaveFailed, match=r"bytes free, .* needed"):
        commit(tmp_path, 2, room=2**60)
    assert newest(tmp_path) == good
    assert commit(tmp_path, 2) == newest(tmp_path)
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
    assert newest(tmp_path) == good


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
    (commit(tmp_path, 2) / "weights.pt").unlink()
    newest(tmp_path)
    assert "passing over checkpoint step-00000002: no file weights.pt" in caplog.text
    (tmp_path / "checkpoints" / "step-00000001" / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="2 damaged, none whole"):
        newest(tmp_path)


def test_newer_ones_are_set_aside_by_a_run_that_went_back(tmp_path: Path) -> None:
    for step in (10, 30, 40):
        commit(tmp_path, step)
    again = commit(tmp_path, 20, keep=2)
    assert newest(tmp_path) == again
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
    assert newest(tmp_path) == good
    assert json.loads((good / "MANIFEST.json").read_text())["files"].keys() == set(FILES[:2])


def test_a_run_whose_folder_was_taken_over_does_not_commit(tmp_path: Path) -> None:
    good = commit(tmp_path, 1)

    def taken(root: Path, tag: str) -> list[Path]:
        (tmp_path / "lease.json").write_text('{"attempt": "theirs", "host": "elsewhere"}')
        (root / tag).mkdir()
        (root / tag / "weights.pt").write_bytes(b"x")
        return [root / tag / "weights.pt"]

    with pytest.raises(PeerLost, match="elsewhere has taken it over"):
        commit(tmp_path, 2, save=taken)
    assert newest(tmp_path) == good


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 0.9999), st.integers(0, 7))
def test_a_bit_flipped_anywhere_in_the_manifest_is_damage(
    tmp_path: Path, where: float, bit: int
) -> None:
    path = commit(tmp_path, 1) / "MANIFEST.json"
    content = bytearray(path.read_bytes())
    whole = json.loads(content)
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        means_the_same = json.loads(content) == whole  # a blank for a line's end
    except ValueError:
        means_the_same = False
    assert means_the_same or checkpoint.damage(path.parent)


def test_what_rank_0_does_not_see_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder on each node's own disk: what other nodes write is not there."""
    good = commit(tmp_path, 1, keep=1)
    gather = Ranks.all_gather

    def with_another(self: Ranks, value: object) -> list[object]:
        values: list[object] = gather(self, value)
        if isinstance(value, tuple):
            theirs = checkpoint.Written(name="of rank 1.pt", bytes=7, sha256="0")
            values.append(([theirs], ""))
        return values

    monkeypatch.setattr(Ranks, "all_gather", with_another)
    with pytest.raises(checkpoint.SaveFailed, match=r"of rank 1.pt: rank 0 sees nothing of the 7"):
        commit(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert newest(tmp_path) == good


def test_a_kill_while_a_step_is_saved_again_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that went back comes to the step again; with keep=1 there is no other checkpoint."""
    commit(tmp_path, 5, keep=1)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.startswith("tmp-"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            commit(tmp_path, 5, keep=1)
    found = newest(tmp_path)
    assert found is not None
    assert found.name == "step-00000005"


def test_an_old_one_that_cannot_be_deleted_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("mgc_dist"), "propagate", True)
    commit(tmp_path, 1, keep=1)

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))  # open files on NFS

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", busy)
        for step in (2, 3):
            assert commit(tmp_path, step, keep=1) == newest(tmp_path)
        assert "del-00000001 cannot be removed" in caplog.text
        (tmp_path / "checkpoints" / "tmp-00000004").mkdir()
        with pytest.raises(checkpoint.SaveFailed, match="tmp-00000004: it is in the way"):
            commit(tmp_path, 4, keep=1)
    commit(tmp_path, 4, keep=1)
    names = [path.name for path in (tmp_path / "checkpoints").glob("*-*")]
    assert names == ["step-00000004"]


def test_a_file_that_no_manifest_lists_is_damage(tmp_path: Path) -> None:
    folder = commit(tmp_path, 1)
    (folder / "zero_pp_rank_9_mp_rank_00_optim_states.pt").write_bytes(b"x")
    assert "not in its manifest" in checkpoint.damage(folder)
