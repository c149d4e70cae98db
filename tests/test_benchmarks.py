"""The benchmark of a step: what it compares, what it refuses, and, slowly, that it runs."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import step  # noqa: E402

SIZE = replace(step.SIZES["small"], warm=1, timed=2, rounds=2, lockstep=True)


def process(seconds: list[float], losses: list[float] | None = None) -> dict[str, Any]:
    """What a process hands back: a step of 100 s to warm up, then these."""
    steps = [{"s": s, "cpu_s": 2 * s, "optimizer_s": s / 4} for s in (100.0, *seconds)]
    settings = step.deepspeed_settings(job("table"))
    return {
        "steps": steps,
        "losses": losses or [2.0, 1.5, 1.25],
        "peak_gib": 1.0,
        "deepspeed": settings,
    }


def job(case: str) -> step.Job:
    return step.Job(model="small", case=case, freeze="half", folder=Path("x"), size=SIZE)


def test_a_pair_is_of_one_turn_and_warming_up_does_not_count() -> None:
    """The machine gets ten times as slow in the second round: the ratio does not see it."""
    fast = [process([1.0, 2.0]), process([10.0, 20.0])]
    slow = [process([2.0, 4.0]), process([20.0, 60.0])]
    assert step.ratio(fast, slow, SIZE)["speed"] == {"min": 2.0, "median": 2.0, "max": 3.0}
    by_process = step.ratio(fast, slow, replace(SIZE, lockstep=False))
    assert by_process["cpu"] == {"min": 2.0, "median": 2.333, "max": 2.667}
    figures = step.of_case(fast, SIZE)
    assert figures["step_s"] == {"min": 1.0, "median": 6.0, "max": 20.0}
    assert figures["segments_per_s"]["max"] == SIZE.global_batch
    assert figures["optimizer_share"]["median"] == 0.25


def test_unequal_work_ends_it() -> None:
    equal = {"table": [process([1.0])], "trainer-poe": [process([2.0])]}
    step.check({"half": equal})
    other = {"table": equal["table"], "trainer-poe": [process([2.0], [2.0, 1.5, 1.26])]}
    with pytest.raises(SystemExit, match=r"half: table and trainer-poe lose .* 0\.01"):
        step.check({"half": other})
    nan = {"table": equal["table"], "trainer-poe": [process([2.0], [2.0, float("nan"), 1.25])]}
    with pytest.raises(SystemExit, match=r"lose differently, .* nan"):
        step.check({"half": nan})
    odd = copy.deepcopy(equal)
    odd["trainer-poe"][0]["deepspeed"]["zero_optimization"]["stage"] = 1
    with pytest.raises(SystemExit, match="not configured alike"):
        step.check({"half": odd})


def test_the_page_shows_the_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())
    page = step.PAGE.read_text(encoding="utf-8")
    assert step.render(results, page) == page, "run benchmarks/step.py --render"
    assert "small" in results["models"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_cases_start_alike_and_lose_alike(tmp_path: Path) -> None:
    result = tmp_path / "step.json"
    words = [sys.executable, "benchmarks/step.py", "--quick", "--threads", "1"]
    words += ["--json", str(result), "--folder", str(tmp_path / "work")]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(result.read_text())["models"]["small"]["freezes"].values():
        cases = found["cases"]
        same = ["trainer-poe", "table"] + (["cache"] if cases["cache"] != step.NOT_THERE else [])
        first = cases["table"]["losses"]
        assert len(first) == 3
        assert first[0] != first[-1]
        for case in same:
            assert cases[case]["losses"] == pytest.approx(first, abs=1e-5), case
        # the same main model on the same rows: with a bias model from random weights that hardly
        # prefers a genre, all losses begin near log 10
        for case in ("original", "trainer-ce"):
            assert cases[case]["losses"][0] == pytest.approx(first[0], abs=0.02)
            assert cases[case]["losses"] != pytest.approx(first, abs=1e-5)
        assert found["ratios"]["table over original"]["cpu"]["median"] > 1
