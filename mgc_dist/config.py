"""Every knob of every command, typed; nothing here imports torch, so `--help` is quick.

A configuration is read-only after parsing. Flags are the field names without their section
(`--global-batch`, not `--optim.global-batch`), so a field name is used once per command.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, UseAppendAction

from mgc_dist.errors import UserError

Device = Literal["auto", "cpu", "cuda"]
SplitName = Literal["train", "validation", "test"]
SplitRule = Literal["auto", "fault-filtered", "stratified", "kfold", "table"]
LossName = Literal["ce", "poe", "learned-mixin", "learned-mixin-h", "reweight", "dfl", "mixture"]
Aggregate = Literal["mean-prob", "mean-logit", "vote"]
Precision = Literal["auto", "fp32", "bf16", "bf16-weights"]
Select = Literal["nll", "macro-f1", "last"]
ChangeName = Literal[
    "lr",
    "head-lr",
    "weight-decay",
    "warmup-fraction",
    "final-lr-fraction",
    "clip-norm",
    "loss",
    "bias-table",
    "model",
    "epochs",
    "global-batch",
    "seed",
    "window-shards",
    "shards",
    "cache",
]
Cache = Literal["none", "cnn", "trunk"]
CacheDtype = Literal["auto", "fp32", "bf16"]

FOREIGN_TABLES = (".csv", ".tsv", ".npy")
"""Suffixes of bias tables from elsewhere; ours are folders."""


def _require(flag: str, ok: bool, got: object, expected: str, cure: str) -> None:
    if not ok:
        raise UserError(flag, got=got, expected=expected, cure=cure)


def _require_name(name: str | None) -> None:
    _require(
        "--name",
        name is None or re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name) is not None,
        name,
        "letters, digits, _, - and dots",
        "files are named after it, such as --name test-shifted",
    )


def _require_resamples(resamples: int) -> None:
    _require(
        "--resamples",
        100 <= resamples <= 1_000_000,
        resamples,
        "100 to 1000000",
        "2000 is usual",
    )


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Write a synthetic data set in GTZAN's folder layout: ten genres that differ in tempo,
    pattern, harmony and timbre, with artists that keep a sound of their own.

    With `--shortcut`, genres differ in tempo, pattern and harmony only, and a steady tone gives
    them away in nearly all tracks; a second data set, OUT/shifted, has the tones at random.
    """

    out: Positional[Path]
    """Folder to write `genres_original/GENRE/GENRE.NNNNN.wav` and `artists.csv` into."""
    tracks_per_genre: int | None = None
    """Tracks of each of the ten genres: 100, or 48 training tracks with --shortcut."""
    tracks_per_artist: int = 4
    """Consecutive tracks of a genre that share an artist."""
    duration_s: float | None = None
    """Length of a track in seconds: 30, or 4 with --shortcut."""
    seed: int = 0
    """Same seed and settings, same bytes."""
    jobs: int = 0
    """Processes; 0 means one a core. The output does not depend on it."""
    shortcut: bool = False
    """Plant a shortcut, and write splits.csv (for `shard --split-file`), artefacts.csv, and the
    shifted test set; 16 kHz instead of 22.05."""
    shortcut_strength: float = 0.9
    """Share of tracks whose tone is their genre's, but in the shifted test, where it is 0.1."""
    tone_db: float = -10.0
    """Level of the tone relative to the music's root mean square."""
    validation_tracks: int = 4
    """Validation tracks of each genre with --shortcut."""
    test_tracks: int = 12
    """Test tracks of each genre with --shortcut, the tones as in training."""
    shifted_tracks: int = 12
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
        _require("--jobs", self.jobs >= 0, self.jobs, "0 or more", "0 means one a core")
        for flag, value in (
            ("--tracks-per-genre", self.tracks_per_genre),
            ("--validation-tracks", self.validation_tracks),
            ("--test-tracks", self.test_tracks),
            ("--shifted-tracks", self.shifted_tracks),
        ):
            _require(
                flag,
                value is None or 1 <= value <= 20_000,
                value,
                "1 to 20000",
                "names have five digits",
            )
        _require(
            "--duration-s",
            self.duration_s is None or self.duration_s >= 1,
            self.duration_s,
            "at least 1",
            "choose a longer one",
        )
        _require(
            "--tracks-per-artist",
            self.tracks_per_artist >= 1,
            self.tracks_per_artist,
            "at least 1",
            "choose 1 for a different artist on every track",
        )
        _require(
            "--shortcut-strength",
            0 <= self.shortcut_strength <= 1,
            self.shortcut_strength,
            "0 to 1",
            "0.9 is the benchmark's",
        )
        _require(
            "--tone-db",
            -80 <= self.tone_db <= 20,
            self.tone_db,
            "-80 to 20",
            "-10 is the benchmark's",
        )


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Cut tracks into segments and pack them into webdataset tar shards.

    `python -m mgc_dist.shard verify SHARDS` re-reads and checks a packed data set,
    `python -m mgc_dist.shard info SHARDS` describes it; both have a --help of their own.
    """

    data: Path = Path("data/genres_original")
    """Folder of `GENRE/*.wav` (.flac, .ogg, .mp3, .opus), or a CSV or TSV table with the
    columns path, genre and, if known, group, split, track."""
    out: Path = Path("shards")
    """Folder for the shards, index.npy and manifest.json."""
    split: SplitRule = "auto"
    """`fault-filtered` (GTZAN's; Kereliuk et al. 2015), `stratified` (by genre, artists kept
    together), `kfold` (fold I is test, I + 1 validation), `table` (a column split of the table,
    or --split-file), or `auto`: table if there is one, fault-filtered if all its tracks are
    there, else stratified."""
    split_file: Path | None = None
    """CSV or TSV table of `track` (or `path`) and `split`, or the predecessor's data_split.txt."""
    folds: int = 5
    """Folds of `kfold`."""
    fold: int = 0
    """Fold that is tested (`kfold`), 0 to folds - 1; the next one validates."""
    groups: Path | None = None
    """CSV or TSV table of `track` and `artist` (or `group`); a group is never in two splits."""
    validation_fraction: float = 0.15
    """Share of each genre's tracks for validation (`stratified`)."""
    test_fraction: float = 0.15
    """Share of each genre's tracks for test (`stratified`)."""
    seed: int = 0
    """Seed of `stratified` and `kfold`."""
    segment_s: float = 3.0
    """Length of a segment in seconds."""
    hop_s: float = 1.5
    """Seconds from the start of a segment to the start of the next."""
    sample_rate: int = 16_000
    """Sample rate of the shards in Hz; wav2vec2 wants 16000."""
    rows_per_shard: int = 512
    """Segments in a shard; 512 of 3 s are 50 MB."""
    allow_bad: int = 0
    """Unusable files that may be left out (they are listed in the manifest)."""
    jobs: int = 0
    """Processes; 0 means one a core. The output does not depend on it."""
    part: str | None = None
    """`I/N`: only decode part I of N of the tracks, into OUT/parts; for several machines."""
    join: bool = False
    """Join the parts in OUT/parts into a data set: the bytes of packing in one go."""
    overwrite: bool = False
    """Replace a different data set in the output folder."""
    dry_run: bool = False
    """Print the plan (tracks, segments, shards, bytes, leak check) and stop."""

    @property
    def segment_samples(self) -> int:
        """T: audio samples of a segment."""
        return round(self.segment_s * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        """Audio samples from a segment's start to the next one's."""
        return round(self.hop_s * self.sample_rate)

    @property
    def part_of(self) -> tuple[int, int] | None:
        """(I, N) of `--part I/N`, I from 1."""
        match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.part or "")
        return (int(match[1]), int(match[2])) if match else None

    def __post_init__(self) -> None:
        _require("--jobs", self.jobs >= 0, self.jobs, "0 or more", "0 means one a core")
        _require(
            "--sample-rate",
            4_000 <= self.sample_rate <= 192_000,
            self.sample_rate,
            "4000 to 192000 Hz",
            "wav2vec2 models want 16000",
        )
        for flag, value in (("--segment-s", self.segment_s), ("--hop-s", self.hop_s)):
            _require(flag, math.isfinite(value), value, "a number of seconds", "1.5 or 3 is usual")
        _require(
            "--segment-s",
            self.segment_samples >= 400,
            self.segment_s,
            "0.025 s or more",
            "3 is usual",
        )
        _require("--hop-s", self.hop_samples >= 1, self.hop_s, "a positive time", "1.5 is usual")
        _require(
            "--rows-per-shard",
            self.rows_per_shard >= 1,
            self.rows_per_shard,
            "at least 1",
            "512 is usual",
        )
        _require("--folds", self.folds >= 3, self.folds, "at least 3", "5 is usual")
        _require(
            "--fold", 0 <= self.fold < self.folds, self.fold, "0 to --folds - 1", "start with 0"
        )
        part = self.part_of
        _require(
            "--part",
            self.part is None or (part is not None and 1 <= part[0] <= part[1]),
            self.part,
            "I/N with I from 1 to N",
            "for example --part 1/4, 2/4, 3/4 and 4/4, then --join",
        )
        _require(
            "--part", not (part and self.join), self.part, "no --join", "join in a step of its own"
        )
        fractions = (self.validation_fraction, self.test_fraction)
        _require(
            "--validation-fraction and --test-fraction",
            min(fractions) > 0 and sum(fractions) < 1,
            fractions,
            "positive and together below 1",
            "0.15 each is usual",
        )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Re-read a packed data set and check every byte: sizes, sha256, tar headers, checksums,
    descriptions, data-set id, and a whole pass with stock webdataset.
    """

    shards: Positional[Path] = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled."""
    jobs: int = 0
    """Processes; 0 means one a core."""

    def __post_init__(self) -> None:
        _require("--jobs", self.jobs >= 0, self.jobs, "0 or more", "0 means one a core")


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Describe a packed data set: splits, genres, artists, hours, bytes, settings."""

    shards: Positional[Path] = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled."""


@dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """Run the frozen bias model over all shards once, fit its heads, and store its logits.

    Every layer's states are kept beside the table: other layers, folds, strengths or seeds fit
    new heads without another pass. A killed pass goes on with the same command. With a file of
    somebody else's logits as --bias-table, only its report is made.
    """

    shards: Path = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled."""
    bias_table: Path | None = None
    """Folder of the table; SHARDS/bias by default. A .csv, .tsv or .npy file is one from elsewhere:
    nothing is fitted, and its report is written beside it."""
    shards_from: str | None = None
    """Where to copy the shards from, into --shards, once per node: see `launch/train.py --help`."""
    stage_dir: str | None = None
    """Folder of each node, such as /scratch/$USER or '$TMPDIR', where its ranks copy the shards to,
    once, with their sha256 compared, and read them from."""
    stage_timeout_s: float = 3600.0
    """How long a rank waits for another one on its node that copies the shards."""
    backbone: str = "facebook/wav2vec2-base"
    """Hub name or folder of a transformers model, or `logmel` (40 log-mel bands, no weights)."""
    layer: tuple[int, ...] = (-1,)
    """Hidden layer that the heads see: 0 is the input of the encoder, -1 its last layer; of
    several (`--layer 6 7 8`) the mean."""
    folds: int = 5
    """Folds of the cross-fitting; no row's logits come from a head that saw its track or group."""
    head_c: float = 1.0
    """Inverse strength of the heads' L2 penalty (scikit-learn's C)."""
    batch: int = 32
    """Segments in a batch of the pass."""
    seed: int = 0
    """Seed of the folds."""
    device: Device = "auto"
    """Where the pass runs."""
    overwrite: bool = False
    """Replace a table made with other settings; hidden states that still fit are kept."""

    @property
    def table(self) -> Path:
        """Folder of the table, or a file from elsewhere."""
        return self.bias_table or self.shards / "bias"

    @property
    def is_foreign(self) -> bool:
        """Whether the table is a file from elsewhere, of which only the report is made."""
        return self.table.suffix in FOREIGN_TABLES and not self.table.is_dir()

    def __post_init__(self) -> None:
        _require("--folds", self.folds >= 2, self.folds, "at least 2", "5 is usual")
        _require("--head-c", self.head_c > 0, self.head_c, "a positive number", "1.0 is usual")
        _require("--batch", self.batch >= 1, self.batch, "at least 1", "32 is usual")
        _require(
            "--layer",
            0 < len(set(self.layer)) == len(self.layer),
            " ".join(map(str, self.layer)) or "nothing",
            "one or more layers, each once",
            "-1 is the last layer",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from."""

    shards: Path = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled."""
    bias_table: Path | None = None
    """Folder of the bias table; SHARDS/bias by default; not read with `--loss ce`. Or a table from
    elsewhere: a .csv or .tsv with the header key,GENRE,... or a structured .npy of such fields."""
    shards_from: str | None = None
    """Where to copy the shards from, into --shards, once per node: a folder, https://..., or
    `pipe:COMMAND` with {} for the file's name, such as `pipe:aws s3 cp s3://bucket/gtzan/{} -`."""
    stage_dir: str | None = None
    """Folder of each node, such as /scratch/$USER or '$TMPDIR', where its ranks copy the shards to,
    once, with their sha256 compared, and read them from."""
    stage_timeout_s: float = 3600.0
    """How long a rank waits for another one on its node that copies the shards."""
    read_ahead: int = 4
    """Batches that the reader threads keep ready."""
    reader_threads: int = 1
    """Threads that read; one gives 20,000 segments/s from memory, slow storage wants more."""
    window_shards: int = 0
    """Shards that are read from at a time, for spinning disks and network storage; 0 means all."""
    cache: Cache = "none"
    """Read what the frozen part of the model gives in place of waves, made once and kept: `cnn` the
    output of the feature encoder, `trunk` that at the boundary of --freeze."""
    cache_dtype: CacheDtype = "auto"
    """Of the cache: `auto` is what the values have in the run anyway, which loses nothing; bf16
    takes half of fp32's space and rounds where the run would not."""
    cache_dir: Path | None = None
    """Folder of caches, one in it for each data set, model and boundary, on a file system that all
    nodes share; SHARDS/cache by default. What is not used any more is yours to remove."""

    @property
    def table(self) -> Path:
        """Folder or file of the bias table."""
        return self.bias_table or self.shards / "bias"

    @property
    def caches(self) -> Path:
        """Folder of caches."""
        return self.cache_dir or self.shards / "cache"

    def __post_init__(self) -> None:
        for flag, value in (
            ("--read-ahead", self.read_ahead),
            ("--reader-threads", self.reader_threads),
        ):
            _require(flag, value >= 1, value, "at least 1", "the default is good")
        _require(
            "--window-shards", self.window_shards >= 0, self.window_shards, "0 or more", "0 is all"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The main model."""

    model: str = "facebook/wav2vec2-large-960h-lv60-self"
    """Hub name or folder of a transformers waveform model, a config .json (random weights), or
    `logmel-cnn`: a small CNN on log-mel bands, for tests and benchmarks."""
    freeze: str = "feature_encoder"
    """`none`, `feature_encoder`, `layers:N` (the CNN and the lower N layers) or `backbone`."""
    spec_augment: bool = True
    """Mask frames in training where the model's config asks for it (SpecAugment), above the CNN and
    below layer 1; `--cache trunk` with `--freeze layers:N` needs `--no-spec-augment`."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @property
    def frozen_layers(self) -> int | None:
        """N of `layers:N`, else None."""
        match = re.fullmatch(r"layers:(\d+)", self.freeze)
        return int(match[1]) if match else None

    def __post_init__(self) -> None:
        _require(
            "--freeze",
            self.freeze in ("none", "feature_encoder", "backbone")
            or (self.frozen_layers is not None and self.frozen_layers > 0),
            self.freeze,
            "none, feature_encoder, layers:N with N > 0, or backbone",
            "for example --freeze layers:12",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the frozen bias logits enter the loss."""

    loss: LossName = "poe"
    """`ce` (no bias), `poe` (product of experts), `learned-mixin` (the same, how much is learned),
    `learned-mixin-h` (with an entropy term), `reweight`, `dfl` (debiased focal), `mixture`."""
    beta: float = 0.5
    """Weight of the bias log-probabilities in `poe`; 0 is `ce`."""
    beta_end: float | None = None
    """Weight at the last step of `poe`; it moves there in a straight line over the steps."""
    entropy_weight: float = 0.03
    """Weight of the entropy of the scaled bias in `learned-mixin-h`."""
    dfl_gamma: float = 2.0
    """Exponent of `dfl`: (1 - b_y)^gamma; 0 is `ce`."""
    bias_ratio: float = 0.1
    """Share r of the bias model in `mixture`: -log((1 - r) p + r b)."""
    ce_weight: float = 0.0
    """Weight of a plain cross-entropy that is added to the loss."""

    @property
    def needs_bias(self) -> bool:
        """Whether a bias table is read."""
        return self.loss != "ce"

    @property
    def learns_gain(self) -> bool:
        """Whether the main model learns by how much the bias counts."""
        return self.loss in ("learned-mixin", "learned-mixin-h")

    @property
    def description(self) -> str:
        """The loss and the settings that it reads, such as `poe (beta 0.5)`."""
        beta = f"beta {self.beta:g}"
        if self.beta_end is not None:
            beta += f" to {self.beta_end:g}"
        settings = {
            "poe": beta,
            "learned-mixin-h": f"entropy weight {self.entropy_weight:g}",
            "dfl": f"gamma {self.dfl_gamma:g}",
            "mixture": f"ratio {self.bias_ratio:g}",
        }
        name = f"{self.loss} ({settings[self.loss]})" if self.loss in settings else self.loss
        return f"{name} + {self.ce_weight:g} ce" if self.ce_weight else name

    def beta_at(self, done: float) -> float:
        """Weight of the bias in `poe` when `done` of the steps, 0 to 1, are taken."""
        end = self.beta if self.beta_end is None else self.beta_end
        return self.beta + (end - self.beta) * done

    def __post_init__(self) -> None:
        for flag, value in (
            ("--beta", self.beta),
            ("--beta-end", self.beta if self.beta_end is None else self.beta_end),
            ("--entropy-weight", self.entropy_weight),
            ("--dfl-gamma", self.dfl_gamma),
            ("--ce-weight", self.ce_weight),
        ):
            _require(
                flag,
                math.isfinite(value) and value >= 0,
                value,
                "0 or more",
                "the default is a good start",
            )
        _require(
            "--bias-ratio", 0 <= self.bias_ratio < 1, self.bias_ratio, "0 to below 1", "try 0.1"
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Batches, learning rates and their schedule."""

    epochs: float = 10.0
    """Passes over the training rows."""
    global_batch: int = 64
    """Rows of an optimizer step over all ranks; it does not change with the machine."""
    lr: float = 3e-5
    """Peak learning rate of the backbone."""
    head_lr: float = 1e-3
    """Peak learning rate of the classification head."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    warmup_fraction: float = 0.1
    """Share of the run in which the rates rise linearly; after it they follow a cosine."""
    final_lr_fraction: float = 0.02
    """Rate at the end of the run as a share of the peak."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        _require("--epochs", self.epochs > 0, self.epochs, "a positive number", "10 is usual")
        _require(
            "--global-batch", self.global_batch >= 1, self.global_batch, "at least 1", "64 is usual"
        )
        _require(
            "--warmup-fraction",
            0 <= self.warmup_fraction < 1,
            self.warmup_fraction,
            "0 to below 1",
            "0.1 is usual",
        )
        for flag, value in (("--lr", self.lr), ("--head-lr", self.head_lr)):
            _require(flag, value >= 0, value, "0 or more", "1e-5 to 1e-3 is usual")
        _require(
            "--clip-norm", self.clip_norm > 0, self.clip_norm, "a positive number", "1.0 is usual"
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed spreads the work."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards: 1 optimizer states, 2 gradients too, 3 parameters too."""
    micro_batch: int = 8
    """Largest batch of one rank that fits its memory; accumulation follows from it."""
    eval_batch: int = 32
    """Segments in a batch of validation, which keeps nothing for a backward pass."""
    precision: Precision = "auto"
    """`bf16` is autocast over fp32 weights; `auto` takes it where the GPU has it. `bf16-weights`
    leaves fp32 ones to the optimizer: less memory, coarser gradients."""
    device: Device = "auto"
    """Where the ranks compute."""
    bucket_elements: int = 50_000_000
    """Elements of a ZeRO communication bucket: memory against the number of collectives."""
    compile: bool = False
    """Compile the model (torch.compile): slower to start, faster steps on a GPU; not at stage 3."""
    hang_timeout_s: float = 600.0
    """A rank without progress for so long writes its stacks to the log and ends with code 75."""
    max_refused_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite, after which the run ends (70)."""

    @property
    def group_timeout_s(self) -> float:
        """Seconds after which a collective fails by itself, and a start is given up.

        Later than a rank is ended for hanging, which says more.
        """
        return 1.5 * self.hang_timeout_s + 60

    def __post_init__(self) -> None:
        _require(
            "--micro-batch", self.micro_batch >= 1, self.micro_batch, "at least 1", "8 is usual"
        )
        _require("--eval-batch", self.eval_batch >= 1, self.eval_batch, "at least 1", "32 is usual")
        _require(
            "--compile with --zero-stage 3",
            not (self.compile and self.zero_stage == 3),
            "both",
            "a compiled model at stage 0, 1 or 2",
            "ZeRO-3 loses nearly all gradients of a compiled model, silently; use --zero-stage 2",
        )
        _require(
            f"--precision bf16-weights with --zero-stage {self.zero_stage}",
            self.precision != "bf16-weights" or self.zero_stage >= 2,
            "both",
            "--zero-stage 2 or 3",
            "stage 0 would begin with an update of 0.744 times the first one; or use bf16",
        )
        _require(
            "--hang-timeout-s",
            self.hang_timeout_s >= 1,
            self.hang_timeout_s,
            "at least 1",
            "600 is usual",
        )
        _require(
            "--max-refused-steps",
            self.max_refused_steps >= 1,
            self.max_refused_steps,
            "at least 1",
            "10 is usual",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder and what is written when."""

    run: Path = Path("runs/train")
    """Run folder: checkpoints, best model, metrics, logs. Never overwritten."""
    resume: str = "never"
    """`never`, `auto` (the newest checkpoint if there is one), `latest`, or a checkpoint folder."""
    seed: int = 0
    """Seed of the order, the new weights, dropout and masking."""
    validate_every_epochs: float = 1.0
    """Epochs between validations; the last step is always validated."""
    select: Select = "nll"
    """Which validation the best model is from: the one with the least NLL over tracks, the largest
    macro-F1, or the last one; a tie goes to the later one."""
    checkpoint_every_epochs: float = 1.0
    """Epochs between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    log_every_steps: int = 10
    """Optimizer steps between log lines and metrics."""
    time_limit_s: float = 0.0
    """Save and stop before the run has taken so long; 0 means no limit."""
    max_tries: int = 3
    """Tries in a row without a new checkpoint after which the run refuses to start again."""
    change: UseAppendAction[tuple[ChangeName, ...]] = ()
    """A flag, without its dashes, in which a resumed run may differ from how it was started, such
    as `lr` (`loss` stands for all knobs of the loss); may be given several times."""
    fresh: bool = False
    """Begin again in a used run folder; what is there is moved into RUN/aside-N."""
    row_ledger: bool = False
    """Write down which rows each step consumed (RUN/rows), to prove that none was lost."""
    dry_run: bool = False
    """Print batches, steps, parameters, memory and disk, and stop; needs no GPU."""
    ranks: int = 0
    """Ranks that `--dry-run` plans for; 0 means as many as were started."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--validate-every-epochs", self.validate_every_epochs),
            ("--checkpoint-every-epochs", self.checkpoint_every_epochs),
            ("--keep-checkpoints", self.keep_checkpoints),
            ("--log-every-steps", self.log_every_steps),
            ("--max-tries", self.max_tries),
        ):
            _require(flag, value > 0, value, "a positive number", "1 is the smallest usual value")
        for flag, value in (("--time-limit-s", self.time_limit_s), ("--ranks", self.ranks)):
            _require(flag, value >= 0, value, "0 or more", "0 is the default")
        _require(
            "--ranks",
            self.dry_run or not self.ranks,
            self.ranks,
            "with --dry-run only",
            "a real run has as many ranks as are started: deepspeed --num_gpus N",
        )
        _require(
            "--fresh",
            not self.fresh or self.resume == "never",
            f"--resume {self.resume}",
            "one of the two",
            "--resume goes on, --fresh begins again",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the main model on ranks that stream the shards; the bias logits enter the loss."""

    data: DataConfig = field(default_factory=DataConfig)
    main: ModelConfig = field(default_factory=ModelConfig)
    objective: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _require(
            f"--cache {self.data.cache}",
            self.data.cache == "none" or self.main.freeze != "none",
            "--freeze none",
            "a frozen part, whose output is a constant",
            "use --freeze feature_encoder or layers:N, or --cache none",
        )
        if self.engine.precision == "bf16-weights":
            plain = self.data.cache == "none" and self.main.model != "logmel-cnn"
            _require(
                "--precision bf16-weights",
                plain,
                f"--cache {self.data.cache}, --model {self.main.model}",
                "a transformers model without a cache",
                "use --precision bf16",
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a run's best model on a split: every row once, tracks first."""

    run: Positional[Path]
    """Run folder, or a folder that `export` wrote."""
    split: SplitName = "test"
    """Split to measure."""
    data: Path | None = None
    """Shards to measure on; the run's own by default. The genres must be the same."""
    shards_from: str | None = None
    """Where to copy the shards from, into --data (or the run's own folder), once per node."""
    stage_dir: str | None = None
    """Folder of each node, such as /scratch/$USER or '$TMPDIR', where its ranks copy the shards to,
    once, with their sha256 compared, and read them from."""
    stage_timeout_s: float = 3600.0
    """How long a rank waits for another one on its node that copies the shards."""
    name: str | None = None
    """Name of the files that are written; the split's, with `-of-FOLDER` of --data."""
    aggregate: Aggregate = "mean-prob"
    """How segments are judged as a track: `mean-prob` (mean of their probabilities), `mean-logit`
    or `vote` (ties go to the higher mean probability). All three are written."""
    bias_table: Path | None = None
    """Bias table of the shards, for the subgroups bias-aligned and bias-conflicting; the run's own
    by default, where the run's own shards are measured."""
    subgroups: Path | None = None
    """CSV or TSV table of `track` and a subgroup, in place of the bias model's."""
    subgroup_column: str = "subgroup"
    """Column of --subgroups to read."""
    resamples: int = 2000
    """Bootstrap resamples of the intervals."""
    seed: int = 0
    """Seed of the resamples."""
    batch: int = 32
    """Segments in a batch."""
    device: Device = "auto"
    """Where the model runs."""

    @property
    def result_name(self) -> str:
        """Name of the files that are written."""
        if self.name or not self.data:
            return self.name or self.split
        folder = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.data.resolve().name)
        return f"{self.split}-of-{folder or 'data'}"

    def __post_init__(self) -> None:
        _require("--batch", self.batch >= 1, self.batch, "at least 1", "32 is usual")
        _require_name(self.name)
        _require_resamples(self.resamples)


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
    resamples: int = 2000
    """Bootstrap resamples of the intervals."""
    seed: int = 0
    """Seed of the resamples."""

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
        _require(
            "RUN",
            len(self.runs) >= 2,
            f"{len(self.runs)} run folders",
            "two or more",
            "python -m mgc_dist.compare RUN_A RUN_B",
        )
        _require_name(self.name)
        _require_resamples(self.resamples)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Name the genre of audio files of any length, rate and channel count."""

    run: Positional[Path]
    """Run folder, or a folder that `export` wrote."""
    files: Positional[tuple[Path, ...]]
    """Audio files."""
    top: int = 3
    """Genres to print for a file."""
    json: bool = False
    """Print JSON: all probabilities of the file and of each segment."""
    plot: Path | None = None
    """Picture of the probabilities over time (.png, .svg or .pdf); of several files, each gets
    its name: OUT-NAME.png."""
    hop_s: float = 1.5
    """Seconds from the start of a segment to the start of the next."""
    batch: int = 16
    """Segments in a batch."""
    device: Device = "auto"
    """Where the model runs."""

    def __post_init__(self) -> None:
        _require("--batch", self.batch >= 1, self.batch, "at least 1", "16 is usual")
        _require("--top", self.top >= 1, self.top, "at least 1", "3 is usual")
        _require("--hop-s", self.hop_s >= 0.01, self.hop_s, "at least 0.01 s", "1.5 is usual")
        _require(
            "--plot",
            self.plot is None or self.plot.suffix.lower() in (".png", ".svg", ".pdf"),
            self.plot,
            "a name that ends in .png, .svg or .pdf",
            "for example --plot timeline.png",
        )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's best model as a folder that transformers loads without our code."""

    run: Positional[Path]
    """Run folder."""
    out: Positional[Path]
    """Folder to write; must not exist or be empty."""


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
    run: Path = Path("runs/train")
    """Run folder, or where one will be."""
    device: Device = "auto"
    """Where the ranks will compute."""
    wait_s: float = 120.0
    """How long ranks wait for each other."""

    @property
    def table(self) -> Path:
        """Folder or file of the bias table."""
        return self.bias_table or self.shards / "bias"

    def __post_init__(self) -> None:
        _require("--wait-s", self.wait_s > 0, self.wait_s, "a positive time", "120 is usual")
