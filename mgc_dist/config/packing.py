"""Knobs of synth and shard: audio to shards."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from mgc_dist.config.knobs import Range, check, require
from mgc_dist.config.source import SEED

ArtefactName = Literal["tone", "cutoff", "tilt", "codec"]

JOBS = Range(minimum=0, maximum=1_024, cure="0 means one a core")
_TRACKS = Range(minimum=1, maximum=20_000, cure="names have five digits")
_LEAST = Range(minimum=0, maximum=1_000_000, cure="3 leaves out those too small to split")
_MOST = Range(minimum=1, maximum=1_000_000, cure="leave it out to keep all")
_SHARD = Range(minimum=1, maximum=1_000_000, cure="leave it out to go by the size of the data set")
_FRACTION = Range(above=0, below=1, cure="0.15 is usual")


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Write a synthetic data set in GTZAN's folder layout: ten genres that differ in tempo,
    pattern, harmony and timbre, with artists that keep a sound of their own.

    With `--shortcut`, genres differ in tempo, pattern and harmony only, and an artefact gives
    them away in nearly all tracks; a second data set, OUT/shifted, has the artefacts at random.
    """

    out: Positional[Path]
    """Folder to write `genres_original/GENRE/GENRE.NNNNN.wav` and `artists.csv` into."""
    tracks_per_genre: Annotated[int | None, _TRACKS] = None
    """Tracks of each of the ten genres: 100, or 48 training tracks with --shortcut."""
    tracks_per_artist: Annotated[
        int, Range(minimum=1, maximum=20_000, cure="1 is a different artist on every track")
    ] = 4
    """Consecutive tracks of a genre that share an artist."""
    duration_s: Annotated[float | None, Range(minimum=1, maximum=3_600, cure="30 is usual")] = None
    """Length of a track in seconds: 30, or 4 with --shortcut."""
    seed: Annotated[int, SEED] = 0
    """Same seed and settings, same bytes."""
    jobs: Annotated[int, JOBS] = 0
    """Processes; 0 means one a core. The output does not depend on it."""
    shortcut: bool = False
    """Plant a shortcut, and write splits.csv (for `shard --split-file`), artefacts.csv, and the
    shifted test set; 16 kHz instead of 22.05."""
    shortcut_strength: Annotated[
        float, Range(minimum=0, maximum=1, cure="0.9 is the benchmark's")
    ] = 0.9
    """Share of tracks whose artefact is their genre's, but in the shifted test, where it is 0.1."""
    artefact: ArtefactName = "tone"
    """What gives the genre away: a steady `tone`, the `cutoff` above which the spectrum ends, a
    `tilt` of the spectrum, or `codec`, an MP3 of some bit rate that is decoded again."""
    strength: Annotated[float, Range(above=0, maximum=1, cure="1 and 0.3 are usual")] = 1.0
    """How strong it is: times the tone's amplitude, or the distances between genres."""
    tone_db: Annotated[float, Range(minimum=-80, maximum=20, cure="-10 is the benchmark's")] = -10.0
    """Level of the tone relative to the music's root mean square, at --strength 1."""
    validation_tracks: Annotated[int, _TRACKS] = 4
    """Validation tracks of each genre with --shortcut."""
    test_tracks: Annotated[int, _TRACKS] = 12
    """Test tracks of each genre with --shortcut, the artefacts as in training."""
    shifted_tracks: Annotated[int, _TRACKS] = 12
    """Tracks of each genre in the shifted test set of --shortcut."""

    @property
    def genre_tracks(self) -> int:
        """Tracks of a genre; training tracks of the planted set."""
        return self.tracks_per_genre or (48 if self.shortcut else 100)

    @property
    def track_s(self) -> float:
        """Length of a track in seconds."""
        return self.duration_s or (4.0 if self.shortcut else 30.0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Cut tracks into segments and pack them into webdataset tar shards.

    `python -m mgc_dist.shard verify SHARDS` re-reads and checks a packed data set,
    `python -m mgc_dist.shard info SHARDS` describes it and writes its splits as a table; both
    have a --help of their own.
    """

    data: Path = Path("data/genres_original")
    """Folder of `GENRE/*` with music in any format that FFmpeg reads (.mp3, .flac, .m4a, ...),
    or a table (CSV, TSV, JSON lines) with the columns path, genre and, if known, group, split,
    track."""
    layout: Literal["auto", "folders", "nested", "fma", "jamendo", "table"] = "auto"
    """`folders` (GENRE/NAME), `nested` (GENRE/ARTIST/.../NAME), `fma` (FMA's numbered folders and
    tracks.csv), `jamendo` (MTG-Jamendo's, with --table; tracks of exactly one wanted genre),
    `table`, or `auto`: a table or folders."""
    table: Path | None = None
    """Table of tracks whose paths lie below the folder --data; FMA's or MTG-Jamendo's own."""
    columns: tuple[str, ...] = ()
    """Columns of the table that have other names, such as `path=file genre=style`."""
    genres: str | None = None
    """Genres to take, with commas between them; others are left out."""
    min_tracks: Annotated[int, _LEAST] = 0
    """Genres with fewer usable tracks are left out."""
    out: Path = Path("shards")
    """Folder for the shards, index.npy and manifest.json."""
    split: str = "auto"
    """`fault-filtered` (GTZAN's; Kereliuk et al. 2015), `stratified` (by genre, artists kept
    together), `kfold` (so too, for cross-validation: bias, train and evaluate take --fold I),
    `table` (a column split of the table, or --split-file), or `auto`: table if there is one,
    fault-filtered if all its tracks are there, else stratified."""
    split_file: Path | None = None
    """CSV or TSV table of `track` (or `path`) and `split`, or the predecessor's data_split.txt."""
    split_from: Path | None = None
    """Packed data set whose tracks and artists keep their splits; new ones are dealt."""
    folds: Annotated[int, Range(minimum=3, maximum=100, cure="5 is usual")] = 5
    """Folds of `kfold`."""
    groups: Path | None = None
    """Table of `track` and `artist` (or `group`), or `gtzan` for the list of GTZAN's artists; a
    group is never in two splits."""
    repetitions: bool = True
    """Look for the same recording twice, by ear: copies, excerpts, other encodings or speeds. In
    two splits it is refused."""
    same_group: bool = False
    """Keep tracks that hold the same recording, and their artists, in one split."""
    validation_fraction: Annotated[float, _FRACTION] = 0.15
    """Share of each genre's tracks for validation (`stratified`)."""
    test_fraction: Annotated[float, _FRACTION] = 0.15
    """Share of each genre's tracks for test (`stratified`)."""
    seed: Annotated[int, SEED] = 0
    """Seed of `stratified` and `kfold`."""
    segment_s: Annotated[float, Range(above=0, maximum=600, cure="3 is usual")] = 3.0
    """Length of a segment in seconds."""
    hop_s: Annotated[float, Range(above=0, maximum=3_600, cure="1.5 is usual")] = 1.5
    """Seconds from the start of a segment to the start of the next."""
    max_segments: Annotated[int | None, _MOST] = None
    """Segments of a track at most, spread over it, so that long tracks do not rule training."""
    sample_rate: Annotated[
        int, Range(minimum=4_000, maximum=192_000, cure="wav2vec2 models want 16000")
    ] = 16_000
    """Sample rate of the shards in Hz; wav2vec2 wants 16000."""
    rows_per_shard: Annotated[int | None, _SHARD] = None
    """Segments in a shard. By default 512, of 3 s 50 MB; where that gives more than 256 shards, so
    many that 256 shards hold all, up to 1 GB a shard."""
    allow_bad: str = "0"
    """Unusable files that may be left out: a number, or a share such as `1%`. The manifest lists
    them."""
    jobs: Annotated[int, JOBS] = 0
    """Processes; 0 means one a core. The output does not depend on it."""
    part: str | None = None
    """`I/N`: only decode part I of N of the tracks, into OUT/parts; for several machines."""
    join: bool = False
    """Join the parts in OUT/parts into a data set: the bytes of packing in one go."""
    overwrite: bool = False
    """Replace a different data set in the output folder."""
    dry_run: bool = False
    """Print the plan (tracks, segments, shards, bytes, leak check) and stop."""
    decode: bool = False
    """With --dry-run: decode all tracks into OUT/parts, so that the plan is the truth. Packing
    then does not decode them again."""

    @property
    def segment_samples(self) -> int:
        """T: audio samples of a segment."""
        return round(self.segment_s * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        """Audio samples from a segment's start to the next one's."""
        return round(self.hop_s * self.sample_rate)

    def bad_allowed(self, tracks: int) -> int:
        """How many of so many tracks may be unusable."""
        share = self.allow_bad.removesuffix("%")
        return int(share) if share == self.allow_bad else int(float(share) / 100 * tracks)

    @property
    def part_of(self) -> tuple[int, int] | None:
        """(I, N) of `--part I/N`, I from 1."""
        match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", self.part or "")
        return (int(match[1]), int(match[2])) if match else None

    def __post_init__(self) -> None:
        check(self)
        require(
            "--segment-s",
            self.segment_samples >= 400,
            self.segment_s,
            "400 samples or more",
            "3 is usual",
        )
        require("--hop-s", self.hop_samples >= 1, self.hop_s, "a sample or more", "1.5 is usual")
        part = self.part_of
        require(
            "--part",
            self.part is None or (part is not None and 1 <= part[0] <= part[1]),
            self.part,
            "I/N with I from 1 to N",
            "for example --part 1/4, 2/4, 3/4 and 4/4, then --join",
        )
        require(
            "--decode",
            self.dry_run or not self.decode,
            self.decode,
            "with --dry-run",
            "packing decodes anyway",
        )
        require(
            "--part", not (part and self.join), self.part, "no --join", "join in a step of its own"
        )
        require(
            "--allow-bad",
            re.fullmatch(r"[0-9]{1,9}|[0-9]{1,2}(\.[0-9]{1,9})?%", self.allow_bad) is not None,
            self.allow_bad,
            "a number, or a percentage below 100",
            "for example 12, or 1%",
        )
        require(
            "--same-group",
            self.repetitions or not self.same_group,
            "--no-repetitions",
            "repetitions that are looked for",
            "leave one of them out",
        )
        fractions = (self.validation_fraction, self.test_fraction)
        require(
            "--validation-fraction and --test-fraction",
            sum(fractions) < 1,
            fractions,
            "together below 1",
            "0.15 each is usual",
        )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Re-read a packed data set and check every byte: sizes, sha256, tar headers, checksums,
    descriptions, data-set id, and a whole pass with stock webdataset.
    """

    shards: Positional[Path] = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled."""
    jobs: Annotated[int, JOBS] = 0
    """Processes; 0 means one a core."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Describe a packed data set: splits, genres, artists, hours, bytes, settings."""

    shards: Positional[Path] = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled."""
    splits: Path | None = None
    """Write the splits into this CSV file: track, genre, group, split; `--split-file` reads it."""
