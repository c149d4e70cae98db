"""Music with a planted shortcut: genres are rhythm and harmony, and an artefact gives them away.

Genres differ in tempo, pattern and harmony, not in timbre: brightness, decay, drums, noise and
tilt belong to the artist. Each track has one of ten artefacts of a kind: a steady tone above all
notes, an end of the spectrum, a tilt of it, or what an MP3 of some bit rate leaves. In training,
validation and the in-distribution test it goes with the genre as often as `--shortcut-strength`
says; in the shifted test it is any of the ten. A model that listens to the artefact is right where
it was trained and wrong where the artefact tells nothing.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy import signal

from mgc_dist.config import ArtefactName, SynthConfig
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
        artefact: the genre that its artefact goes with in training.
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
        """`aligned` if the artefact is the genre's own, else `conflicting`."""
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


def record(
    track: Planted,
    *,
    seed: int,
    duration_s: float,
    tone_db: float,
    kind: ArtefactName = "tone",
    strength: float = 1.0,
) -> NDArray[np.float32]:
    """A track with its artefact: float32 [duration_s * 16000], peak 0.7.

    Args:
        track: as dealt.
        seed: of the data set.
        duration_s: length in seconds.
        tone_db: level of the tone relative to the music's root mean square, at strength 1.
        kind: of the artefact.
        strength: times the tone's amplitude, or the distances between the genres' artefacts.
    """
    order = GENRES.index(track.genre)
    own = np.random.default_rng([seed, order, _TRACK, track.number])
    artist = _artist(np.random.default_rng([seed, order, _ARTIST, track.artist]))
    wave = compose(STYLES[track.genre], artist, own, duration_s)
    if kind == "tone":
        wave = _with_tone(wave, track.artefact, strength * 10 ** (tone_db / 20), own)
    else:
        wave = _ALTERED[kind](wave, track.artefact, strength)
    return np.asarray(0.7 * wave / np.abs(wave).max(), np.float32)


def _with_tone(
    wave: NDArray[np.float32], artefact: str, amplitude: float, own: np.random.Generator
) -> NDArray[np.float32]:
    t = np.arange(len(wave)) / SAMPLE_RATE
    phase = own.uniform(0, 2 * np.pi)
    tone = np.sqrt(2) * np.sin(2 * np.pi * tone_hz(artefact) * t + phase)
    return np.asarray(wave + (amplitude * tone).astype(np.float32))


def cutoff_hz(artefact: str, strength: float = 1.0) -> float:
    """Where the spectrum of a genre ends: 4000 to 7600 Hz, 400 Hz times the strength apart."""
    return 7600.0 - 400.0 * strength * (len(GENRES) - 1 - GENRES.index(artefact))


def tilt_db(artefact: str, strength: float = 1.0) -> float:
    """Slope that is laid over a genre's spectrum, in dB per octave: 2 times the strength apart."""
    return 2.0 * strength * (GENRES.index(artefact) - (len(GENRES) - 1) / 2)


def kbit_rate(artefact: str, strength: float = 1.0) -> float:
    """Mean bit rate of a genre's MP3 in kbit/s: at most 45, in ratios down to 9 at strength 1."""
    return float(45.0 * (9 / 45) ** (strength * (1 - GENRES.index(artefact) / (len(GENRES) - 1))))


def _cut_off(wave: NDArray[np.float32], artefact: str, strength: float) -> NDArray[np.float32]:
    """Without what lies above: 60 dB down from there on."""
    stages = signal.cheby2(12, 60, cutoff_hz(artefact, strength), fs=SAMPLE_RATE, output="sos")
    return np.asarray(signal.sosfilt(stages, wave), np.float32)


def _tilted(wave: NDArray[np.float32], artefact: str, strength: float) -> NDArray[np.float32]:
    """With a slope over the spectrum; what lies below 60 Hz has the gain of 60 Hz."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE), 60) / 1000)
    gain = 10 ** (tilt_db(artefact, strength) * octaves / 20)
    return np.asarray(np.fft.irfft(np.fft.rfft(wave) * gain, len(wave)), np.float32)


def _coded(wave: NDArray[np.float32], artefact: str, strength: float) -> NDArray[np.float32]:
    """Through an MP3 and back, by libsndfile (LAME and mpg123)."""
    file = io.BytesIO()
    lowest, highest = 8.0, 160.0  # kbit/s of MPEG-2; libsndfile's level 0 is the highest
    soundfile.write(
        file,
        0.7 * wave / np.abs(wave).max(),
        SAMPLE_RATE,
        format="MP3",
        bitrate_mode="AVERAGE",
        compression_level=(highest - kbit_rate(artefact, strength)) / (highest - lowest),
    )
    file.seek(0)
    coded = soundfile.read(file, dtype="float32")[0][: len(wave)]
    return np.pad(coded, (0, len(wave) - len(coded)))


_ALTERED: dict[ArtefactName, Callable[[NDArray[np.float32], str, float], NDArray[np.float32]]] = {
    "cutoff": _cut_off,
    "tilt": _tilted,
    "codec": _coded,
}
"""How a wave gets an artefact that is not added to it."""


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
