"""What a figure is drawn on, and what becomes of it: a PNG file, or SVG inside a page.

A figure is 360 points wide, as many as a phone has pixels. Its colours are those of the page, so
that they can follow light and dark there; colour-blind people tell blue and orange apart.
"""

import functools
import io
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from xml.etree import ElementTree

from mgc_dist.files import replacing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

PALETTE = {
    "page": ("#fbfaf7", "#14171c"),
    "box": ("#ffffff", "#1c2027"),
    "ink": ("#1d2129", "#e8e6e1"),
    "soft": ("#5b6370", "#a2a9b4"),
    "rule": ("#dfdcd4", "#363c46"),
    "main": ("#1f5fa8", "#6fb0f5"),
    "second": ("#b4560f", "#f0a35e"),
    "on": ("#fffffe", "#0c1016"),
    "warn": ("#8a4b00", "#f2b765"),
}
"""Name -> colour in light and in dark; a name stands for one colour of figures, so all differ."""
BOX, INK, SOFT, RULE, MAIN, SECOND, ON = (
    PALETTE[name][0] for name in ("box", "ink", "soft", "rule", "main", "second", "on")
)
WIDTH = 360.0
"""Points that are as wide as the page's column on a phone; wider figures scroll there."""
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.facecolor": BOX,
    "figure.titlesize": 10,
    "font.size": 11,
    "grid.color": RULE,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.labelcolor": SOFT,
    "lines.solid_joinstyle": "round",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a $ is a letter of a genre's name
    "xtick.color": SOFT,
    "xtick.labelsize": 10,
    "xtick.major.pad": 6,
    "xtick.major.size": 0,
    "ytick.color": SOFT,
    "ytick.labelsize": 10,
    "ytick.major.size": 0,
}
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML forbids, and halves of surrogate pairs, which UTF-8 cannot hold."""
_TOLD = "told:"
_COLORS = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """The same function, drawing in the report's style; matplotlib takes half a second to load."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inner


def blank(height: float, width: float = WIDTH) -> "Figure":
    """An empty figure, its size in points."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def short(name: str, most: int = 14) -> str:
    """A stranger's name as it fits beside a figure, without what no file may hold."""
    clean = " ".join(CONTROL.sub("\ufffd", name).split())
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"


def tell(artist: "Artist", text: str) -> None:
    """Give a mark the text that a page shows where it is pointed at."""
    artist.set_gid(_TOLD + CONTROL.sub("\ufffd", text))


@styled
def save(figure: "Figure", path: Path, title: str = "") -> None:
    """Write a figure as its file's suffix says (PNG, SVG, PDF); its folder is made.

    Args:
        figure: to write.
        path: where to.
        title: above it, for those who find the file without the page.
    """
    if title:
        width, height = figure.get_size_inches()
        most = int(11.4 * width)  # letters of 10 points
        lines = [part for line in title.splitlines() for part in textwrap.wrap(line, most)]
        figure.set_size_inches(width, height + 0.2 * len(lines))
        figure.suptitle(CONTROL.sub("\ufffd", "\n".join(lines)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=200)


@styled
def inline(figure: "Figure", name: str, label: str) -> str:
    """A figure as SVG inside a page: its colours are the page's variables, its text is text.

    Args:
        figure: to show.
        name: that no other figure of the page has; its ids begin with it.
        label: what it shows, for those who do not see it.

    Returns:
        Markup; every name in it is escaped.
    """
    figure.patch.set_visible(False)
    file = io.StringIO()
    figure.savefig(file, format="svg")
    root = ElementTree.fromstring(file.getvalue())
    text = ElementTree.tostring(root, "unicode")
    ids = sorted(set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)))
    names = {one or other: f"{name}-{k}" for k, (one, other) in enumerate(ids)}
    _bare(root)
    for element in root.iter():
        _for_a_page(element, names)
    width, height = (72 * inch for inch in figure.get_size_inches())
    root.attrib = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": label}
    if width > WIDTH:
        root.set("style", f"min-width:{0.9 * width:.0f}px")
    return ElementTree.tostring(root, "unicode")


def _bare(parent: ElementTree.Element) -> None:
    """Leave out what is about the file, and a style that would be the whole page's."""
    for child in list(parent):
        if child.tag.rpartition("}")[2] in ("metadata", "style"):
            parent.remove(child)
        else:
            _bare(child)


def _for_a_page(element: ElementTree.Element, names: dict[str, str]) -> None:
    """Without namespaces, with the page's colours and font, unique ids, and what marks tell."""
    element.tag = element.tag.rpartition("}")[2]
    given, element.attrib = element.attrib, {}
    for key, value in given.items():
        key = key.rpartition("}")[2]
        if key == "id" and value.startswith(_TOLD):
            title = ElementTree.Element("title")
            title.text = value.removeprefix(_TOLD)
            element.insert(0, title)
        elif key == "id" and value not in names:
            continue
        else:
            element.set(key, _attribute(key, value, names))


def _attribute(key: str, value: str, names: dict[str, str]) -> str:
    if key == "id":
        return names[value]
    if key == "href" and value.startswith("#"):
        return f"#{names[value[1:]]}"
    if key == "clip-path":
        return f"url(#{names[value[5:-1]]})"
    if key == "style":
        value = re.sub(r"#[0-9a-f]{6}", lambda found: _COLORS.get(found[0], found[0]), value)
        value = re.sub(r"font-family: [^;]*;? ?", "", value)  # the page has one
        return re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
    return " ".join(re.sub(r"(\.\d\d)\d+", r"\1", value).split())
