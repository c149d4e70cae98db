"""Knobs of bias: the frozen bias model and its table."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mgc_dist.config.knobs import FLAT, Range, check, require
from mgc_dist.config.source import BATCH, SEED, Device, SourceConfig, is_foreign, table_of


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
    source: Annotated[SourceConfig, FLAT] = field(default_factory=SourceConfig)
    backbone: str = "facebook/wav2vec2-base"
    """Hub name or folder of a transformers model; `logmel` (40 log-mel bands, no weights); or a
    family that `audit` names, such as `audit:lines`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    layer: tuple[int, ...] = (-1,)
    """Hidden layer that the heads see: 0 is the input of the encoder, -1 its last layer; of
    several (`--layer 6 7 8`) the mean."""
    folds: Annotated[int, Range(minimum=2, maximum=1_000, cure="5 is usual")] = 5
    """Folds of the cross-fitting; no row's logits come from a head that saw its track or group."""
    head_c: Annotated[float, Range(minimum=1e-9, maximum=1e9, cure="1.0 is usual")] = 1.0
    """Inverse strength of the heads' L2 penalty (scikit-learn's C)."""
    batch: Annotated[int, BATCH] = 32
    """Segments in a batch of the pass."""
    seed: Annotated[int, SEED] = 0
    """Seed of the folds."""
    device: Device = "auto"
    """Where the pass runs."""
    overwrite: bool = False
    """Replace a table made with other settings; hidden states that still fit are kept."""

    @property
    def table(self) -> Path:
        """Folder of the table, or a file from elsewhere."""
        return table_of(self.shards, self.bias_table, self.source.fold)

    @property
    def states(self) -> Path:
        """Folder of the hidden states, which serve all folds."""
        return table_of(self.shards, self.bias_table, None)

    @property
    def is_foreign(self) -> bool:
        """Whether the table is a file from elsewhere, of which only the report is made."""
        return is_foreign(self.table)

    def __post_init__(self) -> None:
        check(self)
        require(
            "--layer",
            0 < len(set(self.layer)) == len(self.layer),
            " ".join(map(str, self.layer)) or "nothing",
            "one or more layers, each once",
            "-1 is the last layer",
        )
