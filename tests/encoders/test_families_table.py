"""A row of the table of families is what comes out now; `make families` tries all."""

import json
from pathlib import Path

import families
import pytest
from harness import slow

FAST = "MERT v2 (its layout)"
"""Of the others, other tests in `make test` have most cells."""


@pytest.mark.parametrize("name", [FAST, *(slow(name) for name in families.ALL if name != FAST)])
def test_a_row_is_what_the_page_says(name: str, tmp_path: Path) -> None:
    if not families.is_here(name):
        pytest.skip(f"NO PACKAGE {families.NEEDS[name]} HERE, nothing about {name} is shown")
    held = json.loads(families.RESULT.read_text())
    assert families.of(name, tmp_path) == held[name]


def test_the_page_has_the_table_of_the_result_without_defects() -> None:
    held = json.loads(families.RESULT.read_text())
    assert list(held) == list(families.ALL)
    assert families.table(held) in families.PAGE.read_text()
    assert not any(said.startswith("TRACEBACK") for row in held.values() for said in row.values())


def test_what_nobody_foresaw_is_a_defect_of_the_table() -> None:
    def fails() -> str:
        raise RuntimeError("such as a\nmessage")

    assert families.tried(fails) == "TRACEBACK RuntimeError: such as a message"
