"""Augmentation of waves on their device: a pure function of each row's number, the draw."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mgc_dist.config.augment import AugmentConfig
from mgc_dist.errors import UserError
from mgc_dist.sound.draws import mixed

_STREAMS = {
    name: number
    for number, name in enumerate(
        ("gain", "polarity", "shift", "lowpass", "level", "noise", "width", "place"), start=4
    )
}
"""Streams of numbers of a row; masks and crops have 1 to 3."""
_NOISE_DB = 30.0
"""From the loudest noise to the faintest."""


class Augment:
    """What `--augment` does.

    Args:
        config: which kinds, and how strong.
        sample_rate: of the waves in Hz.

    Raises:
        UserError: the low-pass would keep all.
    """

    def __init__(self, config: AugmentConfig, sample_rate: int) -> None:
        if "lowpass" in config.kinds and config.augment_lowpass_hz >= sample_rate / 2:
            raise UserError(
                f"--augment-lowpass-hz {config.augment_lowpass_hz:g}",
                got=f"{config.augment_lowpass_hz:g} Hz",
                expected=f"below {sample_rate / 2:g} Hz, half the sample rate of the shards",
                cure="lower it, or leave lowpass out of --augment",
            )
        self._config, self._rate = config, sample_rate

    def __call__(self, wave: Tensor, draw: Tensor) -> Tensor:
        """float32 [B, T] -> float32 [B, T], by the numbers int64 [B]."""
        config, kinds = self._config, self._config.kinds
        drawn = partial(_uniform, draw)
        if "shift" in kinds:
            most = round(config.augment_shift_s * self._rate)
            wave = _shifted(wave, ((2 * drawn("shift") - 1) * most).round().long())
        if "lowpass" in kinds or "bands" in kinds:
            wave = self._filtered(wave, draw)
        if "noise" in kinds:
            below_db = config.augment_noise_db + _NOISE_DB * drawn("level")
            level = wave.square().mean(dim=1).sqrt() * 10 ** (-below_db / 20)  # [B]
            wave = wave + level[:, None] * normal(draw, wave.shape[1])
        if "gain" in kinds:
            gain_db = config.augment_gain_db * (2 * drawn("gain") - 1)
            wave = wave * (10 ** (gain_db / 20))[:, None]
        if "polarity" in kinds:
            wave = torch.where(drawn("polarity")[:, None] < 0.5, -wave, wave)
        return wave

    def _filtered(self, wave: Tensor, draw: Tensor) -> Tensor:
        """Low-pass and gap, as factors of the spectrum: no phase is moved."""
        return filtered(wave, self._rate, partial(self._factor, draw))

    def _factor(self, draw: Tensor, hz: Tensor) -> Tensor:
        """Of each row's frequencies, [B, T / 2 + 1]."""
        half, drawn = self._rate / 2, partial(_uniform, draw)
        factor = torch.ones_like(hz).expand(len(draw), -1)
        if "lowpass" in self._config.kinds:
            lowest = self._config.augment_lowpass_hz
            cutoff = lowest * (half / lowest) ** drawn("lowpass")  # [B]
            # Butterworth of second order: -3 dB at the cutoff, 12 dB an octave above it
            factor = factor / (1 + (hz / cutoff[:, None]) ** 4).sqrt()
        if "bands" in self._config.kinds:
            top = _mel(torch.tensor(half, device=hz.device))
            width = drawn("width") * self._config.augment_bands * top  # [B]
            start = (drawn("place") * (top - width))[:, None]
            at = _mel(hz)
            factor = factor.masked_fill((at >= start) & (at < start + width[:, None]), 0)
        return factor


def filtered(wave: Tensor, rate: int, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply the spectrum: [B, T] -> [B, T], by a function of frequencies in Hz [T // 2 + 1]."""
    hz = torch.fft.rfftfreq(wave.shape[1], 1 / rate, device=wave.device)
    found: Tensor = torch.fft.irfft(torch.fft.rfft(wave) * factor(hz), n=wave.shape[1])
    return found


def normal(draw: Tensor, size: int) -> Tensor:
    """Standard normal numbers of each row, float32 [B, size].

    Source: Box and Muller, Ann. Math. Stat. 29(2), 1958.
    """
    number = torch.arange(size, device=draw.device)
    bits = mixed(mixed(draw, _STREAMS["noise"])[:, None], number)  # [B, size]
    first, second = (bits >> 40 & (1 << 24) - 1), (bits >> 16 & (1 << 24) - 1)
    radius = (-2 * ((first + 1).float() * 2.0**-24).log()).sqrt()  # log of (0, 1]
    return radius * (2 * math.pi * 2.0**-24 * second.float()).cos()


def _uniform(draw: Tensor, stream: str) -> Tensor:
    """float32 [B] in [0, 1)."""
    return (mixed(draw, _STREAMS[stream]) >> 40 & (1 << 24) - 1).float() * 2.0**-24


def _shifted(wave: Tensor, by: Tensor) -> Tensor:
    """Each row turned by a number of samples, as numpy.roll: by int64 [B]."""
    place = torch.arange(wave.shape[1], device=wave.device)
    return wave.gather(1, torch.remainder(place - by[:, None], wave.shape[1]))


def _mel(hz: Tensor) -> Tensor:
    """Of HTK: 2595 log10(1 + f / 700)."""
    return 2595.0 * (1.0 + hz / 700.0).log10()
