"""Genres that a model and a data set have in common, matched by name or by a map of the user's.

A segment's probabilities are renormalised over them: the softmax over their logits alone. Tracks of
other genres are left out, and counted.
"""

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.errors import UserError
from mgc_dist.scoring.written import EvaluationFigures, GenresInCommon

FLAG = "--genre-map"


@dataclass(frozen=True, kw_only=True)
class SharedGenres:
    """Genres in common.

    Attributes:
        model: names of the model's genres, in label order, K of them.
        data: names of the data set's genres, in label order.
        to: of each of the data set's genres, its label in the model; None if the model lacks it.
    """

    model: tuple[str, ...]
    data: tuple[str, ...]
    to: tuple[int | None, ...]

    @property
    def labels(self) -> list[int]:
        """Labels in the model, ascending, N of them."""
        return sorted({label for label in self.to if label is not None})

    @property
    def genres(self) -> tuple[str, ...]:
        """Names in the model's words and order, N of them."""
        return tuple(self.model[label] for label in self.labels)

    def kept(self, label: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each item's genre is in common: labels of the data set int64 [n] -> bool [n]."""
        return np.array([each is not None for each in self.to])[label]

    def labels_of(self, label: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels of the data set, of kept items, int64 [n] -> places in `genres`, int64 [n]."""
        place = {found: n for n, found in enumerate(self.labels)}
        return np.array([-1 if each is None else place[each] for each in self.to])[label]

    def written(self, genres_of_tracks: Iterable[str]) -> GenresInCommon:
        """What an evaluation says of them.

        Args:
            genres_of_tracks: the data set's genre of each track of the split.
        """
        known = dict(zip(self.data, self.to, strict=True))
        left_out = Counter(genre for genre in genres_of_tracks if known[genre] is None)
        renamed = {
            name: self.model[label]
            for name, label in known.items()
            if label is not None and self.model[label] != name
        }
        return {
            "of_model": list(self.model),
            "renamed": renamed,
            "left_out": dict(sorted(left_out.items())),
        }


def match(
    model: Sequence[str], data: Sequence[str], given: str | None, where: Path
) -> SharedGenres | None:
    """Match the genres of a data set with those of a model.

    A genre that the map does not name is matched by its name; if no genre has just that name, by
    its letters and digits alone, in any case.

    Args:
        model: names in label order.
        data: names in label order.
        given: value of --genre-map.
        where: folder of the data set, for messages.

    Returns:
        None where both have the same genres in the same order, and there is no map.

    Raises:
        UserError: a map that does not fit, a name that fits several genres, or less than two
            genres in common.
    """
    if given is None and tuple(model) == tuple(data):
        return None
    renamed = _read(given, model, data) if given is not None else {}
    to = []
    for name in data:
        target = renamed[name] if name in renamed else _by_name(name, model)
        to.append(model.index(target) if target else None)
    found = SharedGenres(model=tuple(model), data=tuple(data), to=tuple(to))
    if len(found.genres) < 2:
        raise UserError(
            f"genres of {where}",
            got=f"{', '.join(data)}, of which the model knows {', '.join(found.genres) or 'none'}",
            expected=f"at least two of {', '.join(model)}",
            cure=f'say which is which: {FLAG} "{data[0]}={model[0]},..."',
        )
    return found


def told(figures: EvaluationFigures) -> str:
    """A sentence about genres in common; "" for an evaluation on all genres of the model."""
    given = figures.get("in_common")
    if not given:
        return ""
    left_out = given["left_out"]
    parts = [
        f"{named(figures)}, of {len(given['of_model'])} that the model knows: each segment's "
        "probabilities are renormalised over them"
    ]
    parts += [f"{name} counts as {genre}" for name, genre in given["renamed"].items()]
    if left_out:
        counts = ", ".join(f"{genre} {count}" for genre, count in left_out.items())
        parts.append(f"{sum(left_out.values())} tracks of other genres are left out ({counts})")
    return "; ".join(parts)


def named(figures: EvaluationFigures) -> str:
    """Their number and names."""
    return f"{shortly(figures)} ({', '.join(figures['genres'])})" if shortly(figures) else ""


def shortly(figures: EvaluationFigures) -> str:
    """Their number; "" for an evaluation on all genres of the model."""
    return f"on the {len(figures['genres'])} genres in common" if figures.get("in_common") else ""


def _normalised(name: str) -> str:
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return "".join(letter for letter in folded if letter.isalnum())


def _by_name(name: str, model: Sequence[str]) -> str | None:
    if name in model:
        return name
    wanted = _normalised(name)
    found = [genre for genre in model if wanted and _normalised(genre) == wanted]
    if len(found) > 1:
        raise UserError(
            f"genre {name} of the data set",
            got=f"several genres of the model that may be meant: {', '.join(found)}",
            expected="one",
            cure=f'say which: {FLAG} "{name}={found[0]}"',
        )
    return found[0] if found else None


def _read(given: str, model: Sequence[str], data: Sequence[str]) -> dict[str, str]:
    """The data set's genre -> the model's; "" for one that is left out."""
    pairs = _of_file(Path(given), model, data) if Path(given).is_file() else _of_text(given)
    found: dict[str, str] = {}
    for name, genre in pairs:
        for each, known, whose in ((name, data, "data set"), (genre, model, "model")):
            if each not in known and (each or whose == "data set"):
                raise UserError(
                    f"{FLAG} {given}",
                    got=f"{each!r}, which is no genre of the {whose}",
                    expected=f"one of {', '.join(known)}",
                    cure="write GENRE-OF-THE-DATA-SET=GENRE-OF-THE-MODEL; with nothing after the "
                    "= sign, its tracks are left out",
                )
        if found.setdefault(name, genre) != genre:
            raise UserError(
                f"{FLAG} {given}",
                got=f"{name!r} as both {found[name]!r} and {genre!r}",
                expected="one genre of the model for it",
                cure="take one of the two out",
            )
    return found


def _of_text(given: str) -> list[tuple[str, str]]:
    pairs = [part.partition("=") for part in given.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise UserError(
            f"{FLAG} {given}",
            got="no file of that name, and a part without ="
            if any(equals for _, equals, _ in pairs)
            else "no file of that name",
            expected="a CSV or TSV file of two columns, or pairs with =",
            cure=f'for example {FLAG} "Hip-Hop=hiphop,R&B=rnb"; names with a comma need a file',
        )
    return [(name.strip(), genre.strip()) for name, _, genre in pairs]


def _of_file(path: Path, model: Sequence[str], data: Sequence[str]) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [tuple(cell.strip() for cell in row) for row in lines if row]
        wrong = [row for row in rows if len(row) != 2]
        if wrong or not rows:
            raise ValueError(f"{len(wrong[0])} columns in {wrong[0]}" if wrong else "no rows")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{FLAG} {path}",
            got=str(error),
            expected="a CSV or TSV table of two columns, in UTF-8",
            cure="write a line a genre: its name in the data set, its name in the model",
        ) from error
    first = rows[0]
    has_header = first[0] not in data and first[1] not in (*model, "")
    return [(name, genre) for name, genre in rows[has_header:]]
