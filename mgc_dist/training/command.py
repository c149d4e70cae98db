"""The body of `train`: open the data, agree on it, build, take the run folder, train."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mgc_dist.bias_model import table
from mgc_dist.board import Draw
from mgc_dist.cluster import lease, ranks
from mgc_dist.cluster.lease import Lease
from mgc_dist.cluster.meeting import Meeting
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.cluster.stop import Stop
from mgc_dist.cluster.watch import Watch
from mgc_dist.config import TrainConfig, identity
from mgc_dist.data import fetch
from mgc_dist.data.order import Plan
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError, exit_code_of
from mgc_dist.events import DoneEvent, StoppedEvent
from mgc_dist.training import cache, checkpoint, forecast, logbook, loop, run_folder, setup
from mgc_dist.training.resume import State, all_choose, base_of, restore
from mgc_dist.training.setup import Run

log = logging.getLogger(__name__)

_SHORT = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""In the words of CUDA and torch, of torch on a CPU, and of cuBLAS and cuDNN."""

Outcome = Literal["done", "stopped", "already complete", "planned", "refused"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a training ended.

    Attributes:
        outcome: `done`; `stopped` on request, with a checkpoint; `already complete`; of a dry run
            `planned`, or `refused` where something contradicts.
        folder: the run folder.
        samples_seen: positions of the order that were consumed; 0 where nothing was trained.
        best_epoch: of the model in RUN/best; None without one.
        is_first: whether this is rank 0, which speaks for all.
    """

    outcome: Outcome
    folder: Path
    samples_seen: int = 0
    best_epoch: float | None = None
    is_first: bool = True


def train(
    config: TrainConfig, stop: Stop, meeting: Meeting, *, pictures: Mapping[str, Draw] | None = None
) -> TrainResult:
    """Train to the end of the plan, or to a stop that all ranks agree on (a collective).

    Args:
        config: of the run.
        stop: what asks for a stop; it listens already.
        meeting: of the ranks.
        pictures: how values of events are drawn for TensorBoard, by key.

    Raises:
        UserError: data, table, model, arithmetic or run folder do not fit the configuration.
        RunFailed: the run could not go on.
    """
    data, folder = config.data, config.output.run
    with ShardSet(fetch.at_hand(data.shards, data.source), data.source.fold) as shards:
        bias = None
        if config.objective.needs_bias:
            bias = table.read(data.table, shards.manifest, shards.keys)
        plan = setup.plan_of(config, shards)
        base = base_of(config)
        found = setup.found_of_model(config, shards.manifest, base)
        own = setup.identity_of(config, shards, bias, plan)
        own |= {} if isinstance(found, UserError) else found
        meeting.all_same("data", {identity.words(name): str(each) for name, each in own.items()})
        device = ranks.device_of(config.engine.device, meeting.seat.local_rank)
        meeting.all_same("devices", {"device (--device)": device.type})
        with ranks.join(config.engine.device, config.engine.group_timeout_s, meeting) as peers:
            own |= {"precision": setup.precision_of(config, peers)}
            meeting.all_same("precision", {"--precision": own["precision"]})
            if config.output.dry_run:
                _refuse_missing(found)
                outcome = _forecast(config, shards, plan, peers)
                return TrainResult(outcome=outcome, folder=folder, is_first=peers.is_first)
            if peers.all_decide(lambda: run_folder.is_complete(config, own)):
                done: Outcome = "already complete"
                return TrainResult(outcome=done, folder=folder, is_first=peers.is_first)
            setup.layout_of(config, peers.world)  # refused before a model that is far away
            _refuse_missing(found)
            try:
                origin = all_choose(config.output, peers) if base else None
                if origin:
                    log.info("--model %s is not at hand: %s has it", config.main.model, origin)
                run = setup.build(
                    config, own, shards, bias, plan, peers, stop, pictures, base, origin
                )
            except (RuntimeError, MemoryError) as error:
                if not _is_short(error):
                    raise
                raise _no_room(config, error) from error
            return _in_folder(run)


def _refuse_missing(found: dict[str, str] | UserError) -> None:
    if isinstance(found, UserError):
        raise found


def _forecast(config: TrainConfig, shards: ShardSet, plan: Plan, ranks: Ranks) -> Outcome:
    """`--dry-run`: say what a run would be, and whether anything contradicts (rank 0)."""
    if not ranks.is_first:
        return "planned"
    manifest = shards.manifest
    planned = forecast.forecast(
        config,
        world=config.output.ranks or ranks.world,
        plan=plan,
        genres=manifest.genres,
        segment_samples=setup.heard_samples(config, manifest),
        sample_rate=manifest.sample_rate,
        cached_rows=manifest.splits["validation"][1],
    )
    forecast.show(planned)
    return "refused" if planned.problems else "planned"


def _in_folder(run: Run) -> TrainResult:
    """Take the run folder, train, and give it back."""
    folder, peers = run.folder, run.ranks

    def take() -> Lease:
        folder.mkdir(parents=True, exist_ok=True)
        return lease.acquire(folder, lease.new_attempt())

    held = peers.all_decide(take)
    timeout_s = run.config.engine.hang_timeout_s
    try:
        run_folder.refuse_unseen(held, peers)
        with Watch(held, peers.rank, peers.world, run.stop, hang_timeout_s=timeout_s) as watch:
            try:
                return _from_where_it_is(run, held, watch)
            except RuntimeError as error:
                raise _in_words(run, watch, error) from error
    finally:
        run.engine.close()
        run.journal.close()
        if peers.is_first:
            held.release()
            if not (folder / "config.yaml").exists():  # nothing has begun: the name stays free
                lease.forget(folder)


def _from_where_it_is(run: Run, held: Lease, watch: Watch) -> TrainResult:
    """Train from where the run folder is, and write down how it ended."""
    peers, journal = run.ranks, run.journal
    with watch.writing(0, "restoring", run.folder / checkpoint.FOLDER):
        state, changes = restore(run)  # what is refused up to here leaves the run folder as it was
    run = setup.from_position(run, state.first_position, state.first_step, state.held_rate)
    peers.all_decide(lambda: run_folder.open_run(run, held, state, changes))
    logbook.say_arithmetic(run, state)
    logbook.warn_of_bias(run)
    outcome: Literal["done", "stopped", "failed"] = "failed"
    try:
        logbook.begin(run, state, held.attempt)
        if run.cached:
            run = _with_features(run, watch)
        ready = run.cached is None or run.features is not None
        outcome = "done" if ready and loop.train(run, state, held, watch) else "stopped"
        end = DoneEvent if outcome == "done" else StoppedEvent
        journal.write(end(samples_seen=state.samples_seen))
        peers.all_decide(lambda: run_folder.close_run(run, held, state, outcome))
    except BaseException as error:
        told = _in_words(run, watch, error)
        code, reason = exit_code_of(told), f"{type(told).__name__}: {told}"
        if held.seems_ours():  # else status.json is of the run that has taken the folder over
            journal.status("failed", reason=reason, exit_code=code, samples_seen=state.samples_seen)
        raise told from error.__cause__ if told is error else error
    finally:
        if run.features:
            run.features.close()
        if peers.is_first:
            lease.record_end(run.folder, held.attempt, state.samples_seen, outcome)
    return TrainResult(
        outcome=outcome,
        folder=run.folder,
        samples_seen=state.samples_seen,
        best_epoch=_best_epoch(run, state),
        is_first=peers.is_first,
    )


def _best_epoch(run: Run, state: State) -> float | None:
    return None if state.best_loss is None else state.best_samples_seen / run.plan.rows


def _with_features(run: Run, watch: Watch) -> Run:
    """Open the cache that the run reads, and make it first if it is not there (a collective).

    Returns:
        The run with features; without, if it was asked to stop meanwhile.
    """
    assert run.cached
    run.engine.train(False)
    features = cache.all_bring(
        run.config.data.caches,
        run.cached,
        run.engine.features,
        run.shards,
        run.ranks,
        run=run.folder,
        batch=run.config.engine.micro_batch,
        stopped=lambda: bool(run.stop.signal),
        beat=lambda phase: watch.progress(0, phase),
    )
    return replace(run, features=features)


def _in_words(run: Run, watch: Watch, error: BaseException) -> BaseException:
    """What an error of torch means here: a rank was lost, or memory is short; else itself."""
    if run.ranks.is_broken(error):
        return watch.lost(error)
    return _too_large(run, error) if _is_short(error) else error


def _is_short(error: BaseException) -> bool:
    """Whether an error says that memory was short, on a GPU or on the host."""
    short = isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)
    return short or isinstance(error, MemoryError)


def _too_large(run: Run, error: BaseException) -> UserError:
    """Which batch is too large: validation's, or that of training and of the cache."""
    engine, makes_cache = run.config.engine, run.cached is not None and not run.features
    if run.model.training or makes_cache:
        batch = f"--micro-batch {engine.micro_batch}"
        cure = "lower it: --global-batch stays as it is; or --activation-checkpointing"
    else:
        batch = f"--eval-batch {engine.eval_batch}"
        cure = "lower it: figures stay the same but for rounding; --resume auto goes on"
    return UserError(
        batch,
        got=_said(error),
        expected="a batch that fits the memory of a rank",
        cure=cure,
        this_rank_only=True,
    )


def _no_room(config: TrainConfig, error: BaseException) -> UserError:
    """The weights and the optimizer alone are too large."""
    return UserError(
        f"--model {config.main.model} at --zero-stage {config.engine.zero_stage}",
        got=_said(error),
        expected="weights and optimizer that fit the memory of a rank",
        cure="look at --dry-run; freeze more, or spread them: --zero-stage 2 or 3 on more ranks",
        this_rank_only=True,
    )


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
