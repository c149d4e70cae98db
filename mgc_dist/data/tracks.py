"""Labelled tracks: found in folders or listed in a table, named safely, never in two splits.

A track, and a group (an artist) where it is known, is never in two splits. On a random split
of GTZAN 77 % of the test tracks are by an artist of the training set, and the same model
scores 87.1 % there and 79.7 % on the fault-filtered split (docs/design.md).
"""

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mgc_dist.errors import UserError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus")
SPLITS = ("train", "validation", "test")
ID_BYTES = 80
"""A key (id, underscore, segment number) stays under 90 bytes: tar names end at 100."""

KNOWN_BAD = {
    "jazz_00054": "unreadable in the Kaggle copy of GTZAN (andradaolteanu/gtzan-dataset-music-"
    "genre-classification); the file is no audio"
}

_SPLIT_NAMES = {
    **{split: split for split in SPLITS},
    **{"training": "train", "testing": "test"},
    **{"valid": "validation", "val": "validation", "dev": "validation"},
}


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


def find(data: Path) -> list[Track]:
    """Tracks of a folder of `GENRE/*.wav` (or other suffixes) or of a table, by id.

    Dotfiles are ignored: one copy of GTZAN ships a macOS `._*.wav` beside every clip.

    Args:
        data: a folder, or a CSV or TSV table with the columns path, genre and, if known,
            group (or artist), split, track (an id). Paths are relative to the table's folder.

    Raises:
        UserError: no such folder or table, nothing in it, or two files that get one id.
    """
    if data.is_file():
        found = _listed(data)
    elif data.is_dir():
        found = _in_folders(_root(data))
    else:
        raise UserError(
            f"--data {data}",
            got="no such folder or table",
            expected="a folder with one folder of audio files per genre, or a table of paths",
            cure="python -m mgc_dist.synth data  makes a synthetic one",
        )
    if not found:
        raise UserError(
            f"--data {data}",
            got="no rows" if data.is_file() else "no audio files in its sub-folders",
            expected=f"GENRE/NAME with NAME ending in {', '.join(SUFFIXES)}",
            cure="give the folder that holds the genre folders",
        )
    by_id: dict[str, Track] = {}
    for track in found:
        other = by_id.setdefault(track.id, track)
        if other is not track:
            raise UserError(
                f"two files have the track id {track.id}",
                got=f"{other.path} and {track.path}",
                expected="names that differ in letters, digits, - or _",
                cure="rename one of them, or give a table with a column track",
            )
    return sorted(found, key=lambda track: track.id)


def overlooked(data: Path, found: Sequence[Track]) -> list[Path]:
    """Files below a data folder that `find` has not taken, dotfiles aside: nothing is silent."""
    taken = {track.path for track in found}
    others = []
    for folder, folders, names in os.walk(data, onerror=_raise) if data.is_dir() else ():
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder) / name for name in names if not name.startswith("."))
        others += [path for path in paths if path not in taken]
    return sorted(others)


def track_id(path: Path, genre: str) -> str:
    """A key without dots: `blues/blues.00000.wav` -> `blues_00000`, `rock/a b.wav` -> `rock_a_b`.

    The genre is put in front if the name does not begin with it. Where letters are lost or
    the name is too long, eight hex digits of the name's hash keep ids apart.
    """
    stem = path.stem
    name = stem if stem.startswith(genre) else f"{genre}_{stem}"
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    if not name.isascii() or len(slug) > ID_BYTES:
        slug = _with_digest(slug, name)
    return slug


def with_groups(tracks: Sequence[Track], table: Path) -> list[Track]:
    """Tracks with the groups of a CSV or TSV table (`track` and `artist` or `group`).

    `track` is the file's name with or without suffix, or the track's id; with a column `genre`
    it counts within that genre. A blank group means unknown: such a track is its own group,
    never one shared by all blanks. A track that the table does not name keeps its group.

    Raises:
        UserError: the table is unreadable, lacks a column, names none of the tracks, or gives
            a track two groups.
    """
    lines = read_table(table, "--groups")
    rows = [row for _, row in lines]
    column = "group" if rows and "group" in rows[0] else "artist"
    if not rows or "track" not in rows[0] or column not in rows[0]:
        raise UserError(
            f"--groups {table}",
            got=f"columns {', '.join(rows[0]) if rows else 'none'}",
            expected="a header with track and artist (or group)",
            cure="write one line a track below such a header",
        )
    groups: dict[tuple[str, str], str | None] = {}
    for line, row in lines:
        name, group = row["track"], row[column] or None
        if not name:
            raise UserError(
                f"--groups {table}: line {line}",
                got="a blank track",
                expected="the name of a file or a track's id",
                cure="fill it in, or take the line out",
            )
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
    grouped = [replace(t, group=groups.get(found[t.id] or ("", "")) or t.group) for t in tracks]
    if not any(found.values()):
        raise UserError(
            f"--groups {table}",
            got="none of the tracks by name",
            expected=f"names such as {tracks[0].path.stem}",
            cure="the column track holds the file's name without its suffix",
        )
    return grouped


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
                    cure="use --split stratified or kfold, which keep groups together",
                )


