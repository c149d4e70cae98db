"""Tracks to train, validation and test; folds; groups (artists) are kept together.

`fault-filtered` and `table` take what others have decided. `stratified` and `kfold` put each
genre's groups into the order of a hash and cut this row at the wanted shares, so that a track
more or less moves at most one group at each border. A new rule is an entry of RULES.
"""

import ast
import csv
import difflib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import accumulate
from pathlib import Path

import numpy as np

from mgc_dist.config import ShardConfig
from mgc_dist.data.tables import plain, read_table, read_text
from mgc_dist.data.tracks import (
    KNOWN_BAD,
    SPLITS,
    SUFFIXES,
    Track,
    folds_of,
    group_key,
    keyed,
    names_of_splits,
    split_name,
)
from mgc_dist.errors import UserError

NOT_LISTED = "not in the fault-filtered lists"
NO_FILE = "in the fault-filtered lists, but no such file"
NOT_NAMED = "named in no split of the table"
NOT_FOUND = "named in the table of splits, but no such track"
BY_LIST = (NOT_LISTED, NO_FILE, NOT_NAMED, NOT_FOUND)
"""Reasons for which a list leaves tracks out, whatever is in their files."""

Listed = tuple[list[Track], dict[str, str]]
"""Tracks with their split, and id -> reason of those left out."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How tracks come into splits: by a list that names them, or dealt.

    Attributes:
        by_list: takes all tracks that were found; before their files are looked at.
        deal: gives a split to each of the usable tracks; every genre must be in every split.
        groups: how many groups of a genre it needs for that.
        knobs: fields of `ShardConfig` that it reads; they are written into the manifest.
        files: flags that name files it reads, and words that stand for them.
        by_artist: whether the list was made by artist, so that unknown artists are no worry.
    """

    by_list: Callable[[Sequence[Track], ShardConfig], Listed] | None = None
    deal: Callable[[Sequence[Track], ShardConfig], list[Track]] | None = None
    groups: Callable[[ShardConfig], int] = lambda config: len(SPLITS)
    knobs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    by_artist: bool = False


def settings(rule: str, config: ShardConfig) -> dict[str, int | float | str]:
    """What the manifest says of the split: the rule, and the knobs that it reads."""
    extra = {"split_from": str(config.split_from)} if config.split_from else {}
    extra |= {"same_group": "yes"} if config.same_group else {}
    return {"split": rule} | {name: getattr(config, name) for name in RULES[rule].knobs} | extra


def rule_of(settings: Mapping[str, object]) -> Rule:
    """The rule that a manifest's settings name; of one that is not known here, nothing."""
    return RULES.get(str(settings["split"]), Rule())


def choose(
    rule: str, tracks: Sequence[Track], table: Path | None, *, before: Path | None = None
) -> str:
    """What `auto` stands for.

    `table` if there is one (or a column `split`), `fault-filtered` if every track of its lists
    is there, else `stratified`.

    Args:
        rule: that was asked for.
        tracks: all of them.
        table: `--split-file`.
        before: `--split-from`, whose splits stay; new tracks are then dealt.

    Raises:
        UserError: no such rule; a table of splits that would not be used; nearly all of GTZAN.
    """
    if rule != "auto" and rule not in RULES:
        near = difflib.get_close_matches(rule, RULES, n=1)
        raise UserError(
            "--split",
            got=rule,
            expected=f"one of auto, {', '.join(RULES)}",
            cure=f"did you mean {near[0]}?" if near else "leave it out: auto",
        )
    if table and rule not in ("auto", "table"):
        raise UserError(
            f"--split-file {table}",
            got=f"--split {rule}",
            expected="--split table",
            cure="leave one of them out",
        )
    if before and (table or (rule != "auto" and not RULES[rule].deal)):
        raise UserError(
            f"--split-from {before}",
            got=f"--split-file {table}" if table else f"--split {rule}",
            expected="splits from one source",
            cure="leave one of them out",
        )
    if rule != "auto" or before:
        return "stratified" if rule == "auto" else rule
    if table or any(track.split for track in tracks):
        return "table"
    present = {track.id for track in tracks} | set(KNOWN_BAD)
    lists = set(fault_filtered())
    missing = sorted(lists - present)
    if 0 < len(missing) < 0.1 * len(lists):
        raise UserError(
            "--split auto on what looks like GTZAN",
            got=f"no {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}",
            expected=f"all {len(lists)} tracks of the fault-filtered lists",
            cure="--split fault-filtered packs those that are there; --split stratified makes "
            "a random split, in which artists are on both sides unless --groups names them",
        )
    return "stratified" if missing else "fault-filtered"


