"""Transformations of waves that do not change a genre, each at several strengths.

Each is a pure function of (seed, row, transformation, strength). A changed wave is what a shard
would hold of it: one beyond full scale is made softer as a whole, and all are rounded to 16 bits.
Filters are factors of the spectrum, which move no phase; ends of a segment are neighbours.
A new transformation is an entry of TRANSFORMATIONS: the command, its files and pages follow.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from mgc_dist.sound import codecs
from mgc_dist.sound.augment import filtered, normal
from mgc_dist.sound.draws import mixed

FULL_SCALE = 32768.0
_MIDDLE_HZ = 1000.0
"""Where shelves turn (high ones) and a tilt is 0 dB."""
_LOW_HZ = 250.0
"""Where low shelves turn."""
_WINDOW_S = 0.064
"""Of the phase vocoder: two periods of 31 Hz."""
_LEVEL_S = 0.01
"""Of a compressor's frames."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a transformation knows besides the waves.

    Attributes:
        strength: in the transformation's unit.
        rate: in Hz.
        draw: a random number for each row, int64 [B].
        other: another segment for each row, float32 [B, T], where the transformation wants one.
    """

    strength: float
    rate: int
    draw: Tensor
    other: Tensor | None = None


Change = Callable[[Tensor, Given], Tensor]
"""float32 [B, T] within -1 to 1 -> [B, T]."""


@dataclass(frozen=True, kw_only=True)
class Transformation:
    """An entry.

    Attributes:
        unit: of its strengths; "" where they are shares.
        strengths: that are tried.
        about: what it does, in words.
        change: does it.
        wants_other: whether it needs another segment of the same split for each row.
    """

    unit: str
    strengths: tuple[float, ...]
    about: str
    change: Change
    wants_other: bool = False


def transformed(
    name: str,
    strength: float,
    wave: Tensor,
    row: Tensor,
    *,
    rate: int,
    seed: int,
    other: Tensor | None = None,
) -> Tensor:
    """Change segments: int16 [B, T] -> int16 [B, T].

    Args:
        name: of TRANSFORMATIONS.
        strength: in its unit.
        wave: of the segments.
        row: their numbers, int64 [B] on the same device; -1 for padding.
        rate: in Hz.
        seed: of the exam.
        other: segments int16 [B, T], where the transformation wants others.
    """
    stream = xxhash.xxh32_intdigest(name.encode())
    given = Given(
        strength=strength,
        rate=rate,
        draw=mixed(mixed(row, seed), stream),
        other=None if other is None else other.float() / FULL_SCALE,
    )
    return quantised(TRANSFORMATIONS[name].change(wave.float() / FULL_SCALE, given))


def quantised(wave: Tensor) -> Tensor:
    """Float [B, T] -> int16 [B, T]: rows beyond full scale are made softer, none is clipped."""
    most = (FULL_SCALE - 1) / FULL_SCALE
    peak = wave.abs().amax(dim=1, keepdim=True)  # [B, 1]
    softer = torch.where(peak > 1, most / peak.clamp(min=1), torch.ones_like(peak))
    whole = (wave * softer * FULL_SCALE).round()
    return whole.clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16)


def _gain(x: Tensor, given: Given) -> Tensor:
    return x * 10 ** (given.strength / 20)


def _polarity(x: Tensor, given: Given) -> Tensor:
    return -x if given.strength else x


def _offset(x: Tensor, given: Given) -> Tensor:
    return x + given.strength


def _bits(x: Tensor, given: Given) -> Tensor:
    steps = 2.0 ** (given.strength - 1)
    found: Tensor = (x * steps).round().clamp(-steps, steps - 1) / steps
    return found


def _shift(x: Tensor, given: Given) -> Tensor:
    return x.roll(round(given.strength * given.rate), dims=1)


def _silence(x: Tensor, given: Given) -> Tensor:
    """Half of it at each end."""
    size = round(given.strength * x.shape[1] / 2)
    x = x.clone()
    x[:, :size] = 0
    x[:, x.shape[1] - size :] = 0
    return x


def _splice(x: Tensor, given: Given) -> Tensor:
    """Parts of so many seconds, in an order that is drawn; the last one may be shorter."""
    size = max(1, round(given.strength * given.rate))
    count = x.shape[1] // size
    parts = x[:, : count * size].reshape(len(x), count, size)  # [B, parts, size]
    number = torch.arange(count, device=x.device)
    order = mixed(given.draw[:, None], number).argsort(dim=1)  # [B, parts]
    parts = parts.gather(1, order[:, :, None].expand_as(parts))
    return torch.cat((parts.flatten(1), x[:, count * size :]), dim=1)


def _low_shelf(x: Tensor, given: Given) -> Tensor:
    """Of first order: |H|^2 = (f^2 + (g c)^2) / (f^2 + c^2)."""
    gain, corner = 10 ** (given.strength / 20), _LOW_HZ
    return filtered(
        x, given.rate, lambda f: ((f**2 + (gain * corner) ** 2) / (f**2 + corner**2)).sqrt()
    )


def _high_shelf(x: Tensor, given: Given) -> Tensor:
    """Of first order: |H|^2 = ((g f)^2 + c^2) / (f^2 + c^2)."""
    gain, corner = 10 ** (given.strength / 20), _MIDDLE_HZ
    return filtered(
        x, given.rate, lambda f: (((gain * f) ** 2 + corner**2) / (f**2 + corner**2)).sqrt()
    )


def _tilt(x: Tensor, given: Given) -> Tensor:
    """Decibels an octave; below 50 Hz as at 50 Hz."""
    power = given.strength / (20 * math.log10(2))
    return filtered(x, given.rate, lambda f: (f.clamp(min=50) / _MIDDLE_HZ) ** power)


def _low_pass(x: Tensor, given: Given) -> Tensor:
    """Butterworth of fourth order."""
    return filtered(x, given.rate, lambda f: (1 + (f / given.strength) ** 8).rsqrt())


def _high_pass(x: Tensor, given: Given) -> Tensor:
    """Butterworth of fourth order."""
    return filtered(x, given.rate, lambda f: (1 + (given.strength / f) ** 8).rsqrt())


def _octave(x: Tensor, given: Given, *, inside: bool = True) -> Tensor:
    """What lies within an octave around the strength, or outside of it."""
    low, high = given.strength / math.sqrt(2), given.strength * math.sqrt(2)
    return filtered(x, given.rate, lambda f: (((f >= low) & (f < high)) == inside).to(x.dtype))


def _band_stop(x: Tensor, given: Given) -> Tensor:
    return _octave(x, given, inside=False)


def _band_noise(x: Tensor, given: Given) -> Tensor:
    """Noise in place of a band, of the power that the band had in each row."""
    return _replaced(x, _octave(x, given), _octave(normal(given.draw, x.shape[1]), given))


def _band_swap(x: Tensor, given: Given) -> Tensor:
    """Another segment's band in place of a band, of the power that it had."""
    assert given.other is not None
    inside, theirs = _octave(torch.cat((x, given.other)), given).chunk(2)
    return _replaced(x, inside, theirs)


