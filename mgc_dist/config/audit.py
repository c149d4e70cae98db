"""Knobs of audit: what a data set offers besides music."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from mgc_dist.config.knobs import Range, check
from mgc_dist.config.packing import JOBS
from mgc_dist.config.source import SEED


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Say what besides music tells the genre in a data set: files, levels, lines, bandwidth, ...

    A linear model on each family of traits has to name the genre of tracks by artists that it has
    not seen. Leaks, repetitions and doubtful labels are listed too. `bias --backbone audit:NAME`
    makes a bias model of a family.
    """

    data: Positional[Path] = Path("shards")
    """Folder that `python -m mgc_dist.shard` has filled; or music as `shard --data` takes it, which
    is packed into a temporary folder first, files that cannot be used left out."""
    groups: Path | None = None
    """For music: the table of its artists, as `shard --groups` takes it."""
    out: Path | None = None
    """Folder of audit.json and audit.html; SHARDS/audit by default, for music `audit`."""
    folds: Annotated[int, Range(minimum=2, maximum=100, cure="5 is usual")] = 5
    """Folds of the cross-fitting; artists are never in two, where they are known."""
    seed: Annotated[int, SEED] = 0
    """Seed of the folds."""
    jobs: Annotated[int, JOBS] = 0
    """Processes; 0 means one a core."""

    def __post_init__(self) -> None:
        check(self)
