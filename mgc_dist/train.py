"""`deepspeed launch/train.py`: the main model on ranks that stream the shards."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mgc_dist import cli
from mgc_dist.config import TrainConfig
from mgc_dist.errors import UserError
from mgc_dist.stop import Stop

if TYPE_CHECKING:
    from torch.nn import Parameter

    from mgc_dist.data import ShardSet
    from mgc_dist.fit import Fit, State
    from mgc_dist.logits import BiasTable
    from mgc_dist.plan import Plan
    from mgc_dist.ranks import Ranks

log = logging.getLogger(__name__)

EXIT_NON_FINITE = 70
DONE, REQUEUE = "DONE", "REQUEUE"


def run(config: TrainConfig) -> int:
    """Train to the end of the plan, or to an agreed stop.

    Returns:
        0 when done, and when a signal stopped the run and all was saved (the run folder then
        holds REQUEUE instead of DONE); 70 after a loss that was not finite.

    Raises:
        UserError: data, table, model, arithmetic or run folder do not fit the configuration.
    """
    stop = Stop().listen()  # before `import torch`: a signal during the import would kill us
    from mgc_dist import display, logits, ranks, stage
    from mgc_dist.data import ShardSet

    data = config.data
    if data.shards_from:
        stage.stage(data.shards, data.shards_from, timeout_s=data.stage_timeout_s)
    with ShardSet(data.shards) as shards:
        table = None
        if config.objective.loss != "ce":
            table = logits.read(data.table, shards.manifest)
        plan = _plan(config, shards)
        identity = _identity(config, shards, table, plan)
        with ranks.join(config.engine.device) as peers:
            display.start_logging(peers.rank)
            if peers.all_decide(lambda: _is_complete(config, identity)):
                if peers.is_first:
                    print(f"{config.output.run} is already complete.")
                return 0
            return _train(_build(config, identity, shards, table, plan, peers, stop))


def _train(fit: "Fit") -> int:
    from mgc_dist.tally import NonFiniteLoss

    journal, peers = fit.journal, fit.ranks
    state = _resume(fit)  # what is refused up to here leaves the run folder as it was
    peers.all_decide(lambda: _open_run(fit))
    _say_arithmetic(fit, state)
    try:
        journal.write("start", samples_seen=state.samples_seen, world=peers.world)
        journal.status("running", samples_seen=state.samples_seen, total=fit.plan.total)
        done = fit.train(state)
        outcome = "done" if done else "stopped"
        journal.write(outcome, samples_seen=state.samples_seen)
        journal.status(outcome, samples_seen=state.samples_seen, total=fit.plan.total)
    except NonFiniteLoss as error:
        log.error("%s; the last checkpoint is untouched", error)
        journal.status("failed", reason=str(error))
        return EXIT_NON_FINITE
    except BaseException as error:
        journal.status("failed", reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        journal.close()
    if peers.is_first:
        _say_outcome(fit, state, done)
    return 0


def _plan(config: TrainConfig, shards: "ShardSet") -> "Plan":
    from mgc_dist.plan import Plan

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
) -> "Fit":
    import torch

    from mgc_dist.engine import Engine
    from mgc_dist.fit import Fit
    from mgc_dist.journal import Journal
    from mgc_dist.model import build_main
    from mgc_dist.plan import lay_out

    optim, found = config.optim, shards.manifest
    layout = lay_out(
        global_batch=optim.global_batch,
        world=peers.world,
        largest_micro_batch=config.engine.micro_batch,
    )
    model = build_main(
        config.main.model,
        found.genres,
        freeze=config.main.freeze,
        frozen_layers=config.main.frozen_layers,
        activation_checkpointing=config.main.activation_checkpointing,
        seed=config.output.seed,
        segment_samples=found.segment_samples,
        sample_rate=found.sample_rate,
    ).to(peers.device)
    precision, on_gpu = config.engine.precision, peers.device.type == "cuda"
    bf16 = precision == "bf16" or (
        precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    )
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
    )
    return Fit(
        config=config,
        identity=identity,
        shards=shards,
        table=table,
        plan=plan,
        layout=layout,
        model=model,
        engine=engine,
        ranks=peers,
        journal=Journal(config.output.run, writes=peers.is_first),
        stop=stop,
    )


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
        *(config.engine.zero_stage, "bf16 autocast" if fit.engine.bf16 else "fp32"),
        config.objective.loss,
    )
    log.info("starting at samples_seen %d of %d", state.samples_seen, plan.total)


def _identity(
    config: TrainConfig, shards: "ShardSet", table: "BiasTable | None", plan: "Plan"
) -> dict[str, Any]:
    """What must be the same for a checkpoint to go on here, under the user's names."""
    from mgc_dist.plan import ORDER_VERSION

    objective, model = asdict(config.objective), config.main.model
    return {
        "--loss": " ".join(f"{key}={value}" for key, value in objective.items()),
        "data set (--shards)": shards.manifest.dataset_id,
        "bias table (--bias-table)": table.header.table_sha256 if table else "none",
        "order version": ORDER_VERSION,
        "--seed": plan.seed,
        "--window-shards": f"{plan.window_shards} of {plan.shard_rows[0]} rows"
        if plan.window_shards
        else 0,
        "--global-batch": plan.global_batch,
        "positions (--epochs)": plan.total,
        "--model": str(Path(model).resolve()) if Path(model).exists() else model,
        "--freeze": config.main.freeze,
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
    if used and resume == "never":
        raise UserError(
            f"--run {run}",
            got="a folder that is not empty",
            expected="a new or empty one",
            cure="continue it with --resume auto, or choose another name with --run",
        )
    complete = used and resume == "auto" and (run / DONE).is_file()
    if complete:
        trained = json.loads((run / "env.json").read_text())["identity"]
        _refuse_change(f"--run {run}, which is complete", identity, trained)
    return complete


def _resume(fit: "Fit") -> "State":
    from mgc_dist import checkpoint
    from mgc_dist.fit import State

    folder = fit.ranks.all_decide(lambda: _chosen(fit))
    if folder is None:
        return State()
    facts = checkpoint.facts(folder)
    here = {"world": fit.ranks.world, "zero_stage": fit.engine.zero_stage}
    for name, flag in (("world", "ranks (--num_gpus)"), ("zero_stage", "--zero-stage")):
        if facts[name] != here[name]:
            raise UserError(
                f"checkpoint {folder}: {flag}",
                got=here[name],
                expected=f"{facts[name]}, as it was saved with",
                cure=f"resume with {facts[name]}",
            )
    _refuse_change(f"checkpoint {folder}", fit.identity, facts["identity"])
    state = fit.engine.load(folder)
    log.info("resuming from %s", folder)
    return State(
        samples_seen=state["samples_seen"],
        best_macro_f1=state["best_macro_f1"],
        best_samples_seen=state["best_samples_seen"],
    )


def _refuse_change(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{what}: {name}",
                got=value,
                expected=f"{theirs.get(name)}, as the run was started with",
                cure="give the same, or start another run with --run",
            )


def _chosen(fit: "Fit") -> Path | None:
    from mgc_dist import checkpoint

    run, resume = fit.run, fit.config.output.resume
    if resume == "never":
        return None
    if resume in ("auto", "latest"):
        found = checkpoint.newest(run)
        if found is None and resume == "latest":
            raise UserError(
                f"--resume latest in {run}",
                got="no checkpoint",
                expected=f"one in {run / checkpoint.FOLDER}",
                cure="--resume auto starts from the beginning if there is none",
            )
        if found is None:
            log.info("no checkpoint in %s: starting from the beginning", run)
        return found
    reason = checkpoint.damage(Path(resume))
    if reason:
        raise UserError(
            f"--resume {resume}",
            got=reason,
            expected="never, auto, latest, or the folder of a whole checkpoint",
            cure=f"checkpoints are in {run / checkpoint.FOLDER}",
        )
    return Path(resume)


def _open_run(fit: "Fit") -> None:
    """Make the run folder and write down what runs here (rank 0)."""
    import platform
    import socket
    from importlib.metadata import version

    from mgc_dist import display
    from mgc_dist.files import replace_text

    fit.run.mkdir(parents=True, exist_ok=True)
    for marker in (DONE, REQUEUE):
        (fit.run / marker).unlink(missing_ok=True)
    packages = ("mgc_dist", "torch", "transformers", "deepspeed", "numpy")
    content = {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "world": fit.ranks.world,
        "device": str(fit.ranks.device),
        "dataset_id": fit.shards.manifest.dataset_id,
        "identity": fit.identity,
    }
    replace_text(fit.run / "config.yaml", cli.dump("train", fit.config))
    replace_text(fit.run / "env.json", json.dumps(content, indent=1))
    replace_text(fit.run / "ds_config.json", json.dumps(fit.engine.config, indent=1))
    display.start_logging(fit.ranks.rank, fit.run / "train.log")


def _say_outcome(fit: "Fit", state: "State", done: bool) -> None:
    (fit.run / (DONE if done else REQUEUE)).touch()
    if done:
        log.info(
            "done; best validation track macro-F1 %.3f after epoch %.2f is in %s",
            *(state.best_macro_f1, state.best_samples_seen / fit.plan.rows, fit.run / "best"),
        )
        log.info("next: deepspeed launch/evaluate.py %s", fit.run)


def main() -> NoReturn:
    """Entry of `launch/train.py` and `python -m mgc_dist.train`."""
    cli.main("train", TrainConfig, run)


if __name__ == "__main__":
    main()
