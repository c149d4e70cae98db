"""Audio files to mono float32 at the wanted rate, and to segments.

Packing and prediction share this code, so training and serving cannot drift apart.
Resampling is soxr HQ: a 9 kHz tone at 22,050 Hz leaves an alias of -141 dB at 16 kHz, where
torchaudio's default leaves -16.8 dB (docs/design.md).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.fft
import soxr
from numpy.typing import NDArray

from mgc_dist.data.decoders import FULL_SCALE, Block, Header, UnusableAudio, blocks, look, unusable

__all__ = [
    "Header",
    "Source",
    "UnusableAudio",
    "decode",
    "look",
    "read",
    "read_int16",
    "segment_count",
    "segments",
    "to_int16",
]

_LOUDEST = 8.0
"""Samples beyond so many times full scale are not scaled to it; decoders overshoot by less."""
_CANCELLED = 0.01
"""Channels of which mixing leaves less of their power cancel each other."""
_EVERY = 16
"""Of so many frames one is looked at to tell how much mixing takes away."""
_K_WEIGHTING = (
    (1.53512485958697, -2.69169618940638, 1.19839281085285, -1.69065929318241, 0.73248077421585),
    (1.0, -2.0, 1.0, -1.99004745483398, 0.99007225036621),
)
"""b0, b1, b2, a1, a2 of two filters at 48 kHz. Source: ITU-R BS.1770-5, tables 1 and 2."""
_BLOCKS_AT_ONCE = 20
"""More leave a core's cache, and their memory is new to the process each time."""
_ABSOLUTE_GATE, _RELATIVE_GATE = -70.0, -10.0
"""In LUFS and LU. Source: ITU-R BS.1770-5, annex 1."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a file was recorded and encoded, as far as it shows.

    Attributes:
        container: the format of the file, in FFmpeg's or libsndfile's word.
        codec: of its audio, in the same words, such as `mp3` or `PCM_16`.
        sample_rate: in Hz.
        channels: their number.
        kbit_rate: thousands of bits per second over the whole file; None if nothing tells.
        seconds: of audio, as decoded.
        peak: the largest sample, 1 at full scale.
        clipped: share of the samples that are at full scale.
        mixing_loss_db: by how much mixing to mono lowers the power; 0 for mono.
        loudness_lufs: of the mono sound at the data set's rate, by ITU-R BS.1770; None if all of
            it is below the gate or it is shorter than 0.4 s.
    """

    container: str
    codec: str
    sample_rate: int
    channels: int
    kbit_rate: int | None
    seconds: float
    peak: float
    clipped: float
    mixing_loss_db: float
    loudness_lufs: float | None = None


def read(path: Path, sample_rate: int) -> NDArray[np.float32]:
    """Decode, mix to mono and resample a whole file.

    Args:
        path: any file that libsndfile or FFmpeg reads.
        sample_rate: in Hz.

    Returns:
        float32 [samples], usually within -1 to 1.

    Raises:
        UnusableAudio: unreadable, cut, silent, not finite, far beyond full scale, or with
            channels that cancel each other.
    """
    content = bytearray()
    for block in _mixed(path, look(path), _Levels(path), sample_rate):
        content += np.multiply(block, np.float32(1 / FULL_SCALE)).data.cast("B")
    return np.frombuffer(content, np.float32)


def read_int16(path: Path, sample_rate: int) -> NDArray[np.int16]:
    """As `read`, quantised block by block: what a shard holds, in half of the memory.

    Returns:
        int16 [samples], equal to to_int16(read(...)).

    Raises:
        UnusableAudio: as `read`; a sound below half a quantisation step is silence.
    """
    return decode(path, sample_rate)[0]


def decode(path: Path, sample_rate: int) -> tuple[NDArray[np.int16], Source]:
    """As `read_int16`, and what the file shows of how it was recorded and encoded.

    Raises:
        UnusableAudio: as `read_int16`.
    """
    header = look(path)
    levels = _Levels(path)
    wave, samples = np.empty(header.samples_at(sample_rate), "<i2"), 0
    for block in _mixed(path, header, levels, sample_rate):
        if samples + len(block) > len(wave):  # where a header is not exact
            wave = np.resize(wave, 2 * (samples + len(block)))
        _quantise(block, wave[samples : samples + len(block)])
        samples += len(block)
    wave = wave[:samples]
    if not wave.any():
        raise unusable(path, "silence", "sound")
    return wave, replace(levels.source(header), loudness_lufs=loudness(wave, sample_rate))


