"""Logging: rank 0 speaks, the others warn; a file gets plain lines; bars only on a terminal."""

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from mgc_dist import console
from mgc_dist.errors import UserError
from mgc_dist.training.logbook import step_line


@pytest.fixture(autouse=True)
def _restore():
    package = logging.getLogger("mgc_dist")
    before = (package.handlers[:], package.level, package.propagate)
    yield
    package.handlers[:], package.propagate = before[0], before[2]
    package.setLevel(before[1])


def test_ranks_speak_at_their_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("mgc_dist.test")
    console.start_logging(0, tmp_path / "train.log")
    log.info("from %s", "zero")
    console.start_logging(1)
    log.info("unheard")
    log.warning("careful")
    shown = capsys.readouterr().err
    assert "from zero" in shown
    assert "unheard" not in shown
    assert "[rank 1 on " in shown
    assert (tmp_path / "train.log").read_text().strip().endswith("from zero")


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("x", 3, shown=True) as bar:
        assert list(bar.over("abc")) == ["a", "b", "c"]
        bar.at(2, "note")
    assert capsys.readouterr().err == ""


def test_user_errors_travel_between_processes() -> None:
    import pickle

    error = UserError("--x", got=3, expected="4", cure="do", this_rank_only=True)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "--x: got 3, expected 4\n  do"
    assert again.this_rank_only


def test_log_files_get_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    with console.progress("packing", 3, unit="tracks") as bar:
        list(bar.over("abc"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"packing: 2 of 3 tracks, [\d.]+/s, \d+ s left", lines[1])
    for quiet in ({"lines": False}, {"shown": False}):
        with console.progress("packing", 3, unit="tracks", **quiet) as bar:
            list(bar.over("abc"))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(console, "_console", terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with console.progress("packing", 3, unit="tracks") as bar:
        list(bar.over("abc"))
    assert re.search(r"packing.*3/3.*tracks/s.*0:00:00", screen.getvalue().replace("\n", " "))


def test_a_step_is_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, no_color=True)
    monkeypatch.setattr(console, "_console", terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    console.start_logging(0)
    log = logging.getLogger("mgc_dist.test")
    log.info("%s", step_line(1, 275, 2.3029, 0.215, 77.2, 113))
    log.info("%s", step_line(99_999, 99_999, 12.3029, 1.2e-5, 10458.3, 3600 * 9))
    with console.progress("training", 99_999, unit="steps") as bar:
        bar._started -= 1000
        bar.at(99_000, "loss 12.3029")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    lines = [line for line in re.split(r"[\r\n]", shown) if line.strip()]
    assert sum("step " in line for line in lines) == 2
    assert all("step " in line or line.startswith("training ") for line in lines), lines
