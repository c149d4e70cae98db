"""What a run goes on from, and what it must agree with."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgc_dist.cluster import lease
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.config import RunConfig, Select, TrainConfig, identity
from mgc_dist.config.knobs import change_names, flag
from mgc_dist.data.order import Plan
from mgc_dist.errors import EXIT_NO_CHECKPOINT, UserError
from mgc_dist.events import CheckpointEvent, EmaValidationEvent, ValidationEvent, only
from mgc_dist.journal import read_events
from mgc_dist.models.classifier import Base
from mgc_dist.models.folder import BEST, BEST_EMA, settle
from mgc_dist.models.main import is_at_hand, is_found
from mgc_dist.training import checkpoint
from mgc_dist.training.engine import factor_at
from mgc_dist.training.setup import Run

log = logging.getLogger(__name__)

FAMILIES = ((0,), (1, 2), (3,))
"""ZeRO stages whose checkpoints can be read by one another, on any number of ranks."""

_OF_THE_ORDER = ("seed", "window_shards", "shards")

Changes = dict[str, tuple[Any, Any]]
"""Name in the identity -> (what it is now, what it was)."""


@dataclass
class State:
    """What a checkpoint remembers besides weights and optimizer.

    Attributes:
        samples_seen: positions consumed; the only state of the order.
        best_by: the `--select` that the best validation was chosen by.
        best_loss: what it was chosen by, the smaller the better; None before the first.
        best_samples_seen: when it was reached; a tie goes to the later one.
        ema_loss, ema_samples_seen: the same of the averaged weights.
        refused_in_a_row: steps up to now whose gradient was not finite.
        owes_validation: a validation of these weights is due and has not been made.
        no_better: validations in a row that were no better.
        first_position, first_step: of the plan.
        held_rate: factor of the peak learning rates, of a run that was made longer; None where
            it follows the schedule.
    """

    samples_seen: int = 0
    best_by: Select = "nll"
    best_loss: float | None = None
    best_samples_seen: int = 0
    ema_loss: float | None = None
    ema_samples_seen: int = 0
    refused_in_a_row: int = 0
    owes_validation: bool = False
    no_better: int = 0
    first_position: int = 0
    first_step: int = 0
    held_rate: float | None = None

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "State":
        """From a checkpoint; version 0.1.0 wrote the best macro-F1, -1 before the first."""
        values = dict(values)
        macro_f1 = values.pop("best_macro_f1", None)
        if macro_f1 is not None:
            values |= {"best_by": "macro-f1", "best_loss": None if macro_f1 < 0 else -macro_f1}
        return cls(**values)

    def forget_best(self, select: Select) -> None:
        """Seek the best model among the validations to come."""
        self.best_by, self.best_loss, self.best_samples_seen = select, None, 0
        self.forget_best_average()

    def forget_best_average(self) -> None:
        """Seek the best averaged weights among the validations to come."""
        self.ema_loss, self.ema_samples_seen = None, 0


def restore(run: Run) -> tuple[State, Changes]:
    """Weights, optimizer and state of the checkpoint that is asked for (a collective).

    Returns:
        The state, and in what this run was allowed to differ from the checkpoint's.

    Raises:
        UserError: the checkpoint is not whole, or of another run; or too many tries have ended
            without a new one.
    """
    config, peers = run.config.output, run.ranks
    folder = all_choose(config, peers)
    changes: Changes = {}
    if folder is None:
        state = State(best_by=config.select)
    else:
        facts = checkpoint.facts(folder)
        changes = refuse_change(
            f"checkpoint {folder}", run.identity, facts["identity"], config.change
        )
        reshape = must_reshape(folder, world=peers.world, zero_stage=run.engine.zero_stage)
        state = State.restored(run.engine.state.all_load(folder, reshape=reshape))
        refuse_position(changes, run.plan, state.samples_seen)
        _go_on_from(run, state, changes, int(facts["step"]))
        all_keep_best(config, peers, state)
        log.info("resuming from %s", folder)
        if reshape:
            log.info(
                "it was saved by %s ranks at ZeRO-%s: the run goes on the same but for rounding",
                *(facts["world"], facts["zero_stage"]),
            )
    tries = peers.all_decide(lambda: lease.fruitless_tries(config.run, state.samples_seen))
    if tries >= config.max_tries and not config.fresh:
        raise UserError(
            f"run folder {config.run}",
            got=f"{tries} tries in a row that ended without a new checkpoint",
            expected=f"fewer than {config.max_tries} (--max-tries)",
            cure=f"{config.run / 'train.log'} says what happened; then raise --max-tries once",
        )
    return state, changes


def _go_on_from(run: Run, state: State, changes: Changes, step: int) -> None:
    """Count steps from where the run is, if it gets more epochs or another global batch."""
    if not {"epochs", "global_batch"} & changes.keys():
        return
    state.first_position, state.first_step = state.samples_seen, step
    if "epochs" in changes:
        before = int(changes["epochs"][1])
        holds = run.config.optim.extension == "hold"
        held = state.held_rate or factor_at(run.config.optim, state.samples_seen, before)
        state.held_rate = held if holds else None


def all_keep_best(output: RunConfig, ranks: Ranks, state: State) -> None:
    """Forget a best model that RUN/best does not hold, or that was chosen in another way.

    The next validation is then the best; so with RUN/best-ema. A collective.
    """
    best = (state.best_samples_seen, state.best_loss)
    ema = (state.ema_samples_seen, state.ema_loss)

    def are_held() -> tuple[bool, bool]:
        for name in (BEST, BEST_EMA):
            settle(output.run / name)
        return (
            (output.run / BEST).is_dir() and holds_best(output.run, *best),
            (output.run / BEST_EMA).is_dir() and holds_best_average(output.run, *ema),
        )

    held, holds_ema = ranks.all_decide(are_held)
    if held and state.best_by != output.select and ranks.is_first:
        log.warning(
            "--select is %s, and was %s: the best model is sought anew, from here on",
            *(output.select, state.best_by),
        )
    if not held or state.best_by != output.select:
        state.forget_best(output.select)
    if not holds_ema:
        state.forget_best_average()


def base_of(config: TrainConfig) -> Base | None:
    """What a run that goes on is built from, where its `--model` is not at hand; else None.

    A file or folder that is there is read; so is a model of another name than the run began with.
    A model of the hub is not looked for again, but under `--precision bf16-weights`, whose
    checkpoints hold frozen weights as they were rounded, with code of its own, which none hold, and
    under `--lora`, whose checkpoints hold no frozen weights.
    """
    main, output = config.main, config.output
    unheld = main.trust_remote_code or main.lora is not None
    if output.resume == "never" or is_at_hand(main.model) or unheld:
        return None
    named = output.resume not in ("auto", "latest")
    try:
        facts = checkpoint.facts(Path(output.resume)) if named else None
    except (OSError, ValueError, AttributeError):
        return None  # `all_choose` says what is wrong with it
    facts = checkpoint.newest_facts(output.run) if facts is None else facts
    base = Base(**facts["base"]) if "base" in facts else None
    if base is None or (base.name, base.revision) != (main.model, main.revision):
        return None
    rounded = config.engine.precision == "bf16-weights"
    return None if rounded and is_found(main.model, main.revision) else base


def all_choose(config: RunConfig, ranks: Ranks) -> Path | None:
    """The checkpoint that `--resume` means; None to start from the beginning (a collective).

    Raises:
        UserError: there is none where one is needed, or it is damaged, or none is whole (65), or
            all that have been saved are gone (65).
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
    if found is None:
        ranks.all_decide(lambda: _refuse_vanished(run))
    if found is None and ranks.is_first:
        log.info("no checkpoint in %s: starting from the beginning", run)
    return found


