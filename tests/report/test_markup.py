"""No text becomes markup, whatever it holds."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from mgc_dist.report.markup import Html, join, tag


class Seen(HTMLParser):
    """An independent reader of what was written."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(name)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data


def test_elements_attributes_and_texts() -> None:
    assert tag("p", "a < b", tag("b", "c"), None, 3) == "<p>a &lt; b<b>c</b>3</p>"
    line = tag("line", x1=1.23456789, stroke_width=2, class_="grid", hidden=False, id=None)
    assert line == '<line x1="1.2346" stroke-width="2" class="grid"></line>'
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert tag("audio", controls=True) == "<audio controls></audio>"
    assert join("<", Html("<br>")) == "&lt;<br>"


@given(st.text())
def test_any_text_stays_text(text: str) -> None:
    seen = Seen(tag("p", text, title=text))
    assert seen.names == ["p"]
    assert [name for name, _ in seen.attributes] == ["title"]
    ordinary = "".join(c for c in text if c.isprintable())
    assert "".join(c for c in seen.text if c.isprintable() and c != "\ufffd") == ordinary.replace(
        "\ufffd", ""
    )


def test_text_can_always_be_written() -> None:
    tag("p", "half \ud800 a pair, and \x00").encode("utf-8")
