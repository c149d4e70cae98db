"""Knobs that several commands share: where shards come from, and where the work runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from mgc_dist.config.knobs import FOUND, Range, check

Device = Literal["auto", "cpu", "cuda"]
SplitName = Literal["train", "validation", "test"]

RunFolder = Annotated[Path, arg(aliases=("--run-folder",))]
"""torchrun takes `--run`, also after the script's name, for one of its own --run-path, --run_path:
"ambiguous option: --run could match --run-path, --run_path"."""
FOREIGN_TABLES = (".csv", ".tsv", ".npy")
"""Suffixes of bias tables from elsewhere; ours are folders."""
BATCH = Range(minimum=1, maximum=65_536, cure="32 is usual")
SEED = Range(minimum=0, maximum=2**32 - 1, cure="0 is the default")
WEEK_S = 7 * 24 * 3600
"""The longest wait."""


def table_of(shards: Path, bias_table: Path | None, fold: int | None) -> Path:
    """Folder of the bias table, a fold's own below it; or a file of one from elsewhere."""
    table = bias_table or shards / "bias"
    return table if fold is None or is_foreign(table) else table / f"fold{fold}"


def is_foreign(table: Path) -> bool:
    """Whether a bias table is a file from elsewhere."""
    return table.suffix in FOREIGN_TABLES and not table.is_dir()


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which rows of the shards, and where each node takes them from."""

    fold: Annotated[int | None, Range(minimum=0, maximum=99, cure="start with 0"), FOUND] = None
    """Of shards packed with --split kfold: the fold that is tested; the one before it validates,
    the others train. Its bias table is in a folder foldI of --bias-table."""
    shards_from: str | None = None
    """Where to copy the shards from, into their folder, once per node: a folder, https://..., or
    `pipe:COMMAND` with {} for the file's name, such as `pipe:aws s3 cp s3://bucket/gtzan/{} -`."""
    stage_dir: str | None = None
    """Folder of each node, such as /scratch or '$TMPDIR', where its ranks copy the shards to, once,
    with their sha256 compared, and read them from; each user has a folder of mode 0700 in it."""
    stage_timeout_s: Annotated[float, Range(minimum=1, maximum=WEEK_S, cure="3600 is usual")] = (
        3600.0
    )
    """How long a rank waits for another one on its node that copies the shards."""

    def __post_init__(self) -> None:
        check(self)
