"""What a run goes on from, and what it must agree with."""

import json
from pathlib import Path

import pytest

from mgc_dist import resume
from mgc_dist.errors import UserError


def manifest(folder: Path, **facts: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "MANIFEST.json").write_text(json.dumps(facts))
    return folder


def test_other_ranks_and_stages_of_a_family_are_carried_over(tmp_path: Path) -> None:
    folder = manifest(tmp_path / "c", world=2, zero_stage=2)
    assert not resume.must_reshape(folder, world=2, zero_stage=2)
    assert resume.must_reshape(folder, world=4, zero_stage=2)
    assert resume.must_reshape(folder, world=2, zero_stage=1)
    for stage in (0, 3):
        with pytest.raises(UserError, match="go on with --zero-stage 1 or 2, on any number"):
            resume.must_reshape(folder, world=2, zero_stage=stage)


def test_a_change_is_refused_by_name() -> None:
    resume.refuse_change("x", {"--seed": 1}, {"--seed": 1, "--more": 2})
    with pytest.raises(UserError, match="x: --seed: got 2, expected 1"):
        resume.refuse_change("x", {"--seed": 2}, {"--seed": 1})


def test_fresh_moves_everything_but_the_lease(tmp_path: Path) -> None:
    for name in ("lease.json", "metrics.jsonl", "config.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    resume.set_aside(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    resume.set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside-1", "aside-2", "lease.json"]
    assert (tmp_path / "aside-1" / "checkpoints").is_dir()
