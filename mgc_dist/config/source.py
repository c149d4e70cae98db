"""Knobs that several commands share: where shards come from, and where the work runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from mgc_dist.config.knobs import Range, check

Device = Literal["auto", "cpu", "cuda"]
SplitName = Literal["train", "validation", "test"]

RunFolder = Annotated[Path, arg(aliases=("--run-folder",))]
"""torchrun takes `--run`, also after the script's name, for one of its own --run-path, --run_path:
"ambiguous option: --run could match --run-path, --run_path"."""
FOREIGN_TABLES = (".csv", ".tsv", ".npy")
"""Suffixes of bias tables from elsewhere; ours are folders."""
BATCH = Range(minimum=1, cure="32 is usual")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where each node takes the shards from."""

    shards_from: str | None = None
    """Where to copy the shards from, into their folder, once per node: a folder, https://..., or
    `pipe:COMMAND` with {} for the file's name, such as `pipe:aws s3 cp s3://bucket/gtzan/{} -`."""
    stage_dir: str | None = None
    """Folder of each node, such as /scratch or '$TMPDIR', where its ranks copy the shards to, once,
    with their sha256 compared, and read them from; each user has a folder of mode 0700 in it."""
    stage_timeout_s: Annotated[float, Range(minimum=0, cure="3600 is usual")] = 3600.0
    """How long a rank waits for another one on its node that copies the shards."""

    def __post_init__(self) -> None:
        check(self)
