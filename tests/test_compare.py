"""`compare` as a command: pair or seeds, what it prints, where it writes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_conditions import CE, POE, run_of
from test_results import write_run

from mgc_dist import compare
from mgc_dist.config import CompareConfig
from mgc_dist.errors import UserError


def test_two_runs_are_compared_track_by_track(tmp_path: Path, capsys) -> None:
    runs = (write_run(tmp_path / "a", seed=1, skill=0.3), write_run(tmp_path / "b", seed=2))
    compare.run(CompareConfig(runs=runs))
    folder = tmp_path / "b" / "comparison" / "a"
    found = json.loads((folder / "comparison.json").read_text())
    assert found["mode"] == "pair"
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "McNemar, exact" in shown
    assert f"p = {found['mcnemar']['p']:.4g}" in shown
    assert f"{found['accuracy']['difference']:+.3f}" in shown
    assert "bias-conflicting" in shown
    assert "would be seen four times in five" in shown
    compare.run(CompareConfig(runs=runs, out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found


def test_more_runs_are_compared_over_seeds(tmp_path: Path, capsys) -> None:
    made = [run_of(tmp_path, loss, s, drawn=d) for s in range(3) for d, loss in ((1, POE), (0, CE))]
    compare.run(CompareConfig(runs=tuple(run.result.run for run in made)))
    found = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert found["mode"] == "seeds"
    assert list(found["conditions"]) == ["loss=poe beta=0.5", "loss=ce"]
    assert (tmp_path / "comparison" / "comparison.png").is_file()
    shown = capsys.readouterr().out
    assert "gain over loss=ce, paired by seed" in shown
    gained = found["conditions"]["loss=poe beta=0.5"]["gain"]["accuracy"]["gained"]
    assert f"{gained} of 3" in shown


def test_names_of_other_evaluations(tmp_path: Path) -> None:
    runs = tuple(write_run(tmp_path / name, name="test-shifted") for name in "ab")
    with pytest.raises(UserError, match="but test-shifted"):
        compare.run(CompareConfig(runs=runs))
    compare.run(CompareConfig(runs=runs, name="test-shifted"))
    assert (tmp_path / "b/comparison/a/comparison.json").is_file()


def test_refusals_leave_no_folder_behind(tmp_path: Path) -> None:
    runs = (write_run(tmp_path / "a"), write_run(tmp_path / "b", dataset_id="e" * 64))
    with pytest.raises(UserError, match="data set of"):
        compare.run(CompareConfig(runs=runs))
    assert not (tmp_path / "b" / "comparison").exists()


def test_it_needs_no_model_and_no_torch(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, seed=n)) for n, name in enumerate("ab")]
    script = (
        "import sys; from mgc_dist import compare; from mgc_dist.config import CompareConfig;"
        "from pathlib import Path; compare.run(CompareConfig(runs=tuple(map(Path, sys.argv[1:]))));"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, *runs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "b" / "predictions")
    command = [sys.executable, "-m", "mgc_dist.compare", *runs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "a run that has been evaluated" in done.stderr
