"""Tables that users bring: CSV, TSV and the like with a header, JSON lines, or Parquet.

What we write for people is `plain`: a spreadsheet would run a name such as `=1+1` as a formula.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mgc_dist.errors import UserError
from mgc_dist.files import replacing

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = ".parquet"

Value = str | int | float | None
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the start of a formula (OWASP, CSV Injection)."""

Row = tuple[int, dict[str, str]]


def plain(fields: Iterable[object]) -> list[str]:
    """Fields of a row for a spreadsheet: what it would take for a formula has a `'` in front.

    `read_table` takes that away again. Numbers stay as they are.
    """
    return [f"'{text}" if _is_formula(text) else text for text in map(str, fields)]


def _is_formula(text: str) -> bool:
    if not text.startswith(_FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return text[0] not in "-+"  # a tab before a number


def read_text(table: Path, flag: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with the mark that spreadsheets write.

    Raises:
        UserError: unreadable, or in another encoding.
    """
    try:
        content = table.read_bytes()
        encoding = next(
            (name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8"
        )
        return content.decode(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{flag} {table}",
            got=str(error),
            expected="a readable table in UTF-8",
            cure=f"iconv -f latin1 -t utf-8 '{table}' > utf8.csv  converts one in Latin-1",
        ) from error


def read_table(table: Path, flag: str) -> list[Row]:
    """Line numbers and rows of a table with a header, of JSON lines, or of Parquet.

    A header with tabs makes it a TSV; else its delimiter is the more frequent of `,` and `;`.

    Raises:
        UserError: unreadable, in another encoding, a column twice, or a row that does not fit
            the header.
    """
    if table.suffix == _PARQUET:
        found = enumerate(read_columns(table, flag), start=1)
        return [(n, {k: _as_text(v) for k, v in row.items()}) for n, row in found]
    text = read_text(table, flag)
    try:
        return _json_rows(text) if table.suffix in _JSON_LINES else _rows(text)
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{flag} {table}",
            got=str(error),
            expected="a readable CSV or TSV table, JSON lines, or Parquet",
            cure="save it again with a header line, quoting fields that hold the delimiter",
        ) from error


def _rows(text: str) -> list[Row]:
    first = text.partition("\n")[0]
    delimiter = "\t" if "\t" in first else max(",;", key=first.count)
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [name.strip() for name in lines.fieldnames or ()]
    if len(set(header)) < len(header):
        raise ValueError(f"columns {', '.join(header)}, one of them twice")
    rows = []
    for row in lines:
        if None in row or None in row.values():
            raise ValueError(f"line {lines.line_num} has not as many fields as the header")
        rows.append((lines.line_num, {key.strip(): _typed(value) for key, value in row.items()}))
    return rows


def _typed(value: str) -> str:
    """A field as it was before `plain`."""
    text = value.strip()
    return text[1:].strip() if text.startswith("'") and _is_formula(text[1:]) else text


def _json_rows(text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            found = {k: _as_text(v) for k, v in row.items()}
            rows.append((number, found))
    columns = {column for _, row in rows for column in row}
    return [(number, dict.fromkeys(sorted(columns), "") | row) for number, row in rows]


def _as_text(value: object) -> str:
    return "" if value is None else str(value).strip()


def read_columns(table: Path, flag: str) -> list[dict[str, Value]]:
    """The rows of a Parquet file, each value of its type.

    Raises:
        UserError: unreadable.
    """
    import pyarrow  # here, not above: training ranks, which come past here, need no pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Value]] = pyarrow.parquet.read_table(table).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{flag} {table}",
            got=str(error),
            expected="a readable Parquet file",
            cure="write it again, or save it as CSV",
        ) from error
    return rows


def write_columns(table: Path, rows: Sequence[Mapping[str, Value]]) -> None:
    """Write rows of one form as a Parquet file, under a temporary name until it is whole."""
    import pyarrow
    import pyarrow.parquet

    with replacing(table) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
