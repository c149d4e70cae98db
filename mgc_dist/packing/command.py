"""The body of `shard`: find tracks, decode each once, split them, plan, pack."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from mgc_dist.config import ShardConfig
from mgc_dist.console import progress
from mgc_dist.data import manifest
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.tracks import Track
from mgc_dist.errors import UserError
from mgc_dist.packing import card, existing, groups, layouts, parts, splits
from mgc_dist.packing.cut import (
    Cut,
    Lengths,
    PackPlan,
    count_segments,
    decode_all,
    inspect,
    judge_bad,
    leave_out_small,
    make_plan,
)
from mgc_dist.packing.pack import alone, pack, refuse_long_descriptions, tidy
from mgc_dist.packing.parts import Waves
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
        rows_per_shard=config.rows_per_shard or 0,
        max_segments=config.max_segments or 0,
    )
    if config.part_of and not config.dry_run:
        return _decode_part(config, config.part_of, found, cut)
    packing = _pack(config, found, cut, tell)
    if packing.manifest:
        tidy(config.out)
        parts.remove(config.out, joined=config.join)
        _listing(config).unlink(missing_ok=True)
        card.write(config.out, packing.manifest)
    return packing


def _find(config: ShardConfig, tell: Callable[[str], None]) -> list[Track]:
    """The tracks, with their artists where a table names them."""
    listed = layouts.find(config)
    for note in listed.notes:
        tell(note)
    found = listed.tracks
    if config.groups:
        found = groups.with_groups(found, config.groups)
        known = sum(track.group is not None for track in found)
        tell(f"{config.groups} names the artists of {known} of {len(found)} tracks")
    return found


def _pack(
    config: ShardConfig, found: list[Track], cut: Cut, tell: Callable[[str], None]
) -> Packing:
    """Plan from headers; then decode, plan from what came out, and pack."""
    rule = splits.choose(config.split, found, config.split_file, before=config.split_from)
    settings, by_list = splits.settings(rule, config), splits.RULES[rule].by_list
    listed, left_out = by_list(found, config) if by_list else (found, {})
    there = existing.read(config)
    lengths = inspect(listed, cut)
    if there:
        packed = int(there.settings["rows_per_shard"])  # perhaps by an older default
        cut = replace(cut, rows_per_shard=cut.rows_per_shard or packed)
        if config.same_group:  # found when it was packed
            known = {entry.id: entry.group for entry in there.tracks}
            listed = [replace(track, group=known.get(track.id, track.group)) for track in listed]
        samples = _as_packed(config, there, listed, lengths, cut)
        plan = _plan(config, rule, listed, cut, samples, left_out)
        card.show_plan(plan, rule, listed)
        existing.refuse_other(config, there, plan, settings)
        return Packing(outcome="already there", manifest=there)
    if config.dry_run and not config.decode:
        card.show_plan(_plan(config, rule, listed, cut, lengths.samples, left_out), rule, listed)
        if lengths.guessed:
            tell(
                f"The lengths of {len(lengths.guessed)} tracks are guessed: their formats do not "
                "tell them. --decode decodes all, and tells the truth."
            )
        return Packing(outcome="planned")
    expected = _hopeful(config, rule, listed, cut, lengths.samples, left_out)
    refuse_long_descriptions(expected)
    card.show_plan(expected, rule, listed)
    with alone(config.out):
        if not config.join:
            _decode(config, listed, lengths, cut, part=(1, 1))
        waves = parts.join(listed, cut.sample_rate, config.out, total=0 if config.join else 1)
        samples = {track.id: waves.samples(track) for track in listed}
        planned = partial(_plan, config, rule, cut=cut, samples=samples, left_out=left_out)
        plan = planned(listed)
        if config.repetitions:
            plan = _kept_apart(config, rule, listed, plan, waves, planned, tell)
        if not expected.is_same(plan):
            tell("Decoding has changed the plan; now the plan is:")
            card.show_plan(plan, rule, listed)
        if config.dry_run:
            return Packing(outcome="planned")
        with progress("packing", len(plan.tracks), unit="tracks") as bar:
            made = pack(
                plan,
                config.out,
                settings,
                waves,
                overwrite=config.overwrite,
                jobs=config.jobs,
                progress=bar.over,
            )
    return Packing(outcome="packed", manifest=made)


def _kept_apart(
    config: ShardConfig,
    rule: str,
    listed: Sequence[Track],
    plan: PackPlan,
    waves: Waves,
    planned: Callable[[Sequence[Track]], PackPlan],
    tell: Callable[[str], None],
) -> PackPlan:
    """A plan in which no recording is in two splits.

    Raises:
        UserError: one is, and `--same-group` was not given or cannot help.
    """
    with progress("comparing", len(plan.tracks), unit="tracks") as bar:
        found = groups.repetitions(
            plan.tracks, waves, plan.cut.sample_rate, jobs=config.jobs, progress=bar.over
        )
    if config.same_group and found:
        plan = planned(groups.as_one_group(listed, found))
    notes = groups.refuse_repetitions(
        found,
        {track.id: track.split for track in plan.tracks},
        config.out / "repetitions.csv",
        may_join=splits.RULES[rule].deal is not None,
    )
    for note in notes:
        tell(note)
    return plan


def _decode_part(
    config: ShardConfig, part: tuple[int, int], found: Sequence[Track], cut: Cut
) -> Packing:
    """Decode one of N shares of the tracks, to be joined later."""
    mine = sorted(found, key=lambda track: track.id)[part[0] - 1 :: part[1]]
    count, bad = _decode(config, found, inspect(mine, cut), cut, part=part)
    return Packing(outcome="part decoded", decoded=count, unusable=bad)


def _decode(
    config: ShardConfig,
    tracks: Sequence[Track],
    lengths: Lengths,
    cut: Cut,
    *,
    part: tuple[int, int],
) -> tuple[int, dict[str, str]]:
    title = "decoding" if part == (1, 1) else f"decoding part {config.part}"
    mine = len(tracks[part[0] - 1 :: part[1]])
    with progress(title, mine, unit="tracks") as bar:
        return parts.decode_part(
            tracks,
            cut.sample_rate,
            config.out,
            part=part,
            lengths=lengths.samples,
            jobs=config.jobs,
            progress=bar.over,
        )


def _as_packed(
    config: ShardConfig, there: Manifest, listed: Sequence[Track], lengths: Lengths, cut: Cut
) -> dict[str, int | str]:
    """Lengths of the tracks of a data set that is packed already, with little decoding.

    Guessed lengths are those that it was packed with; whether the files are the same is looked
    at later. Tracks that it was packed without are decoded again: they may have been repaired.
    """
    packed = {entry.id: entry.windows for entry in there.tracks}
    length, hop = cut.segment_samples, cut.hop_samples
    samples: dict[str, int | str] = lengths.samples | {
        id_: length + (packed[id_] - 1) * hop for id_ in lengths.guessed if id_ in packed
    }
    suspects = [
        track
        for track in listed
        if there.excluded.get(track.id, splits.NOT_NAMED) not in splits.BY_LIST
        and isinstance(samples[track.id], int)
    ]
    if suspects:
        with progress("decoding what was left out", len(suspects), unit="tracks") as bar:
            samples |= decode_all(suspects, cut, jobs=config.jobs, progress=bar.over)
    return samples


def _hopeful(
    config: ShardConfig,
    rule: str,
    listed: Sequence[Track],
    cut: Cut,
    samples: Mapping[str, int | str],
    left_out: dict[str, str],
) -> PackPlan:
    """The plan of a packing that may leave out as many files as it likes.

    How many it may, is judged when all have been decoded, so that all bad ones are listed.
    """
    try:
        lenient = replace(config, allow_bad=str(len(listed)))
        return _plan(lenient, rule, listed, cut, samples, left_out)
    except UserError:
        _plan(config, rule, listed, cut, samples, left_out)  # bad files may be the reason
        raise


def _plan(
    config: ShardConfig,
    rule: str,
    listed: Sequence[Track],
    cut: Cut,
    samples: Mapping[str, int | str],
    left_out: Mapping[str, str],
) -> PackPlan:
    """The plan for tracks of these lengths, or a refusal of more bad ones than are allowed."""
    windows, bad = count_segments(samples, cut)
    excluded = judge_bad(bad, listed, config.bad_allowed(len(listed)), _listing(config))
    usable = [track for track in listed if track.id not in excluded]
    usable, small = leave_out_small(usable, config.min_tracks)
    dealt = splits.deal(rule, usable, config, _before(config))
    return make_plan(dealt, windows, {**left_out, **excluded, **small}, cut)


def _before(config: ShardConfig) -> dict[str, Track]:
    """The tracks of the data set whose splits stay, by id."""
    if not config.split_from:
        return {}
    return {track.id: track for track in manifest.read(config.split_from).labelled_tracks()}


def _listing(config: ShardConfig) -> Path:
    return config.out / "unusable.txt"