def _replaced(x: Tensor, band: Tensor, other: Tensor) -> Tensor:
    """Another band in place of a row's own, of the power of that."""
    return x - band + other * (_level(band) / _level(other).clamp(min=1e-12))


def _level(x: Tensor) -> Tensor:
    """Root mean square of each row, [B, 1]."""
    return x.square().mean(dim=1, keepdim=True).sqrt()


def _noise(x: Tensor, given: Given) -> Tensor:
    """White, so many dB below the row."""
    return x + _level(x) * 10 ** (-given.strength / 20) * normal(given.draw, x.shape[1])


def _hum(x: Tensor, given: Given) -> Tensor:
    """50 Hz with 100 and 150 Hz at a half and a quarter of it, so many dB below the row."""
    time_s = torch.arange(x.shape[1], device=x.device) / given.rate
    waves = [2.0**-k * (2 * math.pi * 50 * (k + 1) * time_s).sin() for k in range(3)]
    tone = torch.stack(waves).sum(dim=0)[None]  # [1, T]
    return x + _level(x) * 10 ** (-given.strength / 20) * tone / _level(tone)


def _clipping(x: Tensor, given: Given) -> Tensor:
    limit = x.abs().amax(dim=1, keepdim=True) * 10 ** (-given.strength / 20)
    return torch.minimum(torch.maximum(x, -limit), limit)


def _compression(x: Tensor, given: Given) -> Tensor:
    """What is louder than 10 dB below the row's level exceeds that by 1 / strength of its dB.

    The level is that of 10 ms, averaged over 50 ms; the row keeps its own.
    """
    size = max(1, round(_LEVEL_S * given.rate))
    power = F.avg_pool1d(x.square()[:, None], size, ceil_mode=True)  # [B, 1, frames]
    power = F.avg_pool1d(power, 5, stride=1, padding=2, count_include_pad=False)
    level_db = 10 * power.clamp(min=1e-12).log10()
    knee_db = 20 * _level(x).clamp(min=1e-6).log10()[:, :, None] - 10
    gain_db = (level_db - knee_db).clamp(min=0) * (1 / given.strength - 1)
    gain_db = F.interpolate(gain_db, x.shape[1], mode="linear")[:, 0]  # [B, T]
    found = x * 10 ** (gain_db / 20)
    return found * (_level(x) / _level(found).clamp(min=1e-12))


