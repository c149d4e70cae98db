"""`deepspeed launch/exam.py RUN`: which changes that keep a genre change the answers?"""

from typing import NoReturn

from mgc_dist import cli
from mgc_dist.cluster import preflight
from mgc_dist.config import ExamConfig


def run(config: ExamConfig) -> None:
    """Examine a run, and leave this process as it was found; for the rest see `_run`."""
    from mgc_dist import guest  # it imports torch

    with guest.as_found():
        _run(config)


def _run(config: ExamConfig) -> None:
    """Measure the run's best model on transformed music; print and write what it shows.

    Raises:
        UserError: no model or data there, other genres, or no such transformation.
    """
    preflight.begin(run=None, device=config.device)
    # here, not above: they import torch, which takes seconds, and --help answers without
    from mgc_dist.cluster.meeting import meet
    from mgc_dist.report import exam_report, examination, page

    with meet(cli.flags_of(config), wait_s=config.source.stage_timeout_s) as meeting:
        found = examination.examine(config, meeting)
        if found is None:
            return
        exam_report.show(found)
        print(f"all figures: {config.file}; audio of changed answers: {config.folder}/*.wav")
        page.attempt(config.run, config.data)


def main() -> NoReturn:
    """Entry of `launch/exam.py` and `python -m mgc_dist.exam`."""
    cli.main("exam", ExamConfig, _run)


if __name__ == "__main__":
    main()
