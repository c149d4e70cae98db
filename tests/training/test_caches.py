"""The folder of caches: listed with the runs that named themselves, removed by name or age."""

import json
import re
import time
from pathlib import Path

import pytest

from mgc_dist import cache
from mgc_dist.cache import CacheConfig
from mgc_dist.data.features import STORE
from mgc_dist.errors import UserError
from mgc_dist.files import locked
from mgc_dist.training import caches

ONE, TWO, CUT = "ab" * 16, "ac" * 16, "f0" * 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two caches, the second used 40 days ago, a pass that was cut, and a folder of the user's."""
    root = tmp_path / "cache"
    for name in (ONE, TWO, CUT, "notes"):
        (root / name).mkdir(parents=True)
    for name in (ONE, TWO):
        facts = {"boundary": "cnn", "dtype": "bf16", "dataset_id": "d1" * 32}
        (root / name / STORE.header).write_text(json.dumps(facts))
        (root / name / STORE.array).write_bytes(bytes(2_000_000))
    (root / CUT / STORE.partial).write_bytes(b"")
    for run in ("a", "b", "a"):
        caches.note_use(root / ONE, tmp_path / "runs" / run)
    old = {"run": "/runs/old", "time_s": time.time() - 40 * 86_400}
    (root / TWO / caches.USES).write_text(json.dumps(old) + "\n")
    return root


def left(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_size_last_use_and_runs_are_listed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.run(CacheConfig(folder=root))
    said = re.sub(r"\d{4}-\d\d-\d\d", "DAY", capsys.readouterr().out)
    lines, runs = said.splitlines(), tmp_path / "runs"
    assert lines[0].startswith(f"{TWO}  2.0 MB  cnn in bf16 of d1d1d1d1d1d1  ")
    assert lines[0].endswith("/runs/old")
    assert f"{CUT}  0.0 MB  not whole  DAY  no run that named itself" in lines
    assert f"{ONE}  2.0 MB  cnn in bf16 of d1d1d1d1d1d1  DAY  {runs}/a, {runs}/b" in lines
    assert lines[3] == f"3 caches, 0.00 GB in {root}"
    assert left(root) == {ONE, TWO, CUT, "notes"}


def test_they_are_removed_by_age_and_by_name(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.run(CacheConfig(folder=root, unused_days=30))
    assert left(root) == {ONE, CUT, "notes"}
    assert "/runs/old: removed" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"--remove x: got 0 caches(?s:.*)there are .*{ONE}"):
        cache.run(CacheConfig(folder=root, remove=("x",)))
    with locked(root / ONE / caches.LOCK, wait_s=0, purpose="test"):
        with pytest.raises(UserError, match=r"removing cache .*: got another process at it"):
            cache.run(CacheConfig(folder=root, remove=("ab",)))
        assert (root / ONE / STORE.header).exists()
    cache.run(CacheConfig(folder=root, remove=("ab", "f")))
    assert left(root) == {"notes"}
    with pytest.raises(UserError, match="no such folder"):
        cache.run(CacheConfig(folder=root / "none"))


def test_a_cache_of_another_user_is_read_without_a_note(tmp_path: Path) -> None:
    caches.note_use(tmp_path / "nowhere", tmp_path)
    assert not list(tmp_path.iterdir())
