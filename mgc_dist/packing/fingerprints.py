"""The same recording twice, found by ear: copies, excerpts, other encodings, levels or speeds.

Three steps, each for the pairs that the one before has left. Landmarks of three spectral peaks
nominate pairs (Wang, "An industrial-strength audio search algorithm", ISMIR 2003). The signs of how
band energies change say where and how fast one plays in the other (Haitsma and Kalker, "A highly
robust audio fingerprinting system", ISMIR 2002). The phases of all frequencies decide: music that
is composed alike shares tones, but a recording shares its noise too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.fft
import soxr
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

_SLOW_HZ, _FAST_HZ = 4000, 8000
"""Rates at which landmarks and signs are looked for, or up to twice as much."""
_FRAME_S, _HOP_S = 0.256, 0.064
_LOW_HZ, _HIGH = 300.0, 0.475
"""The lowest frequency that is looked at, and the highest as a share of the rate."""
_PEAK_BANDS, _PEAKS, _BLOCK, _NEAR = 96, 10, 16, (3, 4)
"""The ten highest peaks of 16 frames (1 s) are kept. Within 3 frames and 4 bands none is higher."""
_FAN, _FARTHEST = 4, 31
"""A peak makes a landmark with two of the next 4 peaks, within 31 frames."""
_UNIT = 24
"""Steps of an octave by which landmarks are told apart."""
_COMMON, _MOST_VOTES = 48, 30_000_000
"""Landmarks that occur more often tell little; so many pairs of landmarks fit into memory."""
_VOTES, _SHARE, _TOGETHER = 6, 0.006, 12
"""Landmarks that a pair must share, at one distance in time, give or take so many frames."""
_PARTNERS, _PLACES, _IN_VAIN = 32, 8, 6
"""Pairs of a track, and distances in time of a pair, that are looked at: those of most votes, where
music that repeats itself may have the true one fifth. So many pairs of a track are looked at in
vain; its copies do not count."""
_ONE_UP = 128 * 128 * 32 * 32
"""What the key of a landmark grows by when its lowest peak is a step of an octave higher."""
_SPEEDS = tuple(round(1 + step / 200, 3) for step in range(-5, 6))
_BANDS, _SPAN = 33, 4
"""Bands of the signs, and frames over which the change of their energy is taken."""
_SHORTEST_S, _DIFFERING, _TRIED = 4.0, 0.36, 2
"""Seconds that both must have, and the share of signs that may differ; half do by chance, 0.31 at
most of copies at another speed. So many places of a pair are looked at more closely."""
_WAVE, _WAVES, _SEARCHED = 2000, 8, 600
"""Eight blocks of half a second are looked for, 0.15 s to each side of where they should be."""
_LIKE, _OFF, _ON_LINE = 0.6, 8.0, 0.25
"""Correlation of a block, samples that it may lie off a line, and share of blocks on the line."""
_TOP_HZ, _COHERENT = 6000.0, 0.25
"""Agreement of phases up to 6 kHz: 0.9 of a copy at 64 kbit/s, 0.13 at most of other music."""

Wave = NDArray[np.int16]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two tracks that hold the same recording.

    Attributes:
        first: position of one track.
        second: position of the other one.
        speed: of the second track, relative to the first.
        start_s: where the second one begins in the first, in seconds.
        agreement: of their phases, 1 for copies.
    """

    first: int
    second: int
    speed: float
    start_s: float
    agreement: float


def landmarks(wave: Wave, sample_rate: int) -> NDArray[np.uint32]:
    """Landmarks of a track.

    Args:
        wave: int16 [samples].
        sample_rate: in Hz.

    Returns:
        uint32 [n, 2]: what three peaks look like, and the frame of the first one.
    """
    power, rate = _power(wave, sample_rate, _SLOW_HZ)
    if len(power) <= 2 * _NEAR[0]:
        return np.empty((0, 2), np.uint32)
    level = np.log(_in_bands(power, rate, _PEAK_BANDS) + 1.0)  # [F, bands]
    frame, band = _peaks(level)
    octaves = np.log2(_HIGH * rate / _LOW_HZ) * (band / _PEAK_BANDS)
    found = []
    count = len(frame)
    for one in range(1, _FAN):
        for two in range(one + 1, _FAN + 1):
            first = np.arange(max(0, count - two))
            near, far = first + one, first + two
            early, late = frame[near] - frame[first], frame[far] - frame[first]
            up = np.rint(_UNIT * (octaves[near] - octaves[first])).astype(np.int64)
            on = np.rint(_UNIT * (octaves[far] - octaves[first])).astype(np.int64)
            base = np.rint(_UNIT * octaves[first]).astype(np.int64)
            key = (((base * 128 + up + 64) * 128 + on + 64) * 32 + early) * 32 + late
            is_near = late <= _FARTHEST
            found.append(np.stack([key, frame[first]], axis=1)[is_near])
    return np.concatenate(found).astype(np.uint32)


