"""Finding labelled tracks: folders of genres, trees, FMA, MTG-Jamendo, or a table of one's own.

A new layout is an entry of LAYOUTS. Whatever the layout, genres are spelled in one way, every
track gets an id of its own, and what is not taken is said.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from mgc_dist.config import ShardConfig
from mgc_dist.data.tables import read_table, read_text
from mgc_dist.data.tracks import (
    ID_BYTES,
    SUFFIXES,
    Track,
    files_below,
    folded,
    is_music,
    refuse_odd_name,
    split_name,
    track_id,
    with_digest,
)
from mgc_dist.errors import UserError
from mgc_dist.packing import published
from mgc_dist.packing.published import not_taken, split_names

_NOBODY = frozenset(
    {"various artists", "various", "va", "unknown artist", "unknown", "compilations"}
)
"""Folders of artists that name nobody: their tracks may be by anybody."""
_COLUMNS = ("path", "genre", "group", "artist", "split", "track")


@dataclass(frozen=True, kw_only=True)
class Found:
    """Tracks, and what is to be said of them.

    Attributes:
        tracks: in the order of their ids.
        notes: sentences about what was not taken, or merged.
    """

    tracks: list[Track]
    notes: tuple[str, ...]


def find(config: ShardConfig) -> Found:
    """The tracks of `--data`.

    Dotfiles are ignored: one copy of GTZAN ships a macOS `._*.wav` beside every clip.

    Raises:
        UserError: no such folder or table, nothing in it, another layout than the one that is
            asked for, or two files that get one id.
    """
    if not config.data.exists():
        raise UserError(
            f"--data {config.data}",
            got="no such folder or table",
            expected="a folder with one folder of audio files per genre, or a table of paths",
            cure="python -m mgc_dist.synth data  makes a synthetic one",
        )
    found, notes = LAYOUTS[_layout(config)](config)
    if not found:
        raise UserError(
            f"--data {config.data}",
            got="no rows" if config.data.is_file() else "no audio files in its sub-folders",
            expected=f"GENRE/NAME with NAME ending in {', '.join(SUFFIXES)}",
            cure="give the folder that holds the genre folders",
        )
    found, merged = _spelled_once(found)
    found, unwanted = _wanted(found, config.genres)
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
    found.sort(key=lambda track: track.id)
    return Found(tracks=found, notes=(*notes, *merged, *unwanted))


def _layout(config: ShardConfig) -> str:
    """What `auto` stands for."""
    if config.layout != "auto":
        return config.layout
    return "table" if config.data.is_file() or config.table else "auto"


def _folders(config: ShardConfig, *, is_sure: bool = True) -> tuple[list[Track], list[str]]:
    """GENRE/NAME. What ends like audio is a track, a dangling link too: it is then unusable.

    Args:
        config: says which folder.
        is_sure: whether the user has named this layout.
    """
    root = _root(config.data)
    found = []
    for folder in _visible(root):
        for path in _visible(folder) if folder.is_dir() else ():
            if is_music(path):
                id_ = track_id(path, folder.name)
                found.append(Track(id=id_, genre=folder.name, path=path))
    others = _others(config.data, found)
    if not is_sure:
        _refuse_other_layouts(config.data, root, found, others)
    return found, not_taken(others)


def _guessed_folders(config: ShardConfig) -> tuple[list[Track], list[str]]:
    return _folders(config, is_sure=False)


def _refuse_other_layouts(
    data: Path, root: Path, found: Sequence[Track], others: Sequence[Path]
) -> None:
    """Refuse folders that are probably no genres, or hold music further down.

    Raises:
        UserError: with the layouts to choose from.
    """
    genres = {track.genre for track in found}
    if genres and all(genre.isdecimal() for genre in genres):
        raise UserError(
            f"--data {data}",
            got=f"folders {', '.join(sorted(genres)[:3])}, ..., which are numbers",
            expected="folders named by genre",
            cure="--layout fma reads FMA's folders and its tracks.csv; a table may name the genre "
            "of each file; --layout folders takes numbers as genres",
        )
    below = [path for path in others if root in path.parents]
    music = [path for path in below if path.suffix.lower() in SUFFIXES]
    deep = [path for path in music if len(path.relative_to(root).parts) > 2]
    if deep:
        raise UserError(
            f"--data {data}",
            got=f"{len(deep)} audio files in deeper folders, such as {deep[0]}",
            expected="GENRE/NAME",
            cure="--layout nested takes them as GENRE/ARTIST/.../NAME; --layout folders leaves "
            "them out",
        )
    if music and not found:
        raise UserError(
            f"--data {data}",
            got=f"{len(music)} audio files, such as {music[0].name}, in no folder of a genre",
            expected="GENRE/NAME",
            cure="move them into a folder for each genre, or give a table with the columns path "
            "and genre",
        )


def _nested(config: ShardConfig) -> tuple[list[Track], list[str]]:
    """GENRE/.../NAME; the folder below the genre is the artist."""
    root = _root(config.data)
    found = []
    for path in files_below(root):
        if is_music(path) and path.parent != root:
            genre, *folders, _ = path.relative_to(root).parts
            artist = folders[0] if folders else None
            name = Path("_".join((genre, *folders, path.name)))
            found.append(
                Track(
                    id=track_id(name, genre),
                    genre=genre,
                    path=path,
                    group=None if artist and artist.casefold() in _NOBODY else artist,
                )
            )
    counts = Counter(track.id for track in found)
    found = [
        replace(t, id=with_digest(t.id, t.path.relative_to(root).as_posix()))
        if counts[t.id] > 1
        else t
        for t in found
    ]
    return found, not_taken(_others(config.data, found))


def _table(config: ShardConfig) -> tuple[list[Track], list[str]]:
    """Rows of `path` and `genre`, and of `group` (or `artist`), `split` and `track` if known."""
    is_folder = config.data.is_dir()
    if is_folder == (config.table is None) or (is_folder and config.table is None):
        raise UserError(
            f"--data {config.data}",
            got="a folder and no --table" if is_folder else f"a file, and --table {config.table}",
            expected="--data TABLE, or --data FOLDER --table TABLE",
            cure="name the table once",
        )
    table, flag = config.table or config.data, "--table" if is_folder else "--data"
    folder = config.data if is_folder else table.parent
    _refuse_known_tables(table, flag)
    rows = _renamed(read_table(table, flag), config.columns, f"{flag} {table}")
    found = [_of_row(folder, f"{flag} {table}: line {number}", row) for number, row in rows]
    twice = [str(path) for path, count in Counter(t.path for t in found).items() if count > 1]
    if twice:
        raise UserError(
            f"{flag} {table}: {twice[0]}",
            got="two lines",
            expected="one line a track",
            cure="take one of them out",
        )
    # albums number their files alike: there the id takes a digest of the path as it is listed
    counts = Counter(track.id for track in found)
    found = [
        replace(track, id=with_digest(track.id, row["path"]))
        if counts[track.id] > 1 and not row.get("track")
        else track
        for track, (_, row) in zip(found, rows, strict=True)
    ]
    return found, not_taken(_others(folder, found)) if is_folder else []


def _refuse_known_tables(table: Path, flag: str) -> None:
    """Refuse the tables of data sets that have a layout of their own.

    Raises:
        UserError: with the layout that reads it.
    """
    first = read_text(table, flag).splitlines()[:2]
    named = {
        "fma": len(first) > 1 and first[0].startswith(",") and "genre_top" in first[1],
        "jamendo": bool(first) and tuple(first[0].split("\t")) == published.JAMENDO,
    }
    for layout, is_it in named.items():
        if is_it:
            raise UserError(
                f"{flag} {table}",
                got=f"the table of the data set {layout}",
                expected=f"--layout {layout}",
                cure=f"--layout {layout} --data FOLDER_OF_THE_AUDIO --table {table}",
            )


def _renamed(
    rows: list[tuple[int, dict[str, str]]], columns: Sequence[str], where: str
) -> list[tuple[int, dict[str, str]]]:
    """Rows whose columns have our names, by `--columns OURS=THEIRS`."""
    names = dict(word.split("=", 1) for word in columns if "=" in word)
    there = list(rows[0][1]) if rows else []
    wrong = [word for word in columns if word.split("=", 1)[0] not in _COLUMNS or "=" not in word]
    wrong += [f"{ours}={theirs}" for ours, theirs in names.items() if rows and theirs not in there]
    if wrong:
        raise UserError(
            f"--columns {wrong[0]}",
            got=f"the columns {', '.join(there) or 'none'}",
            expected=f"NAME=COLUMN, with NAME one of {', '.join(_COLUMNS)}",
            cure="for example --columns path=file genre=style",
        )
    if rows and not {"path", "genre"} <= set(there) | set(names):
        raise UserError(
            where,
            got=f"columns {', '.join(there)}",
            expected="a header with path and genre (group, split and track may follow)",
            cure="--columns path=YOURS genre=YOURS names them",
        )
    return [
        (number, row | {ours: row[theirs] for ours, theirs in names.items()})
        for number, row in rows
    ]


def _of_row(folder: Path, where: str, row: Mapping[str, str]) -> Track:
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
    path = Path(os.path.normpath(folder / row["path"]))  # a.wav and ./a.wav are one
    refuse_odd_name(path)
    split = row.get("split") or ""
    return Track(
        id=id_,
        genre=row["genre"],
        path=path,
        group=row.get("group") or row.get("artist") or None,
        split=split and split_name(split, where),
    )


def _spelled_once(found: Sequence[Track]) -> tuple[list[Track], list[str]]:
    """Tracks whose genres have one spelling each (the most frequent), and what was merged."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for track in found:
        spellings[folded(track.genre)][track.genre] += 1
    chosen, notes = {}, []
    for plain, counts in sorted(spellings.items()):
        most = min(counts, key=lambda name: (-counts[name], name))
        chosen[plain] = unicodedata.normalize("NFC", " ".join(most.split()))
        if len(counts) > 1:
            parts = ", ".join(f"{name!a} ({count})" for name, count in sorted(counts.items()))
            notes.append(f"one genre, {chosen[plain]}: {parts} differ only in how they are spelled")
    return [replace(track, genre=chosen[folded(track.genre)]) for track in found], notes


