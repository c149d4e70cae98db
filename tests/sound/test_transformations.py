"""Each transformation against another library or its defining property, by row and seed."""

import numpy as np
import pytest
import torch
from scipy import signal

from mgc_dist.sound.transformations import TRANSFORMATIONS, quantised, transformed

RATE, SIZE = 16_000, 8_000
NOTHING = {
    "gain": 0,
    "polarity": 0,
    "offset": 0,
    "bits": 16,
    "shift": 0,
    "silence": 0,
    "splice": SIZE / RATE,
    "resample": 1,
    "low-shelf": 0,
    "high-shelf": 0,
    "tilt": 0,
    "low-pass": 1e9,
    "high-pass": 1e-9,
    "band-stop": 1e-9,
    "band-noise": 1e-9,
    "band-swap": 1e-9,
    "noise": 300,
    "hum": 300,
    "clipping": 0,
    "compression": 1,
    "reverb": 0,
    "speed": 0,
    "tempo": 0,
    "pitch": 0,
}
"""A strength of each that changes nothing; a codec has none."""
CODECS = ("mp3", "opus", "vorbis")


def changed(name: str, strength: float, wave: np.ndarray, seed: int = 0) -> np.ndarray:
    """Float [B, T] within -1 to 1, through int16 -> float64 [B, T]."""
    given = torch.from_numpy(np.rint(wave * 32768).astype(np.int16))
    row = torch.arange(len(wave))
    other = given.flip(0)
    found = transformed(name, strength, given, row, rate=RATE, seed=seed, other=other)
    assert found.dtype == torch.int16
    return found.numpy() / 32768


def coarse(wave: np.ndarray) -> np.ndarray:
    return np.rint(wave * 32768) / 32768


@pytest.fixture
def wave() -> np.ndarray:
    """Four rows of coloured noise without a mean, as 16 bits hold them."""
    noise = np.random.default_rng(0).normal(size=(4, SIZE))
    found = 0.1 * signal.lfilter([1], [1, -0.7], noise)
    return coarse(found - found.mean(axis=1, keepdims=True))


@pytest.fixture
def dark() -> np.ndarray:
    """A row that falls by 6 dB an octave, as music does."""
    noise = np.random.default_rng(1).normal(size=(1, SIZE))
    return coarse(0.03 * signal.lfilter([1], [1, -0.97], noise))


def sine(hz: float, level: float = 0.5) -> np.ndarray:
    return coarse(level * np.sin(2 * np.pi * hz * np.arange(SIZE) / RATE))[None]


def peak_hz(wave: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(wave[0] * np.hanning(SIZE), 16 * SIZE))
    return spectrum.argmax() * RATE / (16 * SIZE)


def level(wave: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(wave).mean(axis=-1))


def response(name: str, strength: float, hz: np.ndarray) -> np.ndarray:
    """What a filter makes of sines that fit the segment, as a factor."""
    waves = np.concatenate([sine(each, 0.25) for each in hz])
    return level(changed(name, strength, waves)) / level(waves)


def test_there_are_transformations_of_every_kind() -> None:
    assert len(TRANSFORMATIONS) >= 20
    assert set(NOTHING) | set(CODECS) == set(TRANSFORMATIONS)
    for each in TRANSFORMATIONS.values():
        assert len(set(each.strengths)) == len(each.strengths) > 0


@pytest.mark.parametrize("name", NOTHING)
def test_a_strength_of_nothing_changes_no_sample(name: str, wave: np.ndarray) -> None:
    assert changed(name, NOTHING[name], wave) == pytest.approx(wave, abs=1.01 / 32768)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_strengths_change_rows_by_seed_and_row_alone(name: str, wave: np.ndarray) -> None:
    long = np.concatenate([*np.roll([wave], 1, axis=1), wave[::-1], *3 * [wave]], axis=1)  # 2.5 s
    given = torch.from_numpy(np.rint(long * 32768).astype(np.int16))
    row = torch.tensor([7, 3, 9, 4])
    how = {"rate": RATE, "seed": 1}
    for strength in TRANSFORMATIONS[name].strengths:
        whole = transformed(name, strength, given, row, other=given.roll(1, 0), **how)
        again = transformed(name, strength, given, row, other=given.roll(1, 0), **how)
        assert torch.equal(whole, again)
        assert not torch.equal(whole, given)
        others = given.roll(1, 0).flip(0)
        turned = transformed(name, strength, given.flip(0), row.flip(0), other=others, **how)
        assert (turned.flip(0).int() - whole.int()).abs().max() <= 1


