"""The same recording is found whatever was done to it, and music that is only alike is not."""

import io
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import soundfile
import soxr

from mgc_dist.packing import fingerprints, music

RATE = 16_000
Wave = np.ndarray


def composed(genre: str, number: int, seconds: float = 20) -> Wave:
    wave = music.compose(genre, number, seed=1, duration_s=seconds, per_artist=4)
    return quantised(0.5 * soxr.resample(wave, music.SAMPLE_RATE, RATE))


def quantised(wave: Wave) -> Wave:
    return np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)


def later_and_lower(wave: Wave) -> Wave:
    return quantised(0.7 * np.concatenate([np.zeros(RATE // 5), wave / 32768]))


def as_mp3(wave: Wave) -> Wave:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="MP3", compression_level=0.9)
    file.seek(0)
    return soundfile.read(file, dtype="int16")[0]


def faster(wave: Wave, by: float) -> Wave:
    return quantised(soxr.resample(wave / 32768, RATE * by, RATE))


CHANGES: dict[str, tuple[Callable[[Wave], Wave], float, float]] = {
    "copy": (lambda wave: wave.copy(), 1.0, 0.0),
    "later and lower": (later_and_lower, 1.0, -0.2),
    "MP3": (as_mp3, 1.0, 0.0),
    "excerpt": (lambda wave: wave[int(6.3 * RATE) : int(16.3 * RATE)], 1.0, 6.3),
    "2 % faster": (lambda wave: faster(wave, 1.02), 1.02, 0.0),
    "2 % slower": (lambda wave: faster(wave, 0.98), 0.98, 0.0),
    "1.3 % faster": (lambda wave: faster(wave, 1.013), 1.013, 0.0),
}
"""What is done to a wave, its speed then, and where it starts in the original, in seconds."""


@pytest.fixture(scope="module")
def others() -> list[Wave]:
    """Music of two artists whose tracks are as alike as the generator makes them."""
    return [composed(genre, number) for genre in ("metal", "jazz") for number in range(4)]


def pairs_of(waves: list[Wave]) -> list[fingerprints.Pair]:
    prints = [fingerprints.landmarks(wave, RATE) for wave in waves]
    return fingerprints.find(prints, lambda number: waves[number], RATE)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recording_is_found_where_it_is(change: str, others: list[Wave]) -> None:
    change_of, speed, start_s = CHANGES[change]
    (pair,) = pairs_of([*others, change_of(others[5])])
    assert (pair.first, pair.second) == (5, len(others))
    assert pair.speed == pytest.approx(speed, abs=2e-4)
    assert pair.start_s == pytest.approx(start_s, abs=0.005 + (0.04 if change == "MP3" else 0))


@pytest.mark.parametrize("start", range(-4, 5))
def test_a_place_is_found_to_the_frame_and_the_speed_with_it(
    start: int, others: list[Wave]
) -> None:
    signs = [fingerprints._signs(wave, RATE) for wave in (others[5], faster(others[5], 1.02))]
    assert fingerprints._placed(signs[0], signs[1], [start]) == [(1.02, 0.0)]


def test_music_that_is_alike_is_no_pair(others: list[Wave]) -> None:
    assert pairs_of(others) == []


def test_many_copies_of_one_recording_are_all_found(others: list[Wave]) -> None:
    """They take no other copy's place among the pairs of a track that are looked at."""
    one = others[5][: 8 * RATE]
    copies = [quantised(one / 32768 * level) for level in np.linspace(1, 0.4, 14)]
    found = {(pair.first, pair.second) for pair in pairs_of(copies)}
    assert found == set(itertools.combinations(range(14), 2))


def test_what_is_hardly_music_is_no_pair_and_no_error() -> None:
    rng = np.random.default_rng(0)
    tone = np.sin(2 * np.pi * 440 * np.arange(10 * RATE) / RATE)
    waves = [
        quantised(0.1 * rng.standard_normal(10 * RATE)),
        quantised(0.1 * rng.standard_normal(10 * RATE)),
        quantised(0.3 * tone + 0.01 * rng.standard_normal(len(tone))),
        quantised(0.3 * tone + 0.01 * rng.standard_normal(len(tone))),
        np.zeros(10 * RATE, np.int16),
        np.zeros(10 * RATE, np.int16),
        np.ones(3, np.int16),
        np.empty(0, np.int16),
        composed("rock", 0, seconds=1),
    ]
    assert pairs_of(waves) == []
    assert pairs_of([]) == []


def test_landmarks_are_the_same_on_every_run_and_few(others: list[Wave]) -> None:
    marks = fingerprints.landmarks(others[0], RATE)
    np.testing.assert_array_equal(marks, fingerprints.landmarks(others[0].copy(), RATE))
    assert marks.dtype == np.uint32
    assert 200 < len(marks) < 70 * 20


def test_votes_stay_in_bounds(others: list[Wave], monkeypatch: pytest.MonkeyPatch) -> None:
    """With hardly a vote allowed, the most telling landmarks still find a copy."""
    monkeypatch.setattr(fingerprints, "_MOST_VOTES", 3000)
    (pair,) = pairs_of([*others, others[5].copy()])
    assert (pair.first, pair.second) == (5, len(others))
