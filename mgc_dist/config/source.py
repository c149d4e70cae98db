"""Knobs that several commands share: where shards come from, and where the work runs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from mgc_dist.config.knobs import Range, check

Device = Literal["auto", "cpu", "cuda"]
SplitName = Literal["train", "validation", "test"]

FOREIGN_TABLES = (".csv", ".tsv", ".npy")
"""Suffixes of bias tables from elsewhere; ours are folders."""
BATCH = Range(minimum=1, maximum=65_536, cure="32 is usual")
SEED = Range(minimum=0, maximum=2**32 - 1, cure="0 is the default")
WEEK_S = 7 * 24 * 3600
"""The longest wait."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where each node takes the shards from."""

    shards_from: str | None = None
    """Where to copy the shards from, into their folder, once per node: a folder, https://..., or
    `pipe:COMMAND` with {} for the file's name, such as `pipe:aws s3 cp s3://bucket/gtzan/{} -`."""
    stage_dir: str | None = None
    """Folder of each node, such as /scratch/$USER or '$TMPDIR', where its ranks copy the shards to,
    once, with their sha256 compared, and read them from."""
    stage_timeout_s: Annotated[float, Range(minimum=1, maximum=WEEK_S, cure="3600 is usual")] = (
        3600.0
    )
    """How long a rank waits for another one on its node that copies the shards."""

    def __post_init__(self) -> None:
        check(self)