def test_drawn_numbers_follow_the_seed(wave: np.ndarray) -> None:
    for name in ("noise", "splice", "band-noise", "reverb"):
        strength = TRANSFORMATIONS[name].strengths[-1]
        assert (changed(name, strength, wave, 0) != changed(name, strength, wave, 1)).any(), name


def test_a_row_beyond_full_scale_is_softer_as_a_whole() -> None:
    wave = torch.tensor([[0.5, -2.0, 1.0], [0.5, -0.25, 0.1]])
    found = quantised(wave).numpy() / 32768
    assert found == pytest.approx(np.array([[0.25, -1, 0.5], [0.5, -0.25, 0.1]]), abs=1e-4)


def test_simple_ones_are_numpys(wave: np.ndarray) -> None:
    step = 1.01 / 32768
    assert changed("gain", -12, wave) == pytest.approx(wave * 10**-0.6, abs=step)
    assert (changed("polarity", 1, wave) == -wave).all()
    assert changed("offset", 0.05, wave) == pytest.approx(wave + 0.05, abs=step)
    assert (changed("shift", 0.25, wave) == np.roll(wave, 4000, axis=1)).all()
    assert changed("bits", 8, wave) == pytest.approx(np.rint(wave * 128) / 128, abs=1e-7)
    limit = np.abs(wave).max(axis=1, keepdims=True) * 10**-0.3
    assert changed("clipping", 6, wave) == pytest.approx(np.clip(wave, -limit, limit), abs=step)
    found = changed("silence", 0.2, wave)
    assert not found[:, :800].any()
    assert not found[:, -800:].any()
    assert (found[:, 800:-800] == wave[:, 800:-800]).all()


def test_splice_keeps_every_part_whole(wave: np.ndarray) -> None:
    found = changed("splice", 0.05, wave).reshape(4, 10, 800)
    parts = wave.reshape(4, 10, 800)
    orders = [
        [int(np.flatnonzero((old == part).all(axis=1))[0]) for part in new]
        for old, new in zip(parts, found, strict=True)
    ]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(("name", "kind"), [("low-pass", "low"), ("high-pass", "high")])
def test_passes_are_scipys_butterworth(name: str, kind: str) -> None:
    hz = np.array([200.0, 500, 1000, 2000, 3000])
    b, a = signal.butter(4, 1000, kind, analog=True)
    expected = np.abs(signal.freqs(b, a, hz)[1])
    assert response(name, 1000, hz) == pytest.approx(expected, abs=2e-4)


def test_shelves_are_scipys_filters_of_first_order() -> None:
    hz, gain = np.array([20.0, 100, 250, 1000, 4000]), 10 ** (-12 / 20)
    low = np.abs(signal.freqs([1, gain * 250], [1, 250], hz)[1])
    assert response("low-shelf", -12, hz) == pytest.approx(low, abs=2e-4)
    high = np.abs(signal.freqs([gain, 1000], [1, 1000], hz)[1])
    assert response("high-shelf", -12, hz) == pytest.approx(high, abs=2e-4)


def test_a_tilt_is_so_many_decibels_an_octave() -> None:
    found = 20 * np.log10(response("tilt", -3, np.array([500.0, 1000, 2000, 4000])))
    assert found == pytest.approx([3, 0, -3, -6], abs=0.02)


def octave_of(wave: np.ndarray, middle: float) -> tuple[np.ndarray, np.ndarray]:
    spectrum, hz = np.fft.rfft(wave), np.fft.rfftfreq(SIZE, 1 / RATE)
    inside = (hz >= middle / 2**0.5) & (hz < middle * 2**0.5)
    return spectrum[:, inside], spectrum[:, ~inside]


