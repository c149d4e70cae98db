"""The ledger: what was written whole comes back, for the same work only."""

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgc_dist.data.ledger import Ledger

ENTRIES = [{"id": f"blues_{n:05d}", "checksums": [n, 2**63 + n], "bad": "é"} for n in range(5)]


def fill(path: Path) -> bytes:
    path.unlink(missing_ok=True)
    with Ledger(path, "pack a") as ledger:
        for entry in ENTRIES:
            ledger.add(entry)
    return path.read_bytes()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1))
def test_a_cut_anywhere_keeps_the_whole_lines(tmp_path: Path, where: float) -> None:
    path = tmp_path / "x.jsonl"
    whole = fill(path)
    kept = whole[: round(where * len(whole))]
    path.write_bytes(kept)
    lines = max(0, kept.count(b"\n") - 1)
    with Ledger(path, "pack a") as ledger:
        assert list(ledger.done.values()) == ENTRIES[:lines]
        for entry in ENTRIES[lines:]:
            ledger.add(entry)
    assert path.read_bytes() == whole


def test_lines_of_another_work_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    fill(path)
    with Ledger(path, "pack b") as ledger:
        assert ledger.done == {}
    with Ledger(path, "pack a") as ledger:
        assert ledger.done == {}


def test_lines_that_are_no_entries_end_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for odd in ("5", '{"x": 1}', '{"id": 3}', "[]"):
        whole = fill(path).decode().splitlines()
        path.write_text("\n".join([*whole[:3], odd, *whole[3:]]) + "\n")
        with Ledger(path, "pack a") as ledger:
            assert list(ledger.done.values()) == ENTRIES[:2]
        path.write_text(odd + "\n")
        with Ledger(path, "pack a") as ledger:
            assert ledger.done == {}
