"""What a run goes on from, and what it must agree with."""

import logging
from pathlib import Path
from typing import Any

from mgc_dist import checkpoint
from mgc_dist.config import RunConfig
from mgc_dist.errors import UserError
from mgc_dist.ranks import Ranks

log = logging.getLogger(__name__)

FAMILIES = ((0,), (1, 2), (3,))
"""ZeRO stages whose checkpoints can be read by one another, on any number of ranks."""


def all_choose(config: RunConfig, ranks: Ranks) -> Path | None:
    """The checkpoint that `--resume` means; None to start from the beginning (a collective).

    Raises:
        UserError: there is none where one is needed, or it is damaged, or none is whole (65).
    """
    run, resume = config.run, config.resume
    if resume == "never":
        return None
    if resume not in ("auto", "latest"):
        reason = checkpoint.all_damage(Path(resume), ranks)
        if reason:
            raise UserError(
                f"--resume {resume}",
                got=reason,
                expected="never, auto, latest, or the folder of a whole checkpoint",
                cure=f"checkpoints are in {run / checkpoint.FOLDER}",
            )
        return Path(resume)
    found = checkpoint.all_newest(run, ranks)
    if found is None and resume == "latest":
        raise UserError(
            f"--resume latest in {run}",
            got="no checkpoint",
            expected=f"one in {run / checkpoint.FOLDER}",
            cure="--resume auto starts from the beginning if there is none",
        )
    if found is None and ranks.is_first:
        log.info("no checkpoint in %s: starting from the beginning", run)
    return found


def must_reshape(folder: Path, *, world: int, zero_stage: int) -> bool:
    """Whether a checkpoint was made by another number of ranks or at another ZeRO stage.

    Raises:
        UserError: at a stage whose checkpoints cannot be read here.
    """
    facts = checkpoint.facts(folder)
    theirs = int(facts["zero_stage"])
    family = next(stages for stages in FAMILIES if theirs in stages)
    if zero_stage not in family:
        fitting = " or ".join(map(str, family))
        raise UserError(
            f"checkpoint {folder}: --zero-stage",
            got=zero_stage,
            expected=f"{fitting}: it was saved at stage {theirs}, which no other stage can read",
            cure=f"go on with --zero-stage {fitting}, on any number of ranks",
        )
    return (int(facts["world"]), theirs) != (world, zero_stage)


def refuse_change(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse to go on as another run than the one that was started.

    Raises:
        UserError: it names the first difference, with both values.
    """
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{what}: {name}",
                got=value,
                expected=f"{theirs.get(name)}, as the run was started with",
                cure="give the same, or start another run with --run",
            )


def set_aside(run: Path) -> None:
    """Move all that a run folder holds into RUN/aside-N, for `--fresh` (rank 0).

    The lease and the heartbeats stay: they are of the run that begins.
    """
    number = 1 + sum(1 for _ in run.glob("aside-*"))
    aside = run / f"aside-{number}"
    aside.mkdir()
    for path in sorted(run.iterdir()):
        if not path.name.startswith(("aside-", "lease.json", "heartbeats")):
            path.rename(aside / path.name)
    log.info("what was in %s is now in %s", run, aside)