def test_a_stopped_band_is_empty_and_a_filled_one_as_loud(wave: np.ndarray) -> None:
    inside, outside = octave_of(wave, 1000)
    stopped = octave_of(changed("band-stop", 1000, wave), 1000)
    filled = octave_of(changed("band-noise", 1000, wave), 1000)
    assert np.abs(stopped[0]).max() < 0.01
    for _, rest in (stopped, filled):
        assert rest == pytest.approx(outside, abs=0.01)
    power, of_noise = (np.square(np.abs(each)).sum(axis=1) for each in (inside, filled[0]))
    assert of_noise == pytest.approx(power, rel=1e-3)
    alike = np.abs((inside * filled[0].conj()).sum(axis=1)) / power
    assert alike.max() < 0.2


def test_a_swapped_band_is_another_rows_as_loud(wave: np.ndarray) -> None:
    inside, outside = octave_of(wave, 1000)
    found, rest = octave_of(changed("band-swap", 1000, wave), 1000)
    assert rest == pytest.approx(outside, abs=0.01)
    power, swapped = (np.square(np.abs(each)).sum(axis=1) for each in (inside, found))
    assert swapped == pytest.approx(power, rel=1e-3)
    theirs = inside[::-1]
    alike = np.abs((theirs * found.conj()).sum(axis=1))
    assert alike == pytest.approx(np.linalg.norm(theirs, axis=1) * swapped**0.5, rel=1e-3)


def test_noise_and_hum_are_so_far_below(wave: np.ndarray) -> None:
    for name in ("noise", "hum"):
        added = changed(name, 10, wave) - wave
        assert 20 * np.log10(level(wave) / level(added)) == pytest.approx(10, abs=0.2)
        spectrum = np.abs(np.fft.rfft(added))
        flat = np.exp(np.log(spectrum + 1e-9).mean(axis=1)) / spectrum.mean(axis=1)
        assert (flat > 0.5).all() if name == "noise" else (flat < 0.2).all()
    lines = np.abs(np.fft.rfft(changed("hum", 10, wave) - wave)[0])
    assert lines.argsort()[::-1][:3].tolist() == [25, 50, 75]  # of 2 Hz
    assert lines[[50, 75]] / lines[25] == pytest.approx([0.5, 0.25], rel=0.02)


