"""`deepspeed launch/evaluate.py RUN`: every row of a split once, judged by track."""

from typing import NoReturn

from mgc_dist import cli
from mgc_dist.cluster import preflight
from mgc_dist.config import EvaluateConfig


def run(config: EvaluateConfig) -> None:
    """Measure a run on a split, and leave this process as it was found; for the rest see `_run`."""
    from mgc_dist import guest  # it imports torch

    with guest.as_found():
        _run(config)


def _run(config: EvaluateConfig) -> None:
    """Walk the split with the run's best model; print and write what it shows.

    Raises:
        UserError: no model or data there, no genres in common, or a bias table, a map of genres
            or a table of subgroups does not fit.
    """
    preflight.begin(run=None, device=config.device)
    # here, not above: they import torch, which takes seconds, and --help answers without
    from mgc_dist.cluster.meeting import meet
    from mgc_dist.report import measure, page, tables

    with meet(cli.flags_of(config), wait_s=config.source.stage_timeout_s) as meeting:
        found = measure.evaluate(config, meeting)
        if not found.is_first:
            return
        tables.evaluation(found.figures)
        for line in (*found.notes, *found.places):
            print(line)
        page.attempt(config.run, found.shards)


def main() -> NoReturn:
    """Entry of `launch/evaluate.py` and `python -m mgc_dist.evaluate`."""
    cli.main("evaluate", EvaluateConfig, _run)


if __name__ == "__main__":
    main()
