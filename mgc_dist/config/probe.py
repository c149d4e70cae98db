"""Knobs of probe: heads on the states of a frozen model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from mgc_dist.config.knobs import FLAT, Range, check, require
from mgc_dist.config.source import BATCH, SEED, Device, SourceConfig

HeadName = Literal["linear", "mlp", "mix"]

C = Range(minimum=1e-9, maximum=1e9, cure="1.0 is usual")
LR = Range(above=0, maximum=10, cure="1e-3 is usual")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Probe a frozen model: heads on the states of each of its layers.

    One pass stores the time-mean of every layer for every segment; a killed pass goes on with the
    same command. Validation tracks choose strength, learning rate and layer. Test tracks are
    looked at once, after that.
    """

    shards: Path = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled."""
    out: Path | None = None
    """Folder of the states and of what is found; SHARDS/probe by default."""
    source: Annotated[SourceConfig, FLAT] = field(default_factory=SourceConfig)
    folds: Annotated[int | None, Range(minimum=3, maximum=100, cure="5 is usual")] = None
    """Cross-validate over all tracks in so many folds, whatever splits were packed: each fold is
    tested once, the one before it validates, the others train."""
    model: str = "facebook/wav2vec2-base"
    """Hub name or folder of any model that can be trained, a config .json for random weights, or
    `logmel` (40 log-mel bands, no weights)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run the code that lies beside the model's weights."""
    head: tuple[HeadName, ...] = ("linear", "mlp", "mix")
    """Heads: `linear` (logistic regression) and `mlp` (one hidden layer of 512) on each layer,
    `mix` (linear, on a learned weighted sum of all layers)."""
    c: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Inverse strengths of the linear heads' L2 penalty (scikit-learn's C) to choose from."""
    lr: tuple[float, ...] = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2)
    """Learning rates of the other heads to choose from."""
    epochs: Annotated[int, Range(minimum=1, maximum=100_000, cure="100 is usual")] = 100
    """Epochs of the other heads at most; 20 without a better validation end them."""
    seeds: Annotated[int, Range(minimum=1, maximum=1_000, cure="5 is usual")] = 5
    """Repetitions of the other heads, each with weights and order of its own."""
    batch: Annotated[int, BATCH] = 32
    """Segments in a batch of the pass."""
    seed: Annotated[int, SEED] = 0
    """First seed of the heads, and that of the folds."""
    device: Device = "auto"
    """Where the pass runs, and the heads but for the linear ones."""
    overwrite: bool = False
    """Replace the states of another model or data set in the folder."""

    @property
    def states(self) -> Path:
        """Folder of the states, which serve all folds."""
        return self.out or self.shards / "probe"

    @property
    def results(self) -> Path:
        """Folder of what is found."""
        if self.folds:
            return self.states / f"folds{self.folds}"
        return self.states if self.source.fold is None else self.states / f"fold{self.source.fold}"

    def __post_init__(self) -> None:
        check(self)
        for flag, values, allowed in (("--c", self.c, C), ("--lr", self.lr, LR)):
            bad = [value for value in values if not allowed.holds(value)]
            require(flag, not bad, bad[0] if bad else "", str(allowed), allowed.cure)
        for flag, given in (("--head", self.head), ("--c", self.c), ("--lr", self.lr)):
            require(
                flag,
                0 < len(set(given)) == len(given),
                " ".join(map(str, given)) or "nothing",
                "one or more, each once",
                "leave the flag out for the default",
            )
        require(
            "--folds",
            self.folds is None or self.source.fold is None,
            f"{self.folds} with --fold {self.source.fold}",
            "one of them: --fold tests one fold that was packed, --folds all folds",
            "leave --fold out",
        )
