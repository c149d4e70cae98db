"""What is printed is what is written, and fits a terminal of 80 columns."""

import copy
from pathlib import Path

import pytest
from test_conditions import CE, POE, run_of
from test_report import measured, told
from test_results import write_run

from mgc_dist.report import tables
from mgc_dist.scoring import conditions, paired, results


def test_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    figures = told(*measured(groups=(None, None, None)))
    tables.evaluation(figures)
    shown = capsys.readouterr().out
    assert "95 % by track; artists unknown, so too narrow: accuracy" in shown
    assert "over artists" not in shown
    assert "worst subgroup: quiet, accuracy 0.000 over 1 tracks" in shown
    (vote,) = [line for line in shown.splitlines() if "vote" in line]
    assert [cell.strip() for cell in vote.split("│")[1:4]] == ["vote", "3", "0.667"]
    assert "- │" in vote  # its likelihood
    bare = copy.deepcopy(figures) | {"subgroups": None, "temperature": None}
    tables.evaluation(bare)
    shown = capsys.readouterr().out
    assert "subgroup" not in shown
    assert "temperature" not in shown


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (results.read(write_run(tmp_path / n, seed=s), "test") for s, n in enumerate("ab"))
    found = paired.compare(a, b, "test")
    tables.pair(found)
    shown = capsys.readouterr().out
    low, high = found["intervals"]["groups"]["macro_f1"]
    assert f"{low:+.3f} to {high:+.3f}" in shown
    for genre, row in found["per_genre"].items():
        (line,) = [line for line in shown.splitlines() if f" {genre} " in line]
        assert f"{row['difference']:+.3f}" in line
    assert max(len(line) for line in shown.splitlines() if line[0] in "│┃") <= 80


def test_settings_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(tmp_path, loss, s, drawn=d) for s in range(3) for d, loss in ((1, POE), (0, CE))]
    found = conditions.compare(runs, "test")
    tables.seeds(found)
    shown = capsys.readouterr().out
    spread = found["conditions"]["loss=ce"]["figures"]["macro_f1"]
    cells = " │ ".join(f"{spread[key]:.3f}" for key in ("mean", "sd", "min", "max"))
    assert cells in shown
    gain = found["conditions"]["loss=poe beta=0.5"]["gain"]["accuracy of bias-conflicting"]
    (line,) = [x for x in shown.splitlines() if "bias-conflicting" in x and " of 3" in x]
    assert f"{gain['mean']:+.3f}" in line
    assert max(len(line) for line in shown.splitlines() if line[0] in "│┃") <= 80
    tables.seeds(conditions.compare(runs[::2], "test"))  # one condition: no gains
    assert "gain over" not in capsys.readouterr().out
