"""How little of the spectrum keeps a model's answer, by search; and whom else that little fools.

Of each segment bands are taken out one after another, those first whose loss alone hurts the
answer least; a band whose loss would change the answer is put back. What is left is sufficient,
and no band of it could be missed when it was tried. It need not be the smallest such set.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgc_dist.scoring.exams import Bands

BANDS = 16
"""Evenly spaced on the mel scale: about 180 mel each up to 8 kHz."""


def edges_hz(rate: int, bands: int = BANDS) -> NDArray[np.float64]:
    """Edges of bands from 0 to half the rate, float64 [bands + 1]; HTK's mel scale."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    return np.asarray(700 * (10 ** (np.linspace(0, top, bands + 1) / 2595) - 1))


class Search:
    """The search, a batch at a time; digits depend on the batch alone.

    Args:
        forward: int16 [B, T] -> logits [B, K], in eval mode.
        rate: in Hz.
    """

    width = BANDS + 3

    def __init__(self, forward: Callable[[Tensor], Tensor], rate: int) -> None:
        self._forward, self._edges = forward, edges_hz(rate)
        self._rate = rate

    def __call__(self, wave: Tensor) -> Tensor:
        """int16 [B, T] -> float32 [B, BANDS + 3]: kept bands, answer, whether another is fooled.

        The last two are the index of the answer of the segment, then 1 or 0 for fooled, and
        whether there was another one in the batch to be fooled. Silence is padding.
        """
        spectrum = torch.fft.rfft(wave.float())  # [B, T // 2 + 1]
        band = self._band_of(wave)  # [T // 2 + 1]
        logits = self._forward(wave)
        answer = logits.argmax(dim=1)  # [B]
        kept = torch.ones(len(wave), BANDS, dtype=torch.bool, device=wave.device)

        def heard(mask: Tensor, other: Tensor | None = None) -> Tensor:
            chosen = mask[:, band]  # [B, T // 2 + 1]
            rest = torch.zeros_like(spectrum) if other is None else other
            mixed = torch.fft.irfft(torch.where(chosen, spectrum, rest), n=wave.shape[1])
            return self._forward(mixed.round().clamp(-32768, 32767).to(torch.int16))

        order = self._order(heard, kept, answer)
        for place in range(BANDS):
            tried = kept.scatter(1, order[:, place : place + 1], False)
            same = heard(tried).argmax(dim=1) == answer
            kept = torch.where(same[:, None], tried, kept)
        victim = self._others(answer, wave)  # [B], -1: none
        fooled = heard(kept, spectrum[victim.clamp(min=0)]).argmax(dim=1) == answer
        has = victim >= 0
        numbers = (answer[:, None], (fooled & has)[:, None], has[:, None])
        return torch.cat((kept.float(), *(each.float() for each in numbers)), dim=1)

    def _band_of(self, wave: Tensor) -> Tensor:
        hz = np.fft.rfftfreq(wave.shape[1], 1 / self._rate)
        place = np.searchsorted(self._edges[1:-1], hz, side="right")
        return torch.from_numpy(place).to(wave.device)

    def _order(self, heard: Callable[[Tensor], Tensor], kept: Tensor, answer: Tensor) -> Tensor:
        """Bands by what the answer's log-probability loses without each, int64 [B, BANDS]."""
        sure = []
        for place in range(BANDS):
            mask = kept.clone()
            mask[:, place] = False
            given = heard(mask).float().log_softmax(dim=1)
            sure.append(given.gather(1, answer[:, None]))
        return torch.cat(sure, dim=1).argsort(dim=1, descending=True, stable=True)

    def _others(self, answer: Tensor, wave: Tensor) -> Tensor:
        """The next row, in a circle, that has another answer: int64 [B]."""
        size = len(answer)
        sound = (wave != 0).any(dim=1)
        place = torch.arange(size, device=wave.device)
        found = torch.full_like(place, -1)
        for step in range(size - 1, 0, -1):  # the nearest one is written last
            other = (place + step) % size
            fits = sound[other] & (answer[other] != answer)
            found = torch.where(fits, other, found)
        return found


def summed_up(found: NDArray[np.float32], genres: Sequence[str], rate: int) -> Bands:
    """Figures of a search.

    Args:
        found: what `Search` gave of each segment, float32 [M, BANDS + 3].
        genres: names in label order.
        rate: in Hz.
    """
    kept, answer = found[:, :BANDS], found[:, BANDS].astype(np.int64)
    fooled, has = found[:, BANDS + 1], found[:, BANDS + 2] > 0
    return Bands(
        edges_hz=edges_hz(rate).tolist(),
        segments=len(found),
        kept=float(kept.sum(axis=1).mean()),
        by_genre={
            name: kept[answer == label].mean(axis=0).astype(np.float64).tolist()
            for label, name in enumerate(genres)
            if (answer == label).any()
        },
        fooled=float(fooled[has].mean()) if has.any() else None,
    )
