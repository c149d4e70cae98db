"""The body of `shard`: find tracks, split them, plan from their headers, pack."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mgc_dist.config import ShardConfig
from mgc_dist.console import progress
from mgc_dist.data import tracks
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.tracks import KNOWN_BAD, Track
from mgc_dist.packing import card, existing, parts, splits
from mgc_dist.packing.cut import (
    Cut,
    PackPlan,
    count_segments,
    decode_all,
    inspect,
    judge_bad,
    make_plan,
)
from mgc_dist.packing.pack import SourceFiles, Waves, pack, tidy
from mgc_dist.workers import keep_memory

Outcome = Literal["packed", "already there", "planned", "part decoded"]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a packing ended.

    Attributes:
        outcome: `packed`; `already there`, the same data set; of a dry run `planned`; of `--part`
            `part decoded`.
        manifest: of the data set, where there is one now.
        decoded: tracks of the part.
        unusable: id -> reason of the tracks of the part that cannot be decoded.
    """

    outcome: Outcome
    manifest: Manifest | None = None
    decoded: int = 0
    unusable: dict[str, str] = field(default_factory=dict)


def shard(config: ShardConfig, tell: Callable[[str], None]) -> Packing:
    """Pack a folder of tracks.

    Args:
        config: which tracks, how they are cut and split, where to.
        tell: shows a sentence about the tracks that were found.

    Raises:
        UserError: anything about the files, the split or the output folder that forbids it.
    """
    keep_memory()
    found = _find(config, tell)
    cut = Cut(
        segment_samples=config.segment_samples,
        hop_samples=config.hop_samples,
        sample_rate=config.sample_rate,
        rows_per_shard=config.rows_per_shard,
    )
    if config.part_of and not config.dry_run:
        return _decode_part(config, config.part_of, found, cut)
    packing = _pack(config, found, cut)
    if packing.manifest:
        tidy(config.out)
        if config.join:
            parts.remove(config.out)
        card.write(config.out, packing.manifest)
    return packing


def _find(config: ShardConfig, tell: Callable[[str], None]) -> list[Track]:
    """The tracks, with their artists where a table names them."""
    found = tracks.find(config.data)
    if others := tracks.overlooked(config.data, found):
        tell(f"not taken: {len(others)} other files, such as {others[0]}")
    if config.groups:
        found = tracks.with_groups(found, config.groups)
        known = sum(track.group is not None for track in found)
        tell(f"{config.groups} names the artists of {known} of {len(found)} tracks")
    return found


def _pack(config: ShardConfig, found: list[Track], cut: Cut) -> Packing:
    """Plan and pack, unless the plan was all that was wanted."""
    rule = splits.choose(config.split, found, config.split_file)
    settings, by_list = splits.settings(rule, config), splits.RULES[rule].by_list
    listed, left_out = by_list(found, config) if by_list else (found, {})
    there = existing.read(config)
    waves: Waves = SourceFiles(sample_rate=cut.sample_rate)
    if config.join and not there:
        waves = joined = parts.join(listed, cut.sample_rate, config.out)
        segments, bad = count_segments({t.id: joined.samples(t) for t in listed}, cut)
    else:
        segments, bad = inspect(listed, cut)
    bad |= _other_bad(config, listed, cut, bad, there)
    while True:  # again without the files that prove unusable only when they are decoded
        plan = _plan(config, rule, listed, cut, segments, bad, left_out)
        card.show_plan(plan, rule)
        if config.dry_run:
            return Packing(outcome="planned")
        if there:
            existing.refuse_other(config, there, plan, settings)
            return Packing(outcome="already there", manifest=there)
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
            return Packing(outcome="packed", manifest=made)
        bad |= late


def _decode_part(
    config: ShardConfig, part: tuple[int, int], found: Sequence[Track], cut: Cut
) -> Packing:
    """Decode one of N shares of the tracks, to be joined later."""
    mine = len(found[part[0] - 1 :: part[1]])
    with progress(f"decoding part {config.part}", mine, unit="tracks") as bar:
        count, bad = parts.decode_part(
            found, cut.sample_rate, config.out, part=part, jobs=config.jobs, progress=bar.over
        )
    return Packing(outcome="part decoded", decoded=count, unusable=bad)


def _other_bad(
    config: ShardConfig,
    listed: Sequence[Track],
    cut: Cut,
    bad: dict[str, str],
    there: Manifest | None,
) -> dict[str, str]:
    """Files with good headers that cannot be decoded, as far as it is worth looking now.

    If there are too many bad headers, all others, because all are to be listed at once; else
    those that the data set in the output folder was packed without.
    """
    if config.join and not there:
        return {}
    suspects = [track for track in listed if track.id not in bad]
    if len(set(bad) - set(KNOWN_BAD)) <= config.allow_bad or config.dry_run:
        excluded = there.excluded if there else {}
        left_out = {id_ for id_, why in excluded.items() if why not in splits.BY_LIST}
        suspects = [track for track in suspects if track.id in left_out]
    if not suspects:
        return {}
    title = "decoding the others, to list all bad files at once"
    with progress(title, len(suspects), unit="tracks") as bar:
        return decode_all(suspects, cut, jobs=config.jobs, progress=bar.over)


def _plan(
    config: ShardConfig,
    rule: str,
    listed: Sequence[Track],
    cut: Cut,
    segments: dict[str, int],
    bad: dict[str, str],
    left_out: dict[str, str],
) -> PackPlan:
    excluded = judge_bad(bad, config.allow_bad)
    usable = [track for track in listed if track.id not in excluded]
    if deal := splits.RULES[rule].deal:
        usable = deal(usable, config)
    return make_plan(usable, segments, left_out | excluded, cut)
