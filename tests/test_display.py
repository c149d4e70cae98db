"""Logging: rank 0 speaks, the others warn; a file gets plain lines; bars only on a terminal."""

import logging
from pathlib import Path

import pytest

from mgc_dist import display
from mgc_dist.errors import UserError


@pytest.fixture(autouse=True)
def _restore():
    package = logging.getLogger("mgc_dist")
    before = (package.handlers[:], package.level, package.propagate)
    yield
    package.handlers[:], package.propagate = before[0], before[2]
    package.setLevel(before[1])


def test_ranks_speak_at_their_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("mgc_dist.test")
    display.start_logging(0, tmp_path / "train.log")
    log.info("from %s", "zero")
    display.start_logging(1)
    log.info("unheard")
    log.warning("careful")
    shown = capsys.readouterr().err
    assert "from zero" in shown
    assert "unheard" not in shown
    assert "[rank 1 on " in shown
    assert (tmp_path / "train.log").read_text().strip().endswith("from zero")


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with display.progress("x", 3, shown=True) as bar:
        assert list(bar.over("abc")) == ["a", "b", "c"]
        bar.at(2, "note")
    assert capsys.readouterr().err == ""


def test_user_errors_travel_between_processes() -> None:
    import pickle

    error = UserError("--x", got=3, expected="4", cure="do", this_rank_only=True)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "--x: got 3, expected 4\n  do"
    assert again.this_rank_only
