"""Pages for users are read easily: no sentence of more than 30 words."""

import re
from pathlib import Path

import pytest
from test_readme import PAGES

MOST = 30


def sentences(text: str) -> list[str]:
    """What a page says in prose: no code, no tables, no links' targets."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=#)", text)
    prose = [block for block in blocks if not block.lstrip().startswith(("|", "#", "<!--"))]
    found = []
    for block in prose:
        words = " ".join(re.sub(r"`[^`]*`", "X", block).split())
        found += re.split(r"(?<=[.!?:;])\s+(?=[A-Z`*\[(])", words)
    return [each for each in found if each]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_long(page: Path) -> None:
    long = [each for each in sentences(page.read_text()) if len(each.split()) > MOST]
    assert long == []


def test_long_sentences_are_seen() -> None:
    words = " ".join(["word"] * 31)
    assert sentences(f"Short. {words.capitalize()}.\n\n```\n{words}\n```\n") == [
        "Short.",
        f"{words.capitalize()}.",
    ]
