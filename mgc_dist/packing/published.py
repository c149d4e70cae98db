"""Published data sets whose folders and tables have a form of their own: FMA and MTG-Jamendo."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from mgc_dist.config import ShardConfig
from mgc_dist.data.tables import read_text
from mgc_dist.data.tracks import SUFFIXES, Track, files_below, folded, split_name
from mgc_dist.errors import UserError

JAMENDO = ("TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS")
"""Header of MTG-Jamendo's tables; the last column is as many fields as a track has tags."""
_GENRE_TAG = "genre---"


def fma(config: ShardConfig) -> tuple[list[Track], list[str]]:
    """FMA: `000/000002.mp3`, and tracks.csv with three lines of header, splits and artists.

    Source: Defferrard et al., "FMA: A Dataset for Music Analysis", ISMIR 2017.
    """
    data = config.data
    places = (data, data / "fma_metadata", data.parent / "fma_metadata", data.parent)
    table = config.table or next(
        (place / "tracks.csv" for place in places if (place / "tracks.csv").is_file()), None
    )
    files = {path.stem: path for path in files_below(data) if path.suffix.lower() in SUFFIXES}
    files = {stem: path for stem, path in files.items() if re.fullmatch(r"\d{6}", stem)}
    if table is None or not files:
        raise UserError(
            f"--layout fma in {data}",
            got="no tracks.csv" if files else "no files such as 000/000002.mp3",
            expected="fma_small (or another subset) with fma_metadata beside it",
            cure="--table names FMA's tracks.csv"
            if files
            else "--data names fma_small or the like",
        )
    lines = csv.reader(io.StringIO(read_text(table, "--table"), newline=""))
    heads = list(zip(next(lines, []), next(lines, []), strict=False))
    wanted = (("set", "split"), ("track", "genre_top"), ("artist", "id"))
    if not set(wanted) <= set(heads):
        raise UserError(
            f"--table {table}",
            got=f"columns {', '.join(name for _, name in heads[:5])}, ...",
            expected="FMA's tracks.csv, whose lines of header name set split, track genre_top, "
            "artist id",
            cure="take the one of fma_metadata.zip",
        )
    columns = [heads.index(head) for head in wanted]
    next(lines, None)
    found, without = [], 0
    for line in lines:
        path = files.pop(f"{int(line[0]):06d}", None)
        if path is None:
            continue
        split, genre, artist = (line[column].strip() for column in columns)
        without += not genre
        if genre:
            id_ = f"fma_{path.stem}"
            where = f"--table {table}: track {path.stem}"
            found.append(
                Track(
                    id=id_,
                    genre=genre,
                    path=path,
                    group=artist or None,
                    split=split_name(split, where) if split else "",
                )
            )
    notes = [f"not taken: {without} tracks without a top genre"] if without else []
    return found, notes + not_taken(sorted(files.values()), "files that its table does not name")


def jamendo(config: ShardConfig) -> tuple[list[Track], list[str]]:
    """MTG-Jamendo: a table of tracks with many tags; those with exactly one wanted genre count.

    Source: Bogdanov et al., "The MTG-Jamendo Dataset for Automatic Music Tagging", 2019.
    """
    if config.table is None or not config.data.is_dir():
        raise UserError(
            "--layout jamendo",
            got="no --table" if config.table is None else f"--data {config.data}, no folder",
            expected="--data FOLDER with 00/, 01/, ... and --table autotagging_genre.tsv",
            cure="name both",
        )
    lines = [line.split("\t") for line in read_text(config.table, "--table").splitlines()]
    if not lines or tuple(lines[0]) != JAMENDO:
        raise UserError(
            f"--table {config.table}",
            got=f"columns {', '.join(lines[0]) if lines else 'none'}",
            expected=f"columns {', '.join(JAMENDO)}",
            cure="take one of MTG-Jamendo's data/*.tsv",
        )
    wanted = {folded(genre) for genre in split_names(config.genres)}
    found, several = [], 0
    for line in lines[1:]:
        tags = [tag.removeprefix(_GENRE_TAG) for tag in line[5:] if tag.startswith(_GENRE_TAG)]
        genres = [tag for tag in tags if not wanted or folded(tag) in wanted]
        several += len(genres) > 1
        if len(genres) == 1:
            path = config.data / line[3]
            low = path.with_suffix(f".low{path.suffix}")  # the smaller copy of the data set
            path = low if low.is_file() and not path.is_file() else path
            found.append(Track(id=line[0], genre=genres[0], path=path, group=line[1] or None))
    other = len(lines) - 1 - len(found) - several
    notes = [f"not taken: {several} tracks of several genres"] if several else []
    return found, notes + ([f"not taken: {other} tracks of other genres"] if other else [])


def split_names(genres: str | None) -> list[str]:
    """Names that `--genres` gives, with commas between them."""
    return [name.strip() for name in (genres or "").split(",") if name.strip()]


def not_taken(others: Sequence[Path], what: str = "other files") -> list[str]:
    """A sentence about files that were found and not taken, if there are some."""
    return [f"not taken: {len(others)} {what}, such as {others[0]}"] if others else []
