"""`python -m mgc_dist.synth OUT`: a seeded synthetic data set in GTZAN's folder layout.

Ten genres that a small model learns in minutes on a CPU (`music`), or, with `--shortcut`, a set
with a planted shortcut and a second one in which the shortcut tells nothing (`planted`).
`artists.csv` names the artists, for `python -m mgc_dist.shard --groups`.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from mgc_dist import cli
from mgc_dist.config import SynthConfig
from mgc_dist.console import progress
from mgc_dist.files import replace_text
from mgc_dist.packing import planted
from mgc_dist.packing.music import SAMPLE_RATE, STYLES, compose
from mgc_dist.packing.planted import SHIFTED, Planted
from mgc_dist.workers import spread

T = TypeVar("T")


def run(config: SynthConfig) -> None:
    """Write the tracks, then the tables that describe them.

    Raises:
        UserError: never; existing files of the same names are replaced.
    """
    if config.shortcut:
        _write_shortcut(config)
    else:
        _write_genres(config)


def _write_genres(config: SynthConfig) -> None:
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
    print(
        f"Wrote {len(jobs)} tracks of {config.track_s:g} s and {table}; next: "
        f"python -m mgc_dist.shard --data {config.out / 'genres_original'} --groups {table}"
    )


def _write_shortcut(config: SynthConfig) -> None:
    """Two data sets, OUT and OUT/shifted, each with its tables."""
    tracks = planted.deal(config)
    jobs = [
        (track, _home(config, track) / "genres_original" / track.genre / f"{track.name}.wav")
        for track in tracks
    ]
    write = partial(
        _write_planted, seed=config.seed, duration_s=config.track_s, tone_db=config.tone_db
    )
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
    print(f"Wrote {len(jobs)} tracks of {config.track_s:g} s with a planted shortcut; next:")
    for home, name in ((config.out, "shortcut"), (config.out / SHIFTED, "shortcut-shifted")):
        print(
            f"python -m mgc_dist.shard --data {home / 'genres_original'} "
            f"--groups {home / 'artists.csv'} --split-file {home / 'splits.csv'} "
            f"--segment-s 1 --hop-s 1 --out shards/{name}"
        )


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
    import soundfile

    genre, number, path = job
    wave = compose(genre, number, seed=seed, duration_s=duration_s, per_artist=per_artist)
    soundfile.write(str(path), wave, SAMPLE_RATE, subtype="PCM_16")


def _write_planted(
    job: tuple[Planted, Path], *, seed: int, duration_s: float, tone_db: float
) -> None:
    import soundfile

    track, path = job
    wave = planted.record(track, seed=seed, duration_s=duration_s, tone_db=tone_db)
    soundfile.write(str(path), wave, planted.SAMPLE_RATE, subtype="PCM_16")


def main() -> None:
    """Entry of `python -m mgc_dist.synth`."""
    cli.main("synth", SynthConfig, run)


if __name__ == "__main__":
    main()
