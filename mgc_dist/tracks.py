"""Labelled tracks: found in folders, named safely, split without leakage.

A track, and a group (an artist) where it is known, is never in two splits. On a random split
of GTZAN 77 % of the test tracks are by an artist of the training set, and the same model
scores 87.1 % there and 79.7 % on the fault-filtered split (docs/design.md).
"""

import csv
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mgc_dist.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
SPLITS = ("train", "validation", "test")
FAULT_FILTERED_TRACKS = 443 + 197 + 290
NOT_LISTED = "not in the fault-filtered lists"
NO_FILE = "in the fault-filtered lists, but no such file"
ID_BYTES = 80
"""A key (id, underscore, segment number) stays under 90 bytes: tar names end at 100."""

KNOWN_BAD = {
    "jazz_00054": "unreadable in the Kaggle copy of GTZAN (andradaolteanu/gtzan-dataset-music-"
    "genre-classification); the file is no audio"
}

_M64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Track:
    """One audio file.

    Attributes:
        id: ASCII name, unique in the data set, without dots (webdataset cuts keys at a dot).
        genre: name of its genre.
        path: the file.
        group: artist or other source that must not be in two splits; None if unknown.
        split: train, validation or test; "" before splitting.
    """

    id: str
    genre: str
    path: Path
    group: str | None = None
    split: str = ""


def find(folder: Path) -> list[Track]:
    """Tracks of `GENRE/*.wav` (or other suffixes), in the order of their ids.

    Dotfiles are ignored: one copy of GTZAN ships a macOS `._*.wav` beside every clip.

    Raises:
        UserError: no such folder, no genre folders, or two files that get one id.
    """
    root = _root(folder)
    if not root.is_dir():
        raise UserError(
            f"--data {folder}",
            got="no such folder",
            expected="a folder with one folder of audio files per genre",
            cure="python -m mgc_dist.synth data  makes a synthetic one",
        )
    tracks: dict[str, Track] = {}
    for path in sorted(root.glob("*/*")):
        hidden = path.name.startswith(".") or path.parent.name.startswith(".")
        if hidden or path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        if not str(path).isprintable():
            raise UserError(
                f"file name {str(path)!r}",
                got="bytes that are not UTF-8, or control characters",
                expected="a readable name",
                cure="rename it, for example with convmv",
            )
        track = Track(id=track_id(path), genre=path.parent.name, path=path)
        if track.id in tracks:
            raise UserError(
                f"two files have the track id {track.id}",
                got=f"{tracks[track.id].path} and {path}",
                expected="names that differ in letters, digits, - or _",
                cure="rename one of them",
            )
        tracks[track.id] = track
    if not tracks:
        raise UserError(
            f"--data {folder}",
            got="no audio files in its sub-folders",
            expected=f"GENRE/NAME with NAME ending in {', '.join(SUFFIXES)}",
            cure="give the folder that holds the genre folders",
        )
    return sorted(tracks.values(), key=lambda track: track.id)


def overlooked(folder: Path, found: Sequence[Track]) -> list[Path]:
    """Files below a data folder that `find` has not taken, dotfiles aside: nothing is silent."""
    root = _root(folder)
    taken = {track.path for track in found}
    return sorted(
        path
        for path in root.glob("*/**/*")
        if path.is_file() and path not in taken and not path.name.startswith(".")
    )


def track_id(path: Path) -> str:
    """A key without dots: `blues/blues.00000.wav` -> `blues_00000`, `rock/a b.wav` -> `rock_a_b`.

    The genre is put in front if the name does not begin with it. Where letters are lost or
    the name is too long, eight hex digits of the name's hash keep ids apart.
    """
    stem, genre = path.stem, path.parent.name
    name = stem if stem.startswith(genre) else f"{genre}_{stem}"
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if not name.isascii() or len(slug) > ID_BYTES:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        slug = f"{slug[: ID_BYTES - 9].strip('_') or 'track'}_{digest}"
    return slug


def with_groups(tracks: Sequence[Track], table: Path) -> list[Track]:
    """Tracks with the groups of a CSV table (`track` and `artist` or `group`).

    `track` is the file's name with or without suffix, or the track's id; with a column `genre`
    it counts within that genre. A blank group means unknown: such a track is its own group,
    never one shared by all blanks.

    Raises:
        UserError: the table is unreadable, lacks a column, names none of the tracks, or gives
            a track two groups.
    """
    rows = _read_table(table)
    column = "group" if rows and "group" in rows[0] else "artist"
    if not rows or "track" not in rows[0] or column not in rows[0]:
        raise UserError(
            f"--groups {table}",
            got=f"columns {', '.join(rows[0]) if rows else 'none'}",
            expected="a header with track and artist (or group)",
            cure="write one line a track below such a header",
        )
    groups: dict[tuple[str, str], str | None] = {}
    for row in rows:
        name, group = row["track"] or "", (row[column] or "").strip() or None
        name = name.removesuffix(Path(name).suffix) if name.lower().endswith(SUFFIXES) else name
        key = (row.get("genre") or "", name)
        if groups.setdefault(key, group) != group:
            raise UserError(
                f"--groups {table}: track {name}",
                got=f"both {groups[key]!r} and {group!r}",
                expected="one artist a track",
                cure="add a column genre if two genres use one name, or correct the table",
            )

    def keys(track: Track) -> list[tuple[str, str]]:
        names = (track.path.stem, track.id)
        return [(genre, name) for genre in (track.genre, "") for name in names]

    found = {t.id: next((key for key in keys(t) if key in groups), None) for t in tracks}
    grouped = [replace(t, group=groups.get(found[t.id] or ("", ""))) for t in tracks]
    if not any(found.values()):
        raise UserError(
            f"--groups {table}",
            got="none of the tracks by name",
            expected=f"names such as {tracks[0].path.stem}",
            cure="the column track holds the file's name without its suffix",
        )
    return grouped


