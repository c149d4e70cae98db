"""Crops: a pure function of seed, position and row in training, evenly spaced elsewhere."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny, run_ranks
from harness import weights_hash
from trainings import config, losses, train_on, train_until

from mgc_dist import evaluate
from mgc_dist.config import EvaluateConfig, TrainConfig
from mgc_dist.data.order import lay_out, training_batches
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.models.folder import load_exported
from mgc_dist.sound.draws import crop, spaced
from mgc_dist.training import setup
from mgc_dist.training.forecast import forecast


def cropped(shards: Path, model: Path, run: Path, **changes: Any) -> TrainConfig:
    """A run on a quarter of a second of each segment of half a second."""
    settings = config(shards, model, run, **({"loss": "ce"} | changes))
    return replace(settings, data=replace(settings.data, crop_s=0.25))


def places_of(draw: np.ndarray, places: int) -> list[int]:
    """Where crops begin, by Python's own integers."""
    found = []
    for number in draw.tolist():
        x = (number * 0x9E3779B97F4A7C15 + 3 + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
        found.append((x - 2**64 if x >= 2**63 else x) % places)
    return found


def test_a_crop_begins_where_its_draw_says() -> None:
    draw = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 5000)
    wave = torch.arange(100, dtype=torch.int16).expand(5000, 100)
    found = crop(wave, torch.from_numpy(draw), 90)
    starts = places_of(draw, 11)
    assert found[:, 0].tolist() == starts
    assert (found == found[:, :1] + torch.arange(90)).all()
    counts = np.bincount(starts, minlength=11)
    assert counts.min() > 380, "each of 11 places about 455 times"


@pytest.mark.parametrize(("whole", "part", "count"), [(100, 50, 2), (100, 40, 3), (101, 100, 2)])
def test_spaced_parts_cover_the_whole(whole: int, part: int, count: int) -> None:
    parts = spaced(torch.arange(whole)[None], part)
    starts = [int(each[0, 0]) for each in parts]
    assert all(each.shape == (1, part) for each in parts)
    assert len(parts) == count
    assert (starts[0], starts[-1]) == (0, whole - part)
    assert np.ptp(np.diff(starts)) <= 1
    assert set(torch.cat(parts, dim=1)[0].tolist()) == set(range(whole))


def test_training_hears_one_crop_and_evaluation_all(tiny_model: Path) -> None:
    whole = build_tiny(tiny_model, segment_samples=3000)
    model = build_tiny(tiny_model, segment_samples=3000, crop_of=8000)
    rng = np.random.default_rng(0)
    wave = torch.from_numpy(rng.integers(-9000, 9000, (4, 8000)).astype(np.int16))
    draw = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 4))
    starts = places_of(draw.numpy(), 5001)
    parts = [row[start : start + 3000] for row, start in zip(wave, starts, strict=True)]
    torch.testing.assert_close(model.train()(wave, draw), whole.train()(torch.stack(parts)))
    with torch.no_grad():
        each = [whole.eval()(wave[:, at : at + 3000]) for at in (0, 2500, 5000)]
        torch.testing.assert_close(model.eval()(wave), torch.stack(each).mean(0))
        assert model(wave[:, :3000]).equal(each[0]), "what has the length of a crop is heard whole"


def test_crops_do_not_depend_on_ranks_nor_on_a_stop(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    alone, two, parts = (tmp_path / name for name in ("alone", "two", "parts"))
    train_on(1, cropped(shards, tiny_model, alone))
    train_on(2, cropped(shards, tiny_model, two))
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    assert run_ranks(2, train_until, 5, cropped(shards, tiny_model, parts)) == [0, 0]
    train_on(2, cropped(shards, tiny_model, parts, resume="auto"))
    assert weights_hash(parts) == weights_hash(two)
    plain = cropped(shards, tiny_model, parts, resume="auto", epochs=3.0)
    with pytest.raises(UserError, match=r"--crop-s: got None, expected 0\.25"):
        train_on(2, replace(plain, data=replace(plain.data, crop_s=None)))


def test_a_row_is_cropped_anew_in_each_epoch(shards: Path, tiny_model: Path) -> None:
    settings = cropped(shards, tiny_model, Path("run"))
    with ShardSet(shards) as data:
        plan = setup.plan_of(settings, data)
    seen: dict[int, list[int]] = {}
    layout = lay_out(global_batch=10, world=1, largest_micro_batch=10)
    for batch in training_batches(plan, layout, 0, 0):
        for place, start in zip(batch.place.tolist(), places_of(batch.draw, 4001), strict=True):
            seen.setdefault(place, []).append(start)
    twice = [starts for place, starts in seen.items() if place >= 0 and len(starts) == 2]
    assert sum(len(set(starts)) == 2 for starts in twice) > 50


def test_evaluation_says_what_it_hears(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_on(1, cropped(shards, tiny_model, run, epochs=0.5, zero_stage=3))
    told = json.loads((run / "best" / "config.json").read_text())
    assert (told["segment_samples"], told["crop_of_samples"]) == (4000, 8000)

    def said() -> str:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            evaluate.run(EvaluateConfig(run=run, batch=8))
        return text.getvalue()

    (text,) = run_ranks(1, said)
    assert "of each segment the model hears 2 crops that cover it, evenly spaced" in text
    logits = np.load(run / "predictions" / "test.logits.npy")
    model = load_exported(run / "best")
    with ShardSet(shards) as data, torch.no_grad():
        first, _ = data.rows_of("test")
        wave = torch.from_numpy(data.read(first).copy())[None]
        parts = torch.cat([model(wave[:, :4000]), model(wave[:, 4000:])])
    divided = parts.mean(0) / (model.temperature or 1.0)
    assert logits[0] == pytest.approx(divided.numpy(), abs=1e-5)


def test_what_has_no_crops_is_refused(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--crop-s with --cache cnn.*\n.*--cache none"):
        cropped(shards, tiny_model, tmp_path, cache="cnn", freeze="feature_encoder")
    settings = cropped(shards, tiny_model, tmp_path / "run")
    long = replace(settings, data=replace(settings.data, crop_s=0.5))
    with pytest.raises(UserError, match=r"--crop-s 0.5: got 8000 samples.*\n.*leave it out"):
        train_on(1, long)
    assert not (tmp_path / "run").exists()


def test_the_dry_run_counts_the_crop(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    settings = cropped(shards, tiny_model, tmp_path)
    with ShardSet(shards) as data:
        plan, found = setup.plan_of(settings, data), data.manifest
        heard = setup.heard_samples(settings, found)
    words: dict[str, Any] = {"world": 1, "plan": plan, "genres": found.genres, "sample_rate": 16000}
    crops, whole = (forecast(settings, segment_samples=n, **words) for n in (heard, 8000))
    assert heard == 4000
    assert crops.flops.training < 0.6 * whole.flops.training
