"""`python -m mgc_dist.shard [pack | verify | info]`: tracks to webdataset shards."""

import sys

from mgc_dist import cli
from mgc_dist.config import InfoConfig, ShardConfig, VerifyConfig


def run(config: ShardConfig) -> None:
    """Find tracks, split them, plan from their headers, and pack.

    Raises:
        UserError: anything about the files, the split or the output folder that forbids it.
    """
    from mgc_dist.packing import card, command  # here, not above: --help answers without numpy

    packing = command.shard(config, print)
    for id_, reason in packing.unusable.items():
        print(f"unusable: {id_}: {reason}")
    if config.part_of and packing.outcome == "part decoded":
        print(
            f"Part {config.part}: {packing.decoded} tracks, {len(packing.unusable)} of them "
            f"unusable. When all {config.part_of[1]} parts are there: the same command with "
            "--join instead of --part."
        )
    made = packing.manifest
    if made is None:
        return
    if packing.outcome == "packed":
        print(f"Packed {made.rows} segments into {len(made.shards)} shards in {config.out}.")
        task = f"{cli.launched('bias')} --shards {config.out}"
        if "fold0" in made.splits:
            task += " --fold 0"
        elif made.splits["train"][0] == made.splits["train"][1]:
            task = f"{cli.launched('evaluate')} RUN --data {config.out}"
            task += "  (no training tracks: for evaluation only)"
        print(f"data set {made.dataset_id[:12]}; next: {task}")
    else:
        print(f"{config.out} already holds exactly this; nothing to do.")
    for one, other in card.twins_shown(made):
        print(f"not controlled: {one} and {other} are the same file in two splits")
    for line in card.betrayed(made):
        print(f"not controlled: {line}")


def verify(config: VerifyConfig) -> None:
    """Check every byte of a packed data set.

    Raises:
        UserError: something is not as it was packed; all of it is listed.
    """
    from mgc_dist.console import progress
    from mgc_dist.data import manifest
    from mgc_dist.packing.verify import verify as check

    dataset = manifest.read(config.shards)
    with progress("verifying", len(dataset.shards), unit="shards") as bar:
        check(config.shards, dataset, jobs=config.jobs, progress=bar.over)
    print(
        f"{config.shards}: {dataset.rows} segments in {len(dataset.shards)} shards are as they "
        f"were packed; stock webdataset reads the same. Data set {dataset.dataset_id[:12]}."
    )


def info(config: InfoConfig) -> None:
    """Describe a packed data set on the terminal, and write its splits as a table.

    Raises:
        UserError: there is none.
    """
    from mgc_dist.data import manifest
    from mgc_dist.files import replace_text
    from mgc_dist.packing import card, splits

    found = manifest.read(config.shards)
    card.show(config.shards, found)
    if config.splits:
        replace_text(config.splits, splits.as_table(found.labelled_tracks()))
        print(f"{config.splits} names the splits of {len(found.tracks)} tracks")


def main() -> None:
    """Entry of `python -m mgc_dist.shard`: the verb may be left out."""
    verb = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in _VERBS else "pack"
    _VERBS[verb]()


_VERBS = {
    "pack": lambda: cli.main("shard", ShardConfig, run),
    "verify": lambda: cli.main("shard verify", VerifyConfig, verify),
    "info": lambda: cli.main("shard info", InfoConfig, info),
}

if __name__ == "__main__":
    main()