def group_key(track: str, group: str | None) -> str:
    """What must stay together: the group where it is known, else the track."""
    return f"group {group}" if group else f"track {track}"


def split_name(text: str, where: str) -> str:
    """`val`, `dev`, `Training`, ... as train, validation or test.

    Raises:
        UserError: it is none of them.
    """
    split = _SPLIT_NAMES.get(text.strip().lower())
    if split is None:
        raise UserError(
            f"split in {where}",
            got=repr(text),
            expected=", ".join(_SPLIT_NAMES),
            cure="correct the table",
        )
    return split


def read_table(table: Path, flag: str) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a CSV or TSV file; tabs in its header make it a TSV.

    Raises:
        UserError: unreadable, not UTF-8, a column twice, or a row that does not fit the header.
    """
    try:
        text = table.read_text(encoding="utf-8-sig")
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = [name.strip() for name in lines.fieldnames or ()]
        if len(set(header)) < len(header):
            raise ValueError(f"columns {', '.join(header)}, one of them twice")
        rows = []
        for row in lines:
            if None in row or None in row.values():
                raise ValueError(f"line {lines.line_num} has not as many fields as the header")
            rows.append(
                (lines.line_num, {key.strip(): value.strip() for key, value in row.items()})
            )
        return rows
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{flag} {table}",
            got=str(error),
            expected="a readable CSV or TSV table in UTF-8",
            cure="save it again with a header line, quoting fields that hold the delimiter",
        ) from error


def _in_folders(root: Path) -> list[Track]:
    """What ends like audio is a track, a dangling link too: it is then reported as unusable."""
    found = []
    for folder in _visible(root):
        for path in _visible(folder) if folder.is_dir() else ():
            if path.suffix.lower() in SUFFIXES and not path.is_dir():
                _refuse_odd_name(path)
                id_ = track_id(path, folder.name)
                found.append(Track(id=id_, genre=folder.name, path=path))
    return found


def _visible(folder: Path) -> list[Path]:
    """Entries but dotfiles; unlike glob, an unreadable folder raises."""
    return sorted(folder / name for name in os.listdir(folder) if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _listed(table: Path) -> list[Track]:
    rows = read_table(table, "--data")
    if rows and not {"path", "genre"} <= set(rows[0][1]):
        raise UserError(
            f"--data {table}",
            got=f"columns {', '.join(rows[0][1])}",
            expected="a header with path and genre (group, split and track may follow)",
            cure="write one line a track below such a header",
        )
    found = [_of_row(table, number, row) for number, row in rows]
    twice = [str(path) for path, count in Counter(t.path for t in found).items() if count > 1]
    if twice:
        raise UserError(
            f"--data {table}: {twice[0]}",
            got="two lines",
            expected="one line a track",
            cure="take one of them out",
        )
    # albums number their files alike: there the id takes a digest of the path as it is listed
    counts = Counter(track.id for track in found)
    return [
        replace(track, id=_with_digest(track.id, row["path"]))
        if counts[track.id] > 1 and not row.get("track")
        else track
        for track, (_, row) in zip(found, rows, strict=True)
    ]


def _of_row(table: Path, number: int, row: Mapping[str, str]) -> Track:
    where = f"--data {table}: line {number}"
    if not row["path"] or not row["genre"]:
        raise UserError(
            where,
            got="a blank path or genre",
            expected="both",
            cure="fill it in, or take the line out",
        )
    id_ = row.get("track") or track_id(Path(row["path"]), row["genre"])
    if not re.fullmatch(rf"[A-Za-z0-9_-]{{1,{ID_BYTES}}}", id_):
        raise UserError(
            where,
            got=f"track {id_!r}",
            expected=f"at most {ID_BYTES} ASCII letters, digits, - and _",
            cure="choose another id, or leave the column track out",
        )
    path = Path(os.path.normpath(table.parent / row["path"]))  # a.wav and ./a.wav are one
    _refuse_odd_name(path)
    split = row.get("split") or ""
    return Track(
        id=id_,
        genre=row["genre"],
        path=path,
        group=row.get("group") or row.get("artist") or None,
        split=split and split_name(split, where),
    )


def _refuse_odd_name(path: Path) -> None:
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in str(path)):
        raise UserError(
            f"file name {str(path)!r}",
            got="bytes that are not UTF-8, or control characters",
            expected="a readable name",
            cure="rename it, for example with convmv",
        )


def _with_digest(slug: str, name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{slug[: ID_BYTES - 9].strip('_') or 'track'}_{digest}"


def _root(folder: Path) -> Path:
    """The folder of genre folders: Kaggle's copy has it one level down."""
    inner = folder / "genres_original"
    return inner if inner.is_dir() else folder
