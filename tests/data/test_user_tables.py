"""Tables of users: delimiters, encodings, JSON lines."""

import csv
from pathlib import Path

import pytest

from mgc_dist.data.tables import plain, read_table
from mgc_dist.errors import UserError

ROWS = [(2, {"a": "1", "b": "x, y"}), (3, {"a": "", "b": "é"})]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", ["\t", ";"])
def test_spreadsheets_write_many_kinds(encoding: str, delimiter: str, tmp_path: Path) -> None:
    lines = [delimiter.join(line) for line in (("a", " b"), ("1", "x, y"), ("", "é "))]
    table = tmp_path / "t.csv"
    table.write_bytes("\r\n".join(lines).encode(encoding))
    assert read_table(table, "--data") == ROWS


def test_quotes_hold_delimiters_and_json_lines_hold_anything(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('a,b\n1,"x, y"\n,é\n')
    assert read_table(table, "--data") == ROWS
    lines = tmp_path / "t.jsonl"
    lines.write_text('\n{"a": 1, "b": "x, y"}\n{"b": "é", "a": null}\n')
    assert read_table(lines, "--data") == ROWS
    for text in ("[1]\n", "{\n"):
        lines.write_text(text)
        with pytest.raises(UserError, match=r"t\.jsonl: got .*(no JSON object|Expecting)"):
            read_table(lines, "--data")


def test_another_encoding_is_named_with_a_way_out(tmp_path: Path) -> None:
    table = tmp_path / "my table.csv"
    table.write_bytes("a,b\n1,é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"utf-8(?s:.*)iconv -f latin1 -t utf-8 '.*my table.csv'"):
        read_table(table, "--data")


def test_a_name_is_no_formula_in_a_spreadsheet_and_comes_back(tmp_path: Path) -> None:
    names = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "'quoted'", "a=b", "", "Ann"]
    numbers = ["-0.25", "+1", "1e-5", "-inf", "7"]
    shown = plain([*names, *numbers])
    assert shown[:4] == [f"'{name}" for name in names[:4]]
    assert shown[4:] == [*names[4:], *numbers]
    assert plain(["\t=1", "\r=1", "\t1", -3, Path("x/=1")]) == [
        "'\t=1",
        "'\r=1",
        "'\t1",
        "-3",
        "x/=1",
    ]
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["name"], *([text] for text in shown if text)])
    read = [row["name"] for _, row in read_table(table, "--data")]
    assert read == [name for name in [*names, *numbers] if name]