def _reverb(x: Tensor, given: Given) -> Tensor:
    """A room that falls by 60 dB in so many seconds, as loud as the sound itself."""
    if not given.strength:
        return x
    size = min(x.shape[1], round(given.strength * given.rate))
    time_s = torch.arange(size, device=x.device) / given.rate
    tail = normal(given.draw, size) * 10 ** (-3 * time_s / given.strength)  # [B, size]
    tail = tail / tail.square().sum(dim=1, keepdim=True).sqrt()
    whole = x.shape[1] + size
    spectrum = torch.fft.rfft(x, whole) * torch.fft.rfft(tail, whole)
    late: Tensor = torch.fft.irfft(spectrum, n=whole)[:, : x.shape[1]]
    return x + late


def _speed(x: Tensor, given: Given) -> Tensor:
    """So many percent faster, pitch too; what then lacks at the end comes from the beginning."""
    return _filled(stretched(x, 1 / (1 + given.strength / 100)), x.shape[1])


def _tempo(x: Tensor, given: Given) -> Tensor:
    """So many percent faster at the same pitch."""
    return _filled(vocoded(x, 1 + given.strength / 100, given.rate), x.shape[1])


def _pitch(x: Tensor, given: Given) -> Tensor:
    """So many percent higher at the same tempo."""
    ratio = 1 + given.strength / 100
    return _filled(stretched(vocoded(x, 1 / ratio, given.rate), 1 / ratio), x.shape[1])


def _filled(x: Tensor, size: int) -> Tensor:
    return torch.cat((x, x[:, : max(0, size - x.shape[1])]), dim=1)[:, :size]


def stretched(x: Tensor, factor: float) -> Tensor:
    """The same wave over so many times as many samples: [B, T] -> [B, round(factor T)]."""
    size, half = round(factor * x.shape[1]), x.shape[1] // 2
    spectrum = torch.fft.rfft(x)
    if size > x.shape[1] == 2 * half:
        spectrum[:, half] /= 2  # the highest frequency now stands on both sides
    found: Tensor = torch.fft.irfft(spectrum, n=size) * (size / x.shape[1])
    return found


