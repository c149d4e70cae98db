"""`deepspeed launch/bias.py`: one pass of the frozen bias model, heads, table, bias report."""

from typing import NoReturn

from mgc_dist import cli
from mgc_dist.cluster import preflight
from mgc_dist.config import BiasConfig


def run(config: BiasConfig) -> None:
    """Make the bias table, and leave this process as it was found; for the rest see `_run`."""
    from mgc_dist import guest  # it imports torch

    with guest.as_found():
        _run(config)


def _run(config: BiasConfig) -> None:
    """Pool hidden states of every row, cross-fit the heads, write the table, print the report.

    Raises:
        UserError: no shards, no model, or a table with other settings is in the way.
    """
    preflight.begin(run=None, device=config.device)
    # here, not above: they import torch, which takes seconds, and --help answers without
    from mgc_dist.bias_model import command
    from mgc_dist.cluster import ranks
    from mgc_dist.cluster.meeting import meet
    from mgc_dist.data import fetch
    from mgc_dist.data.reader import ShardSet
    from mgc_dist.report import bias_report

    with meet(cli.flags_of(config), wait_s=config.source.stage_timeout_s) as meeting:
        folder = fetch.at_hand(config.shards, config.source)
        with ShardSet(folder, config.source.fold) as shards:
            meeting.all_same("data", {"data set (--shards)": shards.manifest.dataset_id})
            with ranks.join(config.device, meeting=meeting) as peers:
                made = command.make(config, shards, peers)
                if not made.is_first:  # no collective is left to come
                    return
                if not made.is_new:
                    print(f"{made.folder} already holds exactly this table; nothing to do.")
                paths = bias_report.bring(made.folder, shards, write_anew=made.is_new)
                other = f" --bias-table {config.bias_table}" if config.bias_table else ""
                other += "" if config.source.fold is None else f" --fold {config.source.fold}"
                print(
                    f"{made.folder} is ready, its report in {paths[0]} and {paths[1].name}; next:"
                )
                print(f"{cli.launched('train')} --shards {config.shards}{other}")


def main() -> NoReturn:
    """Entry of `launch/bias.py` and `python -m mgc_dist.bias`."""
    cli.main("bias", BiasConfig, _run)


if __name__ == "__main__":
    main()
