"""The benchmarks of speed: what they compare, what they refuse, and, slowly, that they run."""

import argparse
import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import masks  # noqa: E402
import scaling  # noqa: E402
import startup  # noqa: E402
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
    found = step.ratio(list(zip(fast, slow, strict=True)), SIZE)
    assert found["speed"] == found["cpu"] == {"min": 2.0, "median": 2.0, "max": 3.0}
    figures = step.of_case(fast, SIZE)
    assert figures["step_s"] == {"min": 1.0, "median": 6.0, "max": 20.0}
    assert figures["segments_per_s"]["max"] == SIZE.global_batch
    assert figures["optimizer_share"]["median"] == 0.25


def test_cases_take_turns_together_or_each_with_ours() -> None:
    assert step.groups_of(["original", "table", "cache"], together=True) == [
        ["original", "table", "cache"]
    ]
    assert step.groups_of(["original", "table", "cache"], together=False) == [
        ["table", "original"],
        ["table", "cache"],
    ]
    assert step.groups_of(["original", "cache"], together=False) == [["original"], ["cache"]]
    assert step.groups_of(["table"], together=False) == [["table"]]


def test_pairs_make_the_cases_figures_and_ratios(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    for name in ("main", "bias"):
        (tmp_path / "small" / f"{name}.json").write_text(json.dumps(getattr(SIZE, name)))
    words = argparse.Namespace(cases=["original", "table", "trainer-ce", "cache"])
    turns = [
        {"table": process([1.0, 1.0]), "original": process([3.0, 3.0])},
        {"table": process([5.0, 5.0]), "trainer-ce": process([4.0, 4.0])},
    ]
    found = step.summarise(turns, replace(job("table"), folder=tmp_path), words)
    assert found["cases"]["table"]["step_s"] == {"min": 1.0, "median": 3.0, "max": 5.0}
    assert found["cases"]["cache"] == step.NOT_THERE
    assert {name: of["speed"]["median"] for name, of in found["ratios"].items()} == {
        "table over original": 3.0,
        "table over trainer-ce": 0.8,
    }


def test_unequal_work_ends_it() -> None:
    equal = {"table": process([1.0]), "trainer-poe": process([2.0])}
    step.check("half", [equal])
    other = {"table": equal["table"], "trainer-poe": process([2.0], [2.0, 1.5, 1.26])}
    with pytest.raises(SystemExit, match=r"half: table and trainer-poe lose .* 0\.01"):
        step.check("half", [equal, other])
    nan = {"table": equal["table"], "trainer-poe": process([2.0], [2.0, float("nan"), 1.25])}
    with pytest.raises(SystemExit, match=r"lose differently, .* nan"):
        step.check("half", [nan])
    odd = copy.deepcopy(equal)
    odd["trainer-poe"]["deepspeed"]["zero_optimization"]["stage"] = 1
    with pytest.raises(SystemExit, match="not configured alike"):
        step.check("half", [equal, odd])


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


LINKS = {
    "all_reduce": scaling.Link(bytes_per_s=1e9, latency_s=1e-3),
    "all_gather": scaling.Link(bytes_per_s=2e9, latency_s=1e-3),
    "reduce_scatter": scaling.Link(bytes_per_s=4e9, latency_s=1e-3),
}
WEIGHTS = scaling.Weights(every=300, trained=200, kept=40, wide=220, wide_trained=150)


def test_the_traffic_of_each_stage() -> None:
    moved = {stage: scaling.traffic(stage, WEIGHTS, 3, bf16=False) for stage in scaling.STAGES}
    assert moved[0] == {"all_reduce": 800}
    assert moved[1] == {"all_reduce": 800, "all_gather": 800}
    assert moved[2] == {"all_reduce": 2400, "all_gather": 800}
    assert moved[3] == {"all_gather": 3 * 4 * 260 + 160, "reduce_scatter": 2400}
    halved = 4 * 50 + 2 * 150
    assert scaling.traffic(2, WEIGHTS, 1, bf16=True) == {"all_reduce": halved, "all_gather": 800}
    halves = {"all_gather": 4 * 40 + 2 * 220 + 160, "reduce_scatter": halved}
    assert scaling.traffic(3, WEIGHTS, 1, bf16=True) == halves


def test_the_model_of_a_step() -> None:
    knobs = {"compute_s": 2.0, "optimizer_s": 4.0, "weights": WEIGHTS, "links": LINKS}
    knobs |= {"bf16": False, "bucket_bytes": 400.0}
    assert scaling.predict(2, 1, 3, **knobs) == 10.0, "one rank talks to nobody"
    # two buckets of each; 3/4 of the bytes twice, or once
    talk = 2 * 0.75 * 800 / 1e9 + 2e-3 + 0.75 * 800 / 2e9 + 2e-3
    assert scaling.predict(1, 4, 3, **knobs) == pytest.approx(6.0 + 1.0 + talk)
    assert scaling.predict(0, 4, 3, **knobs) == pytest.approx(10.0 + 1.2e-6 + 2e-3)


def test_the_page_shows_masks_scaling_and_the_way_to_a_model() -> None:
    page = step.PAGE.read_text(encoding="utf-8")
    for benchmark in (masks, scaling, startup):
        results = ROOT / "benchmarks" / "results" / f"{benchmark.__name__}.json"
        assert benchmark.render(json.loads(results.read_text()), page) == page, results.name


def test_a_training_command_in_parts(tmp_path: Path) -> None:
    events = [("start", 110.0), ("step", 111.0), ("step", 120.0), ("checkpoint", 121.5)]
    events += [("validation", 124.0), ("done", 124.5)]
    lines = [json.dumps({"event": name, "time_s": at}) for name, at in events]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    parts = startup.timeline(tmp_path, 100.0, 126.0)
    assert list(parts.values()) == [10.0, 10.0, 1.5, 2.5, 2.0]
    assert sum(parts.values()) == 26.0


def gpu_result() -> dict[str, Any]:
    def row(speed: float, loss: float, micro_batch: int = 32) -> dict[str, Any]:
        figures = {"segments_per_s": speed, "model_tflop_per_s": speed / 4, "data_wait_share": 0.0}
        return figures | {"micro_batch": micro_batch, "peak_gib": 20.0, "losses": [loss, 2.0]}

    turns: dict[str, Any] = {
        name: {"segments_per_s": 900.0, "losses": [2.1, 2.0]}
        for name in ("table", "trainer-poe", "trainer-ce")
    }
    turns |= {"micro_batch": 16, "table over trainer-poe": 1.25, "table over trainer-ce": 0.9}
    return {
        "date": "2026-11-26",
        "seconds": 300,
        "left_out": ["reader"],
        "rows": {
            "rates": {"name": "A GPU", "bf16_tflop_per_s": 1000.0, "fp32_tflop_per_s": 50.0},
            "feature_encoder": row(1200.0, 2.1),
            "trainer": turns,
            "layers:12": row(2000.0, 2.2),
            "layers:12, cache": row(2900.0, 2.2),
            "parts": {"shares": {"CNN": 0.25, "transformer": 0.5, "idle": 0.25}},
            "feature_encoder, compile": row(2000.0, 2.11),
            "feature_encoder, micro batch 128": {"out_of_memory": "CUDA", "micro_batch": 128},
            "run": {"computed_minutes": 5.5, "computed_over_steps": 1.25},
            "bias pass": {"segments_per_s": 500.0, "model_tflop_per_s": 20.0},
        },
    }


def test_the_table_of_a_gpu() -> None:
    table = gpu.table(gpu_result())
    assert "left out: reader" in table
    assert "| feature_encoder | 1200 | 300 | 30.0 % | 32 | 20.0 | 0.0 % |" in table
    assert "| feature_encoder, micro batch 128 | out of memory |" in table
    assert "| bias pass, float32 | 500 | 20 | 40.0 % |" in table
    assert "table over trainer-ce: 0.9 times" in table
    assert "the trunk cache: 1.45 times; the goal is 1.4" in table
    assert "time by part: CNN 25.0 %, transformer 50.0 %, idle 25.0 %" in table
    assert "GTZAN, ten epochs, computed: 5.5 minutes" in table
    assert table.endswith(
        "feature_encoder, compile meets the goal of 40.0 % of the measured product: 50.0 %"
    )


def test_what_goes_wrong_on_a_gpu_is_told_below_the_figures() -> None:
    found = gpu_result()
    rows = found["rows"]
    assert gpu.failures(found) == []
    rows["layers:12, cache"]["losses"][0] = 2.3
    rows["feature_encoder, compile"]["losses"][0] = None  # as the journal has what is not finite
    rows["trainer"]["trainer-poe"]["losses"][1] = 2.2
    rows["bias pass"] = {"failed": "not done after 30 s"}
    assert gpu.failures(found) == [
        "bias pass: not done after 30 s",
        "layers:12, cache loses 2.3, layers:12 2.2",
        "feature_encoder, compile loses None, feature_encoder 2.1",
        "trainer: ours and the Trainer with the bias model lose differently",
    ]
    assert "not done after 30 s\n" in gpu.table(found)
    rows["rates"] = {"failed": "ended with 1"}
    assert gpu.table(found).endswith("against the goal of 40.0 % of the measured product")


def test_time_is_given_to_the_part_whose_forward_pass_autograd_names() -> None:
    clock = itertools.count()

    class Event:
        def __init__(self, name: str, us: float, above: Any = None, number: int = -1) -> None:
            self.name, self.self_device_time_total, self.self_cpu_time_total = name, us, 2 * us
            self.cpu_parent, self.sequence_nr = above, number
            self.time_range = SimpleNamespace(start=next(clock))

    cnn, above = Event("part:CNN", 0.0), Event("part:transformer", 0.0)
    frozen = Event("aten::conv1d", 3.0, cnn, 7)  # makes no node: the next one has the same number
    product = Event("aten::addmm", 4.0, above, 7)
    node = Event("autograd::engine::evaluate_function: AddmmBackward0", 0.0, None, 7)
    lost = Event("autograd::engine::evaluate_function: NllLossBackward0", 0.0, None, 9)
    events = [
        *(cnn, above, frozen, product, node, Event("aten::mm", 5.0, node)),
        *(lost, Event("aten::nll_loss_backward", 1.0, lost), Event("ProfilerStep#1", 90.0)),
        Event("aten::add", 2.0, Event("part:optimizer", 0.0)),
    ]
    expected = {"CNN": 3.0, "transformer": 4.0, "transformer, backward": 5.0, "optimizer": 2.0}
    expected["loss and all else"] = 1.0
    assert gpu.by_part(events, on_gpu=True) == expected
    on_cpu = gpu.by_part(events, on_gpu=False)
    assert on_cpu == {name: 2 * us for name, us in expected.items()}


def test_the_minutes_of_all_of_gtzan_are_worked_out_from_a_fifth_of_it() -> None:
    from mgc_dist.config import OptimConfig, TrainConfig

    found = {"start_s": 20.0, "end_s": 4.0, "evaluation_s": 3.0, "validation_s": 2.0}
    found |= {"checkpoint_s": 5.0, "step_s": 0.25}
    config = TrainConfig(optim=OptimConfig(global_batch=64))
    steps_s = 10 * 443 * 19 / 64 * 0.25
    other_s = 20 + 4 + 5 * 3 + 10 * (5 * 2 + 5)
    told = gpu.computed(found, config)
    assert told["computed_step_minutes"] == pytest.approx(steps_s / 60, rel=1e-3)
    assert told["computed_minutes"] == pytest.approx((steps_s + other_s) / 60, rel=1e-3)
    assert told["computed_over_steps"] == pytest.approx(1 + other_s / steps_s, rel=1e-3)


def call(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_for_a_gpu_runs(tmp_path: Path) -> None:
    """All of it on the CPU: every part has a figure, the table comes last."""
    result = tmp_path / "gpu.json"
    done = call(
        "benchmarks/gpu.py", "--device", "cpu", "--quick", "--minutes", "60", "--json", str(result)
    )
    found = json.loads(result.read_text())
    names = [row.name for row in gpu.rows(4, 4)]
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        names.remove("feature_encoder, compile")
    assert list(found["rows"]) == names
    assert all(row["segments_per_s"] > 0 for row in gpu.trained(found).values())
    assert {"CNN", "CNN, backward"} & set(found["rows"]["parts"]["shares"]) == {"CNN"}, "frozen"
    assert "transformer, backward" in found["rows"]["parts"]["shares"]
    assert found["rows"]["reader"]["segments_per_s"] > 100
    assert found["rows"]["run"]["computed_over_steps"] > 1
    assert done.stdout.endswith(f"{gpu.table(found)}\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_send_what_the_model_of_scaling_says(tmp_path: Path) -> None:
    result = tmp_path / "scaling.json"
    quick = ["--rounds", "1", "--warm", "1", "--timed", "1", "--json", str(result)]
    call("benchmarks/scaling.py", "--stages", "2", "3", *quick)
    found = json.loads(result.read_text())
    for stage in found["stages"].values():
        assert set(stage["counted_bytes"]) == set(stage["modelled_bytes"])
        for name, counted in stage["counted_bytes"].items():
            assert counted == pytest.approx(stage["modelled_bytes"][name], rel=0.03), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_way_to_a_model_is_timed(tmp_path: Path) -> None:
    result = tmp_path / "startup.json"
    call("benchmarks/startup.py", "--parts", "small", "--tracks", "30", "--json", str(result))
    parts = json.loads(result.read_text())["parts"]["small"]
    assert len(parts) == 8
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["train: the steps"] > 0
