"""The run folder: whether it may be used, what stands in it from the start, how it ends."""

import json
import logging
import platform
import socket
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mgc_dist import __version__, cli, console
from mgc_dist.cluster import lease
from mgc_dist.cluster.lease import Lease
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.config import TrainConfig, identity
from mgc_dist.errors import UserError
from mgc_dist.events import ChangedEvent
from mgc_dist.files import replace_text
from mgc_dist.journal import ENVIRONMENT, read_environment
from mgc_dist.models.folder import BEST_EMA
from mgc_dist.training import checkpoint, resume
from mgc_dist.training.resume import Changes, State, refuse_change
from mgc_dist.training.setup import Run

log = logging.getLogger(__name__)

DONE, REQUEUE = "DONE", "REQUEUE"
"""Markers of a run that has ended: at the end of its plan, or stopped on request."""


def is_complete(config: TrainConfig, own: dict[str, Any]) -> bool:
    """Whether the run folder holds a complete run.

    Raises:
        UserError: it holds something that this run may not touch.
    """
    run, how = config.output.run, config.output.resume
    if run.exists() and not run.is_dir():
        raise UserError(f"--run {run}", got="a file", expected="a folder", cure="choose another")
    used = run.is_dir() and any(run.iterdir())
    if used and how == "never" and not config.output.fresh:
        raise UserError(
            f"--run {run}",
            got="a folder that is not empty",
            expected="a new or empty one",
            cure="continue it with --resume auto, begin again with --fresh, or name another --run",
        )
    complete = used and how == "auto" and (run / DONE).is_file()
    if complete or _comes_from_elsewhere(config):
        trained = read_environment(run)["identity"]
        what = f"--run {run}, which {'is complete' if complete else 'holds another run'}"
        changes = refuse_change(what, own, trained, config.output.change)
        return complete and "epochs" not in changes
    return False


def _comes_from_elsewhere(config: TrainConfig) -> bool:
    """Whether a used run folder would go on from another one's checkpoint, over its own."""
    run, how = config.output.run, config.output.resume
    own = (run / checkpoint.FOLDER).resolve()
    named = how not in ("never", "auto", "latest")
    return named and (run / ENVIRONMENT).is_file() and Path(how).resolve().parent != own


def refuse_unseen(held: Lease, ranks: Ranks) -> None:
    """Refuse a run folder that some node does not share (a collective).

    Raises:
        UserError: it names the hosts.
    """
    seen = ranks.all_gather((socket.gethostname(), held.comes_into_view()))
    blind = [f"{host} (rank {rank})" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"--run {held.run}",
            got=f"{', '.join(blind[:8])}, which does not see what rank 0 writes",
            expected="a folder on a file system that all nodes share",
            cure="choose another --run",
        )


def open_run(run: Run, held: Lease, state: State, changes: Changes) -> None:
    """Write down what runs here (rank 0)."""
    folder = run.folder
    output = run.config.output
    if output.fresh:
        resume.set_aside(folder)
    if output.resume not in ("never", "auto", "latest"):
        checkpoint.set_out_from(folder, Path(output.resume))
    lease.record_start(folder, held.attempt, state.samples_seen, run.ranks.world)
    for marker in (DONE, REQUEUE):
        (folder / marker).unlink(missing_ok=True)
    bias = run.objective.table
    packages = ("torch", "transformers", "deepspeed", "numpy")
    content = {
        "versions": {"mgc_dist": __version__} | {name: version(name) for name in packages},
        "git": commit_of_code(),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "world": run.ranks.world,
        "device": str(run.ranks.device),
        "dataset_id": run.shards.manifest.dataset_id,
        "bias_table": bias and {"name": bias.name, "fold_status": bias.fold_status},
        "identity": run.identity,
    }
    again = replace(run.config, output=replace(run.config.output, fresh=False, change=()))
    replace_text(folder / "config.yaml", cli.dump("train", again))
    replace_text(folder / ENVIRONMENT, json.dumps(content, indent=1))
    replace_text(folder / "ds_config.json", json.dumps(run.engine.config, indent=1))
    console.start_logging(run.ranks.rank, folder / "train.log")
    for name, (ours, theirs) in changes.items():
        key = identity.words(name)
        log.info(
            "changed from samples_seen %d on: %s", state.samples_seen, f"{key}: {theirs} -> {ours}"
        )
        seen = state.samples_seen
        run.journal.write(
            ChangedEvent(samples_seen=seen, knob=key, before=str(theirs), now=str(ours))
        )


def commit_of_code() -> str | None:
    """Commit of this code, `-dirty` if it is changed; None where it is not under git."""
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


def close_run(run: Run, held: Lease, state: State, outcome: str) -> None:
    """Leave the marker that batch scripts read, and say what comes next (rank 0)."""
    held.check()
    (run.folder / (DONE if outcome == "done" else REQUEUE)).touch()
    run.journal.status(outcome, samples_seen=state.samples_seen, total=run.plan.total, exit_code=0)
    if outcome == "done" and state.best_loss is None:
        log.warning("done; no validation gave finite logits, so there is no best model")
    elif outcome == "done":
        epoch = state.best_samples_seen / run.plan.rows
        log.info(
            "done; the best model (--select %s) is that of epoch %.2f: %s",
            *(state.best_by, epoch, run.folder / "best"),
        )
        if state.ema_loss is not None:
            epoch = state.ema_samples_seen / run.plan.rows
            log.info(
                "the best averaged weights are those of epoch %.2f: %s; give --ema",
                *(epoch, run.folder / BEST_EMA),
            )
        log.info("next: %s %s", cli.launched("evaluate"), run.folder)