def choose_split(rule: str, tracks: Sequence[Track]) -> str:
    """`auto` becomes `fault-filtered` if every track of its lists is there, else `stratified`."""
    if rule != "auto":
        return rule
    present = {track.id for track in tracks} | set(KNOWN_BAD)
    if len(present) < 0.9 * FAULT_FILTERED_TRACKS:  # saves the import of torchaudio, 2 s
        return "stratified"
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
    Multimedia 17(11), 2015; the lists as torchaudio ships them.
    """
    from torchaudio.datasets import gtzan

    lists = {
        "train": gtzan.filtered_train,
        "validation": gtzan.filtered_valid,
        "test": gtzan.filtered_test,
    }
    return {name.replace(".", "_"): split for split, names in lists.items() for name in names}


def split_fault_filtered(tracks: Sequence[Track]) -> tuple[list[Track], dict[str, str]]:
    """Tracks with their split, and id -> reason of the tracks that the lists leave out.

    Raises:
        UserError: none of the tracks is in the lists, or a split would be empty.
    """
    lists = fault_filtered()
    kept = [replace(t, split=lists[t.id]) for t in tracks if t.id in lists]
    left_out = {t.id: NOT_LISTED for t in tracks if t.id not in lists}
    present = {track.id for track in tracks}
    left_out |= {id_: NO_FILE for id_ in lists if id_ not in present}
    sizes = Counter(track.split for track in kept)
    if any(sizes[split] == 0 for split in SPLITS):
        raise UserError(
            "--split fault-filtered",
            got=", ".join(f"{sizes[s]} {s}" for s in SPLITS),
            expected="GTZAN's file names in every split",
            cure="use --split stratified for another data set",
        )
    return kept, left_out


def split_stratified(
    tracks: Sequence[Track], *, validation: float, test: float, seed: int
) -> list[Track]:
    """Tracks with a split: each genre in the wanted shares, groups kept together.

    Raises:
        UserError: a genre gets no track in some split (too few tracks or groups).
    """
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    chosen = _deal(tracks, shares, seed)
    labelled = [replace(track, split=chosen[group_key(track.id, track.group)]) for track in tracks]
    totals = Counter(track.genre for track in tracks)
    have = Counter((track.split, track.genre) for track in labelled)
    for genre in sorted(totals):
        for split in SPLITS:
            if not have[split, genre]:
                raise UserError(
                    f"genre {genre} has no track for the {split} split",
                    got=f"{totals[genre]} tracks, no artist of which may be in two splits",
                    expected="at least three tracks by three artists",
                    cure="add tracks, or take the genre out of the folder",
                )
    return labelled


def refuse_leaks(tracks: Iterable[Track]) -> None:
    """Check that no track and no known group is in two splits.

    Raises:
        UserError: one is; named with its splits.
    """
    seen: dict[str, Track] = {}
    for track in tracks:
        for key in (f"track {track.id}", f"group {track.group}" if track.group else ""):
            first = seen.setdefault(key, track)
            if key and first.split != track.split:
                raise UserError(
                    f"{key} is in two splits",
                    got=f"{first.id} in {first.split}, {track.id} in {track.split}",
                    expected="every track and every group in one split only",
                    cure="use --split stratified, which keeps groups together",
                )


def group_key(track: str, group: str | None) -> str:
    """What must stay together: the group where it is known, else the track."""
    return f"group {group}" if group else f"track {track}"


def deal_folds(tracks: Sequence[Track], folds: int, seed: int) -> dict[str, int]:
    """group_key -> cross-fitting fold, 0 .. folds - 1, each genre spread evenly over folds."""
    shares = {str(fold): 1 / folds for fold in range(folds)}
    return {key: int(fold) for key, fold in _deal(tracks, shares, seed).items()}


def _deal(tracks: Sequence[Track], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """group_key -> bin, every genre in the wanted shares.

    Groups are taken largest first, in an order keyed by the seed; each goes to the bin that is
    emptiest, relative to its share, over the genres of the group's tracks, and of equally
    empty ones to the one with the fewest tracks of any genre.
    """
    members: dict[str, Counter[str]] = defaultdict(Counter)
    for track in tracks:
        members[group_key(track.id, track.group)][track.genre] += 1
    have: dict[str, Counter[str]] = {name: Counter() for name in shares}

    def fill(name: str, genres: Mapping[str, int]) -> tuple[float, float]:
        here = sum(count * have[name][genre] for genre, count in genres.items())
        return here / shares[name], have[name].total() / shares[name]

    chosen: dict[str, str] = {}
    for key in sorted(members, key=lambda k: (-members[k].total(), _keyed(seed, k))):
        best = min(shares, key=lambda name: fill(name, members[key]))
        have[best].update(members[key])
        chosen[key] = best
    return chosen


def _keyed(seed: int, text: str) -> int:
    digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & _M64


def _root(folder: Path) -> Path:
    """The folder of genre folders: Kaggle's copy has it one level down."""
    inner = folder / "genres_original"
    return inner if inner.is_dir() else folder


def _read_table(table: Path) -> list[Mapping[str, str]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"--groups {table}",
            got=str(error),
            expected="a readable CSV table in UTF-8",
            cure="columns track and artist (or group)",
        ) from error
