"""`python -m mgc_dist.shard`: tracks to webdataset shards."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mgc_dist import cli
from mgc_dist.config import ShardConfig
from mgc_dist.errors import UserError

if TYPE_CHECKING:
    from mgc_dist.cut import Cut, PackPlan
    from mgc_dist.manifest import Manifest
    from mgc_dist.tracks import Track

Settings = dict[str, int | float | str]


def run(config: ShardConfig) -> None:
    """Find tracks, split them, plan from their headers, and pack.

    Raises:
        UserError: anything about the files, the split or the output folder that forbids it.
    """
    from mgc_dist import tracks  # after parsing: --help answers without numpy
    from mgc_dist.cut import Cut, inspect, still_bad
    from mgc_dist.display import progress
    from mgc_dist.pack import pack

    found = tracks.find(config.data)
    if others := tracks.overlooked(config.data, found):
        print(f"not taken: {len(others)} other files, such as {others[0]}")
    if config.groups:
        found = tracks.with_groups(found, config.groups)
        known = sum(track.group is not None for track in found)
        print(f"{config.groups} names the artists of {known} of {len(found)} tracks")
    rule = tracks.choose_split(config.split, found)
    cut = Cut(
        segment_samples=config.segment_samples,
        hop_samples=config.hop_samples,
        sample_rate=config.sample_rate,
        rows_per_shard=config.rows_per_shard,
    )
    settings = _settings(config, rule)
    segments, bad = inspect(found, cut)
    existing = _existing(config)
    if existing:
        by_list = (tracks.NOT_LISTED, tracks.NO_FILE)
        suspects = [id_ for id_, why in existing.excluded.items() if why not in by_list]
        bad |= still_bad(found, suspects, cut)
    while True:  # again without the files that prove unusable only when they are decoded
        plan = _plan(config, rule, found, cut, segments, bad)
        _print_plan(plan, rule)
        if config.dry_run or (existing and _is_there(config, existing, plan, settings)):
            return
        with progress("packing", len(plan.tracks), shown=True) as bar:
            made, late = pack(plan, config.out, settings, jobs=config.jobs, progress=bar.over)
        if made is not None:
            break
        bad |= late
    print(f"Packed {made.rows} segments into {len(made.shards)} shards in {config.out}.")
    print(f"data set {made.dataset_id[:12]}; next: deepspeed launch/bias.py --shards {config.out}")


def _settings(config: ShardConfig, rule: str) -> Settings:
    if rule != "stratified":
        return {"split": rule}
    return {
        "split": rule,
        "seed": config.seed,
        "validation_fraction": config.validation_fraction,
        "test_fraction": config.test_fraction,
    }


def _plan(
    config: ShardConfig,
    rule: str,
    found: "Sequence[Track]",
    cut: "Cut",
    segments: dict[str, int],
    bad: dict[str, str],
) -> "PackPlan":
    from mgc_dist import tracks
    from mgc_dist.cut import judge_bad, make_plan

    excluded = judge_bad(bad, config.allow_bad)
    usable = [track for track in found if track.id not in excluded]
    if rule == "fault-filtered":
        labelled, left_out = tracks.split_fault_filtered(usable)
        excluded = left_out | excluded
    else:
        labelled = tracks.split_stratified(
            usable,
            validation=config.validation_fraction,
            test=config.test_fraction,
            seed=config.seed,
        )
    return make_plan(labelled, segments, excluded, cut)


def _existing(config: ShardConfig) -> "Manifest | None":
    """The data set in the output folder that may not be replaced, if there is one."""
    from mgc_dist import manifest

    if config.overwrite or not (config.out / manifest.NAME).is_file():
        return None
    return manifest.read(config.out)


def _is_there(
    config: ShardConfig, existing: "Manifest", plan: "PackPlan", settings: Settings
) -> bool:
    """True if the data set that is there is just the planned one; another one is an error."""
    from mgc_dist.pack import is_packed

    if not is_packed(plan, existing, settings):
        raise UserError(
            f"--out {config.out}",
            got=f"a different data set ({existing.dataset_id[:12]})",
            expected="an empty folder, or the same tracks and settings",
            cure="choose another --out, or replace it with --overwrite",
        )
    print(f"{config.out} already holds exactly this; nothing to do.")
    return True


def _print_plan(plan: "PackPlan", rule: str) -> None:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from mgc_dist import record

    table = Table(title=f"{len(plan.tracks)} tracks, {len(plan.genres)} genres, split {rule}")
    for column in ("split", "tracks", "artists", "segments"):
        table.add_column(column, justify="left" if column == "split" else "right")
    tracks = Counter(track.split for track in plan.tracks)
    for split, rows in plan.split_rows.items():
        groups = {track.group for track in plan.tracks if track.split == split and track.group}
        table.add_row(split, str(tracks[split]), str(len(groups) or "unknown"), str(rows))
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(table)
    size = sum(record.shard_bytes(rows, plan.cut.segment_samples) for _, rows in plan.shards())
    console.print(f"{len(plan.shards())} shards, {size / 1e6:.1f} MB")
    reasons = Counter(plan.excluded.values())
    for reason, count in sorted(reasons.items()):
        ids = [id_ for id_, why in plan.excluded.items() if why == reason]
        named = ", ".join(ids) if count <= 5 else f"{count} tracks such as {ids[0]}"
        console.print(f"left out: {named}: {reason}")
    console.print("leak check: no track and no known artist is in two splits")
    unknown = sum(track.group is None for track in plan.tracks)
    if unknown and (rule == "stratified" or unknown < len(plan.tracks)):
        console.print(
            f"not controlled: {unknown} tracks have no known artist (--groups FILE names them); "
            "tracks of one artist may be in two splits, which raises test accuracy"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["pack"]:  # the default verb may be written out
        del sys.argv[1]
    cli.main("shard", ShardConfig, run)