def _mixed(
    path: Path, header: Header, levels: "_Levels", sample_rate: int
) -> Iterator[NDArray[np.float32]]:
    """Mono blocks at the new rate, full scale 32768, of `frames * new // old` samples together.

    Scale is a power of two, so it changes no digit of the floats, and 16-bit audio needs no
    multiplication on the way. Each stretch of one rate is resampled on its own.
    """
    rate, stretch = 0, None
    for new, block in blocks(path, header):
        if stretch is None or new != rate:
            if stretch:
                yield stretch.rest()
            rate, stretch = new, _Stretch(new, sample_rate)
        mono = _mono(block)
        levels.take(new, block, mono)
        yield stretch.resampled(mono)
    if stretch:
        yield stretch.rest()
    levels.judge()


class _Stretch:
    """Mono audio of one rate, resampled: samples in, samples out, and the rest at its end."""

    def __init__(self, rate: int, sample_rate: int) -> None:
        self._rates = (rate, sample_rate)
        self._taken = self._given = 0
        self._stream = None
        if rate != sample_rate:
            self._stream = soxr.ResampleStream(rate, sample_rate, 1, "float32", "HQ")

    def resampled(self, mono: NDArray[np.float32]) -> NDArray[np.float32]:
        self._taken += len(mono)
        return self._counted(self._stream.resample_chunk(mono) if self._stream else mono)

    def rest(self) -> NDArray[np.float32]:
        if not self._stream:
            return np.empty(0, np.float32)
        rest = self._counted(self._stream.resample_chunk(np.zeros(0, np.float32), last=True))
        return np.pad(rest, (0, max(0, self._total() - self._given)))

    def _counted(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        block = block[: max(0, self._total() - self._given)]
        self._given += len(block)
        return block

    def _total(self) -> int:
        return self._taken * self._rates[1] // self._rates[0]


class _Levels:
    """What levels a file has: absurd ones are refused."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peak = self._mixed = self._apart = self._seconds = 0.0
        self._samples = self._clipped = 0
        self._is_sound = False

    def take(self, rate: int, block: Block, mono: NDArray[np.float32]) -> None:
        peak = max(float(block.max(initial=0)), -float(block.min(initial=0)))
        self._peak = max(self._peak, peak / FULL_SCALE)
        self._samples += block.size
        self._seconds += len(block) / rate
        if peak >= FULL_SCALE - 1:
            high = np.count_nonzero(block >= FULL_SCALE - 1)
            self._clipped += int(high + np.count_nonzero(block <= 1 - FULL_SCALE))
        if block.shape[1] > 1:
            some = block[::_EVERY].astype(np.float32).ravel()
            self._apart += float(some @ some) / block.shape[1]
            self._mixed += float(mono[::_EVERY] @ mono[::_EVERY])
        self._is_sound = self._is_sound or bool(mono.any())

    def judge(self) -> None:
        if self._peak > _LOUDEST:
            got = f"samples up to {self._peak:.0f} times full scale"
            raise unusable(self._path, got, "full scale 1: divide them by 32768 or so")
        if self._mixed < _CANCELLED * self._apart:
            raise unusable(
                self._path,
                "channels that cancel each other when they are mixed",
                "channels of one polarity: turn one over, or keep one of them",
            )
        if not self._is_sound:
            raise unusable(self._path, "silence", "sound")

    def source(self, header: Header) -> Source:
        kept = self._mixed / self._apart if self._apart else 1.0
        return Source(
            container=header.container,
            codec=header.codec,
            sample_rate=header.sample_rate,
            channels=header.channels,
            kbit_rate=round(header.bit_rate / 1000) or None,
            seconds=round(self._seconds, 3),
            peak=round(self._peak, 4),
            clipped=round(self._clipped / max(1, self._samples), 6),
            mixing_loss_db=round(-10 * math.log10(kept), 2) + 0.0,
        )


def loudness(wave: NDArray[np.int16], sample_rate: int) -> float | None:
    """Integrated loudness of a mono sound in LUFS; None if nothing of it passes the gate.

    The filters weight the spectrum of blocks of 0.1 s, in place of running over the samples,
    which would take four times as long.

    Args:
        wave: int16 [samples].
        sample_rate: in Hz; what lies above half of it is not heard.

    Source: ITU-R BS.1770-5, annex 1.
    """
    step = sample_rate // 10
    count = len(wave) // step
    if count < 4:
        return None
    weight = np.full(step // 2 + 1, 2.0 / (step * FULL_SCALE) ** 2)
    weight[0] /= 2
    if step % 2 == 0:
        weight[-1] /= 2
    turn = np.exp(-2j * np.pi * np.fft.rfftfreq(step, 1 / sample_rate) / 48_000)
    for b0, b1, b2, a1, a2 in _K_WEIGHTING:
        gain = (b0 + b1 * turn + b2 * turn**2) / (1 + a1 * turn + a2 * turn**2)
        weight *= gain.real**2 + gain.imag**2
    weight_of_parts = np.repeat(weight, 2).astype(np.float32)  # real and imaginary part in turn
    power = np.empty(count, np.float64)
    for first in range(0, count, _BLOCKS_AT_ONCE):
        last = min(first + _BLOCKS_AT_ONCE, count)
        blocks = wave[first * step : last * step].reshape(-1, step).astype(np.float32)
        parts = scipy.fft.rfft(blocks, axis=1).view(np.float32)  # NumPy's takes seven times as long
        power[first:last] = np.square(parts, out=parts) @ weight_of_parts
    power = np.convolve(power, np.full(4, 0.25), "valid")  # 0.4 s, every 0.1 s
    power = power[power > _power_at(_ABSOLUTE_GATE)]
    if not len(power):
        return None
    gate = power.mean() * 10 ** (_RELATIVE_GATE / 10)
    return round(-0.691 + 10 * math.log10(power[power > gate].mean()), 2)


def _power_at(lufs: float) -> float:
    return float(10 ** ((lufs + 0.691) / 10))


def _mono(block: Block) -> NDArray[np.float32]:
    """Mean over the channels, [frames, channels] -> [frames]: the bits of `block.mean(axis=1)`.

    That took 971 of 1,600 us of a segment of 44.1 kHz stereo, this takes 119. A half is a power of
    two, so in which order a processor adds and multiplies changes no bit of a stereo sound.
    """
    channels = block.shape[1]
    if channels == 2:
        return np.asarray(block @ np.full(2, 0.5, np.float32), np.float32)
    mono = block[:, 0].astype(np.float32)
    for channel in range(1, channels):
        mono += block[:, channel]
    return mono if channels == 1 else mono / np.float32(channels)


def _quantise(block: NDArray[np.float32], out: NDArray[np.int16]) -> None:
    limited = np.clip(block, np.float32(-FULL_SCALE), np.float32(FULL_SCALE - 1))
    np.rint(limited, out=out, casting="unsafe")


def segment_count(samples: int, length: int, hop: int) -> int:
    """S: whole segments of `length` samples, every `hop` samples; 19 for 30 s, 3 s and 1.5 s."""
    return 0 if samples < length else (samples - length) // hop + 1


def segments(wave: NDArray[np.int16], length: int, hop: int) -> NDArray[np.int16]:
    """Cut a wave into whole segments: int16 [S, length], a view of the wave."""
    if len(wave) < length:
        return np.empty((0, length), np.int16)
    return np.lib.stride_tricks.sliding_window_view(wave, length)[::hop]  # [S, length]


def to_int16(wave: NDArray[np.float32]) -> NDArray[np.int16]:
    """Quantise to 16 bits, rounded and clipped, no dither: exact for 16-bit audio at this rate."""
    quantised = np.empty(len(wave), "<i2")
    _quantise(wave * np.float32(FULL_SCALE), quantised)
    return quantised
