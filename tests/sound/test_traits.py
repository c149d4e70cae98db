"""Traits of waves: each hears what it is for, at any rate, and not what another one is for."""

import numpy as np
import pytest
import torch
from scipy import signal

from mgc_dist.models.backbone import LogMel
from mgc_dist.sound import traits
from mgc_dist.sound.traits import FAMILIES

RATES = (8_000, 16_000, 22_050, 44_100)


def noise(rate: int, rows: int = 3) -> np.ndarray:
    """Pink-ish noise at -20 dB, float64 [rows, 2 s]."""
    wave = np.random.default_rng(0).standard_normal((rows, 2 * rate))
    wave = signal.lfilter([1, 0.3], [1, -0.6], wave)
    return 0.1 * wave / wave.std()


def traits_of(name: str, wave: np.ndarray, rate: int) -> dict[str, float]:
    """Mean over the rows of each trait, by its name."""
    taken = torch.from_numpy(np.clip(np.rint(32768 * wave), -32768, 32767).astype(np.int16))
    found = FAMILIES[name].of(traits.hear(taken, rate)).mean(dim=0)
    return dict(zip(FAMILIES[name].columns(rate), found.tolist(), strict=True))


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_is_a_line_in_its_band_and_changes_no_other_family(rate: int) -> None:
    hz = 0.3 * rate
    time_s = np.arange(2 * rate) / rate
    wave = noise(rate)
    toned = wave + 0.03 * np.sin(2 * np.pi * hz * time_s)
    before, after = traits_of("lines", wave, rate), traits_of("lines", toned, rate)
    largest = max(after, key=lambda name: after[name] - before[name])
    low, high = (float(word.replace(",", "")) for word in largest.split()[2:5:2])
    assert low - 1 <= hz <= high + 1
    assert after[largest] - before[largest] > 10
    assert sum(after.values()) - after[largest] < 5
    for name in FAMILIES.keys() - {"lines"}:
        one, two = traits_of(name, wave, rate), traits_of(name, toned, rate)
        assert max(abs(one[key] - two[key]) for key in one) < 0.5, name


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("mains", [50, 60])
def test_hum_is_told_by_its_mains(rate: int, mains: int) -> None:
    time_s = np.arange(2 * rate) / rate
    hum = sum(0.05 * np.sin(2 * np.pi * n * mains * time_s) for n in (1, 2, 3))
    found = traits_of("lines", noise(rate) + hum, rate)
    here, there = found[f"hum of {mains} Hz"], found[f"hum of {110 - mains} Hz"]
    assert here > there + 3


@pytest.mark.parametrize("rate", RATES)
def test_the_end_of_the_spectrum_is_where_the_filter_is(rate: int) -> None:
    hz = 0.35 * rate
    stages = signal.cheby2(12, 60, hz, fs=rate, output="sos")
    found = traits_of("bandwidth", signal.sosfilt(stages, noise(rate)), rate)
    ends = {name: value for name, value in found.items() if name.startswith("end")}
    near = {float(name.split()[2].replace(",", "")): value for name, value in ends.items()}
    assert sum(near.values()) == pytest.approx(1, abs=0.01)
    assert sum(at * value for at, value in near.items()) == pytest.approx(hz, abs=rate / 60)
    whole = traits_of("bandwidth", noise(rate), rate)
    assert sum(value for name, value in whole.items() if name.startswith("end")) < 0.1


@pytest.mark.parametrize("rate", RATES)
def test_the_slope_is_that_of_a_filter_that_tilts(rate: int) -> None:
    wave = noise(rate)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(wave.shape[1], 1 / rate), 60) / 1000)
    tilted = np.fft.irfft(np.fft.rfft(wave) * 10 ** (-4 * octaves / 20), wave.shape[1])
    change = traits_of("tilt", 0.3 * tilted, rate)["slope"] - traits_of("tilt", wave, rate)["slope"]
    assert change == pytest.approx(-4, abs=0.3)


def test_level_clipping_offset_silence_and_hiss() -> None:
    rate, wave = 16_000, noise(16_000)
    level = traits_of("level", wave, rate)
    assert level["level"] == pytest.approx(-20, abs=0.1)
    half = traits_of("level", wave / 2, rate)
    assert half["level"] == pytest.approx(level["level"] - 6.02, abs=0.1)
    assert half["peaks over it"] == pytest.approx(level["peaks over it"], abs=0.05)

    cut = np.clip(wave, -0.15, 0.15)
    assert (
        traits_of("clipping", cut, rate)["flat tops"]
        > traits_of("clipping", wave, rate)["flat tops"] + 2
    )
    assert traits_of("level", cut, rate)["peaks over it"] < level["peaks over it"] - 2
    assert traits_of("clipping", 30 * wave, rate)["at full scale"] > -1

    assert traits_of("offset", wave, rate)["its size"] == pytest.approx(0, abs=0.1)
    moved = traits_of("offset", wave + 0.05, rate)
    assert moved["offset"] > 0.5
    assert traits_of("offset", wave - 0.05, rate)["offset"] == pytest.approx(
        -moved["offset"], abs=0.5
    )

    gapped = wave.copy()
    gapped[:, rate // 2 : rate] = 0
    assert traits_of("silence", gapped, rate) == {
        "frames of zeros": pytest.approx(0.25),
        "frames below -60 dB": pytest.approx(0.25),
    }
    beats = wave * (np.arange(2 * rate) // 1600 % 4 == 0)
    quiet, loud = (traits_of("floor", beats + hiss * noise(rate), rate) for hiss in (0.001, 0.03))
    assert all(loud[name] > quiet[name] + 20 for name in quiet)


def test_quantiles_are_torchs_where_torch_takes_them() -> None:
    x, shares = torch.randn(3, 5, 14), (0.0, 0.1, 0.5, 0.75, 1.0)
    expected = torch.quantile(x, torch.tensor(shares), dim=2)
    torch.testing.assert_close(traits._quantiles(x, shares, 2), expected)


@pytest.mark.parametrize(("samples", "rate"), [(400, 4_000), (400, 192_000), (24_000, 8_000)])
@pytest.mark.parametrize("size", [0, 1, 12_000])
def test_any_wave_has_finite_traits_under_their_names(samples: int, rate: int, size: int) -> None:
    wave = np.random.default_rng(1).integers(-size, size + 1, (2, samples)).astype(np.int16)
    for name, family in FAMILIES.items():
        module = traits.Traits(name, rate)
        found = module(torch.from_numpy(wave))
        assert found.shape == (2, 1, module.width) == (2, 1, len(family.columns(rate)))
        assert torch.isfinite(found).all(), name
        assert len(set(family.columns(rate))) == module.width


def test_the_probe_begins_with_the_means_of_the_log_mel_bias_model() -> None:
    wave = torch.from_numpy((32768 * noise(16_000)).astype(np.int16))
    found = traits.Probe(16_000)(wave)
    torch.testing.assert_close(found[:, :40], LogMel(16_000)(wave)[:, 0], atol=1e-3, rtol=0)
