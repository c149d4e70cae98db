"""Tracks in subgroups: those that the bias model agrees with and those it does not, or a user's.

A track (a segment) is `bias-aligned` if the argmax of the bias model's mean probability over its
segments (of its probability) is its label, else `bias-conflicting`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.data.manifest import TRACKS
from mgc_dist.data.reader import ShardSet
from mgc_dist.data.tables import Value, read_columns, read_table
from mgc_dist.errors import UserError
from mgc_dist.scoring import intervals
from mgc_dist.scoring.metrics import track_labels, track_means
from mgc_dist.scoring.written import GroupFigures, Share, WorstGroup

ALIGNED = "bias-aligned"
CONFLICTING = "bias-conflicting"
_FEW = 6
"""Numbers of so few different values are subgroups as they are."""


@dataclass(frozen=True, kw_only=True)
class Subgroups:
    """Which subgroup each track, and each segment if that is another question, is in.

    Attributes:
        source: where they come from, in words.
        of_track: a name or None for each track, ascending as in `SplitScores`.
        of_row: the same for each row of the split; None where segments follow their track.
    """

    source: str
    of_track: list[str | None]
    of_row: list[str | None] | None = None


def aligned_rows(
    log_probability: NDArray[np.float32], label: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether the bias model's best genre is the true one, bool [rows]."""
    return np.asarray(log_probability.argmax(axis=1) == label)