def _refuse_vanished(run: Path) -> None:
    saved = only(read_events(run), CheckpointEvent)
    if saved:
        raise UserError(
            f"checkpoints in {run / checkpoint.FOLDER}",
            got=f"none, though {len(saved)} have been saved, "
            f"the last one at samples_seen {saved[-1].samples_seen}",
            expected="at least one of them",
            cure="bring one back, or begin again with --fresh: nothing is deleted",
            exit_code=EXIT_NO_CHECKPOINT,
        )


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


def refuse_change(
    what: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    allowed: Sequence[str] = (),
    config_type: type[Any] = TrainConfig,
) -> Changes:
    """Refuse to go on as another run than the one that was started.

    Args:
        what: that was made by the other one, in the error message.
        ours: identity of this run.
        theirs: of the one that was started, as it was written down.
        allowed: names after `--change`.
        config_type: whose knobs the identities are of.

    Returns:
        The differences that were allowed.

    Raises:
        UserError: it names the first other difference, with both values.
    """
    names = {knob: name for name, knobs in change_names(config_type).items() for knob in knobs}
    recorded = identity.read(theirs, config_type)
    changes: Changes = {}
    for key, value in identity.read(ours, config_type).items():
        before = recorded.get(key, "not written down")
        if before == value or (key not in recorded and key in identity.NEWER):
            continue
        if key in identity.SAID:
            changes[key] = (value, before)
            continue
        if names.get(key) not in allowed:
            way = f"allow it with --change {names[key]}, " if key in names else ""
            raise UserError(
                f"{what}: {identity.words(key)}",
                got=value,
                expected=f"{before}, as the run was started with",
                cure=f"give the same, {way}or start another run with --run",
            )
        changes[key] = (value, before)
    return changes


def refuse_position(changes: Changes, plan: Plan, samples_seen: int) -> None:
    """Refuse an allowed change where the position in the order would have no meaning any more.

    Raises:
        UserError: the new plan ends before samples_seen; or the order changes in the middle of
            an epoch, in which some rows would come twice and others not at all.
    """
    replace(plan, first_position=min(samples_seen, plan.total)).step_of(samples_seen)
    for name in _OF_THE_ORDER:
        if name in changes and samples_seen % plan.rows:
            raise UserError(
                f"--change {flag(name)[2:]} at samples_seen {samples_seen}",
                got=f"{samples_seen % plan.rows} of {plan.rows} rows into an epoch",
                expected="the end of one: in this epoch some rows would come twice, others never",
                cure=f"give the same {flag(name)}, or --resume a checkpoint at the end of an epoch",
            )


def holds_best(run: Path, samples_seen: int, loss: float | None) -> bool:
    """Whether RUN/best is the model of a validation: not one of a way that was gone back from.

    Args:
        run: the run folder.
        samples_seen: at that validation.
        loss: what the model was chosen by, as in `State.best_loss`.
    """
    exports = [each for each in only(read_events(run), ValidationEvent) if each.exported]
    if not exports:
        return False
    last = exports[-1]
    # version 0.1.0 chose by macro-F1, and did not write so
    chosen_by = -last.track_macro_f1 if last.select_loss is None else last.select_loss
    return (last.samples_seen, chosen_by) == (samples_seen, loss)


def holds_best_average(run: Path, samples_seen: int, loss: float | None) -> bool:
    """As `holds_best`, of RUN/best-ema and the averaged weights."""
    exports = [each for each in only(read_events(run), EmaValidationEvent) if each.exported]
    last = exports[-1] if exports else None
    return last is not None and (last.samples_seen, last.select_loss) == (samples_seen, loss)


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
