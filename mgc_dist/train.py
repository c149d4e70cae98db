"""`deepspeed launch/train.py`: the main model on ranks that stream the shards."""

import hashlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mgc_dist import cli
from mgc_dist.cluster.stop import Stop
from mgc_dist.config import TrainConfig
from mgc_dist.errors import EXIT_BAD_INPUT, UserError, exit_code_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.nn import Module, Parameter

    from mgc_dist.bias_model.table import BiasTable
    from mgc_dist.cluster.lease import Lease
    from mgc_dist.cluster.meeting import Meeting
    from mgc_dist.cluster.ranks import Ranks
    from mgc_dist.cluster.watch import Watch
    from mgc_dist.data.features import Facts
    from mgc_dist.data.manifest import Manifest
    from mgc_dist.data.order import Plan
    from mgc_dist.data.reader import Batch, ShardSet
    from mgc_dist.models.main import WaveClassifier
    from mgc_dist.training.loop import Fit, State
    from mgc_dist.training.resume import Changes

log = logging.getLogger(__name__)

DONE, REQUEUE = "DONE", "REQUEUE"


def run(config: TrainConfig) -> int:
    """Train to the end of the plan, or to an agreed stop.

    Returns:
        0 when done, and when the run was stopped and all was saved (the run folder then holds
        REQUEUE instead of DONE).

    Raises:
        UserError: data, table, model, arithmetic or run folder do not fit the configuration.
        RunFailed: the run could not go on; mgc_dist.errors lists the exit codes.
    """
    stop = Stop().listen().follow_launcher()  # before `import torch`, which takes seconds
    from mgc_dist.cluster import preflight

    preflight.begin(run=config.output.run, device=config.engine.device)
    from mgc_dist.cluster import meeting as rendezvous

    wait_s = config.engine.group_timeout_s
    if config.data.shards_from or config.data.stage_dir:  # nodes may be done long after one another
        wait_s += config.data.stage_timeout_s
    with rendezvous.meet(cli.flags_of(config), wait_s=wait_s) as meeting:
        return _run(config, stop, meeting)


def _run(config: TrainConfig, stop: Stop, meeting: "Meeting") -> int:
    """Open the data, make sure that all ranks have the same, and train (a collective)."""
    from mgc_dist.bias_model import table as logits
    from mgc_dist.cluster import ranks
    from mgc_dist.data import fetch as stage
    from mgc_dist.data.reader import ShardSet

    data = config.data
    folder = stage.at_hand(
        data.shards,
        source=data.shards_from,
        stage_dir=data.stage_dir,
        timeout_s=data.stage_timeout_s,
    )
    with ShardSet(folder) as shards:
        table = None
        if config.objective.needs_bias:
            table = logits.read(data.table, shards.manifest, shards.keys)
        plan = _plan(config, shards)
        identity = _identity(config, shards, table, plan)
        meeting.all_same("data", {name: str(value) for name, value in identity.items()})
        with ranks.join(config.engine.device, config.engine.group_timeout_s, meeting) as peers:
            if config.output.dry_run:
                return _forecast(config, shards, plan, peers)
            if peers.all_decide(lambda: _is_complete(config, identity)):
                if peers.is_first:
                    print(f"{config.output.run} is already complete.")
                return 0
            try:
                fit, cached = _build(config, identity, shards, table, plan, peers, stop)
            except (RuntimeError, MemoryError) as error:
                if not _is_short_of_memory(error):
                    raise
                raise _no_room(config, error) from error
            return _train(fit, cached)


