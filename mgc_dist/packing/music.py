"""Synthetic music of ten genres: patterns, drums and notes, and tracks made of them.

The genres differ in tempo, drum pattern, harmony, decay, brightness and loudness of the drums,
enough for a small model to learn them in minutes on a CPU. Artists keep a key, a recording
noise and a spectral tilt of their own over their tracks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 22_050
"""In Hz, as GTZAN's."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """What makes a genre. Patterns are 16 steps of a bar, `x` a hit; chords are semitones.

    Attributes:
        beats_per_minute: tempo, varied by 6 %.
        kick, snare: drum patterns.
        chord: intervals over the root.
        roots: semitones of the root, one a bar, over the key.
        rolloff: exponent by which harmonics fall.
        decay_s: time constant of a note.
        drums: loudness of the drums over the chords.
        tilt: coefficient of a one-zero filter; positive brightens.
        is_broken: whether `planted` plays a note of the chord between the beats.
    """

    beats_per_minute: float
    kick: str
    snare: str
    chord: tuple[int, ...]
    roots: tuple[int, int, int, int]
    rolloff: float
    decay_s: float
    drums: float
    tilt: float
    is_broken: bool


def _style(
    bpm: float,
    kick: str,
    snare: str,
    chord: tuple[int, ...],
    roots: tuple[int, int, int, int],
    timbre: tuple[float, float, float, float],
    is_broken: bool = False,
) -> Style:
    rolloff, decay_s, drums, tilt = timbre
    return Style(
        beats_per_minute=bpm,
        kick=kick,
        snare=snare,
        chord=chord,
        roots=roots,
        rolloff=rolloff,
        decay_s=decay_s,
        drums=drums,
        tilt=tilt,
        is_broken=is_broken,
    )


# fmt: off
STYLES = {
    "blues": _style(70, "x.......x.......", "....x.......x...", (0, 4, 7, 10),
                    (0, 0, 5, 7), (1.2, 0.30, 0.70, 0.0)),
    "classical": _style(85, "x...x...x...x...", "................", (0, 4, 7),
                        (0, 7, 9, 5), (2.2, 0.90, 0.05, -0.3), True),
    "country": _style(98, "x......xx.......", "....x.......x..x", (0, 4, 7, 9),
                      (0, 5, 7, 0), (1.6, 0.35, 0.60, 0.1)),
    "disco": _style(112, "x...x...x...x...", "....x.......x...", (0, 3, 7, 10),
                    (9, 5, 0, 7), (1.0, 0.15, 1.40, 0.5), True),
    "hiphop": _style(122, "x..x....x.x.....", "....x..x.x..x...", (0, 7),
                     (0, 0, 3, 0), (1.8, 0.22, 1.60, -0.2)),
    "jazz": _style(132, "x.....x...x.....", "...x..x....x..x.", (0, 3, 7, 10, 14),
                   (2, 7, 0, 9), (2.0, 0.50, 0.40, 0.0), True),
    "metal": _style(146, "x.x.x.x.x.x.x.x.", "....x...x...x...", (0, 7, 12),
                    (0, 3, 5, 6), (0.9, 0.20, 0.70, 0.5)),
    "pop": _style(92, "x.....x.x.......", "........x.......", (0, 4, 7, 11),
                  (0, 9, 5, 7), (1.3, 0.28, 1.00, 0.4), True),
    "reggae": _style(78, "....x.......x...", "x...x...x...x...", (0, 3, 7),
                     (9, 7, 9, 7), (1.7, 0.18, 0.90, -0.1)),
    "rock": _style(165, "x..x..x...x..x..", "....x..x.x..x...", (0, 5, 7),
                   (0, 5, 3, 7), (0.8, 0.20, 1.10, 0.5), True),
}
# fmt: on


def compose(
    genre: str, number: int, *, seed: int, duration_s: float, per_artist: int
) -> NDArray[np.float32]:
    """A track of a genre: float32 [duration_s * 22050], peak 0.7.

    Args:
        genre: a name in STYLES.
        number: of the track in its genre.
        seed: of the data set.
        duration_s: length in seconds.
        per_artist: consecutive tracks that share an artist.
    """
    style, order = STYLES[genre], list(STYLES).index(genre)
    artist = np.random.default_rng([seed, order, 0, number // per_artist])
    own = np.random.default_rng([seed, order, 1, number])
    key = int(artist.integers(-5, 6) + own.integers(-2, 3))
    decay_s = style.decay_s * artist.uniform(0.8, 1.25)
    rolloff = style.rolloff + artist.uniform(-0.8, 0.8)
    drums = style.drums * artist.uniform(0.7, 1.4)
    step_s = 60 / style.beats_per_minute / 4 * (1 + own.uniform(-0.06, 0.06))

    wave = np.zeros(int(duration_s * SAMPLE_RATE) + 2 * SAMPLE_RATE, np.float32)
    thump, rattle = drums * kick(SAMPLE_RATE), drums * snare(own, SAMPLE_RATE)
    notes: dict[int, NDArray[np.float32]] = {}
    offset = int(own.integers(0, 16))
    for step in range(int(duration_s / step_s) + 1):
        bar_step, start = step + offset, int(step * step_s * SAMPLE_RATE)
        if style.kick[bar_step % 16] == "x":
            add(wave, thump, start)
        if style.snare[bar_step % 16] == "x":
            add(wave, rattle, start)
        if bar_step % 4 == 0:
            root = 48 + key + style.roots[bar_step // 16 % 4]
            for interval in style.chord:
                pitch = root + interval
                if pitch not in notes:
                    notes[pitch] = note(pitch, rolloff, decay_s, SAMPLE_RATE)
                add(wave, notes[pitch], start)
    wave = wave[: int(duration_s * SAMPLE_RATE)]
    wave /= np.sqrt(np.square(wave).mean()) + 1e-9
    noise_db = artist.uniform(4, 20)
    wave += (10 ** (-noise_db / 20) * own.standard_normal(len(wave))).astype(np.float32)
    tilt = np.clip(style.tilt + artist.uniform(-0.4, 0.4), -0.5, 0.9)
    wave[1:] = wave[1:] - np.float32(tilt) * wave[:-1]
    return np.asarray(0.7 * wave / np.abs(wave).max(), np.float32)


def add(wave: NDArray[np.float32], sound: NDArray[np.float32], start: int) -> None:
    """Add a sound to a wave in place, from a sample on; what does not fit is cut."""
    stop = min(start + len(sound), len(wave))
    wave[start:stop] += sound[: stop - start]


def kick(sample_rate: int) -> NDArray[np.float32]:
    """A bass drum of 0.12 s whose pitch falls to 55 Hz: float32, peak 1."""
    t = np.arange(int(0.12 * sample_rate)) / sample_rate
    glide = 55 * t + (1 - np.exp(-30 * t))  # Hz * s: a falling pitch
    return np.asarray(np.sin(2 * np.pi * glide) * np.exp(-t / 0.05), np.float32)


def snare(rng: np.random.Generator, sample_rate: int) -> NDArray[np.float32]:
    """A snare drum of 0.10 s, white noise that decays: float32."""
    t = np.arange(int(0.10 * sample_rate)) / sample_rate
    return np.asarray(0.5 * rng.standard_normal(len(t)) * np.exp(-t / 0.03), np.float32)


def note(
    pitch: int,
    rolloff: float,
    decay_s: float,
    sample_rate: int,
    ceiling_hz: float = float("inf"),
) -> NDArray[np.float32]:
    """A note of up to eight harmonics: float32.

    Args:
        pitch: MIDI number; 69 is 440 Hz.
        rolloff: exponent by which harmonics fall.
        decay_s: time constant; the note ends after three of them, or 0.6 s.
        sample_rate: in Hz.
        ceiling_hz: harmonics from here on are left out.
    """
    t = np.arange(int(min(0.6, 3 * decay_s) * sample_rate)) / sample_rate
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    harmonic = np.arange(1, 9)[:, None]
    harmonic = harmonic[frequency * harmonic[:, 0] < ceiling_hz]
    tones = harmonic**-rolloff * np.sin(2 * np.pi * frequency * harmonic * t)
    envelope = np.minimum(t / 0.005, 1) * np.exp(-t / decay_s)
    return np.asarray(0.12 * tones.sum(axis=0) * envelope, np.float32)