def aligned_tracks(
    log_probability: NDArray[np.float32], label: NDArray[np.int64], track: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether the genre of the highest mean bias probability is the true one.

    Args:
        log_probability: float32 [rows, K] of the bias model.
        label: int64 [rows].
        track: int64 [rows].

    Returns:
        bool [M], tracks ascending.
    """
    _, mean = track_means(np.exp(log_probability.astype(np.float64)), track)
    return np.asarray(mean.argmax(axis=1) == track_labels(label, track))


def names_of(aligned: NDArray[np.bool_]) -> list[str | None]:
    """The subgroup of each item, bool [M]."""
    return [ALIGNED if yes else CONFLICTING for yes in aligned]


def asked_for(
    table: Path | None, column: str | None, ids: Sequence[str], shards: ShardSet
) -> Subgroups:
    """Subgroups of a user's table, or by a property of the source files.

    Args:
        table: `--subgroups`; None for the table of sources that packing has written.
        column: `--subgroup-column`.
        ids: of the tracks.
        shards: the data set.

    Raises:
        UserError: no such table or column, or a track that it lacks.
    """
    if table:
        column = column or "subgroup"
        names = from_table(table, column, ids)
        return Subgroups(source=f"column {column} of {table.name}", of_track=names)
    path = shards.folder / TRACKS
    if not shards.manifest.tracks_sha256:
        raise UserError(
            f"--subgroup-column {column}",
            got=f"no {TRACKS} in {shards.folder}, which an older version has packed",
            expected="that table, or one of yours",
            cure="name yours with --subgroups FILE, or pack the data set again",
        )
    rows = {row["track"]: row for row in read_columns(path, "--subgroup-column")}
    columns = list(next(iter(rows.values())))
    if column not in columns:
        raise UserError(
            f"--subgroup-column {column}",
            got="no such column",
            expected=f"one of {', '.join(columns)}",
            cure="name one of them, or a table of yours with --subgroups FILE",
        )
    names = in_thirds([rows[id_][column] for id_ in ids])
    return Subgroups(source=f"{column} of the source files", of_track=names)


def in_thirds(values: Sequence[Value]) -> list[str | None]:
    """Values as names of subgroups: as they are, or numbers in thirds if there are many.

    Args:
        values: of the tracks; None for a track in no subgroup.
    """
    known = [value for value in values if isinstance(value, int | float)]
    if len(known) < sum(value is not None for value in values) or len(set(known)) <= _FEW:
        return [None if value is None else str(value) for value in values]
    low, high = np.quantile(known, (1 / 3, 2 / 3), method="lower").tolist()
    parts = (f"up to {low:g}", f"above {low:g} to {high:g}", f"above {high:g}")
    return [
        parts[int(value > low) + int(value > high)] if isinstance(value, int | float) else None
        for value in values
    ]


def from_table(table: Path, column: str, ids: Sequence[str]) -> list[str | None]:
    """The subgroup of each track from a table with a column `track`.

    Args:
        table: holds a row for every one of the tracks; others are passed over.
        column: holds the subgroup; blank for none.
        ids: of the tracks; a dot in the table's names counts as the underscore of an id.

    Raises:
        UserError: the table lacks a column or a track, or gives a track two subgroups.
    """
    lines = read_table(table, "--subgroups")
    columns = list(lines[0][1]) if lines else []
    if "track" not in columns or column not in columns:
        raise UserError(
            f"--subgroups {table}",
            got=f"columns {', '.join(columns) or 'none'}",
            expected=f"a header with track and {column}",
            cure="name the column with --subgroup-column",
        )
    found: dict[str, str] = {}
    for line, row in lines:
        name = row["track"].removesuffix(".wav").replace(".", "_")
        if found.setdefault(name, row[column]) != row[column]:
            raise UserError(
                f"--subgroups {table}: line {line}, track {row['track']}",
                got=f"both {found[name]!r} and {row[column]!r}",
                expected="one subgroup a track",
                cure="correct the table",
            )
    missing = [name for name in ids if name not in found]
    if missing:
        raise UserError(
            f"--subgroups {table}",
            got=f"no row for {len(missing)} of {len(ids)} tracks, such as {missing[0]}",
            expected="a row for every track of the split",
            cure="leave the subgroup blank where there is none",
        )
    return [found[name] or None for name in ids]


def figures(
    names: Sequence[str | None],
    right: NDArray[np.bool_],
    label: NDArray[np.int64],
    genres: Sequence[str],
    cluster: NDArray[np.int64],
) -> dict[str, GroupFigures]:
    """Count, accuracy and interval of each subgroup, by name, and its genres.

    Args:
        names: of each track's subgroup; None for tracks in none.
        right: bool [M], whether the track was named rightly.
        label: int64 [M].
        genres: in label order.
        cluster: int64 [M], items of equal number are right or wrong together.

    Returns:
        {name: {count, accuracy, interval, genres: {genre: {count, accuracy}}}}; the bias
        subgroups stand there also when empty, with null in the place of figures.
    """
    known = {name for name in names if name is not None}
    if known & {ALIGNED, CONFLICTING}:
        known |= {ALIGNED, CONFLICTING}
    return {name: _of_one(name, names, right, label, genres, cluster) for name in sorted(known)}


def _of_one(
    name: str,
    names: Sequence[str | None],
    right: NDArray[np.bool_],
    label: NDArray[np.int64],
    genres: Sequence[str],
    cluster: NDArray[np.int64],
) -> GroupFigures:
    inside = np.array([found == name for found in names], dtype=bool)
    interval = intervals.of_share(right[inside], cluster[inside])
    return {
        "count": int(inside.sum()),
        "accuracy": _share(right[inside])["accuracy"],
        "interval": interval and list(interval),
        "genres": {
            genre: _share(right[inside & (label == number)]) for number, genre in enumerate(genres)
        },
    }


def _share(right: NDArray[np.bool_]) -> Share:
    return {"count": len(right), "accuracy": float(right.mean()) if len(right) else None}


def worst(groups: dict[str, GroupFigures]) -> WorstGroup | None:
    """Name, accuracy and count of the subgroup of the lowest accuracy; None if all are empty."""
    filled = {name: each for name, each in groups.items() if each["count"]}
    if not filled:
        return None
    accuracy, name = min((each["accuracy"] or 0.0, name) for name, each in filled.items())
    return {"name": name, "accuracy": accuracy, "count": filled[name]["count"]}