def _train(fit: "Fit", cached: "Facts | None") -> int:
    """Take the run folder, train, and give it back."""
    from mgc_dist.cluster import lease
    from mgc_dist.cluster.watch import Watch
    from mgc_dist.report import page

    run, peers, journal = fit.run, fit.ranks, fit.journal

    def take() -> lease.Lease:
        run.mkdir(parents=True, exist_ok=True)
        return lease.acquire(run, lease.new_attempt())

    held = peers.all_decide(take)
    timeout_s = fit.config.engine.hang_timeout_s
    try:
        _refuse_unseen(held, peers)
        with Watch(held, peers.rank, peers.world, fit.stop, hang_timeout_s=timeout_s) as watch:
            try:
                _run_fit(fit, held, watch, cached)
                if peers.is_first and (run / DONE).is_file():
                    page.attempt(run, fit.config.data.shards)
            except RuntimeError as error:
                raise _in_words(fit, watch, error) from error
    finally:
        journal.close()
        if peers.is_first:
            held.release()
            if not (run / "config.yaml").exists():  # nothing has begun: the name stays free
                lease.forget(run)
    return 0


def _refuse_unseen(held: "Lease", peers: "Ranks") -> None:
    """Refuse a run folder that some node does not share (a collective)."""
    import socket

    seen = peers.all_gather((socket.gethostname(), held.comes_into_view()))
    blind = [f"{host} (rank {rank})" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"--run {held.run}",
            got=f"{', '.join(blind[:8])}, which does not see what rank 0 writes",
            expected="a folder on a file system that all nodes share",
            cure="choose another --run",
        )


def _run_fit(fit: "Fit", held: "Lease", watch: "Watch", cached: "Facts | None") -> None:
    """Train from where the run folder is, and write down how it ended."""
    from mgc_dist.cluster import lease

    peers, journal, run = fit.ranks, fit.journal, fit.run
    state, changes = _resume(fit)  # what is refused up to here leaves the run folder as it was
    peers.all_decide(lambda: _open_run(fit, held, state, changes))
    _say_arithmetic(fit, state)
    _warn_of_bias(fit)
    outcome = "failed"
    try:
        genres = list(fit.shards.manifest.genres)
        journal.write("start", samples_seen=state.samples_seen, world=peers.world, genres=genres)
        first = fit.plan.step_of(state.samples_seen)
        journal.begin(attempt=held.attempt, first_step=first, world=peers.world)
        journal.status("running", samples_seen=state.samples_seen, total=fit.plan.total)
        brought = cached is None or _bring_features(fit, cached, watch)
        outcome = "done" if brought and fit.train(state, held, watch) else "stopped"
        journal.write(outcome, samples_seen=state.samples_seen)
        peers.all_decide(lambda: _close_run(fit, held, state, outcome))
    except BaseException as error:
        told = _in_words(fit, watch, error)
        code, reason = exit_code_of(told), f"{type(told).__name__}: {told}"
        if held.seems_ours():  # else status.json is of the run that has taken the folder over
            journal.status("failed", reason=reason, exit_code=code, samples_seen=state.samples_seen)
        raise told from error.__cause__ if told is error else error
    finally:
        if fit.features:
            fit.features.close()
        if peers.is_first:
            lease.record_end(run, held.attempt, state.samples_seen, outcome)


def _bring_features(fit: "Fit", facts: "Facts", watch: "Watch") -> bool:
    """Open the cache that the run reads, and make it first if it is not there (a collective).

    Returns:
        False if the run was asked to stop meanwhile.
    """
    from mgc_dist.training import cache

    def watched(batches: "Iterator[Batch]") -> "Iterator[Batch]":
        for batch in batches:
            watch.progress(0, "making the cache")
            yield batch

    fit.engine.train(False)
    fit.features = cache.all_bring(
        fit.config.data.caches,
        facts,
        fit.engine.features,
        fit.shards,
        fit.ranks,
        batch=fit.config.engine.micro_batch,
        stopped=lambda: bool(fit.stop.signal),
        progress=watched,
    )
    return fit.features is not None


def _in_words(fit: "Fit", watch: "Watch", error: BaseException) -> BaseException:
    """What an error of torch means here: a rank was lost, or memory is short; else itself."""
    if fit.ranks.is_broken(error):
        return watch.lost(error)
    return _too_large(fit, error) if _is_short_of_memory(error) else error


