"""`python -m mgc_dist.synth OUT`: a seeded synthetic data set in GTZAN's folder layout.

Ten genres differ in tempo, drum pattern, harmony, decay, brightness and loudness of the drums,
enough for a small model to learn them in minutes on a CPU. Artists keep a key, a recording
noise and a spectral tilt of their own over their tracks; `artists.csv` names them, for
`python -m mgc_dist.shard --groups`.
"""

import csv
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mgc_dist import cli
from mgc_dist.config import SynthConfig
from mgc_dist.display import progress
from mgc_dist.files import replace_text
from mgc_dist.workers import spread

if TYPE_CHECKING:
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


def _style(
    bpm: float,
    kick: str,
    snare: str,
    chord: tuple[int, ...],
    roots: tuple[int, int, int, int],
    timbre: tuple[float, float, float, float],
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
    )


# fmt: off
STYLES = {
    "blues": _style(70, "x.......x.......", "....x.......x...", (0, 4, 7, 10),
                    (0, 0, 5, 7), (1.2, 0.30, 0.70, 0.0)),
    "classical": _style(85, "x...x...x...x...", "................", (0, 4, 7),
                        (0, 7, 9, 5), (2.2, 0.90, 0.05, -0.3)),
    "country": _style(98, "x......xx.......", "....x.......x..x", (0, 4, 7, 9),
                      (0, 5, 7, 0), (1.6, 0.35, 0.60, 0.1)),
    "disco": _style(112, "x...x...x...x...", "....x.......x...", (0, 3, 7, 10),
                    (9, 5, 0, 7), (1.0, 0.15, 1.40, 0.5)),
    "hiphop": _style(122, "x..x....x.x.....", "....x..x.x..x...", (0, 7),
                     (0, 0, 3, 0), (1.8, 0.22, 1.60, -0.2)),
    "jazz": _style(132, "x.....x...x.....", "...x..x....x..x.", (0, 3, 7, 10, 14),
                   (2, 7, 0, 9), (2.0, 0.50, 0.40, 0.0)),
    "metal": _style(146, "x.x.x.x.x.x.x.x.", "....x...x...x...", (0, 7, 12),
                    (0, 3, 5, 6), (0.9, 0.20, 0.70, 0.5)),
    "pop": _style(92, "x.....x.x.......", "........x.......", (0, 4, 7, 11),
                  (0, 9, 5, 7), (1.3, 0.28, 1.00, 0.4)),
    "reggae": _style(78, "....x.......x...", "x...x...x...x...", (0, 3, 7),
                     (9, 7, 9, 7), (1.7, 0.18, 0.90, -0.1)),
    "rock": _style(165, "x..x..x...x..x..", "....x..x.x..x...", (0, 5, 7),
                   (0, 5, 3, 7), (0.8, 0.20, 1.10, 0.5)),
}
# fmt: on


def run(config: SynthConfig) -> None:
    """Write the tracks, then the table of artists.

    Raises:
        UserError: never; existing files of the same names are replaced.
    """
    jobs = [
        (genre, number, config.out / "genres_original" / genre / f"{genre}.{number:05d}.wav")
        for genre in STYLES
        for number in range(config.tracks_per_genre)
    ]
    for genre in STYLES:
        (config.out / "genres_original" / genre).mkdir(parents=True, exist_ok=True)
    write = partial(
        _write, seed=config.seed, duration_s=config.duration_s, per_artist=config.tracks_per_artist
    )
    with progress("composing", len(jobs), unit="tracks") as bar:
        for _ in bar.over(spread(write, jobs, config.jobs)):
            pass
    table, lines = config.out / "artists.csv", io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(("track", "genre", "artist"))
    for genre, number, path in jobs:
        artist = f"{genre} artist {number // config.tracks_per_artist}"
        writer.writerow((path.stem, genre, artist))
    replace_text(table, lines.getvalue())  # last: it says that all tracks are there
    print(
        f"Wrote {len(jobs)} tracks of {config.duration_s:g} s and {table}; next: "
        f"python -m mgc_dist.shard --data {config.out / 'genres_original'} --groups {table}"
    )


