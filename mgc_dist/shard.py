"""`python -m mgc_dist.shard [pack | verify | info]`: tracks to webdataset shards."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mgc_dist import cli
from mgc_dist.config import InfoConfig, ShardConfig, VerifyConfig
from mgc_dist.errors import UserError

if TYPE_CHECKING:
    from mgc_dist.data.manifest import Manifest
    from mgc_dist.data.tracks import Track
    from mgc_dist.packing.cut import Cut, PackPlan
    from mgc_dist.packing.pack import Settings, Waves


def run(config: ShardConfig) -> None:
    """Find tracks, split them, plan from their headers, and pack.

    Raises:
        UserError: anything about the files, the split or the output folder that forbids it.
    """
    from mgc_dist.data import tracks  # after parsing: --help answers without numpy
    from mgc_dist.packing import card
    from mgc_dist.packing.cut import Cut
    from mgc_dist.workers import keep_memory

    keep_memory()
    found = tracks.find(config.data)
    if others := tracks.overlooked(config.data, found):
        print(f"not taken: {len(others)} other files, such as {others[0]}")
    if config.groups:
        found = tracks.with_groups(found, config.groups)
        known = sum(track.group is not None for track in found)
        print(f"{config.groups} names the artists of {known} of {len(found)} tracks")
    cut = Cut(
        segment_samples=config.segment_samples,
        hop_samples=config.hop_samples,
        sample_rate=config.sample_rate,
        rows_per_shard=config.rows_per_shard,
    )
    if config.part_of and not config.dry_run:
        _decode_part(config, found, cut)
        return
    made = _pack(config, found, cut)
    if made:
        card.write(config.out, made)
        for one, other in card.twins_shown(made):
            print(f"not controlled: {one} and {other} are the same file in two splits")


def verify(config: VerifyConfig) -> None:
    """Check every byte of a packed data set.

    Raises:
        UserError: something is not as it was packed; all of it is listed.
    """
    from mgc_dist.console import progress
    from mgc_dist.data import manifest
    from mgc_dist.packing.verify import verify as check

    found = manifest.read(config.shards)
    with progress("verifying", len(found.shards), unit="shards") as bar:
        check(config.shards, found, jobs=config.jobs, progress=bar.over)
    print(
        f"{config.shards}: {found.rows} segments in {len(found.shards)} shards are as they were "
        f"packed; stock webdataset reads the same. Data set {found.dataset_id[:12]}."
    )


def info(config: InfoConfig) -> None:
    """Describe a packed data set on the terminal.

    Raises:
        UserError: there is none.
    """
    from mgc_dist.data import manifest
    from mgc_dist.packing import card

    card.show(config.shards, manifest.read(config.shards))


def _pack(config: ShardConfig, found: "list[Track]", cut: "Cut") -> "Manifest | None":
    """Plan and pack; None if the plan was all that was wanted."""
    from mgc_dist.console import progress
    from mgc_dist.packing import parts
    from mgc_dist.packing import splits as split
    from mgc_dist.packing.cut import count_segments, inspect
    from mgc_dist.packing.pack import SourceFiles, pack

    rule = split.choose(config.split, found, config.split_file)
    settings, by_list = split.settings(rule, config), split.RULES[rule].by_list
    listed, left_out = by_list(found, config) if by_list else (found, {})
    existing = _existing(config)
    waves: Waves = SourceFiles(sample_rate=cut.sample_rate)
    if config.join and not existing:
        waves = joined = parts.join(listed, cut.sample_rate, config.out)
        segments, bad = count_segments({t.id: joined.samples(t) for t in listed}, cut)
    else:
        segments, bad = inspect(listed, cut)
    bad |= _other_bad(config, listed, cut, bad, existing)
    while True:  # again without the files that prove unusable only when they are decoded
        plan = _plan(config, rule, listed, cut, segments, bad, left_out)
        _print_plan(plan, rule)
        if config.dry_run:
            return None
        if existing and _is_there(config, existing, plan, settings):
            _finish(config)
            return existing
        with progress("packing", len(plan.tracks), unit="tracks") as bar:
            made, late = pack(
                plan,
                config.out,
                settings,
                waves,
                overwrite=config.overwrite,
                jobs=config.jobs,
                progress=bar.over,
            )
        if made is not None:
            break
        bad |= late
    _finish(config)
    print(f"Packed {made.rows} segments into {len(made.shards)} shards in {config.out}.")
    bounds = made.splits["train"]
    task = f"bias.py --shards {config.out}"
    if bounds[0] == bounds[1]:
        task = f"evaluate.py RUN --data {config.out}  (no training tracks: for evaluation only)"
    print(f"data set {made.dataset_id[:12]}; next: deepspeed launch/{task}")
    return made


def _finish(config: ShardConfig) -> None:
    from mgc_dist.packing import pack, parts

    pack.tidy(config.out)
    if config.join:
        parts.remove(config.out)


def _decode_part(config: ShardConfig, found: "Sequence[Track]", cut: "Cut") -> None:
    from mgc_dist.console import progress
    from mgc_dist.packing.parts import decode_part

    part = config.part_of
    assert part is not None
    mine = len(found[part[0] - 1 :: part[1]])
    with progress(f"decoding part {config.part}", mine, unit="tracks") as bar:
        count, bad = decode_part(
            found, cut.sample_rate, config.out, part=part, jobs=config.jobs, progress=bar.over
        )
    for id_, reason in bad.items():
        print(f"unusable: {id_}: {reason}")
    print(
        f"Part {config.part}: {count} tracks, {len(bad)} of them unusable. "
        f"When all {part[1]} parts are there: the same command with --join instead of --part."
    )


def _other_bad(
    config: ShardConfig,
    listed: "Sequence[Track]",
    cut: "Cut",
    bad: dict[str, str],
    existing: "Manifest | None",
) -> dict[str, str]:
    """Files with good headers that cannot be decoded, as far as it is worth looking now.

    If there are too many bad headers, all others, because all are to be listed at once; else
    those that the data set in the output folder was packed without.
    """
    from mgc_dist.console import progress
    from mgc_dist.data.tracks import KNOWN_BAD
    from mgc_dist.packing import cut as cutting
    from mgc_dist.packing import splits as split

    if config.join and not existing:
        return {}
    suspects = [track for track in listed if track.id not in bad]
    if len(set(bad) - set(KNOWN_BAD)) <= config.allow_bad or config.dry_run:
        excluded = existing.excluded if existing else {}
        left_out = {id_ for id_, why in excluded.items() if why not in split.BY_LIST}
        suspects = [track for track in suspects if track.id in left_out]
    if not suspects:
        return {}
    title = "decoding the others, to list all bad files at once"
    with progress(title, len(suspects), unit="tracks") as bar:
        return cutting.decode_all(suspects, cut, jobs=config.jobs, progress=bar.over)


def _plan(
    config: ShardConfig,
    rule: str,
    listed: "Sequence[Track]",
    cut: "Cut",
    segments: dict[str, int],
    bad: dict[str, str],
    left_out: dict[str, str],
) -> "PackPlan":
    from mgc_dist.packing import splits as split
    from mgc_dist.packing.cut import judge_bad, make_plan

    excluded = judge_bad(bad, config.allow_bad)
    usable = [track for track in listed if track.id not in excluded]
    if deal := split.RULES[rule].deal:
        usable = deal(usable, config)
    return make_plan(usable, segments, left_out | excluded, cut)


def _existing(config: ShardConfig) -> "Manifest | None":
    """The data set in the output folder that may not be replaced, if there is one."""
    from mgc_dist.data import manifest

    if config.overwrite or not (config.out / manifest.NAME).is_file():
        return None
    return manifest.read(config.out)


def _is_there(
    config: ShardConfig, existing: "Manifest", plan: "PackPlan", settings: "Settings"
) -> bool:
    """True if the data set that is there is just the planned one; another one is an error."""
    from mgc_dist.packing.pack import damage, is_packed

    if not is_packed(plan, existing, settings):
        raise UserError(
            f"--out {config.out}",
            got=f"a different data set ({existing.dataset_id[:12]})",
            expected="an empty folder, or the same tracks and settings",
            cure="choose another --out, or replace it with --overwrite",
        )
    if fault := damage(config.out, existing, config.jobs):
        raise UserError(
            f"--out {config.out}",
            got=f"this data set, but {fault}",
            expected="files as its manifest lists them",
            cure="pack it again with --overwrite",
        )
    print(f"{config.out} already holds exactly this; nothing to do.")
    return True


def _print_plan(plan: "PackPlan", rule: str) -> None:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from mgc_dist.data import record
    from mgc_dist.packing.card import kept_apart, not_controlled

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
    unknown = sum(track.group is None for track in plan.tracks)
    console.print(f"leak check: {kept_apart(len(plan.tracks) - unknown)}")
    if note := not_controlled(rule, unknown, len(plan.tracks)):
        console.print(f"not controlled: {note}")


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