def fault_filtered() -> dict[str, str]:
    """Track id -> split of GTZAN's fault-filtered lists: 443 / 197 / 290 tracks.

    Source: Kereliuk, Sturm, Larsen, "Deep Learning and Music Adversaries", IEEE Trans.
    Multimedia 17(11), 2015.
    """
    text = (files("mgc_dist") / "packing" / "fault_filtered.txt").read_text(encoding="utf-8")
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {f"{genre}_{n}": split for split, genre, *numbers in rows for n in numbers}


def split_fault_filtered(tracks: Sequence[Track]) -> Listed:
    """Tracks with their split, and id -> reason of the tracks that the lists leave out.

    Raises:
        UserError: none of the tracks is in the lists, or a split would be empty.
    """
    lists = fault_filtered()
    kept = [replace(t, split=lists[t.id]) for t in tracks if t.id in lists]
    left_out = {t.id: NOT_LISTED for t in tracks if t.id not in lists}
    present = {track.id for track in tracks}
    left_out |= {id_: NO_FILE for id_ in lists if id_ not in present}
    _refuse_empty(
        kept, "--split fault-filtered", "GTZAN's file names", "use --split stratified instead"
    )
    return kept, left_out


def split_table(tracks: Sequence[Track], table: Path | None) -> Listed:
    """Tracks with the split that a table gives them, and id -> reason of those left out.

    Args:
        tracks: with a split already, if their own table has such a column.
        table: CSV or TSV of `track` (or `path`) and `split`; or three pairs of lines, `train:`
            and a list `['pop/pop00048.png', ...]`, as the project's predecessor wrote
            (data_split.txt of csci467_music_genre_classification). Names are compared by
            their letters and digits, without suffix: `pop/pop00048.png` is `pop.00048.wav`.

    A table without training tracks makes a data set that can be evaluated on, and no more.

    Raises:
        UserError: no table at all, an unreadable one, a track in two splits, training tracks
            without validation or test tracks.
    """
    if table is None:
        kept = [track for track in tracks if track.split]
        left_out = {track.id: NOT_NAMED for track in tracks if not track.split}
    else:
        of_track, unused = _match(_pairs(table), tracks, table)
        kept = [replace(t, split=of_track[t.id]) for t in tracks if t.id in of_track]
        left_out = {t.id: NOT_NAMED for t in tracks if t.id not in of_track}
        left_out |= dict.fromkeys(unused, NOT_FOUND)
    source = f"--split-file {table}" if table else "--split table"
    if not kept or any(track.split == "train" for track in kept):
        _refuse_empty(
            kept,
            source,
            "tracks in every split, or none in train (for evaluation only)",
            "give --split-file FILE, or a --data table with a column split, that names the tracks",
        )
    return kept, left_out


def deal(
    rule: str, tracks: Sequence[Track], config: ShardConfig, before: Mapping[str, Track]
) -> list[Track]:
    """Usable tracks with the splits of a rule that deals, or as they are if it is a list.

    Args:
        rule: name of an entry of RULES.
        tracks: without the unusable ones.
        config: the knobs.
        before: id -> track of an earlier data set whose splits stay (`--split-from`).

    Raises:
        UserError: a genre has no track in some split.
    """
    entry = RULES[rule]
    if not entry.deal:
        return list(tracks)
    dealt = entry.deal(tracks, config)
    names = names_of_splits(track.split for track in dealt)
    theirs = names_of_splits(track.split for track in before.values())
    if before and names != theirs:
        raise UserError(
            f"--split-from {config.split_from}",
            got=f"splits {', '.join(theirs)}",
            expected=", ".join(names),
            cure=f"--split kfold --folds {len(theirs)}"
            if folds_of(theirs)
            else "--split stratified",
        )
    of_group: dict[str | None, str] = {t.group: t.split for t in before.values() if t.group}
    dealt = [
        replace(
            track,
            split=before[track.id].split
            if track.id in before
            else of_group.get(track.group, track.split),
        )
        for track in dealt
    ]
    _refuse_gaps(dealt, entry.groups(config))
    return dealt


