"""Traits of a segment that are not music: its level, steady lines, where the spectrum ends, ...

Each family of traits is a few numbers that tell of recording, mastering or encoding. Where a linear
model on one of them names genres, it is a shortcut that the data offer. The traits see as little
as they can of rhythm, harmony and each other: a tone is no tilt, an edge is no line.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgc_dist.sound.mel import MelSpectrogram

PREFIX = "audit:"
"""Of a family's name, where a bias model is asked for."""
_FULL_SCALE = 32768.0
_LEAST = 1e-16
"""Of a power, full scale 1: -160 dB, far below a bin of what rounding to 16 bits leaves."""
_LINES, _ENDS, _HOLES = 64, 40, 16
"""Bands of the spectrum in which each is looked for."""
_CLEAR_DB = 6.0
"""By so much, and by its own spread over time, a line has to stand above its neighbours."""
_FALL_DB = 12.0
"""A smaller fall is no end of the spectrum; one of twice as much surely is."""
_HOLE_DB = 30.0
"""So far below its mean a frequency of noise is in 0.1 % of the frames."""
_SLOPES_DB = torch.arange(-15.0, 13.0, 3.0)
"""Knots over slopes in dB per octave; synthetic music without artefacts has -9 to 0."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A batch of segments, as all families take it.

    Attributes:
        wave: float32 [B, T], full scale 1.
        sample_rate: in Hz.
        frames: of 50 ms, [B, n, samples].
        level_db: their mean power, [B, n].
        spectrum_db: power of each frequency and window, [B, bins, windows].
        hz: of each frequency, [bins].
    """

    wave: Tensor
    sample_rate: int
    frames: Tensor
    level_db: Tensor
    spectrum_db: Tensor
    hz: Tensor

    def bins(self, hertz: float) -> int:
        """How many frequencies lie within so many Hz: 1 or more, at most an eighth of all."""
        return max(1, min(round(hertz / self.hz[1].item()), len(self.hz) // 8))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of traits.

    Attributes:
        about: what it is, in words.
        columns: the names of its d traits, given the sample rate in Hz.
        of: the traits, float32 [B, d].
    """

    about: str
    columns: Callable[[int], list[str]]
    of: Callable[[Heard], Tensor]


def hear(wave: Tensor, sample_rate: int) -> Heard:
    """What all families take of a batch.

    Args:
        wave: int16 [B, T], T 400 or more.
        sample_rate: in Hz; windows are the power of two that is nearest to an eighth of a second.
    """
    x = wave.float() / _FULL_SCALE  # [B, T]
    samples = min(x.shape[1], max(16, sample_rate // 20))
    frames = x[:, : x.shape[1] // samples * samples].reshape(len(x), -1, samples)
    size = min(1 << (x.shape[1].bit_length() - 1), 1 << round(math.log2(sample_rate / 8)))
    window = torch.hann_window(size, device=x.device)
    spectrum = torch.stft(
        x, size, size // 2, window=window, center=False, return_complex=True
    )  # [B, bins, windows]
    power = spectrum.abs().square() / window.square().sum() / (size / 2)
    return Heard(
        wave=x,
        sample_rate=sample_rate,
        frames=frames,
        level_db=_db(frames.square().mean(dim=2)),
        spectrum_db=_db(power),
        hz=torch.arange(size // 2 + 1, device=x.device) * (sample_rate / size),
    )


def _db(power: Tensor) -> Tensor:
    return 10 * torch.log10(power + _LEAST)


def _hats(value: Tensor, knots: Tensor) -> Tensor:
    """Triangles over evenly spaced knots, [B] -> [B, knots]: a linear model bends at each."""
    step = (knots[1] - knots[0]).item()
    inside = value.clamp(knots[0].item(), knots[-1].item())
    return F.relu(1 - (inside[:, None] - knots.to(value.device)).abs() / step)


def _running_median(x: Tensor, half: int) -> Tensor:
    """Median of `2 half + 1` neighbours, [B, bins] -> [B, bins]."""
    padded = F.pad(x[:, None], (half, half), mode="replicate")[:, 0]
    return padded.unfold(1, 2 * half + 1, 1).median(dim=2).values


def _level(heard: Heard) -> Tensor:
    """Level, and how far peaks stand above it within frames, which rhythm leaves alone."""
    power = _db(heard.wave.square().mean(dim=1))
    peak_db = _db(heard.frames.square().amax(dim=2))
    return torch.stack([power, (peak_db - heard.level_db).median(dim=1).values], dim=1)


def _silence(heard: Heard) -> Tensor:
    """Shares of frames."""
    zero = (heard.frames == 0).all(dim=2).float().mean(dim=1)
    return torch.stack([zero, (heard.level_db < -60).float().mean(dim=1)], dim=1)


def _clipping(heard: Heard) -> Tensor:
    """Flat tops, which are neighbours of one value near the peak, and samples at full scale."""
    size = heard.wave.abs()
    high = size >= 0.9 * size.amax(dim=1, keepdim=True)
    flat = high[:, 1:] & (heard.wave[:, 1:] == heard.wave[:, :-1]) & (size[:, 1:] > 0)
    full = size >= 1 - 2 / _FULL_SCALE
    shares = [share.float().mean(dim=1) for share in (flat, full)]
    return torch.stack([torch.log10(share + 1e-6) for share in shares], dim=1)


def _offset(heard: Heard) -> Tensor:
    """The median of the frames' means, as far as it exceeds their own spread: drums have means."""
    means = heard.frames.mean(dim=2) * _FULL_SCALE  # [B, n]
    low, middle, high = _quantiles(means, (0.25, 0.5, 0.75), 1)
    sure = F.relu(middle.abs() / (high - low + 0.5) - 1)
    return torch.stack([torch.asinh(middle.sign() * sure), torch.log1p(sure)], dim=1)


def _quantiles(x: Tensor, shares: tuple[float, ...], dim: int) -> Tensor:
    """As torch.quantile, which refuses more than 16 million values: half a minute of 32 rows."""
    ordered = x.sort(dim=dim).values.movedim(dim, 0)
    places = [share * (len(ordered) - 1) for share in shares]
    return torch.stack(
        [torch.lerp(ordered[int(at)], ordered[math.ceil(at)], at % 1.0) for at in places]
    )


def _bandwidth(heard: Heard) -> Tensor:
    """Where the spectrum falls for good, if it does, and what is empty now and then.

    Medians of neighbours leave lines out.
    """
    mean, reach = heard.spectrum_db.mean(dim=2), heard.bins(150)
    smooth = _running_median(mean, reach)
    above = smooth.flip(1).cummax(dim=1).values.flip(1)[:, 2 * reach :]  # the loudest from there
    fall = (smooth[:, : -2 * reach] - above).clamp(min=0)
    most = fall.amax(dim=1, keepdim=True)  # [B, 1]
    weight = F.relu(fall - 0.7 * most) + 1e-9
    end = (weight * heard.hz[: fall.shape[1]]).sum(dim=1) / weight.sum(dim=1) + heard.hz[reach]
    sure = (most / _FALL_DB - 1).clamp(0, 1)
    empty = (heard.spectrum_db < mean[:, :, None] - _HOLE_DB).float().mean(dim=2)  # [B, bins]
    holes = torch.log10(F.adaptive_avg_pool1d(empty, _HOLES) + 1e-3)
    return torch.cat([_hats(end, _ends(heard.sample_rate)) * sure, holes[:, _HOLES // 4 :]], dim=1)


def _ends(sample_rate: int) -> Tensor:
    return torch.linspace(0, sample_rate / 2, _ENDS + 1)


def _end_columns(sample_rate: int) -> list[str]:
    width = sample_rate / 2 / _HOLES
    ends = [f"end near {hz:,.0f} Hz" for hz in _ends(sample_rate).tolist()]
    return ends + [f"holes above {n * width:,.0f} Hz" for n in range(_HOLES // 4, _HOLES)]


def _tilt(heard: Heard) -> Tensor:
    """Slope over octaves from 100 Hz to a quarter of the rate, of medians of third octaves."""
    octaves = torch.arange(0, math.log2(heard.sample_rate / 400), 1 / 3)
    mean, levels = heard.spectrum_db.mean(dim=2), []
    for low in (100 * 2**octaves).tolist():
        first = int((heard.hz - low).abs().argmin())
        count = max(1, int(((heard.hz >= low) & (heard.hz < low * 2 ** (1 / 3))).sum()))
        levels.append(mean[:, first : first + count].median(dim=1).values)
    level = torch.stack(levels, dim=1)  # [B, bands]
    slopes = []
    for part in (slice(None), slice(len(octaves) // 2, None)):
        x = (octaves[part] - octaves[part].mean()).to(level.device)
        slopes.append(level[:, part] @ x / x.square().sum().clamp(min=1e-9))
    return torch.cat([_hats(slopes[0], _SLOPES_DB), torch.stack(slopes, dim=1)], dim=1)


def _tilt_columns(sample_rate: int) -> list[str]:
    near = [f"slope near {slope:g} dB/octave" for slope in _SLOPES_DB.tolist()]
    return [*near, "slope", f"slope above {math.sqrt(100 * sample_rate / 4):,.0f} Hz"]


def _lines(heard: Heard) -> Tensor:
    """How far what never pauses stands above both of its sides, the most in a band; and hum."""
    steady, usual = _quantiles(heard.spectrum_db, (0.1, 0.75), 2)  # [B, bins] each
    away = heard.bins(100)
    beside = _running_median(steady, max(1, away // 2))  # moved by 100 Hz it is that of a side
    left, right = beside.roll(away, 1), beside.roll(-away, 1)
    left[:, :away], right[:, -away:] = right[:, :away], left[:, -away:]
    excess = steady - torch.maximum(left, right) - (usual - steady) - _CLEAR_DB
    excess = excess.clamp(0, 30)
    hum = [_hum(heard, excess, mains) for mains in (50, 60)]
    return torch.cat([F.adaptive_max_pool1d(excess, _LINES), torch.stack(hum, dim=1)], dim=1)


def _hum(heard: Heard, excess: Tensor, mains_hz: int) -> Tensor:
    """Mean over the first three harmonics."""
    step = heard.hz[1].item()
    places = [round(n * mains_hz / step) for n in (1, 2, 3)]
    return excess[:, places].mean(dim=1)


def _line_columns(sample_rate: int) -> list[str]:
    width = sample_rate / 2 / _LINES
    bands = [f"line from {n * width:,.0f} to {(n + 1) * width:,.0f} Hz" for n in range(_LINES)]
    return [*bands, "hum of 50 Hz", "hum of 60 Hz"]


def _floor(heard: Heard) -> Tensor:
    """Hiss: the quietest tenth of the time, against the level, from an eighth of the rate on."""
    quiet = _quantiles(heard.spectrum_db, (0.1,), 2)[0]  # [B, bins]
    first, last = len(heard.hz) // 4, len(heard.hz) // 2
    level = _db(heard.wave.square().mean(dim=1, keepdim=True))
    return F.adaptive_avg_pool1d(quiet[:, first : last + 1], 3) - level


def _floor_columns(sample_rate: int) -> list[str]:
    return [f"hiss from {sample_rate / 8 * (1 + n / 3):,.0f} Hz" for n in range(3)]


FAMILIES = {
    "level": Family(
        about="level and dynamics", columns=lambda _: ["level", "peaks over it"], of=_level
    ),
    "silence": Family(
        about="silence", columns=lambda _: ["frames of zeros", "frames below -60 dB"], of=_silence
    ),
    "clipping": Family(
        about="clipping", columns=lambda _: ["flat tops", "at full scale"], of=_clipping
    ),
    "offset": Family(about="offset (DC)", columns=lambda _: ["offset", "its size"], of=_offset),
    "bandwidth": Family(
        about="where the spectrum ends, and holes in it", columns=_end_columns, of=_bandwidth
    ),
    "tilt": Family(about="tilt of the spectrum", columns=_tilt_columns, of=_tilt),
    "lines": Family(about="steady lines: tones and hum", columns=_line_columns, of=_lines),
    "floor": Family(about="noise floor", columns=_floor_columns, of=_floor),
}
"""Those that the waves tell. Who adds a family adds it here, and nowhere else."""


class Traits(nn.Module):
    """One family of traits, as a frozen bias model.

    Attributes:
        layers, width: 1 and d; it has one layer of states.
        settings: what its output depends on.
    """

    def __init__(self, name: str, sample_rate: int) -> None:
        super().__init__()
        self._family, self._sample_rate = FAMILIES[name], sample_rate
        columns = self._family.columns(sample_rate)
        self.layers, self.width = 1, len(columns)
        self.settings: dict[str, object] = {"traits": name, "columns": columns, "version": 1}

    def forward(self, wave: Tensor) -> Tensor:
        """int16 [B, T] -> float32 [B, 1, d]."""
        return self._family.of(hear(wave, self._sample_rate)).unsqueeze(1)


class Probe(nn.Module):
    """Cheap statistics of the sound, which know timbre: mean and spread of 40 log-mel bands.

    Attributes:
        width: 80.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.width = 80
        self.mel = MelSpectrogram(sample_rate, n_fft=512, hop_length=256, n_mels=40)

    def forward(self, wave: Tensor) -> Tensor:
        """int16 [B, T] -> float32 [B, 80]."""
        x = wave.float()
        scaled = (x - x.mean(dim=1, keepdim=True)) / (x.std(dim=1, keepdim=True) + 1e-3)
        bands = torch.log(self.mel(scaled) + 1e-3)  # [B, 40, F]
        return torch.cat([bands.mean(dim=2), bands.std(dim=2)], dim=1)
