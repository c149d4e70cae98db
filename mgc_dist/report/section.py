"""What a page shows: sections of tables, figures and sentences, all of it plain text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from mgc_dist.report import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; the first cell of a row names it.

    Attributes:
        label: what it holds, in words.
        columns: heads.
        rows: cells, as many as heads.
    """

    label: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure with its words.

    Attributes:
        name: of its file; no other figure of a page has it.
        title: above it.
        label: what it shows, for those who do not see it.
        figure: drawn once, for files and pages.
        about: what is to be known for reading it.
    """

    name: str
    title: str
    label: str
    figure: "Figure"
    about: str = ""

    @property
    def svg(self) -> Markup:
        """The figure inside a page; canvas escapes the texts in it."""
        return Markup(canvas.inline(self.figure, self.name, self.label))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure that counts: large, with its name, and what to think of it in small letters."""

    value: str
    name: str
    below: str = ""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A track that is wrong.

    Attributes:
        track: its id.
        wrong: the genre that was predicted.
        wrong_share: its probability.
        truth: the true genre.
        truth_share: its probability.
        drawing: both over the segments; None without shards.
        start_s: of the segment that decided.
        wav: its audio in base64; "" without shards.
    """

    track: str
    wrong: str
    wrong_share: float
    truth: str
    truth_share: float
    drawing: Drawing | None = None
    start_s: float = 0.0
    wav: str = ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A track to listen to: its id, why it is shown, and the audio of a segment in base64."""

    track: str
    about: str
    wav: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page, in the order in which its attributes are listed; most are empty.

    Attributes:
        title: heading; "" for the first part, which has none.
        tiles: the figures that count.
        warnings: what to be careful with.
        facts: names and values.
        code: commands.
        tables: of figures.
        drawings: figures.
        paragraphs: sentences.
        notes: remarks, such as why something is not there.
        bullets: sentences as a list.
        folded: tables that are opened by their names.
        mistakes: wrong tracks.
        examples: tracks to listen to.
    """

    title: str = ""
    tiles: tuple[Tile, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    code: str = ""
    tables: tuple[Table, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    paragraphs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bullets: tuple[str, ...] = ()
    folded: tuple[tuple[str, Table], ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    examples: tuple[Example, ...] = ()
