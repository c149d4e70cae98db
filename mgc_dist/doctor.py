"""`python -m mgc_dist.doctor`: what goes wrong on clusters, looked at before a job waits for it."""

import socket
from typing import NoReturn

from mgc_dist import cli
from mgc_dist.cluster import preflight
from mgc_dist.cluster.preflight import Finding
from mgc_dist.cluster.seat import seat
from mgc_dist.config import DoctorConfig
from mgc_dist.errors import EXIT_BAD_INPUT


def run(config: DoctorConfig) -> int:
    """Look; with several ranks, tell rank 0, which prints what all have found.

    Returns:
        0, or 2 where something is wrong.

    Raises:
        UserError: the ranks cannot meet, or have other code, flags or data.
        PeerLost: a rank does not come.
    """
    here = seat()
    findings = preflight.look(here, run=config.run, device=config.device)
    if here.rank == 0:
        findings += preflight.lease(config.run)
    if here.world > 1 and any(finding.error for finding in findings):  # they might never meet
        print(f"rank {here.rank} on {socket.gethostname()}", flush=True)
        _print(findings)
        return EXIT_BAD_INPUT
    # here, not above: they import torch, and what was looked at so far may keep it from loading
    from mgc_dist.cluster.meeting import meet
    from mgc_dist.training import checkup

    with meet(cli.flags_of(config), wait_s=config.wait_s) as meeting:
        is_well = checkup.all_look(config, meeting, findings, _print)
    return 0 if is_well else EXIT_BAD_INPUT


def _print(findings: list[Finding]) -> None:
    for finding in findings:
        sign = finding.verdict.upper() if finding.verdict == "wrong" else finding.verdict
        print(f"{sign:<6} {finding.question:<12} {finding.sentence}", flush=True)


def main() -> NoReturn:
    """Entry of `python -m mgc_dist.doctor`."""
    cli.main("doctor", DoctorConfig, run)


if __name__ == "__main__":
    main()