def test_compression_brings_loud_and_soft_together() -> None:
    loud, soft = sine(400, 0.5)[:, : SIZE // 2], sine(400, 0.1)[:, : SIZE // 2]
    wave = np.concatenate((loud, soft), axis=1)

    def gap_db(of: np.ndarray) -> float:
        parts = level(of[:, 500:3500]), level(of[:, 4500:7500])
        return float(20 * np.log10(parts[0] / parts[1])[0])

    found = [gap_db(changed("compression", ratio, wave)) for ratio in (1, 2, 4, 8)]
    # the row's level is -11.87 dB, the knee 10 below; the parts have -9.03 and -23.01
    over, under = -9.03 + 21.87, -21.87 + 23.01
    expected = [over / ratio + under for ratio in (1, 2, 4, 8)]
    assert found == pytest.approx(expected, abs=0.05)
    assert level(changed("compression", 4, wave)) == pytest.approx(level(wave), rel=1e-3)


def test_a_room_is_a_convolution_that_dies_away(wave: np.ndarray) -> None:
    impulse = np.zeros((4, SIZE))
    impulse[:, 0] = 0.5
    tail = (changed("reverb", 0.1, impulse) - impulse) / 0.5
    power = np.square(tail).reshape(4, -1, 160).mean(axis=(0, 2))  # of 10 ms
    falls = np.polyfit(np.arange(7) * 0.01, 10 * np.log10(power[:7]), 1)[0]
    assert falls == pytest.approx(-60 / 0.1, rel=0.1)
    assert np.square(tail).sum(axis=1) == pytest.approx(np.ones(4), rel=0.01)
    small = 0.3 * wave
    expected = small + signal.fftconvolve(small, tail, axes=1)[:, :SIZE]
    assert changed("reverb", 0.1, small) == pytest.approx(expected, abs=0.01)


def test_speed_is_scipys_resampling(wave: np.ndarray) -> None:
    found = changed("speed", 5, 0.5 * wave)
    expected = signal.resample(0.5 * wave, 7619, axis=1)
    assert found[:, :7619] == pytest.approx(expected, abs=1e-4)
    assert found[:, 7619:] == pytest.approx(expected[:, :381], abs=1e-4)
    slow = signal.resample(0.5 * wave, 8421, axis=1)[:, :SIZE]
    assert changed("speed", -5, 0.5 * wave) == pytest.approx(slow, abs=1e-4)


def test_tempo_is_torchaudios_phase_vocoder(wave: np.ndarray) -> None:
    functional = pytest.importorskip("torchaudio.functional", exc_type=ImportError)
    given, window = torch.from_numpy(0.5 * wave), torch.hann_window(1024, dtype=torch.float64)
    spectrum = torch.stft(given, 1024, 256, window=window, return_complex=True)
    advance = torch.linspace(0, np.pi * 256, 513, dtype=torch.float64)[:, None]
    turned = functional.phase_vocoder(spectrum, 1.05, advance)
    expected = torch.istft(turned, 1024, 256, window=window, length=7619).numpy()
    assert changed("tempo", 5, 0.5 * wave)[:, :7619] == pytest.approx(expected, abs=2e-3)


def test_pitch_moves_and_tempo_does_not() -> None:
    for percent in (-5, 1, 5):
        for name, hz in (("speed", 1), ("pitch", 1), ("tempo", 0)):
            found = peak_hz(changed(name, percent, sine(500)))
            assert found == pytest.approx(500 * (1 + hz * percent / 100), rel=0.002), name


def test_tempo_moves_what_happens_and_pitch_does_not() -> None:
    wave = sine(500, 0.01)
    wave[:, 4000:4400] = sine(500)[:, :400]

    def at(of: np.ndarray) -> int:
        return int(np.abs(of[0]).argmax())

    for name, place in (("pitch", 4200), ("tempo", 4000), ("speed", 4000)):
        assert at(changed(name, 5, wave)) == pytest.approx(place, abs=210), name


def test_a_lower_rate_keeps_what_it_can_hold() -> None:
    kept, gone = sine(3000), sine(5000)
    assert changed("resample", 0.5, kept)[:, 500:-500] == pytest.approx(kept[:, 500:-500], abs=1e-3)
    assert level(changed("resample", 0.5, gone)[:, 500:-500]) < 1e-3
    assert changed("resample", 1.378125, gone)[:, 500:-500] == pytest.approx(
        gone[:, 500:-500], abs=1e-3
    )


@pytest.mark.parametrize("name", CODECS)
def test_codecs_stay_in_time_and_lose_more_at_lower_rates(name: str, dark: np.ndarray) -> None:
    ratios = []
    for strength in TRANSFORMATIONS[name].strengths:
        found = changed(name, strength, dark)
        lag = signal.correlate(found[0], dark[0]).argmax() - (SIZE - 1)
        assert abs(lag) <= 2  # Opus at 8 kbit/s is 0.1 ms late
        ratios.append(float(level(dark)[0] / level(found - dark)[0]))
    assert ratios[0] > ratios[-1] > 0.9
    assert ratios[0] > 2


@pytest.mark.parametrize("rate", [11_025, 22_050, 44_100])
def test_codecs_take_every_rate(rate: int, dark: np.ndarray) -> None:
    given = torch.from_numpy(np.rint(dark * 32768).astype(np.int16))
    for name in CODECS:
        for strength in TRANSFORMATIONS[name].strengths[::2]:
            found = transformed(name, strength, given, torch.zeros(1).long(), rate=rate, seed=0)
            assert found.shape == given.shape
            assert np.corrcoef(found[0].numpy(), given[0].numpy())[0, 1] > 0.5