def as_table(tracks: Sequence[Track]) -> str:
    """The splits of tracks as CSV, as `--split-file` reads them."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("track", "genre", "group", "split"))
    lines.writerows(plain((t.id, t.genre, t.group or "", t.split)) for t in tracks)
    return text.getvalue()


def split_stratified(
    tracks: Sequence[Track], *, validation: float, test: float, seed: int
) -> list[Track]:
    """Tracks with a split: each genre in the wanted shares, groups kept together."""
    names = ("test", "validation", "train")
    chosen = _cut(tracks, (test, test + validation), seed)
    return [
        replace(track, split=names[chosen[group_key(track.id, track.group)]]) for track in tracks
    ]


def split_kfold(tracks: Sequence[Track], *, folds: int, seed: int) -> list[Track]:
    """Tracks with a split: fold0, fold1, ... of each genre, groups kept together."""
    chosen = _cut(tracks, [number / folds for number in range(1, folds)], seed)
    return [
        replace(track, split=f"fold{chosen[group_key(track.id, track.group)]}") for track in tracks
    ]


def _cut(tracks: Sequence[Track], borders: Sequence[float], seed: int) -> dict[str, int]:
    """group_key -> part, 0 to len(borders): each genre cut at shares of its tracks.

    A group of several genres counts in the one of most of its tracks. It lies where its middle
    is. A genre has a group in every part if it has as many groups as there are parts.
    """
    members: dict[str, Counter[str]] = defaultdict(Counter)
    for track in tracks:
        members[group_key(track.id, track.group)][track.genre] += 1
    rows: dict[str, list[str]] = defaultdict(list)
    for key in sorted(members, key=lambda key: (keyed(seed, key), key)):
        genres = members[key]
        rows[min(genres, key=lambda genre: (-genres[genre], genre))].append(key)
    parts: dict[str, int] = {}
    for row in rows.values():
        sizes = [members[key].total() for key in row]
        ends = list(accumulate(sizes))
        middles = [end - size / 2 for end, size in zip(ends, sizes, strict=True)]
        firsts = np.searchsorted(middles, np.array(borders) * ends[-1]).tolist()
        if len(row) > len(borders):
            for number in range(len(borders)):
                least = firsts[number - 1] + 1 if number else 1
                most = len(row) - (len(borders) - number)
                firsts[number] = min(max(firsts[number], least), most)
        parts |= zip(
            row, np.searchsorted(firsts, range(len(row)), side="right").tolist(), strict=True
        )
    return parts


def _refuse_empty(kept: Sequence[Track], what: str, expected: str, cure: str) -> None:
    sizes = Counter(track.split for track in kept)
    if any(sizes[split] == 0 for split in SPLITS):
        got = ", ".join(f"{sizes[split]} {split}" for split in SPLITS)
        raise UserError(what, got=f"{got} tracks", expected=expected, cure=cure)


def _refuse_gaps(labelled: Sequence[Track], needed: int) -> None:
    names = names_of_splits(track.split for track in labelled)
    groups: dict[str, set[str]] = defaultdict(set)
    for track in labelled:
        groups[track.genre].add(group_key(track.id, track.group))
    have = Counter((track.split, track.genre) for track in labelled)
    for genre in sorted(groups):
        total = sum(have[split, genre] for split in names)
        missing = [split for split in names if not have[split, genre]]
        if missing or len(groups[genre]) < needed:
            what = f"no track for the {missing[0]} split" if missing else "too few artists"
            raise UserError(
                f"genre {genre} has {what}",
                got=f"{total} tracks by {len(groups[genre])} artists, each of them in one split",
                expected=f"at least {needed} tracks by {needed} artists",
                cure=f"add tracks; or leave the genre out: --min-tracks {total + 1} leaves out "
                "all genres as small as this one, --genres names those to keep",
            )


def _pairs(table: Path) -> list[tuple[str, str]]:
    flag = "--split-file"
    text = read_text(table, flag)
    if re.match(r"\w+:\s*\n\s*\[", text):
        return _predecessors_pairs(text, f"{flag} {table}")
    rows = [row for _, row in read_table(table, flag)]
    column = "track" if rows and "track" in rows[0] else "path"
    if not rows or column not in rows[0] or "split" not in rows[0]:
        raise UserError(
            f"{flag} {table}",
            got=f"columns {', '.join(rows[0]) if rows else 'none'}",
            expected="a header with track (or path) and split",
            cure="write one line a track below such a header",
        )
    where = f"{flag} {table}"
    return [(row[column], split_name(row["split"], where)) for row in rows]


def _predecessors_pairs(text: str, where: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip()]
    pairs = []
    for title, listed in zip(lines[::2], lines[1::2], strict=False):
        split = split_name(title.rstrip(": "), where)
        try:
            names = ast.literal_eval(listed)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"{where}: {split}",
                got=f"{listed[:40]!r} ...",
                expected="a list of quoted names on one line",
                cure="write it as the predecessor's data_split.txt, or as a CSV table",
            )
        pairs += [(name, split) for name in names]
    return pairs


def _match(
    named: Sequence[tuple[str, str]], tracks: Sequence[Track], table: Path
) -> tuple[dict[str, str], list[str]]:
    """Track id -> split, and the names that no track has; an exact id counts before all else."""
    exact = {track.id for track in tracks}
    owners: dict[str, set[str]] = defaultdict(set)
    for track in tracks:
        for name in (track.id, f"{track.genre}/{track.path.name}", track.path.name):
            owners[_comparable(name)].add(track.id)
    of_track: dict[str, str] = {}
    unused = []
    for name, split in named:
        ids = [name] if name in exact else sorted(owners.get(_comparable(name), ()))
        if not ids:
            unused.append(name)
        elif len(ids) > 1 or of_track.setdefault(ids[0], split) != split:
            two = f"both {of_track.get(ids[0])} and {split}"
            raise UserError(
                f"--split-file {table}: {name}",
                got=f"a name of {', '.join(ids)}" if len(ids) > 1 else two,
                expected="one track and one split",
                cure="write GENRE/NAME, or the track's id",
            )
    return of_track, unused


def _comparable(name: str) -> str:
    """`pop/pop00048.png`, `pop.00048.wav` and `pop_00048` -> `pop00048`."""
    name = name.lower()
    suffix = next((end for end in (*SUFFIXES, ".png") if name.endswith(end)), "")
    *folders, stem = name.removesuffix(suffix).split("/")
    genre = folders[-1] if folders and not stem.startswith(folders[-1]) else ""
    return re.sub(r"[\W_]+", "", genre + stem)


RULES: dict[str, Rule] = {
    "fault-filtered": Rule(
        by_list=lambda tracks, config: split_fault_filtered(tracks), by_artist=True
    ),
    "stratified": Rule(
        deal=lambda tracks, config: split_stratified(
            tracks,
            validation=config.validation_fraction,
            test=config.test_fraction,
            seed=config.seed,
        ),
        knobs=("seed", "validation_fraction", "test_fraction"),
    ),
    "kfold": Rule(
        deal=lambda tracks, config: split_kfold(tracks, folds=config.folds, seed=config.seed),
        groups=lambda config: config.folds,
        knobs=("seed", "folds"),
    ),
    "table": Rule(
        by_list=lambda tracks, config: split_table(tracks, config.split_file),
        files=("--split-file", "SPLITS"),
    ),
}
