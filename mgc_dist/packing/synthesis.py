"""The body of `synth`: tracks in GTZAN's folder layout, and the tables that describe them."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
from numpy.typing import NDArray

from mgc_dist.config import SynthConfig
from mgc_dist.console import progress
from mgc_dist.files import replace_text
from mgc_dist.packing import planted
from mgc_dist.packing.music import SAMPLE_RATE, STYLES, compose
from mgc_dist.packing.planted import SHIFTED, Planted
from mgc_dist.workers import spread

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """What was written.

    Attributes:
        tracks: how many, in all.
        homes: folder of each data set.
    """

    tracks: int
    homes: tuple[Path, ...]


def write_genres(config: SynthConfig) -> Synthesis:
    """Ten genres that a small model learns in minutes, in OUT."""
    jobs = [
        (genre, number, config.out / "genres_original" / genre / f"{genre}.{number:05d}.wav")
        for genre in STYLES
        for number in range(config.genre_tracks)
    ]
    write = partial(
        _write,
        seed=config.seed,
        duration_s=config.track_s,
        per_artist=config.tracks_per_artist,
    )
    _write_all(config, write, jobs, [path for _, _, path in jobs])
    table = config.out / "artists.csv"
    lines = [
        (path.stem, genre, f"{genre} artist {number // config.tracks_per_artist}")
        for genre, number, path in jobs
    ]
    _write_table(table, ("track", "genre", "artist"), lines)  # last: all tracks are there
    return Synthesis(tracks=len(jobs), homes=(config.out,))


def write_shortcut(config: SynthConfig) -> Synthesis:
    """Two data sets with a planted shortcut, OUT and OUT/shifted, each with its tables."""
    tracks = planted.deal(config)
    jobs = [
        (track, _home(config, track) / "genres_original" / track.genre / f"{track.name}.wav")
        for track in tracks
    ]
    record = partial(
        planted.record,
        seed=config.seed,
        duration_s=config.track_s,
        tone_db=config.tone_db,
        kind=config.artefact,
        strength=config.strength,
    )
    write = partial(_write_planted, record=record)
    _write_all(config, write, jobs, [path for _, path in jobs])
    for home in (config.out / SHIFTED, config.out):
        here = [track for track in tracks if _home(config, track) == home]
        splits = [(t.name, "test" if t.part == SHIFTED else t.part) for t in here]
        artefacts = [(t.name, t.genre, t.artefact, t.subgroup) for t in here]
        _write_table(home / "splits.csv", ("track", "split"), splits)
        _write_table(home / "artefacts.csv", ("track", "genre", "artefact", "subgroup"), artefacts)
        _write_table(
            home / "artists.csv",
            ("track", "genre", "artist"),
            [(t.name, t.genre, t.artist_name) for t in here],
        )
    return Synthesis(tracks=len(jobs), homes=(config.out, config.out / SHIFTED))


def _home(config: SynthConfig, track: Planted) -> Path:
    return config.out / SHIFTED if track.part == SHIFTED else config.out


def _write_all(
    config: SynthConfig, write: Callable[[T], None], jobs: Sequence[T], paths: Iterable[Path]
) -> None:
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    with progress("composing", len(jobs), unit="tracks") as bar:
        for _ in bar.over(spread(write, jobs, config.jobs)):
            pass


def _write_table(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(columns)
    writer.writerows(rows)
    replace_text(path, lines.getvalue())


def _write(job: tuple[str, int, Path], *, seed: int, duration_s: float, per_artist: int) -> None:
    genre, number, path = job
    wave = compose(genre, number, seed=seed, duration_s=duration_s, per_artist=per_artist)
    soundfile.write(str(path), wave, SAMPLE_RATE, subtype="PCM_16")


def _write_planted(
    job: tuple[Planted, Path], *, record: Callable[[Planted], NDArray[np.float32]]
) -> None:
    track, path = job
    soundfile.write(str(path), record(track), planted.SAMPLE_RATE, subtype="PCM_16")
