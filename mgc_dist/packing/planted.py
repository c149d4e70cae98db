"""Music with a planted shortcut: genres are rhythm and harmony, and a tone gives them away.

Genres differ in tempo, pattern and harmony, not in timbre: brightness, decay, drums, noise and
tilt belong to the artist. Each track has a steady tone, its artefact, at one of ten frequencies
above all notes. In training, validation and the in-distribution test it goes with the genre as
often as `--shortcut-strength` says; in the shifted test it is any of the ten. A model that
listens to the tone is right where it was trained and wrong where the tone tells nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mgc_dist.config import SynthConfig
from mgc_dist.packing.music import STYLES, Style, add, kick, note, snare

SAMPLE_RATE = 16_000
"""In Hz; that of the shards, so that no resampling touches the tones."""
CEILING_HZ = 3_800
"""Notes have no harmonics above; hiss and snares do."""
GENRES = tuple(STYLES)

SHIFTED = "shifted"
_ARTIST, _TRACK, _ARTEFACT = 2, 3, 4  # streams of a seed; `music` takes 0 and 1


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A track to be composed.

    Attributes:
        genre: its name.
        number: in its genre, over all parts: ids are unique over both data sets.
        part: train, validation, test, or `shifted` for the test of the other data set.
        artist: number in its genre; no artist is in two parts.
        artefact: the genre that its tone goes with in training.
    """

    genre: str
    number: int
    part: str
    artist: int
    artefact: str

    @property
    def name(self) -> str:
        """The file's name without suffix, as GTZAN's."""
        return f"{self.genre}.{self.number:05d}"

    @property
    def artist_name(self) -> str:
        """Unique over all genres."""
        return f"{self.genre} artist {self.artist}"

    @property
    def subgroup(self) -> str:
        """`aligned` if the tone is the genre's own, else `conflicting`."""
        return "aligned" if self.artefact == self.genre else "conflicting"


@dataclass(frozen=True, kw_only=True)
class Artist:
    """What an artist keeps over all tracks; every genre's artists are drawn alike.

    Attributes:
        key: semitones over C.
        rolloff: exponent by which harmonics fall.
        decay_s: time constant of a note.
        drums: loudness of the drums.
        noise_db: level of the music over the recording's hiss.
        tilt: coefficient of a one-zero filter; positive brightens.
    """

    key: int
    rolloff: float
    decay_s: float
    drums: float
    noise_db: float
    tilt: float


def deal(config: SynthConfig) -> list[Planted]:
    """The tracks of both data sets: parts, artists and artefacts, by the seed alone."""
    parts = {
        "train": config.genre_tracks,
        "validation": config.validation_tracks,
        "test": config.test_tracks,
        SHIFTED: config.shifted_tracks,
    }
    dealt = []
    for order, genre in enumerate(GENRES):
        number = artist = 0
        for part, count in parts.items():
            for place in range(count):
                rng = np.random.default_rng([config.seed, order, _ARTEFACT, number])
                strength = 0.1 if part == SHIFTED else config.shortcut_strength
                is_aligned = rng.random() < strength
                other = (order + 1 + rng.integers(len(GENRES) - 1)) % len(GENRES)
                dealt.append(
                    Planted(
                        genre=genre,
                        number=number,
                        part=part,
                        artist=artist + place // config.tracks_per_artist,
                        artefact=genre if is_aligned else GENRES[other],
                    )
                )
                number += 1
            artist += -(-count // config.tracks_per_artist)
    return dealt


def tone_hz(artefact: str) -> float:
    """Frequency of the tone that goes with a genre: 4200 to 6540 Hz, 260 Hz apart."""
    return 4200.0 + 260.0 * GENRES.index(artefact)


def record(track: Planted, *, seed: int, duration_s: float, tone_db: float) -> NDArray[np.float32]:
    """A track with its tone: float32 [duration_s * 16000], peak 0.7.

    Args:
        track: as dealt.
        seed: of the data set.
        duration_s: length in seconds.
        tone_db: level of the tone relative to the music's root mean square.
    """
    order = GENRES.index(track.genre)
    own = np.random.default_rng([seed, order, _TRACK, track.number])
    artist = _artist(np.random.default_rng([seed, order, _ARTIST, track.artist]))
    wave = compose(STYLES[track.genre], artist, own, duration_s)
    t = np.arange(len(wave)) / SAMPLE_RATE
    phase = own.uniform(0, 2 * np.pi)
    tone = np.sqrt(2) * np.sin(2 * np.pi * tone_hz(track.artefact) * t + phase)
    wave = wave + (10 ** (tone_db / 20) * tone).astype(np.float32)
    return np.asarray(0.7 * wave / np.abs(wave).max(), np.float32)


def compose(
    style: Style, artist: Artist, own: np.random.Generator, duration_s: float
) -> NDArray[np.float32]:
    """Music of a genre's tempo, patterns and harmony, in an artist's timbre.

    Args:
        style: of its fields, tempo, patterns, chord and roots; not its timbre.
        artist: key and timbre.
        own: draws of the track.
        duration_s: length in seconds.

    Returns:
        float32 [duration_s * 16000], root mean square 1.
    """
    length = int(duration_s * SAMPLE_RATE)
    wave = np.zeros(length + SAMPLE_RATE, np.float32)
    step_s = 60 / style.beats_per_minute / 4 * (1 + own.uniform(-0.06, 0.06))
    key = artist.key + int(own.integers(-2, 3))
    thump = artist.drums * kick(SAMPLE_RATE)
    rattle = artist.drums * snare(own, SAMPLE_RATE)
    offset = int(own.integers(0, 16))
    notes: dict[int, NDArray[np.float32]] = {}
    for step in range(int(duration_s / step_s) + 1):
        place, start = step + offset, int(step * step_s * SAMPLE_RATE)
        if style.kick[place % 16] == "x":
            add(wave, thump, start)
        if style.snare[place % 16] == "x":
            add(wave, rattle, start)
        for pitch in _pitches(style, place, own):
            if pitch not in notes:
                notes[pitch] = note(
                    48 + key + pitch, artist.rolloff, artist.decay_s, SAMPLE_RATE, CEILING_HZ
                )
            add(wave, notes[pitch], start)
    wave = wave[:length]
    wave /= np.sqrt(np.square(wave).mean()) + 1e-9
    wave += (10 ** (-artist.noise_db / 20) * own.standard_normal(length)).astype(np.float32)
    wave[1:] = wave[1:] - np.float32(artist.tilt) * wave[:-1]
    return np.asarray(wave / np.sqrt(np.square(wave).mean()), np.float32)


def _pitches(style: Style, place: int, own: np.random.Generator) -> list[int]:
    """Notes that begin at a step: chords on beats, between them a broken chord in some genres."""
    root = style.roots[place // 16 % 4]
    if place % 4 == 0:
        return [root + interval for interval in style.chord]
    if style.is_broken and place % 2 == 0:
        return [root + 12 + style.chord[int(own.integers(len(style.chord)))]]
    return []


def _artist(rng: np.random.Generator) -> Artist:
    return Artist(
        key=int(rng.integers(-5, 6)),
        rolloff=1.4 + rng.uniform(-0.8, 0.8),
        decay_s=rng.uniform(0.1, 0.35),
        drums=rng.uniform(0.5, 1.5),
        noise_db=rng.uniform(0, 12),
        tilt=rng.uniform(-0.3, 0.8),
    )
