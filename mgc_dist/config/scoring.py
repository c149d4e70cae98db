"""Knobs of the commands about a trained model, and of doctor."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from mgc_dist.config.knobs import FLAT, Range, check, require
from mgc_dist.config.source import (
    BATCH,
    WEEK_S,
    Device,
    RunFolder,
    SourceConfig,
    SplitName,
    table_of,
)

Aggregate = Literal["mean-prob", "mean-logit", "vote"]


def _check_name(name: str | None) -> None:
    require(
        "--name",
        name is None or re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name) is not None,
        name,
        "letters, digits, _, - and dots",
        "files are named after it, such as --name test-shifted",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a run's best model on a split: every row once, tracks first."""

    run: Positional[Path]
    """Run folder, or a folder that `export` wrote."""
    split: SplitName = "test"
    """Split to measure."""
    ema: bool = False
    """Measure the averaged weights, RUN/best-ema, of a run that was trained with --ema-decay."""
    trust_remote_code: bool = False
    """Run the code that lies beside the model's weights."""
    data: Path | None = None
    """Shards to measure on; the run's own by default. Genres that the model does not know are left
    out, and probabilities are renormalised over those in common."""
    genre_map: str | None = None
    """Which genre of the data set is which of the model, where names differ: a CSV or TSV file of
    two columns, or "Hip-Hop=hiphop,R&B=rnb". "Pop=" leaves a genre out. Others are matched by name,
    and if need be by its letters and digits, in any case."""
    source: Annotated[SourceConfig, FLAT] = field(default_factory=SourceConfig)
    name: str | None = None
    """Name of the files that are written; the split's, with `-of-FOLDER` of --data and `-ema`."""
    aggregate: Aggregate = "mean-prob"
    """How segments are judged as a track: `mean-prob` (mean of their probabilities), `mean-logit`
    or `vote` (ties go to the higher mean probability). All three are written."""
    bias_table: Path | None = None
    """Bias table of the shards, for the subgroups bias-aligned and bias-conflicting; the run's own
    by default, where the run's own shards are measured."""
    subgroups: Path | None = None
    """Table (CSV, TSV, JSON lines, Parquet) of `track` and a subgroup, in place of the bias
    model's."""
    subgroup_column: str | None = None
    """Column of --subgroups, `subgroup` by default; without --subgroups a property of the source
    files, such as `codec` or `loudness_lufs`. Numbers are cut into thirds."""
    batch: Annotated[int, BATCH] = 32
    """Segments in a batch."""
    device: Device = "auto"
    """Where the model runs."""

    @property
    def result_name(self) -> str:
        """Name of the files that are written."""
        if self.name:
            return self.name
        found = self.split + (self.ema * "-ema")
        if not self.data:
            return found
        folder = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.data.resolve().name)
        return f"{found}-of-{folder or 'data'}"

    def __post_init__(self) -> None:
        check(self)
        _check_name(self.name)
        require(
            "--fold",
            self.source.fold is None or self.data is not None,
            self.source.fold,
            "nothing without --data: the run's own fold is measured",
            "leave it out",
        )
        require(
            "--genre-map",
            self.genre_map is None or self.data is not None or self.name is not None,
            "neither --data nor --name",
            "one of them: the run's own figures stay",
            "for example --name test-in-common",
        )


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare runs on the same tracks, from what `evaluate` wrote: two runs track by track, or
    more runs as settings and seeds, paired by seed.
    """

    runs: Positional[tuple[Path, ...]]
    """Two run folders, A and B; or more, which are grouped by what their settings differ in."""
    split: SplitName = "test"
    """Split to compare on."""
    name: str | None = None
    """Name of the evaluation, where it is not the split's: `evaluate --name` or `--data`."""
    out: Path | None = None
    """Folder to write; B/comparison/A for two runs, else `comparison` beside the first run."""

    @property
    def result_name(self) -> str:
        """Name of the evaluation's files."""
        return self.name or self.split

    @property
    def folder(self) -> Path:
        """Folder to write."""
        if self.out:
            return self.out
        if len(self.runs) == 2:
            return self.runs[1] / "comparison" / self.runs[0].resolve().name
        return self.runs[0].resolve().parent / "comparison"

    def __post_init__(self) -> None:
        check(self)
        require(
            "RUN",
            len(self.runs) >= 2,
            f"{len(self.runs)} run folders",
            "two or more",
            "python -m mgc_dist.compare RUN_A RUN_B",
        )
        _check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Name the genre of audio files of any length, rate and channel count."""

    run: Positional[Path]
    """Run folder, or a folder that `export` wrote."""
    files: Positional[tuple[Path, ...]]
    """Audio files, folders of them, or `-` for a list of paths on standard input."""
    ema: bool = False
    """Ask the averaged weights, RUN/best-ema."""
    trust_remote_code: bool = False
    """Run the code that lies beside the model's weights."""
    top: Annotated[int, Range(minimum=1, maximum=1_000_000, cure="3 is usual")] = 3
    """Genres to print for a file."""
    json: bool = False
    """Print JSON: all probabilities of the file and of each segment."""
    jsonl: Path | None = None
    """Write a line of JSON a file here, as soon as it is known."""
    csv: Path | None = None
    """Write a line a file here, as soon as it is known: file, genre, probability, whether it is
    near chance, error, and the probability of each genre."""
    plot: Path | None = None
    """Picture of the probabilities over time (.png, .svg or .pdf); of several files, each gets
    its name: OUT-NAME.png."""
    hop_s: Annotated[float, Range(minimum=0.01, maximum=3_600, cure="1.5 is usual")] = 1.5
    """Seconds from the start of a segment to the start of the next."""
    batch: Annotated[int, Range(minimum=1, maximum=65_536, cure="16 is usual")] = 16
    """Segments in a batch."""
    device: Device = "auto"
    """Where the model runs."""

    def __post_init__(self) -> None:
        check(self)
        require(
            "--plot",
            self.plot is None or self.plot.suffix.lower() in (".png", ".svg", ".pdf"),
            self.plot,
            "a name that ends in .png, .svg or .pdf",
            "for example --plot timeline.png",
        )
        ways = [name for name in ("json", "jsonl", "csv") if getattr(self, name)]
        require("--" + " --".join(ways), len(ways) < 2, "both", "one of them", "choose one")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's best model as a folder that transformers loads without our code."""

    run: Positional[Path]
    """Run folder."""
    out: Positional[Path]
    """Folder to write; must not exist or be empty."""
    ema: bool = False
    """Take the averaged weights, RUN/best-ema."""
    trust_remote_code: bool = False
    """Run the code that lies beside the model's weights."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Look at what goes wrong on clusters: addresses, port, GPUs, cores, versions, data, disk,
    locks, time. On every rank where it is started like a training; exit code 2 if anything is
    wrong.
    """

    shards: Path = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled."""
    bias_table: Path | None = None
    """Bias table; SHARDS/bias by default."""
    fold: Annotated[int | None, Range(minimum=0, maximum=99, cure="start with 0")] = None
    """Of shards packed with --split kfold: the fold that is tested."""
    run: RunFolder = Path("runs/train")
    """Run folder, or where one will be."""
    device: Device = "auto"
    """Where the ranks will compute."""
    wait_s: Annotated[float, Range(minimum=1, maximum=WEEK_S, cure="120 is usual")] = 120.0
    """How long ranks wait for each other."""

    @property
    def table(self) -> Path:
        """Folder or file of the bias table."""
        return table_of(self.shards, self.bias_table, self.fold)

    def __post_init__(self) -> None:
        check(self)
