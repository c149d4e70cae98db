"""Augmentation: each kind against another library or plain NumPy, by row, off but in training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NOISY, build_tiny, run_ranks, write_model
from harness import weights_hash
from scipy import signal
from trainings import config, losses, train_on, train_until

from mgc_dist import cli
from mgc_dist.config import AugmentConfig, TrainConfig
from mgc_dist.config.augment import KINDS
from mgc_dist.errors import UserError
from mgc_dist.sound.augment import Augment, normal

RATE = 16_000
ALL = ",".join(KINDS)


def uniform(draw: np.ndarray, stream: int) -> np.ndarray:
    """By uint64 of NumPy, in [0, 1)."""
    return (mixed(draw.astype(np.uint64), np.uint64(stream)) >> np.uint64(40)) / 2**24


def mixed(draw: np.ndarray, number: Any) -> np.ndarray:
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        x = draw * golden + number + golden
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor]:
    """64 waves of 4,000 samples and their draws."""
    rng = np.random.default_rng(0)
    wave = torch.from_numpy(0.1 * rng.normal(size=(64, 4000)).astype(np.float32))
    return wave, torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 64))


def augmented(given: tuple[torch.Tensor, torch.Tensor], kinds: str, **strengths: Any) -> Any:
    wave, draw = given
    return Augment(AugmentConfig(augment=kinds, **strengths), RATE)(wave, draw).numpy()


def test_gain_is_torchaudios(given: Any) -> None:
    functional = pytest.importorskip("torchaudio.functional", exc_type=ImportError)
    found = augmented(given, "gain", augment_gain_db=9.0)
    gains_db = 9.0 * (2 * uniform(given[1].numpy(), 4) - 1)
    for row, wave, gain_db in zip(found, given[0], gains_db, strict=True):
        assert row == pytest.approx(functional.gain(wave, gain_db).numpy(), rel=1e-5)
    assert gains_db.min() < -7 < 7 < gains_db.max()


def test_polarity_turns_half_of_the_rows(given: Any) -> None:
    found = augmented(given, "polarity")
    turned = uniform(given[1].numpy(), 5) < 0.5
    assert 20 < turned.sum() < 44
    assert (found == np.where(turned[:, None], -1, 1) * given[0].numpy()).all()


def test_shift_is_numpys_roll(given: Any) -> None:
    found = augmented(given, "shift", augment_shift_s=0.05)
    by = np.round((2 * uniform(given[1].numpy(), 6) - 1) * 800).astype(int)
    for row, wave, places in zip(found, given[0].numpy(), by, strict=True):
        assert (row == np.roll(wave, places)).all()
    assert by.min() < -600 < 600 < by.max()


def test_lowpass_has_the_response_of_scipys_butterworth(given: Any) -> None:
    found = augmented(given, "lowpass", augment_lowpass_hz=1000.0)
    cutoffs = 1000.0 * 8.0 ** uniform(given[1].numpy(), 7)
    assert 1000 <= cutoffs.min() < 1500
    assert 6000 < cutoffs.max() < 8000
    hz = np.fft.rfftfreq(4000, 1 / RATE)
    for row, wave, cutoff in zip(found, given[0].numpy(), cutoffs, strict=True):
        wave = wave.astype(np.float64)
        _, response = signal.freqs(*signal.butter(2, cutoff, analog=True), hz)
        expected = np.fft.irfft(np.fft.rfft(wave) * np.abs(response), n=4000)
        assert row == pytest.approx(expected, abs=1e-6)


def test_a_band_of_the_mel_scale_is_gone_and_all_else_is_there(given: Any) -> None:
    torchaudio = pytest.importorskip("torchaudio.functional.functional", exc_type=ImportError)
    convert = torchaudio._hz_to_mel
    found = augmented(given, "bands", augment_bands=0.3)
    at = np.array([convert(f) for f in np.fft.rfftfreq(4000, 1 / RATE)])
    draw, top = given[1].numpy(), convert(RATE / 2)
    width = uniform(draw, 10) * 0.3 * top
    start = uniform(draw, 11) * (top - width)
    sizes = []
    for row, wave, low, high in zip(found, given[0].numpy(), start, start + width, strict=True):
        spectrum, whole = np.fft.rfft(row), np.fft.rfft(wave)
        sure = np.abs(at - low) + np.abs(at - high) > high - low + 0.02  # not by rounding inside
        inside = (at > low + 0.01) & (at < high - 0.01)
        assert np.abs(spectrum[inside]).max(initial=0) < 1e-4
        assert spectrum[sure] == pytest.approx(whole[sure], abs=1e-4)
        sizes.append(inside.mean())
    assert max(sizes) > 0.2
    assert len({round(size, 3) for size in sizes}) > 20


def test_noise_is_normal_white_and_as_loud_as_it_says(given: Any) -> None:
    wave, draw = given[0].numpy(), given[1].numpy()
    bits = mixed(
        mixed(draw.astype(np.uint64), np.uint64(9))[:, None], np.arange(4000, dtype=np.uint64)
    )
    first, second = bits >> np.uint64(40), bits >> np.uint64(16) & np.uint64(2**24 - 1)
    expected = np.sqrt(-2 * np.log((first + 1) / 2**24)) * np.cos(2 * np.pi * second / 2**24)
    drawn = normal(given[1], 4000).numpy()
    assert drawn == pytest.approx(expected, abs=1e-4)
    assert drawn.mean() == pytest.approx(0, abs=0.01)
    assert drawn.std() == pytest.approx(1, abs=0.01)
    assert (np.abs(drawn) > 1.96).mean() == pytest.approx(0.05, abs=0.003)
    power = np.abs(np.fft.rfft(drawn))[:, 1:-1] ** 2
    assert power[:, :1000].mean() == pytest.approx(power[:, 1000:].mean(), rel=0.02)
    added = augmented(given, "noise", augment_noise_db=10.0) - wave
    below_db = 10.0 + 30.0 * uniform(draw, 8)
    ratio_db = 10 * np.log10((wave**2).mean(1) / (added**2).mean(1))
    assert ratio_db == pytest.approx(below_db, abs=0.3)


def test_a_row_does_not_depend_on_the_others(given: Any) -> None:
    wave, draw = given
    change = Augment(AugmentConfig(augment=ALL), RATE)
    whole = change(wave, draw)
    torch.testing.assert_close(change(wave[5:8], draw[5:8]), whole[5:8])
    torch.testing.assert_close(change(wave.flip(0), draw.flip(0)).flip(0), whole)
    assert not torch.allclose(change(wave, draw + 1), whole)


def test_it_is_for_training_only_and_off_by_default(tiny_model: Path, given: Any) -> None:
    wave, draw = (given[0] * 32767).to(torch.int16), given[1]
    plain = build_tiny(tiny_model, segment_samples=4000)
    off = build_tiny(tiny_model, segment_samples=4000, augment=Augment(AugmentConfig(), RATE))
    change = Augment(AugmentConfig(augment="shift"), RATE)
    on = build_tiny(tiny_model, segment_samples=4000, augment=change)
    with torch.no_grad():
        assert off.train()(wave, draw).equal(plain.train()(wave, draw))
        assert on.eval()(wave, draw).equal(plain.eval()(wave, draw))
        heard = (change(wave.float(), draw)).to(torch.int16)
        torch.testing.assert_close(on.train()(wave, draw), plain.train()(heard, draw))
        assert not torch.allclose(on(wave, draw), plain(wave, draw))


def changed(shards: Path, model: Path, run: Path, **changes: Any) -> TrainConfig:
    settings = config(shards, model, run, **({"loss": "ce"} | changes))
    return replace(settings, augmentation=AugmentConfig(augment=ALL))


def test_training_is_the_same_on_any_ranks_and_after_a_stop(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    alone, two, parts = (tmp_path / name for name in ("alone", "two", "parts"))
    train_on(1, changed(shards, tiny_model, alone))
    train_on(2, changed(shards, tiny_model, two))
    assert losses(two) == pytest.approx(losses(alone), rel=1e-3)
    noisy = write_model(tmp_path / "noisy.json", **NOISY)
    whole = tmp_path / "whole"
    train_on(2, changed(shards, noisy, whole))
    assert run_ranks(2, train_until, 5, changed(shards, noisy, parts)) == [0, 0]
    train_on(2, changed(shards, noisy, parts, resume="auto"))
    assert weights_hash(parts) == weights_hash(whole)
    other = changed(shards, noisy, parts, resume="auto", epochs=3.0)
    weaker = AugmentConfig(augment=ALL, augment_noise_db=30.0)
    with pytest.raises(UserError, match=r"--augment-noise-db: got 30\.0, expected 20\.0"):
        train_on(2, replace(other, augmentation=weaker))


def test_what_is_no_augmentation_is_refused(shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    for words in ("gain,pitch", "gain,gain", "", "none,gain"):
        with pytest.raises(UserError, match="--augment: got "):
            AugmentConfig(augment=words)
    with pytest.raises(UserError, match=r"--augment with --cache cnn.*\n.*or leave --augment out"):
        changed(shards, tiny_model, tmp_path, cache="cnn", freeze="feature_encoder")
    high = AugmentConfig(augment="lowpass", augment_lowpass_hz=8000.0)
    with pytest.raises(UserError, match=r"--augment-lowpass-hz 8000: .*below 8000 Hz"):
        Augment(high, RATE)
    parsed = cli.parse("train", TrainConfig, ["--augment", "polarity,gain"])
    assert parsed.augmentation.kinds == ("gain", "polarity")
