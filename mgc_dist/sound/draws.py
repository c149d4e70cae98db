"""Random numbers of a row, from a number of its own, the draw: the same on every device.

They are integer arithmetic on the device of the draw, so nothing waits for the host, and who
computes a row does not matter.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the constants of splitmix64 as signed numbers
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)
_SHIFTS = (30, 27, 31)


def mixed(draw: Tensor, number: Tensor | int) -> Tensor:
    """A random number for each draw and number: int64.

    Source: the finaliser of splitmix64 (Steele et al., OOPSLA 2014); integers wrap around.
    """
    x = draw * _GOLDEN + number + _GOLDEN
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * multiplier
    return x


def crop(wave: Tensor, draw: Tensor, samples: int) -> Tensor:
    """A part of each row, from a random place: [B, T] -> [B, samples].

    Args:
        wave: longer than the part.
        draw: int64 [B].
        samples: of the part.
    """
    places = wave.shape[1] - samples + 1
    start = torch.remainder(mixed(draw, _CROP), places)  # [B]; its bias is below places / 2^63
    return wave.gather(1, start[:, None] + torch.arange(samples, device=wave.device))


_CROP = 3
"""Stream of numbers of a row; the masks have 1 and 2."""


def spaced(wave: Tensor, samples: int) -> list[Tensor]:
    """Parts that cover each row, as few as do, evenly spaced: [B, T] -> n times [B, samples]."""
    last = wave.shape[1] - samples
    gaps = -(-wave.shape[1] // samples) - 1
    return [wave[:, (at := last * k // gaps) : at + samples] for k in range(gaps + 1)]
