"""A run is the same on any ranks, dropout and SpecAugment on; `make exactness` tries all."""

import json
from pathlib import Path

import exactness
import pytest


def test_a_run_is_the_same_on_any_number_of_ranks_with_dropout_on(tmp_path: Path) -> None:
    kinds = list(exactness.KINDS)
    cells = [(kinds[0], 3, 2, 3), (kinds[0], 0, 2, 5), (kinds[1], 2, 2, 2), (kinds[2], 2, 2, 3)]
    for cell in exactness.measure(tmp_path, cells, chains=1, seed=1):
        assert cell.loss < exactness.BOUND, cell
        assert cell.weight < 1e-4, cell


def test_masks_do_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    cells = [(exactness.MASKS, 2, micro, 2) for micro in (2, 8)]
    for cell in exactness.measure(tmp_path, cells, chains=1):
        assert cell.loss < exactness.BOUND, cell


def test_the_page_is_that_of_its_result() -> None:
    if not exactness.RESULT.exists():
        pytest.fail("make exactness writes it")
    found = json.loads(exactness.RESULT.read_text())
    assert exactness.PAGE.read_text() == exactness.table(found["cells"])
    assert len(found["cells"]) == len(exactness.grid())
    assert max(cell["loss"] for cell in found["cells"]) < found["bound"]
