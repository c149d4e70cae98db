"""`deepspeed launch/train.py`: the main model on ranks that stream the shards."""

import os
from dataclasses import replace
from typing import NoReturn

from mgc_dist import cli
from mgc_dist.cluster import preflight
from mgc_dist.cluster.stop import Stop
from mgc_dist.config import TrainConfig
from mgc_dist.errors import EXIT_BAD_INPUT


def run(config: TrainConfig) -> int:
    """Train, and leave this process as it was found; for the rest see `_run`."""
    from mgc_dist import guest  # it imports torch

    with guest.as_found():
        return _run(config)


def _run(config: TrainConfig) -> int:
    """Train to the end of the plan, or to a stop that all ranks agree on.

    Returns:
        0 when done, and when the run was stopped and all was saved: the run folder then holds
        REQUEUE instead of DONE. 2 if a dry run found a contradiction.

    Raises:
        UserError: data, table, model, arithmetic or run folder do not fit the configuration.
        RunFailed: the run could not go on; mgc_dist.errors lists the exit codes.
    """
    stop = Stop().listen().follow_launcher()
    preflight.begin(run=config.output.run, device=config.engine.device)
    # here, not above: they import torch, which takes seconds, and a signal must not come before
    from mgc_dist.cluster.meeting import meet
    from mgc_dist.report import page
    from mgc_dist.report.figures import PICTURES
    from mgc_dist.training import command

    tries = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    config = replace(config, output=config.output.of_try(tries))
    wait_s = config.engine.group_timeout_s
    source = config.data.source
    if source.shards_from or source.stage_dir:  # nodes may be done long after one another
        wait_s += source.stage_timeout_s
    with meet(cli.flags_of(config), wait_s=wait_s) as meeting:
        result = command.train(config, stop, meeting, pictures=PICTURES)
        if result.outcome == "done" and result.is_first:
            page.attempt(result.folder, config.data.shards)
    if result.outcome == "already complete" and result.is_first:
        print(f"{result.folder} is already complete.")
    return EXIT_BAD_INPUT if result.outcome == "refused" else 0


def main() -> NoReturn:
    """Entry of `launch/train.py` and `python -m mgc_dist.train`."""
    cli.main("train", TrainConfig, _run)


if __name__ == "__main__":
    main()
