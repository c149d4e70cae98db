"""`deepspeed launch/probe.py`: heads on the pooled states of each layer of a frozen model."""

from typing import NoReturn

from mgc_dist import cli
from mgc_dist.cluster import preflight
from mgc_dist.config import ProbeConfig


def run(config: ProbeConfig) -> None:
    """Probe a model, and leave this process as it was found; for the rest see `_run`."""
    from mgc_dist import guest  # it imports torch

    with guest.as_found():
        _run(config)


def _run(config: ProbeConfig) -> None:
    """Pool hidden states of every row, fit the heads, measure them, print and write the figures.

    Raises:
        UserError: no shards, no model, a split without tracks, or other states are in the way.
    """
    preflight.begin(run=None, device=config.device)
    # here, not above: they import torch, which takes seconds, and --help answers without
    from mgc_dist.bias_model import probe
    from mgc_dist.cluster import ranks
    from mgc_dist.cluster.meeting import meet
    from mgc_dist.data import fetch
    from mgc_dist.data.reader import ShardSet
    from mgc_dist.report import probe_report

    with meet(cli.flags_of(config), wait_s=config.source.stage_timeout_s) as meeting:
        folder = fetch.at_hand(config.shards, config.source)
        with ShardSet(folder, is_whole=True) as shards:
            meeting.all_same("data", {"data set (--shards)": shards.manifest.dataset_id})
            with ranks.join(config.device, meeting=meeting) as peers:
                found = probe.make(config, shards, peers)
                if found is not None:  # no collective is left to come
                    probe_report.bring(found, config.results)


def main() -> NoReturn:
    """Entry of `launch/probe.py` and `python -m mgc_dist.probe`."""
    cli.main("probe", ProbeConfig, _run)


if __name__ == "__main__":
    main()