def vocoded(x: Tensor, ratio: float, rate: int) -> Tensor:
    """Faster by a ratio at the same pitch: [B, T] -> [B, round(T / ratio)], a phase vocoder.

    Source: Flanagan and Golden, Bell System Technical Journal 45(9), 1966.
    """
    if ratio == 1:
        return x
    size = 2 ** round(math.log2(_WINDOW_S * rate))
    hop, window = size // 4, torch.hann_window(size, device=x.device)
    spectrum = torch.stft(x, size, hop, window=window, return_complex=True)  # [B, bins, frames]
    steps = torch.arange(0, spectrum.shape[2], ratio, device=x.device)
    at = steps.long()
    padded = F.pad(spectrum, (0, 2))
    first, second = padded[:, :, at], padded[:, :, at + 1]
    expected = (2 * math.pi * hop / size) * torch.arange(size // 2 + 1, device=x.device)
    turn = second.angle() - first.angle() - expected[:, None]
    turn = turn - 2 * math.pi * (turn / (2 * math.pi)).round() + expected[:, None]
    start = first.angle()[:, :, :1]
    phase = torch.cat((start, start + turn[:, :, :-1].double().cumsum(dim=2)), dim=2)
    share = steps - at
    size_of = first.abs() * (1 - share) + second.abs() * share
    built = torch.polar(size_of.double(), phase.double()).to(spectrum.dtype)
    length = round(x.shape[1] / ratio)
    return torch.istft(built, size, hop, window=window, length=length)


def _on_cpu(change: Callable[[NDArray[np.float32], float, int], NDArray[np.float32]]) -> Change:
    def each(x: Tensor, given: Given) -> Tensor:
        def one(row: NDArray[np.float32]) -> NDArray[np.float32]:
            return change(row, given.strength, given.rate)

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            rows = list(threads.map(one, x.cpu().numpy()))
        return torch.from_numpy(np.stack(rows)).to(x.device)

    return each


def _resample(wave: NDArray[np.float32], share: float, rate: int) -> NDArray[np.float32]:
    other = round(share * rate)
    there = codecs.resampled(wave, rate, other)
    return codecs.fitted(codecs.resampled(there, other, rate), len(wave))


_TURNS = (-5.0, 1.0, 2.0, 5.0)
_OCTAVES_HZ = (250, 500, 1000, 2000, 4000, 5600)

TRANSFORMATIONS: dict[str, Transformation] = {
    "gain": Transformation(unit="dB", strengths=(-6, -12, -24), about="softer", change=_gain),
    "polarity": Transformation(
        unit="", strengths=(1,), about="the wave turned over, which nobody hears", change=_polarity
    ),
    "offset": Transformation(
        unit="", strengths=(0.01, 0.05), about="a constant of full scale added", change=_offset
    ),
    "bits": Transformation(
        unit="bits", strengths=(12, 10, 8), about="rounded to fewer bits", change=_bits
    ),
    "shift": Transformation(
        unit="s", strengths=(0.05, 0.25, 1), about="a later start, in a circle", change=_shift
    ),
    "silence": Transformation(
        unit="", strengths=(0.05, 0.1, 0.2), about="silence at the ends", change=_silence
    ),
    "splice": Transformation(
        unit="s", strengths=(1, 0.5, 0.25), about="parts in another order", change=_splice
    ),
    "resample": Transformation(
        unit="x rate",
        strengths=(1.378125, 0.75, 0.5),
        about="to another sample rate and back",
        change=_on_cpu(_resample),
    ),
    "mp3": Transformation(
        unit="kbit/s", strengths=(64, 32, 16), about="MP3 and back", change=_on_cpu(codecs.mp3)
    ),
    "opus": Transformation(
        unit="kbit/s", strengths=(32, 16, 8), about="Opus and back", change=_on_cpu(codecs.opus)
    ),
    "vorbis": Transformation(
        unit="quality",
        strengths=(0.5, 0.2, 0),
        about="Vorbis and back",
        change=_on_cpu(codecs.vorbis),
    ),
    "low-shelf": Transformation(
        unit="dB", strengths=(6, -6, -12), about="bass, below 250 Hz", change=_low_shelf
    ),
    "high-shelf": Transformation(
        unit="dB", strengths=(6, -6, -12), about="treble, above 1 kHz", change=_high_shelf
    ),
    "tilt": Transformation(
        unit="dB/octave", strengths=(-3, -1.5, 1.5, 3), about="EQ around 1 kHz", change=_tilt
    ),
    "low-pass": Transformation(
        unit="Hz", strengths=(6000, 4000, 2000), about="24 dB an octave", change=_low_pass
    ),
    "high-pass": Transformation(
        unit="Hz", strengths=(100, 300, 1000), about="24 dB an octave", change=_high_pass
    ),
    "band-stop": Transformation(
        unit="Hz",
        strengths=_OCTAVES_HZ,
        about="nothing left of an octave",
        change=_band_stop,
    ),
    "band-noise": Transformation(
        unit="Hz",
        strengths=_OCTAVES_HZ,
        about="an octave filled by noise of its level",
        change=_band_noise,
    ),
    "band-swap": Transformation(
        unit="Hz",
        strengths=_OCTAVES_HZ,
        about="another segment's octave, as loud: what is lost was relied upon",
        change=_band_swap,
        wants_other=True,
    ),
    "noise": Transformation(
        unit="dB below", strengths=(30, 20, 10), about="white noise", change=_noise
    ),
    "hum": Transformation(
        unit="dB below", strengths=(30, 20, 10), about="50 Hz and its overtones", change=_hum
    ),
    "clipping": Transformation(
        unit="dB of peak", strengths=(3, 6, 12), about="peaks cut off", change=_clipping
    ),
    "compression": Transformation(
        unit=":1", strengths=(2, 4, 8), about="loud parts softer", change=_compression
    ),
    "reverb": Transformation(unit="s", strengths=(0.1, 0.2, 0.4), about="a room", change=_reverb),
    "speed": Transformation(
        unit="%", strengths=_TURNS, about="faster, and as much higher", change=_speed
    ),
    "tempo": Transformation(
        unit="%", strengths=_TURNS, about="faster at the same pitch", change=_tempo
    ),
    "pitch": Transformation(
        unit="%", strengths=_TURNS, about="higher at the same tempo", change=_pitch
    ),
}
"""By name, 27 of them."""
