"""HTML and SVG from Python: what is not markup already is escaped, so no text can become one.

Names of tracks and genres come from strangers' files. `Html` is the only type that is taken as it
is, and only `tag` makes it.
"""

import html
import re
from collections.abc import Iterable, Sequence

_VOID = frozenset({"meta", "br"})
"""Elements without an end tag; those of SVG have one."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML forbids, and halves of surrogate pairs, which UTF-8 cannot hold."""


class Html(str):
    """Text that is markup and stays as it is."""

    __slots__ = ()


Child = str | int | Html | None


def tag(name: str, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        name: of the element.
        children: its content; strings are escaped unless they are Html, None is left out.
        attributes: `class_` and the like lose their underscore, `stroke_width` becomes
            `stroke-width`; None and False leave an attribute out, True gives it no value.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        words.append(word if value is True else f'{word}="{_plain(_short(value))}"')
    head = " ".join(words)
    return Html(f"<{head}>" if name in _VOID else f"<{head}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Elements and texts one after another, texts escaped."""
    return Html(
        "".join(
            child if isinstance(child, Html) else _plain(str(child))
            for child in children
            if child is not None
        )
    )


def _plain(text: str) -> str:
    return html.escape(_CONTROL.sub("\ufffd", text))


def _short(value: str | float) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def section(title: str, *children: Child) -> Html:
    """A part of a page, named by its heading."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    heading = tag("h2", title, id=name)
    return tag("section", heading, *children, aria_labelledby=name)


def figure(title: str, *children: Child, about: str = "") -> Html:
    """A figure with its caption, and what is to be known for reading it."""
    caption = tag("figcaption", tag("b", title), tag("span", about) if about else None)
    return tag("figure", caption, tag("div", *children, class_="scroll"))


def table(label: str, columns: Sequence[str], rows: Iterable[Sequence[Child]]) -> Html:
    """A table that scrolls inside its box; its first column names the rows."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    content = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def facts(pairs: Iterable[tuple[str, Child]]) -> Html:
    """Names and values."""
    items = (tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs)
    return tag("dl", *items)


def bullets(lines: Iterable[Child]) -> Html:
    """A list."""
    return tag("ul", *(tag("li", line) for line in lines))


def note(text: str) -> Html:
    """A plain remark, such as why something is not there."""
    return tag("p", text, class_="note")
