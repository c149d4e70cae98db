"""Knobs of train, in sections."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction

from mgc_dist.config.augment import AugmentConfig
from mgc_dist.config.head import HeadConfig
from mgc_dist.config.knobs import (
    COMPARED,
    DRAWN,
    FIXED,
    FLAT,
    FOUND,
    LEARNED,
    Effect,
    Range,
    change_names,
    check,
    require,
)
from mgc_dist.config.lora import Lora
from mgc_dist.config.losses import LossConfig
from mgc_dist.config.source import BATCH, SEED, WEEK_S, Device, RunFolder, SourceConfig, table_of

Precision = Literal["auto", "fp32", "bf16", "fp16", "bf16-weights"]
Select = Literal["nll", "macro-f1", "last"]
Cache = Literal["none", "cnn", "trunk"]
Schedule = Literal["cosine", "linear", "constant", "inverse-sqrt"]
CacheDtype = Literal["auto", "fp32", "bf16"]

_YOURS = "?"
"""What a preset begins a value with that it cannot know; the rest says where to find it."""
_READERS = Range(minimum=1, maximum=128, cure="the default is good")
_RATE = Range(minimum=0, maximum=10, cure="1e-5 to 1e-3 is usual")
_EVERY = Range(above=0, maximum=1_000_000, cure="1 is the smallest usual value")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from."""

    shards: Annotated[Path, FOUND] = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled."""
    bias_table: Annotated[Path | None, FOUND] = None
    """Folder of the bias table; SHARDS/bias by default; not read with `--loss ce`. Or a table from
    elsewhere: a .csv or .tsv with the header key,GENRE,... or a structured .npy of such fields."""
    source: Annotated[SourceConfig, FLAT] = field(default_factory=SourceConfig)
    read_ahead: Annotated[int, _READERS] = 4
    """Batches that the reader threads keep ready."""
    reader_threads: Annotated[int, _READERS] = 1
    """Threads that read; one gives 20,000 segments/s from memory, slow storage wants more."""
    window_shards: Annotated[int, Range(minimum=0, maximum=1_000_000, cure="0 is all"), LEARNED] = 0
    """Shards that are read from at a time, for spinning disks and network storage; 0 means all."""
    crop_s: Annotated[float | None, Range(above=0, maximum=3_600, cure="5 is usual"), LEARNED] = (
        None
    )
    """Train on a random crop of so many seconds of each segment, another one each time it is read;
    the whole segment is read. Validation, `evaluate` and `predict` hear crops that cover it."""
    cache: Annotated[Cache, FOUND] = "none"
    """Read what the frozen part of the model gives in place of waves, made once and kept: `cnn` the
    output of the feature encoder, `trunk` that at the boundary of --freeze."""
    cache_dtype: Annotated[CacheDtype, COMPARED] = "auto"
    """Of the cache: `auto` is what the values have in the run anyway, which loses nothing; bf16
    takes half of fp32's space and rounds where the run would not."""
    cache_dir: Path | None = None
    """Folder of caches, one in it for each data set, model and boundary, on a file system that all
    nodes share; SHARDS/cache by default. `python -m mgc_dist.cache` lists and removes them."""

    @property
    def table(self) -> Path:
        """Folder or file of the bias table."""
        return table_of(self.shards, self.bias_table, self.source.fold)

    @property
    def caches(self) -> Path:
        """Folder of caches."""
        return self.cache_dir or self.shards / "cache"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The main model."""

    model: Annotated[str, LEARNED] = "facebook/wav2vec2-large-960h-lv60-self"
    """Hub name or folder of a transformers audio model, `muq:` with that of a MuQ, a config .json
    (random weights), or `logmel-cnn`: a small CNN on log-mel bands, for tests and benchmarks."""
    revision: Annotated[str | None, FOUND] = None
    """Branch, tag or commit of a hub model; the run keeps the commit that it stood for."""
    trust_remote_code: Annotated[bool, FOUND] = False
    """Run the code that lies beside a model's weights: that of a folder, or of the commit of the
    hub that `--revision` names."""
    freeze: Annotated[str, FIXED] = "feature_encoder"
    """`none`, `feature_encoder`, `layers:N` (the CNN and the lower N layers) or `backbone`."""
    lora: Annotated[str | None, FIXED] = None
    """Train low-rank adapters (LoRA) in place of the weights below the head, at --lr (1e-4 to 1e-3
    is usual): `r=16`, or `r=16,alpha=32,targets=q_proj,v_proj` with ends of names of linear layers.
    What --freeze names is not adapted. Checkpoints hold adapters and head only."""
    head: Annotated[HeadConfig, FLAT] = field(default_factory=HeadConfig)
    spec_augment: Annotated[bool, FIXED] = True
    """Mask frames in training where the model's config asks for it (SpecAugment), above the CNN and
    below layer 1; `--cache trunk` with `--freeze layers:N` needs `--no-spec-augment`."""
    activation_checkpointing: Annotated[bool, COMPARED] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @property
    def frozen_layers(self) -> int | None:
        """N of `layers:N`, else None."""
        match = re.fullmatch(r"layers:([0-9]{1,4})", self.freeze)
        return int(match[1]) if match else None

    @property
    def adapters(self) -> Lora | None:
        """What `--lora` says."""
        return None if self.lora is None else Lora.parsed(self.lora)

    def __post_init__(self) -> None:
        require(
            "--model",
            not self.model.startswith(_YOURS),
            "a preset that leaves it to you",
            self.model.removeprefix(_YOURS),
            "add --model NAME --revision COMMIT, or --model FOLDER",
        )
        require(
            "--freeze",
            self.freeze in ("none", "feature_encoder", "backbone")
            or (self.frozen_layers is not None and self.frozen_layers > 0),
            self.freeze,
            "none, feature_encoder, layers:N with N > 0, or backbone",
            "for example --freeze layers:12",
        )
        require(
            f"--lora with --freeze {self.freeze}",
            self.adapters is None or self.freeze not in ("none", "backbone"),
            "both",
            "--freeze feature_encoder or layers:N, above which adapters are trained",
            "leave --lora out, or use --freeze feature_encoder",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Batches, learning rates and their schedule."""

    epochs: Annotated[float, Range(above=0, maximum=100_000, cure="10 is usual"), LEARNED] = 10.0
    """Passes over the training rows."""
    global_batch: Annotated[
        int, Range(minimum=1, maximum=1_000_000, cure="64 is usual"), LEARNED
    ] = 64
    """Rows of an optimizer step over all ranks; it does not change with the machine."""
    lr: Annotated[float, _RATE, LEARNED] = 3e-5
    """Peak learning rate of the backbone."""
    head_lr: Annotated[float, _RATE, LEARNED] = 1e-3
    """Peak learning rate of the classification head."""
    layer_lr_decay: Annotated[
        float, Range(above=0, maximum=1, cure="0.8 to 0.95 is usual, and 1 is one rate"), FIXED
    ] = 1.0
    """Factor of the learning rate from an encoder layer to the one below it: --lr is that of the
    last layer. What lies below the first layer counts as one layer more; the head has --head-lr."""
    weight_decay: Annotated[
        float, Range(minimum=0, maximum=1_000, cure="0.01 is usual"), LEARNED
    ] = 0.01
    """AdamW's decoupled weight decay."""
    warmup_fraction: Annotated[float, Range(minimum=0, below=1, cure="0.1 is usual"), LEARNED] = 0.1
    """Share of the run in which the rates rise linearly; after it they follow --schedule."""
    schedule: Annotated[Schedule, LEARNED] = "cosine"
    """How the rates fall after the warm-up: to --final-lr-fraction in a `cosine` or `linear`; not
    at all (`constant`); or with one over the square root of the position (`inverse-sqrt`)."""
    final_lr_fraction: Annotated[
        float, Range(minimum=0, maximum=1, cure="0.02 is usual"), LEARNED
    ] = 0.02
    """Rate at the end of the run as a share of the peak (`cosine`, `linear`)."""
    extension: Annotated[Literal["replan", "hold"], Effect(identity=False, change=None)] = "replan"
    """Learning rates after `--change epochs`: `replan`, as if the run had been planned so long from
    the start; `hold`, as they are there."""
    clip_norm: Annotated[float, Range(above=0, maximum=1e9, cure="1.0 is usual"), LEARNED] = 1.0
    """Largest norm of the gradient."""
    ema_decay: Annotated[
        float, Range(minimum=0, below=1, cure="0.999 is usual, and 0 keeps none"), LEARNED
    ] = 0.0
    """Keep an exponential moving average (EMA) of the trained weights, of which a step leaves this
    share; it is validated beside them, and its best is RUN/best-ema. 0 keeps none."""

    def __post_init__(self) -> None:
        check(self)
        require(
            "--schedule inverse-sqrt",
            self.schedule != "inverse-sqrt" or self.warmup_fraction > 0,
            "--warmup-fraction 0",
            "a warm-up, from whose end the rates fall",
            "0.1 is usual",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed spreads the work."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], COMPARED] = 2
    """What ZeRO shards: 1 optimizer states, 2 gradients too, 3 parameters too."""
    micro_batch: Annotated[int, Range(minimum=1, maximum=65_536, cure="8 is usual"), FOUND] = 8
    """Largest batch of one rank that fits its memory; accumulation follows from it. Dropout is
    drawn for micro batches: another size is another draw."""
    eval_batch: Annotated[int, BATCH] = 32
    """Segments in a batch of validation, which keeps nothing for a backward pass."""
    precision: Annotated[Precision, Effect(identity=False)] = "auto"
    """`bf16` is autocast over fp32 weights; `auto` takes it where the GPU has it, and elsewhere
    `fp16`, which scales the loss, on a GPU with tensor cores (V100, T4) without a cache.
    `bf16-weights` leaves fp32 ones to the optimizer: less memory, coarser gradients."""
    offload: Annotated[Literal["none", "optimizer"], COMPARED] = "none"
    """`optimizer` keeps AdamW's weights and moments in the memory of the host, and steps there:
    less memory of a GPU, slower steps. At stages 2 and 3."""
    device: Device = "auto"
    """Where the ranks compute."""
    bucket_elements: Annotated[int, Range(minimum=1_000, maximum=2**31, cure="5e7 is usual")] = (
        50_000_000
    )
    """Elements of a ZeRO communication bucket: memory against the number of collectives."""
    compile: Annotated[bool, COMPARED] = False
    """Compile the model (torch.compile): slower to start, faster steps on a GPU; not at stage 3."""
    hang_timeout_s: Annotated[float, Range(minimum=1, maximum=WEEK_S, cure="600 is usual")] = 600.0
    """A rank without progress for so long writes its stacks to the log and ends with code 75."""
    max_refused_steps: Annotated[int, Range(minimum=1, maximum=1_000_000, cure="10 is usual")] = 10
    """Steps in a row with a loss or gradient that is not finite, after which the run ends (70)."""

    @property
    def group_timeout_s(self) -> float:
        """Seconds after which a collective fails by itself, and a start is given up.

        Later than a rank is ended for hanging, which says more.
        """
        return 1.5 * self.hang_timeout_s + 60

    def __post_init__(self) -> None:
        check(self)
        require(
            "--compile with --zero-stage 3",
            not (self.compile and self.zero_stage == 3),
            "both",
            "a compiled model at stage 0, 1 or 2",
            "ZeRO-3 loses nearly all gradients of a compiled model, silently; use --zero-stage 2",
        )
        require(
            f"--offload optimizer with --zero-stage {self.zero_stage}",
            self.offload == "none" or self.zero_stage >= 2,
            "both",
            "--zero-stage 2 or 3",
            "use --zero-stage 2, or --offload none",
        )
        require(
            f"--precision bf16-weights with --zero-stage {self.zero_stage}",
            self.precision != "bf16-weights" or self.zero_stage >= 2,
            "both",
            "--zero-stage 2 or 3",
            "stage 0 would begin with an update of 0.744 times the first one; or use bf16",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder and what is written when."""

    run: RunFolder = Path("runs/train")
    """Run folder: checkpoints, best model, metrics, logs. Never overwritten."""
    resume: str = "never"
    """`never`, `auto` (the newest checkpoint if there is one), `latest`, or a checkpoint folder."""
    seed: Annotated[int, SEED, DRAWN] = 0
    """Seed of the order, the new weights, dropout and masking."""
    validate_every_epochs: Annotated[float, _EVERY, COMPARED] = 1.0
    """Epochs between validations; the last step is always validated."""
    select: Annotated[Select, COMPARED] = "nll"
    """Which validation the best model is from: the one with the least NLL over tracks, the largest
    macro-F1, or the last one; a tie goes to the later one."""
    patience: Annotated[int, Range(minimum=0, maximum=1_000_000, cure="3 is usual"), LEARNED] = 0
    """End the run after so many validations in a row that are no better by --select; 0 does not."""
    checkpoint_every_epochs: Annotated[float, _EVERY] = 1.0
    """Epochs between checkpoints; the last step is always saved."""
    keep_checkpoints: Annotated[int, _EVERY] = 2
    """Newest checkpoints that are kept."""
    log_every_steps: Annotated[int, _EVERY] = 10
    """Optimizer steps between log lines and metrics."""
    time_limit_s: Annotated[float, Range(minimum=0, maximum=1e8, cure="0 is the default")] = 0.0
    """Save and stop before the run has taken so long; 0 means no limit."""
    max_tries: Annotated[int, _EVERY] = 3
    """Tries in a row without a new checkpoint after which the run refuses to start again."""
    change: UseAppendAction[tuple[str, ...]] = ()
    """A flag, without its dashes, in which a resumed run may differ from how it was started, such
    as `lr` (`loss` stands for all knobs of the loss); may be given several times."""
    fresh: bool = False
    """Begin again in a used run folder; what is there is moved into RUN/aside-N. Like a checkpoint
    named with --resume, it counts for the first try of a Slurm job; requeued ones go on."""
    row_ledger: bool = False
    """Write down which rows each step consumed (RUN/rows), to prove that none was lost."""
    dry_run: bool = False
    """Print batches, steps, parameters, memory and disk, and stop; needs no GPU."""
    ranks: Annotated[int, Range(minimum=0, maximum=65_536, cure="0 is the default")] = 0
    """Ranks that `--dry-run` plans for; 0 means as many as were started."""

    def __post_init__(self) -> None:
        check(self)
        require(
            "--ranks",
            self.dry_run or not self.ranks,
            self.ranks,
            "with --dry-run only",
            "a real run has as many ranks as are started: deepspeed --num_gpus N",
        )
        require(
            "--patience with --select last",
            not (self.patience and self.select == "last"),
            "both",
            "a measure that can stop getting better",
            "use --select nll or macro-f1",
        )
        require(
            "--fresh",
            not self.fresh or self.resume in ("never", "auto"),
            f"--resume {self.resume}",
            "one of the two",
            "--resume goes on, --fresh begins again",
        )

    def of_try(self, number: int) -> "RunConfig":
        """What is asked of a try: later ones of a job go on from what the first has begun.

        Args:
            number: 0 for the first; Slurm counts how often a job was requeued.
        """
        if number:
            named = self.resume not in ("never", "auto", "latest")
            resume = "auto" if self.fresh or named else self.resume
            return replace(self, fresh=False, resume=resume)
        return replace(self, resume="never") if self.fresh else self


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the main model on ranks that stream the shards; the bias logits enter the loss."""

    data: DataConfig = field(default_factory=DataConfig)
    main: ModelConfig = field(default_factory=ModelConfig)
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    objective: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        names = change_names(type(self))
        for name in self.output.change:
            require("--change", name in names, name, f"one of {', '.join(names)}", "start anew")
        require(
            f"--cache {self.data.cache}",
            self.data.cache == "none" or self.main.freeze != "none",
            "--freeze none",
            "a frozen part, whose output is a constant",
            "use --freeze feature_encoder or layers:N, or --cache none",
        )
        require(
            "--precision fp16",
            self.engine.precision != "fp16" or self.data.cache == "none",
            f"--cache {self.data.cache}",
            "no cache",
            "use --precision fp32, or --cache none",
        )
        if self.data.cache != "none":
            changes = {"--crop-s": self.data.crop_s, "--augment": self.augmentation.kinds}
            flags = " and ".join(flag for flag, value in changes.items() if value)
            require(
                f"{flags} with --cache {self.data.cache}",
                not flags,
                "both",
                "segments that are heard as they are, whose frozen output is a constant",
                f"use --cache none, or leave {flags} out",
            )
        if self.engine.precision == "bf16-weights":
            plain = self.data.cache == "none" and self.main.model != "logmel-cnn"
            require(
                "--precision bf16-weights",
                plain,
                f"--cache {self.data.cache}, --model {self.main.model}",
                "a transformers model without a cache",
                "use --precision bf16",
            )
