"""Runs over seeds: who belongs together, and what was gained, against numpy and scipy."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_results import write_run

from mgc_dist import cli
from mgc_dist.config import DataConfig, LossConfig, OptimConfig, RunConfig, TrainConfig
from mgc_dist.errors import UserError
from mgc_dist.report import comparison
from mgc_dist.scoring import conditions, results


def run_of(
    folder: Path, loss: LossConfig, seed: int, lr: float = 3e-5, drawn: int = 0, **changes
) -> conditions.Run:
    """A run with settings and an evaluation; data sets differ by seed."""
    number = len(list(folder.iterdir())) if folder.exists() else 0
    run = folder / f"run-{number}"
    changes = {"dataset_id": str(seed) * 64} | changes
    write_run(run, seed=100 * drawn + seed, skill=0.4 + 0.2 * drawn, **changes)
    settings = TrainConfig(
        data=DataConfig(shards=Path(f"shards/{seed}"), bias_table=Path(f"bias/{number}")),
        objective=loss,
        optim=OptimConfig(lr=lr),
        output=RunConfig(run=run, seed=seed, log_every_steps=number + 1),
    )
    (run / "config.yaml").write_text(cli.dump("train", settings))
    found, flags = conditions.settings_of(run)
    assert found == seed
    return conditions.Run(result=results.read(run, "test"), seed=seed, settings=flags)


CE, POE = LossConfig(loss="ce"), LossConfig(loss="poe", beta=0.5)


def test_conditions_are_named_by_what_differs(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, loss, seed) for seed in (0, 1) for loss in (POE, CE)]
    assert list(conditions.group(runs)) == ["loss=poe beta=0.5", "loss=ce"]
    assert [sorted(seeds) for seeds in conditions.group(runs).values()] == [[0, 1], [0, 1]]
    runs.append(run_of(tmp_path, LossConfig(loss="poe", beta=1.0), 0))
    runs.append(run_of(tmp_path, CE, 0, lr=1e-4))
    runs.append(run_of(tmp_path, LossConfig(loss="mixture"), 0))
    assert list(conditions.group(runs)) == [
        "loss=poe beta=0.5 lr=3.0e-05",
        "loss=ce lr=3.0e-05",
        "loss=poe beta=1.0 lr=3.0e-05",
        "loss=ce lr=0.0001",
        "loss=mixture bias_ratio=0.1 lr=3.0e-05",
    ]


def test_knobs_that_a_loss_does_not_read_divide_nothing(tmp_path: Path) -> None:
    other = LossConfig(loss="ce", beta=0.9, bias_ratio=0.3)
    runs = [run_of(tmp_path, CE, 0), run_of(tmp_path, other, 1), run_of(tmp_path, POE, 0)]
    assert list(conditions.group(runs)) == ["loss=ce", "loss=poe beta=0.5"]


def test_spread_and_gains_agree_with_scipy(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, loss, s, drawn=d) for s in range(4) for d, loss in ((1, POE), (0, CE))]
    found = conditions.compare(runs, "test")
    found = json.loads(json.dumps(found, allow_nan=False))
    assert found["baseline"] == "loss=ce"
    assert found["conditions"]["loss=ce"]["gain"] is None
    accuracy = {
        loss: [
            float((r.result.guess == r.result.label).mean())
            for r in runs
            if r.settings["loss"] == loss
        ]
        for loss in ("ce", "poe")
    }
    told = found["conditions"]["loss=poe beta=0.5"]
    figures = told["figures"]["accuracy"]
    assert list(figures["values"].values()) == pytest.approx(accuracy["poe"])
    assert figures["mean"] == pytest.approx(np.mean(accuracy["poe"]))
    assert figures["sd"] == pytest.approx(np.std(accuracy["poe"], ddof=1))
    assert (figures["min"], figures["max"]) == (min(accuracy["poe"]), max(accuracy["poe"]))
    gain, expected = told["gain"]["accuracy"], stats.ttest_rel(accuracy["poe"], accuracy["ce"])
    interval = expected.confidence_interval()
    assert gain["interval"] == pytest.approx([interval.low, interval.high])
    assert gain["p"] == gain["p_corrected"] == pytest.approx(expected.pvalue)
    assert gain["unit"] == "seeds", "each seed has a data set of its own"
    pairs = zip(accuracy["poe"], accuracy["ce"], strict=True)
    assert gain["gained"] == sum(poe > ce for poe, ce in pairs) > 0
    assert set(told["figures"]) == {
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "accuracy of bias-aligned",
        "accuracy of bias-conflicting",
    }


def test_gains_on_one_test_set_are_over_seeds_and_artists_and_corrected(tmp_path: Path) -> None:
    """Seeds alone would say what happens on these artists only."""
    losses = ((2, LossConfig(loss="poe", beta=1.0)), (1, POE), (0, CE))
    runs = [
        run_of(tmp_path, loss, seed, drawn=drawn, dataset_id="d" * 64)
        for seed in range(4)
        for drawn, loss in losses
    ]
    found = conditions.compare(runs, "test")
    assert found["tries"] == 2
    gains = [found["conditions"][f"loss=poe beta={beta}"]["gain"] for beta in (1.0, 0.5)]
    for gain in gains:
        each = gain["accuracy"]
        alone = stats.ttest_1samp(list(each["values"].values()), 0).confidence_interval()
        assert each["unit"] == "seeds and artists"
        assert each["interval"][1] - each["interval"][0] > 0.05 < each["detectable"]
        assert each["interval"] != pytest.approx([alone.low, alone.high])
        assert gain["accuracy of bias-conflicting"]["interval"] is not None
    values = [gain["accuracy"]["p"] for gain in gains]
    expected = [min(1, max(2 * min(values), value)) for value in values]
    assert [gain["accuracy"]["p_corrected"] for gain in gains] == pytest.approx(expected)
    two = conditions.compare([run for run in runs if run.seed < 2], "test")
    gain = two["conditions"]["loss=poe beta=0.5"]["gain"]["accuracy"]
    assert (gain["interval"], gain["p"], gain["detectable"]) == (None, None, None)


def test_gains_are_over_shared_seeds_and_shared_subgroups(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path, CE, 0),
        run_of(tmp_path, CE, 1, subgroups=None),
        run_of(tmp_path, POE, 1, drawn=1),
        run_of(tmp_path, POE, 2, drawn=1),
        run_of(tmp_path, LossConfig(loss="mixture"), 5),
    ]
    found = conditions.compare(runs, "test")["conditions"]
    gain = found["loss=poe beta=0.5"]["gain"]
    assert list(gain["accuracy"]["values"]) == ["1"]
    assert gain["accuracy"]["sd"] is None
    assert gain["accuracy"]["interval"] is None
    assert not any(name.startswith("accuracy of") for name in gain)
    assert found["loss=mixture bias_ratio=0.1"]["gain"] is None


def test_without_plain_cross_entropy_the_first_condition_is_the_baseline(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, POE, 0), run_of(tmp_path, LossConfig(loss="mixture"), 0)]
    assert conditions.compare(runs, "test")["baseline"] == "loss=poe beta=0.5"


def test_a_run_twice_is_refused(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, CE, 0), run_of(tmp_path, POE, 0), run_of(tmp_path, CE, 0)]
    with pytest.raises(UserError, match=r"run-0 and .*run-2: got the same settings and seed 0"):
        conditions.compare(runs, "test")


def test_other_tracks_within_a_seed_are_refused(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, CE, 0), run_of(tmp_path, CE, 1)]
    runs.append(run_of(tmp_path, POE, 1, dataset_id="f" * 64))
    with pytest.raises(UserError, match=r"data set of .*got 111111111111 and ffffffffffff"):
        conditions.compare(runs, "test")


def test_a_run_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"settings .*config\.yaml: got .*No such file"):
        conditions.settings_of(tmp_path)
    (tmp_path / "config.yaml").write_text("train: {output: {}}")
    with pytest.raises(UserError, match="got 'seed'"):
        conditions.settings_of(tmp_path)


def test_the_picture_has_a_panel_a_figure(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    draw = comparison.figures.seeds
    monkeypatch.setattr(
        comparison.figures, "seeds", lambda panels: [drawn.append(panels), draw(panels)][1]
    )
    runs = [run_of(tmp_path, loss, seed) for seed in (0, 1) for loss in (POE, CE)]
    comparison.draw_seeds(tmp_path / "x.png", conditions.compare(runs, "test"))
    panels = drawn[0]
    assert list(panels)[:2] == ["accuracy", "macro-F1"]
    assert set(panels["macro-F1"]) == {"loss=ce", "loss=poe beta=0.5"}
    assert sorted(panels["accuracy"]["loss=ce"]) == [0, 1]