def _wanted(found: list[Track], genres: str | None) -> tuple[list[Track], list[str]]:
    """Tracks of the genres that `--genres` names."""
    names = split_names(genres)
    if not names:
        return found, []
    there = {folded(track.genre): track.genre for track in found}
    for name in names:
        if folded(name) not in there:
            near = get_close_matches(folded(name), there, n=1)
            raise UserError(
                f"--genres {genres}",
                got=name,
                expected=f"some of {', '.join(sorted(there.values()))}",
                cure=f"did you mean {there[near[0]]}?" if near else "names, with commas between",
            )
    kept = [track for track in found if folded(track.genre) in {folded(name) for name in names}]
    others = {track.genre for track in found} - {track.genre for track in kept}
    note = f"not taken: {len(found) - len(kept)} tracks of {len(others)} other genres"
    return kept, [note] if others else []


def _visible(folder: Path) -> list[Path]:
    """Entries but dotfiles; unlike glob, an unreadable folder raises."""
    return sorted(folder / name for name in os.listdir(folder) if not name.startswith("."))


def _others(root: Path, found: Sequence[Track]) -> list[Path]:
    taken = {track.path for track in found}
    return [path for path in files_below(root) if path not in taken]


def _root(folder: Path) -> Path:
    """The folder of genre folders: Kaggle's copy has it one level down."""
    inner = folder / "genres_original"
    return inner if inner.is_dir() else folder


LAYOUTS: dict[str, Callable[[ShardConfig], tuple[list[Track], list[str]]]] = {
    "auto": _guessed_folders,
    "folders": _folders,
    "nested": _nested,
    "fma": published.fma,
    "jamendo": published.jamendo,
    "table": _table,
}