_SHORT = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""In the words of CUDA and torch, of torch on a CPU, and of cuBLAS and cuDNN."""


def _is_short_of_memory(error: BaseException) -> bool:
    short = isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)
    return short or isinstance(error, MemoryError)


def _too_large(fit: "Fit", error: BaseException) -> UserError:
    """Which batch is too large: validation's, or that of training and of the cache."""
    engine, makes_cache = fit.config.engine, fit.model.boundary is not None and not fit.features
    if fit.model.training or makes_cache:
        batch = f"--micro-batch {engine.micro_batch}"
        cure = "lower it: --global-batch stays as it is; or --activation-checkpointing"
    else:
        batch = f"--eval-batch {engine.eval_batch}"
        cure = "lower it: figures stay the same but for rounding; --resume auto goes on"
    return UserError(
        batch,
        got=" ".join(str(error).split())[:200],
        expected="a batch that fits the memory of a rank",
        cure=cure,
        this_rank_only=True,
    )


def _no_room(config: TrainConfig, error: BaseException) -> UserError:
    """The weights and the optimizer alone are too large."""
    return UserError(
        f"--model {config.main.model} at --zero-stage {config.engine.zero_stage}",
        got=" ".join(str(error).split())[:200],
        expected="weights and optimizer that fit the memory of a rank",
        cure="look at --dry-run; freeze more, or spread them: --zero-stage 2 or 3 on more ranks",
        this_rank_only=True,
    )


def _forecast(config: TrainConfig, shards: "ShardSet", plan: "Plan", peers: "Ranks") -> int:
    """`--dry-run`: say what a run would be, and whether anything contradicts (rank 0)."""
    from mgc_dist.training import forecast

    if not peers.is_first:
        return 0
    found = shards.manifest
    planned = forecast.forecast(
        config,
        world=config.output.ranks or peers.world,
        plan=plan,
        genres=found.genres,
        segment_samples=found.segment_samples,
        sample_rate=found.sample_rate,
        cached_rows=found.splits["validation"][1],
    )
    forecast.show(planned)
    return EXIT_BAD_INPUT if planned.problems else 0


def _plan(config: TrainConfig, shards: "ShardSet") -> "Plan":
    from mgc_dist.data.order import Plan

    first, end = shards.rows_of("train")
    return Plan(
        rows=end - first,
        total=max(1, round(config.optim.epochs * (end - first))),
        global_batch=config.optim.global_batch,
        seed=config.output.seed,
        window_shards=config.data.window_shards,
        shard_rows=shards.shard_rows_of("train"),
    )


def _build(
    config: TrainConfig,
    identity: dict[str, Any],
    shards: "ShardSet",
    table: "BiasTable | None",
    plan: "Plan",
    peers: "Ranks",
    stop: Stop,
) -> "tuple[Fit, Facts | None]":
    """What trains, and what its cache is of."""
    from mgc_dist.cluster.watch import start_limit
    from mgc_dist.data.order import lay_out
    from mgc_dist.journal import Journal
    from mgc_dist.models.flops import count
    from mgc_dist.models.main import frozen_fingerprint
    from mgc_dist.report.figures import PICTURES
    from mgc_dist.training import cache
    from mgc_dist.training.engine import Engine
    from mgc_dist.training.loop import Fit
    from mgc_dist.training.objective import Objective

    optim = config.optim
    layout = lay_out(
        global_batch=optim.global_batch,
        world=peers.world,
        largest_micro_batch=config.engine.micro_batch,
    )
    model = _main_model(config, shards.manifest).to(peers.device)
    bf16, facts = _takes_bf16(config, peers), None
    if model.boundary is not None:
        dtype = config.data.cache_dtype
        facts = cache.describe(model, shards, device=peers.device, bf16=bf16, dtype=dtype)
    identity = identity | {
        "frozen weights of --model": frozen_fingerprint(model),
        "shapes of --model": _shapes(model),
        "--cache": facts.description if facts else "none",
        "--precision of the weights": "bf16"
        if config.engine.precision == "bf16-weights"
        else "fp32",
    }
    flops = count(model, shards.manifest.segment_samples)  # before ZeRO-3 leaves nothing in place
    if flops and model.boundary is not None:
        flops = flops.above(model.boundary)
    with start_limit(peers.rank, config.engine.group_timeout_s):
        engine = Engine(
            model,
            layout,
            peers,
            zero_stage=config.engine.zero_stage,
            bf16=bf16,
            lr=optim.lr,
            head_lr=optim.head_lr,
            weight_decay=optim.weight_decay,
            clip_norm=optim.clip_norm,
            bucket_elements=config.engine.bucket_elements,
            bf16_weights=config.engine.precision == "bf16-weights",
            compile_model=config.engine.compile,
        )
    fit = Fit(
        config=config,
        identity=identity,
        shards=shards,
        objective=Objective(config.objective, plan, shards, table),
        plan=plan,
        layout=layout,
        flops=flops,
        model=model,
        engine=engine,
        ranks=peers,
        journal=Journal(config.output.run, writes=peers.is_first, pictures=PICTURES),
        stop=stop,
    )
    return fit, facts