def compose(
    genre: str, number: int, *, seed: int, duration_s: float, per_artist: int
) -> "NDArray[np.float32]":
    """A track of a genre: float32 [duration_s * 22050], peak 0.7.

    Args:
        genre: a name in STYLES.
        number: of the track in its genre.
        seed: of the data set.
        duration_s: length in seconds.
        per_artist: consecutive tracks that share an artist.
    """
    import numpy as np

    style, order = STYLES[genre], list(STYLES).index(genre)
    artist = np.random.default_rng([seed, order, 0, number // per_artist])
    own = np.random.default_rng([seed, order, 1, number])
    key = int(artist.integers(-5, 6) + own.integers(-2, 3))
    decay_s = style.decay_s * artist.uniform(0.8, 1.25)
    rolloff = style.rolloff + artist.uniform(-0.8, 0.8)
    drums = style.drums * artist.uniform(0.7, 1.4)
    step_s = 60 / style.beats_per_minute / 4 * (1 + own.uniform(-0.06, 0.06))

    wave = np.zeros(int(duration_s * SAMPLE_RATE) + 2 * SAMPLE_RATE, np.float32)
    kick, snare = drums * _kick(), drums * _snare(own)
    notes: dict[int, NDArray[np.float32]] = {}
    offset = int(own.integers(0, 16))
    for step in range(int(duration_s / step_s) + 1):
        bar_step, start = step + offset, int(step * step_s * SAMPLE_RATE)
        if style.kick[bar_step % 16] == "x":
            _add(wave, kick, start)
        if style.snare[bar_step % 16] == "x":
            _add(wave, snare, start)
        if bar_step % 4 == 0:
            root = 48 + key + style.roots[bar_step // 16 % 4]
            for interval in style.chord:
                pitch = root + interval
                if pitch not in notes:
                    notes[pitch] = _note(pitch, rolloff, decay_s)
                _add(wave, notes[pitch], start)
    wave = wave[: int(duration_s * SAMPLE_RATE)]
    wave /= np.sqrt(np.square(wave).mean()) + 1e-9
    noise_db = artist.uniform(4, 20)
    wave += (10 ** (-noise_db / 20) * own.standard_normal(len(wave))).astype(np.float32)
    tilt = np.clip(style.tilt + artist.uniform(-0.4, 0.4), -0.5, 0.9)
    wave[1:] = wave[1:] - np.float32(tilt) * wave[:-1]
    return np.asarray(0.7 * wave / np.abs(wave).max(), np.float32)


def _write(job: tuple[str, int, Path], *, seed: int, duration_s: float, per_artist: int) -> None:
    import soundfile

    genre, number, path = job
    wave = compose(genre, number, seed=seed, duration_s=duration_s, per_artist=per_artist)
    soundfile.write(str(path), wave, SAMPLE_RATE, subtype="PCM_16")


def _add(wave: "NDArray[np.float32]", sound: "NDArray[np.float32]", start: int) -> None:
    stop = min(start + len(sound), len(wave))
    wave[start:stop] += sound[: stop - start]


def _kick() -> "NDArray[np.float32]":
    import numpy as np

    t = np.arange(int(0.12 * SAMPLE_RATE)) / SAMPLE_RATE
    glide = 55 * t + (1 - np.exp(-30 * t))  # Hz * s: a falling pitch
    return np.asarray(np.sin(2 * np.pi * glide) * np.exp(-t / 0.05), np.float32)


def _snare(rng: "np.random.Generator") -> "NDArray[np.float32]":
    import numpy as np

    t = np.arange(int(0.10 * SAMPLE_RATE)) / SAMPLE_RATE
    return np.asarray(0.5 * rng.standard_normal(len(t)) * np.exp(-t / 0.03), np.float32)


def _note(pitch: int, rolloff: float, decay_s: float) -> "NDArray[np.float32]":
    import numpy as np

    t = np.arange(int(min(0.6, 3 * decay_s) * SAMPLE_RATE)) / SAMPLE_RATE
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    harmonic = np.arange(1, 9)[:, None]
    tones = harmonic**-rolloff * np.sin(2 * np.pi * frequency * harmonic * t)
    envelope = np.minimum(t / 0.005, 1) * np.exp(-t / decay_s)
    return np.asarray(0.12 * tones.sum(axis=0) * envelope, np.float32)


if __name__ == "__main__":
    cli.main("synth", SynthConfig, run)
