"""Shards of another rate and length than 16 kHz and 3 s: the whole way, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_tiny, run_ranks, shard_config, write_tracks
from test_families import GENRES, write
from trainings import config, losses, train_on
from transformers import Wav2Vec2FeatureExtractor, pipeline

from mgc_dist import evaluate, export, shard, train
from mgc_dist.config import EvaluateConfig, ExportConfig
from mgc_dist.errors import UserError
from mgc_dist.models.predictor import Predictor

RATE = 24_000


@pytest.fixture
def music_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder of a model that was trained at 24 kHz, as MERT, MuQ and MusicFM were."""
    folder = tmp_path / "at-24-khz"
    build_tiny(tiny_model, seed=2).net.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True).save_pretrained(folder)
    return folder


def test_a_model_of_24_khz_goes_the_whole_way(
    shards: Path, tracks: Path, music_model: Path, tmp_path: Path
) -> None:
    run, own = tmp_path / "run", tmp_path / "shards-24"
    knobs: dict[str, Any] = {"loss": "ce", "epochs": 20 / 66}
    at_16 = config(shards, music_model, run, **knobs)
    planned = replace(at_16, output=replace(at_16.output, dry_run=True))
    for settings in (planned, at_16):
        with pytest.raises(UserError, match=r"got 16000 Hz, expected 24000 Hz\n  pack ") as error:
            train.run(settings)
    cure = re.search(r"--sample-rate (\d+) ", str(error.value))
    assert cure
    assert not run.exists()
    shard.run(shard_config(tracks, own, sample_rate=int(cure[1])))
    train_on(1, config(own, music_model, run, **knobs))
    assert len(losses(run)) == 2
    run_ranks(1, evaluate.run, EvaluateConfig(run=run, batch=8))
    with pytest.raises(UserError, match=r"got 16000 Hz|segments of the shards .* got 8000"):
        evaluate.run(EvaluateConfig(run=run, data=shards))
    file = next(tracks.glob("*/*.wav"))
    told = Predictor.load(run, torch.device("cpu")).predict(file, hop_s=1.5, batch=4)
    assert told.segment_s == 0.5
    export.run(ExportConfig(run=run, out=tmp_path / "out"))
    classify = pipeline("audio-classification", model=str(tmp_path / "out"), top_k=None)
    wave, rate = soundfile.read(file, dtype="float32")
    assert rate == 22_050, "another one again"
    said = classify({"array": np.asarray(wave[:12_000]), "sampling_rate": RATE})
    assert sum(item["score"] for item in said) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("seconds", "fits"),
    [
        (5, {"wav2vec2": True, "whisper": True, "audio-spectrogram-transformer": True}),
        (10, {"wav2vec2": True, "whisper": True, "audio-spectrogram-transformer": True}),
        (30, {"wav2vec2": True, "whisper": True, "audio-spectrogram-transformer": False}),
    ],
)
def test_segments_are_as_long_as_a_model_can_hear(
    seconds: int, fits: dict[str, bool], tmp_path: Path
) -> None:
    """AST's positions end at 10.24 s; a crop of that length is what the error says."""
    for family, is_heard in fits.items():
        limits = {"max_length": 1024, "max_source_positions": 1500}
        known = {k: v for k, v in limits.items() if (k == "max_length") == ("spectro" in family)}
        name = write(tmp_path, family, **known)
        samples = seconds * 16_000
        if is_heard:
            build_tiny(name, GENRES, segment_samples=samples)
            continue
        with pytest.raises(UserError, match=r"got 30 s, .*10\.2.*\n.*--crop-s 10$"):
            build_tiny(name, GENRES, segment_samples=samples)
        build_tiny(name, GENRES, segment_samples=160_000, crop_of=samples)


@pytest.mark.slow
@pytest.mark.grid
def test_half_a_minute_is_packed_cropped_and_judged(tiny_model: Path, tmp_path: Path) -> None:
    write_tracks(tmp_path / "tracks", duration_s=30.0)
    own, run = tmp_path / "shards", tmp_path / "run"
    shard.run(shard_config(tmp_path / "tracks", own, segment_s=30.0, hop_s=30.0))
    settings = config(own, tiny_model, run, loss="ce", epochs=2.0, global_batch=6)
    train_on(1, replace(settings, data=replace(settings.data, crop_s=5.0)))
    assert len(losses(run)) == 2
    run_ranks(1, evaluate.run, EvaluateConfig(run=run, batch=2))
    assert len((run / "predictions" / "test.jsonl").read_text().splitlines()) == 6