def _main_model(config: TrainConfig, found: "Manifest") -> "WaveClassifier":
    from mgc_dist.models.main import build_main

    return build_main(
        config.main.model,
        found.genres,
        freeze=config.main.freeze,
        frozen_layers=config.main.frozen_layers,
        activation_checkpointing=config.main.activation_checkpointing,
        seed=config.output.seed,
        segment_samples=found.segment_samples,
        sample_rate=found.sample_rate,
        learns_gain=config.objective.learns_gain,
        cache=config.data.cache,
        spec_augment=config.main.spec_augment,
    )


def _takes_bf16(config: TrainConfig, peers: "Ranks") -> bool:
    import torch

    precision, on_gpu = config.engine.precision, peers.device.type == "cuda"
    return precision == "bf16" or (
        precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    )


def _shapes(model: "Module") -> str:
    """A hash of what is trained and frozen, by name and shape: what an optimizer's state fits."""
    lines = [f"{n} {tuple(p.shape)} {p.requires_grad}" for n, p in model.named_parameters()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _elements(parameter: "Parameter") -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves 0 in place


def _say_arithmetic(fit: "Fit", state: "State") -> None:
    config, layout, plan = fit.config, fit.layout, fit.plan
    head, backbone = fit.model.head_and_backbone()
    parts = (fit.model.parameters(), backbone, head)
    counts = [sum(_elements(parameter) for parameter in part) / 1e6 for part in parts]
    log.info(
        "global batch %d = %d ranks x micro batch %d x accumulation %d (%d slots, %.0f %% padding)",
        *(layout.global_batch, layout.world, layout.micro_batch, layout.accumulation),
        *(layout.slots, 100 * layout.waste),
    )
    if layout.waste > 0.1:
        log.info(
            "%.0f %% of each step computes padding; --global-batch %d would waste none",
            *(100 * layout.waste, layout.slots),
        )
    log.info("%d training rows, %d positions, %d steps", plan.rows, plan.total, plan.steps)
    log.info(
        "%s: %.2f M parameters, trained %.2f M of the backbone and %.3f M of the head",
        *(config.main.model, *counts),
    )
    log.info(
        "ZeRO-%d, %s, loss %s",
        *(config.engine.zero_stage, fit.engine.precision),
        config.objective.description,
    )
    log.info("starting at samples_seen %d of %d", state.samples_seen, plan.total)


def _warn_of_bias(fit: "Fit") -> None:
    """Repeat the warnings of the bias report: its model may know too much, or the training rows."""
    from mgc_dist.bias_model import summary as bias_report

    table, shards = fit.objective.table, fit.shards
    if table is None or not fit.ranks.is_first:
        return
    report = bias_report.make(table, shards.manifest, shards.labels, shards.tracks)
    for warning in report["warnings"]:
        log.warning("bias table %s: %s", fit.config.data.table, warning)


def _identity(
    config: TrainConfig, shards: "ShardSet", table: "BiasTable | None", plan: "Plan"
) -> dict[str, Any]:
    """What must be the same for a checkpoint to go on here, under the user's names."""
    from mgc_dist.data.order import ORDER_VERSION

    objective, model, optim = asdict(config.objective), config.main.model, config.optim
    return {
        "--loss": " ".join(f"{key}={value}" for key, value in objective.items()),
        "data set (--shards)": shards.manifest.dataset_id,
        "genres": ", ".join(shards.manifest.genres),
        "bias table (--bias-table)": table.sha256 if table else "none",
        "order version": ORDER_VERSION,
        "--seed": plan.seed,
        "--window-shards": f"{plan.window_shards} of {plan.shard_rows[0]} rows"
        if plan.window_shards
        else 0,
        "--global-batch": plan.global_batch,
        "positions (--epochs)": plan.total,
        "--model": str(Path(model).resolve()) if Path(model).exists() else model,
        "--freeze": config.main.freeze,
        "--spec-augment": config.main.spec_augment,
        "--lr": optim.lr,
        "--head-lr": optim.head_lr,
        "--weight-decay": optim.weight_decay,
        "--warmup-fraction": optim.warmup_fraction,
        "--final-lr-fraction": optim.final_lr_fraction,
        "--clip-norm": optim.clip_norm,
    }


def _is_complete(config: TrainConfig, identity: dict[str, Any]) -> bool:
    """Whether the run folder holds a complete run.

    Raises:
        UserError: it holds something that this run may not touch.
    """
    run, resume = config.output.run, config.output.resume
    if run.exists() and not run.is_dir():
        raise UserError(f"--run {run}", got="a file", expected="a folder", cure="choose another")
    used = run.is_dir() and any(run.iterdir())
    if used and resume == "never" and not config.output.fresh:
        raise UserError(
            f"--run {run}",
            got="a folder that is not empty",
            expected="a new or empty one",
            cure="continue it with --resume auto, begin again with --fresh, or name another --run",
        )
    from mgc_dist.training.resume import CHANGEABLE, refuse_change

    complete = used and resume == "auto" and (run / DONE).is_file()
    if complete or _comes_from_elsewhere(config):
        trained = json.loads((run / "env.json").read_text())["identity"]
        what = f"--run {run}, which {'is complete' if complete else 'holds another run'}"
        changes = refuse_change(what, identity, trained, config.output.change)
        return complete and CHANGEABLE["epochs"] not in changes
    return False


def _comes_from_elsewhere(config: TrainConfig) -> bool:
    """Whether a used run folder would go on from another one's checkpoint, over its own."""
    from mgc_dist.training import checkpoint

    run, resume = config.output.run, config.output.resume
    own = (run / checkpoint.FOLDER).resolve()
    named = resume not in ("never", "auto", "latest")
    return named and (run / "env.json").is_file() and Path(resume).resolve().parent != own


def _resume(fit: "Fit") -> tuple["State", "Changes"]:
    """Weights, optimizer and state of the checkpoint that is asked for (a collective).

    Returns:
        The state, and in what this run was allowed to differ from the checkpoint's.
    """
    from mgc_dist.cluster import lease
    from mgc_dist.training import checkpoint, resume
    from mgc_dist.training.loop import State

    config, peers = fit.config.output, fit.ranks
    folder = resume.all_choose(config, peers)
    changes: Changes = {}
    if folder is None:
        state = State(best_by=config.select)
    else:
        facts = checkpoint.facts(folder)
        changes = resume.refuse_change(
            f"checkpoint {folder}", fit.identity, facts["identity"], config.change
        )
        stage = fit.engine.zero_stage
        reshape = resume.must_reshape(folder, world=peers.world, zero_stage=stage)
        state = State.restored(fit.engine.all_load(folder, reshape=reshape))
        resume.refuse_position(changes, fit.plan, state.samples_seen)
        _keep_best(fit, state)
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


def _keep_best(fit: "Fit", state: "State") -> None:
    """Forget a best model that RUN/best does not hold, or that was chosen in another way.

    The next validation is then the best. A collective.
    """
    from mgc_dist.training import resume

    output = fit.config.output
    best = (state.best_samples_seen, state.best_loss)
    held = fit.ranks.all_decide(lambda: resume.holds_best(output.run, *best))
    if held and state.best_by != output.select and fit.ranks.is_first:
        log.warning(
            "--select is %s, and was %s: the best model is sought anew, from here on",
            *(output.select, state.best_by),
        )
    if not held or state.best_by != output.select:
        state.forget_best(output.select)


def _open_run(fit: "Fit", held: "Lease", state: "State", changes: "Changes") -> None:
    """Write down what runs here (rank 0)."""
    import platform
    import socket
    from importlib.metadata import version

    from mgc_dist import console as display
    from mgc_dist.cluster import lease
    from mgc_dist.files import replace_text
    from mgc_dist.training import resume

    if fit.config.output.fresh:
        resume.set_aside(fit.run)
    lease.record_start(fit.run, held.attempt, state.samples_seen, fit.ranks.world)
    for marker in (DONE, REQUEUE):
        (fit.run / marker).unlink(missing_ok=True)
    bias = fit.objective.table
    packages = ("mgc_dist", "torch", "transformers", "deepspeed", "numpy")
    content = {
        "versions": {name: version(name) for name in packages},
        "git": _commit(),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "world": fit.ranks.world,
        "device": str(fit.ranks.device),
        "dataset_id": fit.shards.manifest.dataset_id,
        "bias_table": bias and {"name": bias.name, "fold_status": bias.fold_status},
        "identity": fit.identity,
    }
    again = replace(fit.config, output=replace(fit.config.output, fresh=False, change=()))
    replace_text(fit.run / "config.yaml", cli.dump("train", again))
    replace_text(fit.run / "env.json", json.dumps(content, indent=1))
    replace_text(fit.run / "ds_config.json", json.dumps(fit.engine.config, indent=1))
    display.start_logging(fit.ranks.rank, fit.run / "train.log")
    for key, (ours, theirs) in changes.items():
        log.info(
            "changed from samples_seen %d on: %s", state.samples_seen, f"{key}: {theirs} -> {ours}"
        )
        fit.journal.write(
            "changed", samples_seen=state.samples_seen, name=key, before=str(theirs), now=str(ours)
        )


def _commit() -> str | None:
    """Commit of this code, `-dirty` if it is changed; None where it is not under git."""
    import subprocess

    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:  # the repository around a virtual environment is somebody else's
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True
        )
        words = [*git, "describe", "--always", "--dirty", "--exclude", "*"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _close_run(fit: "Fit", held: "Lease", state: "State", outcome: str) -> None:
    """Leave the marker that batch scripts read, and say what comes next (rank 0)."""
    held.check()
    (fit.run / (DONE if outcome == "done" else REQUEUE)).touch()
    fit.journal.status(outcome, samples_seen=state.samples_seen, total=fit.plan.total, exit_code=0)
    if outcome == "done" and state.best_loss is None:
        log.warning("done; no validation gave finite logits, so there is no best model")
    elif outcome == "done":
        epoch = state.best_samples_seen / fit.plan.rows
        log.info(
            "done; the best model (--select %s) is that of epoch %.2f: %s",
            *(state.best_by, epoch, fit.run / "best"),
        )
        log.info("next: deepspeed launch/evaluate.py %s", fit.run)


def main() -> NoReturn:
    """Entry of `launch/train.py` and `python -m mgc_dist.train`."""
    cli.main("train", TrainConfig, run)


if __name__ == "__main__":
    main()