def find(
    prints: Sequence[NDArray[np.uint32]], read: Callable[[int], Wave], sample_rate: int
) -> list[Pair]:
    """Pairs of tracks that hold the same recording.

    Args:
        prints: landmarks of each track.
        read: gives the wave of the track at a position: int16 [samples].
        sample_rate: of the waves, in Hz.
    """
    signs = lru_cache(maxsize=1024)(lambda track: _signs(read(track), sample_rate))
    found: list[Pair] = []
    in_vain = np.zeros(len(prints), np.int64)
    for first, second, starts in _nominated(prints):
        if min(in_vain[first], in_vain[second]) >= _IN_VAIN:
            continue
        guesses = _placed(signs(first), signs(second), starts)
        pairs = (
            _judged(first, second, read(first), read(second), sample_rate, guess)
            for guess in guesses
        )
        pair = next((each for each in pairs if each.agreement >= _COHERENT), None)
        if pair:
            found.append(pair)
        else:
            in_vain[[first, second]] += 1
    return found


def _power(wave: Wave, sample_rate: int, least_hz: int) -> tuple[NDArray[np.float32], float]:
    """Power of frames up to the highest frequency that is looked at, and the rate in Hz.

    Samples are added up to come down to that rate: what aliases does so in both recordings.
    """
    step = max(1, sample_rate // least_hz)
    rate = sample_rate / step
    slow = wave[: len(wave) // step * step].reshape(-1, step).astype(np.float32)
    slow = slow @ np.ones(step, np.float32)
    size = round(_FRAME_S * rate)
    top = int(_HIGH * max(_SPEEDS) * size) + 2
    if len(slow) < size:
        return np.empty((0, top), np.float32), rate
    frames = sliding_window_view(slow, size)[:: round(_HOP_S * rate)]
    window = np.hanning(size).astype(np.float32)
    power = np.empty((len(frames), top), np.float32)
    for start in range(0, len(frames), 64):  # so many stay in a core's cache
        bins = scipy.fft.rfft(frames[start : start + 64] * window, axis=1)[:, :top]
        power[start : start + 64] = bins.real**2 + bins.imag**2
    return power, rate


def _in_bands(
    power: NDArray[np.float32], rate: float, bands: int, speed: float = 1.0
) -> NDArray[np.float32]:
    """Power in bands of equal width on a logarithmic scale: float32 [F, bands]."""
    hertz = speed * _LOW_HZ * (_HIGH * rate / _LOW_HZ) ** (np.arange(bands + 1) / bands)
    edges = np.rint(hertz * _FRAME_S).astype(np.int64)
    return np.add.reduceat(power[:, : edges[-1]], edges[:-1], axis=1)


def _peaks(level: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Frame and band (with a fraction) of the highest peaks of each second, in time order."""
    inner = level[_NEAR[0] : -_NEAR[0], _NEAR[1] : -_NEAR[1]]
    is_peak = (inner == _highest(_highest(level, _NEAR[0], 0), _NEAR[1], 1)) & (inner > 1.0)
    frame, band = (at + near for at, near in zip(np.nonzero(is_peak), _NEAR, strict=True))
    height = level[frame, band]
    block = frame // _BLOCK
    order = np.lexsort((-height, block))
    rank = np.arange(len(order)) - np.searchsorted(block[order], block[order])
    kept = np.sort(order[rank < _PEAKS])
    frame, band = frame[kept], band[kept]
    below, here, above = (level[frame, band + step] for step in (-1, 0, 1))
    bend = np.maximum(2 * here - below - above, 1e-6)
    return frame, band + np.clip((above - below) / (2 * bend), -0.5, 0.5)


def _highest(level: NDArray[np.float32], near: int, axis: int) -> NDArray[np.float32]:
    """The highest of 2 near + 1 neighbours along an axis, which gets shorter by 2 near.

    scipy.ndimage's maximum_filter takes seven times as long.
    """
    level = np.moveaxis(level, axis, 0)
    length = max(0, len(level) - 2 * near)
    highest = level[:length]
    for step in range(1, 2 * near + 1):
        highest = np.maximum(highest, level[step : step + length])
    return np.moveaxis(highest, 0, axis)


def _nominated(prints: Sequence[NDArray[np.uint32]]) -> Iterator[tuple[int, int, list[int]]]:
    """Pairs of tracks that share landmarks at one distance in time, and these in frames."""
    if not prints:
        return
    keys = np.concatenate([found[:, 0] for found in prints]).astype(np.int64)
    frames = np.concatenate([found[:, 1] for found in prints]).astype(np.int64)
    sizes = np.array([len(found) for found in prints])
    tracks = np.repeat(np.arange(len(prints)), sizes)
    order = np.argsort(keys, kind="stable")
    keys, frames, tracks = keys[order], frames[order], tracks[order]
    codes, shifts = [], []
    for octave_step in (0, 1):  # the same shape a step higher is some per cent faster
        wanted = keys + octave_step * _ONE_UP
        left = np.searchsorted(keys, wanted, "left")
        right = np.searchsorted(keys, wanted, "right")
        if not octave_step:
            left = np.maximum(left, np.arange(len(keys)) + 1)
        most = _cap(right - left)
        for step in range(most):
            mine = np.flatnonzero((left + step < right) & (right - left <= most))
            theirs = left[mine] + step
            apart = tracks[mine] != tracks[theirs]
            mine, theirs = mine[apart], theirs[apart]
            one, two = tracks[mine], tracks[theirs]
            late = frames[mine] - frames[theirs]
            codes.append(np.minimum(one, two) * len(prints) + np.maximum(one, two))
            shifts.append(np.where(one < two, late, -late))
    yield from _in_step(np.concatenate(codes), np.concatenate(shifts), sizes)


def _cap(sizes: NDArray[np.int64]) -> int:
    """How often a landmark may occur, so that votes stay in bounds."""
    most = _COMMON
    while most > 1 and np.minimum(sizes, most)[sizes <= most].sum() > _MOST_VOTES:
        most //= 2
    return most


def _in_step(
    codes: NDArray[np.int64], shifts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> Iterator[tuple[int, int, list[int]]]:
    """Pairs with enough votes within a few frames, most votes first, and where these lie."""
    order = np.lexsort((shifts, codes))
    codes, shifts = codes[order], shifts[order]
    line = (codes << 21) + shifts  # one axis, on which pairs lie apart
    votes = np.searchsorted(line, line + _TOGETHER, "right") - np.arange(len(line))
    one, two = codes // len(sizes), codes % len(sizes)
    enough = votes >= np.maximum(_VOTES, _SHARE * np.minimum(sizes[one], sizes[two]))
    chosen = np.flatnonzero(enough)
    found: dict[int, list[int]] = {}
    partners = np.zeros(len(sizes), np.int64)
    for at in chosen[np.argsort(-votes[chosen], kind="stable")].tolist():
        code, shift = int(codes[at]), int(shifts[at + votes[at] // 2])
        if code not in found:
            if min(partners[one[at]], partners[two[at]]) >= _PARTNERS:
                continue
            partners[[one[at], two[at]]] += 1
        starts = found.setdefault(code, [])
        if len(starts) < _PLACES and all(abs(shift - other) > _TOGETHER for other in starts):
            starts.append(shift)
    for code, starts in found.items():
        yield code // len(sizes), code % len(sizes), starts


def _signs(wave: Wave, sample_rate: int) -> tuple[NDArray[np.uint32], ...]:
    """Whether the difference of neighbouring bands rises, at each of `_SPEEDS`.

    Each is uint32 [F - 4], a bit for each of 32 pairs of bands.
    """
    power, rate = _power(wave, sample_rate, _FAST_HZ)
    found = []
    for speed in _SPEEDS:
        tilt = np.diff(np.log(_in_bands(power, rate, _BANDS, speed) + 1000.0), axis=1)
        packed = np.packbits(tilt[_SPAN:] > tilt[:-_SPAN], axis=1)  # [F - 4, 4]
        found.append(packed.view(np.uint32).ravel())
    return tuple(found)


def _placed(
    mine: tuple[NDArray[np.uint32], ...], theirs: tuple[NDArray[np.uint32], ...], starts: list[int]
) -> list[tuple[float, float]]:
    """Speeds of the second track and its starts in the first in seconds, where most signs agree.

    Each place is looked for in coarse steps, then in fine ones: a frame off draws the speed off
    too. Two places at most, the best one first: of music that repeats itself, the signs of another
    bar may agree better than those of the same one, but its phases do not.
    """
    plain = mine[_SPEEDS.index(1.0)]
    halves = [signs[::2] for signs in theirs]  # neighbours say nearly the same
    best = []
    for start in starts:
        coarse = start + np.arange(-_TOGETHER, _TOGETHER + 1, 2)
        _, speed, frame = _closest(plain, halves, range(len(_SPEEDS)), coarse)
        beside = range(max(0, speed - 1), min(len(_SPEEDS), speed + 2))
        best.append(_closest(plain, halves, beside, np.arange(frame - 1, frame + 2)))
    return [
        (_SPEEDS[speed], frame * _HOP_S)
        for share, speed, frame in sorted(best)[:_TRIED]
        if share < _DIFFERING
    ]


def _closest(
    plain: NDArray[np.uint32],
    halves: Sequence[NDArray[np.uint32]],
    speeds: Iterable[int],
    starts: NDArray[np.int64],
) -> tuple[float, int, int]:
    """The least share of signs that differ, the number of its speed, and its start in frames.

    Args:
        plain: signs of the first track, [F].
        halves: every second frame of those of the second one, at each speed.
        speeds: numbers of those to try.
        starts: of the second track in the first, to try.
    """
    best = (1.0, _SPEEDS.index(1.0), int(starts[0]))
    for number in speeds:
        signs = halves[number]
        played = np.rint(2 * _SPEEDS[number] * np.arange(len(signs))).astype(np.int64)
        place = starts[:, None] + played  # [S, F / 2]
        both = (place >= 0) & (place < len(plain))
        differing = np.bitwise_count(plain[np.where(both, place, 0)] ^ signs)
        shared = both.sum(axis=1)
        share = (differing * both).sum(axis=1) / np.maximum(32 * shared, 1)
        share[2 * shared * _HOP_S < _SHORTEST_S] = 1.0
        at = int(share.argmin())
        best = min(best, (float(share[at]), number, int(starts[at])))
    return best


def _judged(
    first: int,
    second: int,
    one: Wave,
    two: Wave,
    sample_rate: int,
    guess: tuple[float, float],
) -> Pair:
    """The pair at the speed and start at which its phases agree best."""
    slow = [soxr.resample(wave.astype(np.float32), sample_rate, _SLOW_HZ) for wave in (one, two)]
    speed, start_s = guess
    middle = start_s + (speed - 1) * min(len(two) / sample_rate, len(one) / sample_rate) / 2
    best = (0.0, 1.0, middle)
    as_it_is = (1.0, middle) if abs(speed - 1) < 0.006 else None
    for line in (_line(slow[0], slow[1], speed, start_s), as_it_is):
        if line and best[0] < _COHERENT:
            speed, start_s = line
            for _ in range(2):
                agreement, better, sooner = _coherence(one, two, sample_rate, speed, start_s)
                best = max(best, (agreement, speed, start_s))
                speed, start_s = better, sooner
    return Pair(first=first, second=second, agreement=best[0], speed=best[1], start_s=best[2])


def _line(
    one: NDArray[np.float32], two: NDArray[np.float32], speed: float, start_s: float
) -> tuple[float, float] | None:
    """Speed of the second wave, and where it starts in the first in seconds, to a sample or so.

    Blocks of the second wave are looked for in the first; None if they lie on no line.
    """
    start = start_s * _SLOW_HZ
    begin, end = max(0.0, -start / speed), min(len(two), (len(one) - start) / speed)
    places = np.linspace(begin, max(begin, end - _WAVE), _WAVES).astype(int)
    energy = np.concatenate([[0.0], np.cumsum(one.astype(np.float64) ** 2)])
    best: tuple[float, tuple[float, float] | None] = (0.0, None)
    for tuned in speed * (1 + np.arange(-3, 4) / 1000):
        inside = np.arange(int(_WAVE * tuned)) / tuned
        found = np.zeros((_WAVES, 2))
        for number, place in enumerate(places):
            block = np.interp(inside, np.arange(_WAVE), two[place : place + _WAVE])
            first = max(0, int(start + speed * place) - _SEARCHED)
            region = one[first : first + len(block) + 2 * _SEARCHED]
            if len(region) > len(block):
                product = _correlated(region, block)
                ends = np.arange(first, first + len(product))
                power = (energy[ends + len(block)] - energy[ends]) * (block @ block)
                likeness = product / np.sqrt(np.maximum(power, 1e-9))
                found[number] = likeness.max(), first + likeness.argmax()
        sure = found[:, 0] > _LIKE
        if sure.sum() >= 3:
            slope, offset = _theil_sen(found[sure, 1], places[sure])
            near = sure & (np.abs(found[:, 1] - offset - slope * places) < _OFF)
            if near.mean() > best[0]:
                best = (float(near.mean()), (float(slope), float(offset) / _SLOW_HZ))
    return best[1] if best[0] >= _ON_LINE else None


def _correlated(region: NDArray[np.float32], block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products of a block with each stretch of a region that is as long: float64."""
    size = scipy.fft.next_fast_len(len(region), real=True)
    spectrum = scipy.fft.rfft(region.astype(np.float64), size)
    spectrum *= scipy.fft.rfft(block, size).conj()
    products: NDArray[np.float64] = scipy.fft.irfft(spectrum, size)
    return products[: len(region) - len(block) + 1]


def _theil_sen(y: NDArray[Any], x: NDArray[Any]) -> tuple[float, float]:
    """Slope and offset of the line through points of which some are wrong (Theil 1950, Sen 1968).

    scipy.stats has it too; importing that takes as long as packing fifty tracks.
    """
    one, two = np.triu_indices(len(x), 1)
    apart = x[one] != x[two]
    slopes = (y[two] - y[one])[apart] / (x[two] - x[one])[apart]
    slope = float(np.median(slopes)) if len(slopes) else 0.0
    return slope, float(np.median(y) - slope * np.median(x))


def _coherence(
    one: Wave, two: Wave, rate: int, speed: float, start_s: float
) -> tuple[float, float, float]:
    """How well the phases of all frequencies agree, median over blocks: 1 for the same wave.

    Music that is composed alike shares tones, a recording shares its noise too.

    Returns:
        The agreement, and a better speed and start in seconds.
    """
    tuned = soxr.resample(two.astype(np.float32), rate, rate * speed)
    start, size = round(start_s * rate), rate // 2
    begin, end = max(0, -start), min(len(tuned), len(one) - start)
    if end - begin < 2 * size:
        return 0.0, speed, start_s
    hertz = np.fft.rfftfreq(size, 1 / rate)
    band = (hertz > _LOW_HZ) & (hertz < _TOP_HZ)
    window, most = np.hanning(size), size // 4  # 0.125 s to each side
    places = np.linspace(begin, end - size, _WAVES).astype(int)
    peaks, lags = [], []
    for place in places:
        mine = np.fft.rfft(one[start + place : start + place + size] * window)
        theirs = np.fft.rfft(tuned[place : place + size] * window)
        cross = np.where(band, mine * theirs.conj(), 0)
        phases = np.fft.irfft(cross / np.maximum(np.abs(cross), 1e-9)) * size / (2 * band.sum())
        near = np.roll(phases, most)[: 2 * most]
        peaks.append(float(near.max()))
        lags.append(int(near.argmax()) - most)
    drift, offset = _theil_sen(np.array(lags), places)
    return float(np.median(peaks)), speed * (1 + float(drift)), start_s + float(offset) / rate
