"""One file → its columns, with the line each row stands on; whole (`Records`), or row by row in constant memory (`Source`).

TSV, CSV and JSONL have readers of our own, since every error names its line, and since of a TSV a stray quote must
never swallow the next line: no library reads it so. A TSV field that begins and ends with `"` and doubles those inside
is unquoted as CSV does; any other quote is text; a row is one line. CSV is standard (Python's strict reader: quoted
fields may hold commas and line breaks, an unterminated quote is an error). JSONL has one object a line. Parquet is
pyarrow's. Text files are UTF-8, with or without BOM, lines end in LF or CRLF; blank lines at the end are ignored.
"""

from __future__ import annotations

import csv
import json
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from katei.core.errors import DataError
from katei.data.columns import choose_text_column, one_column_hint
from katei.data.lines import (
    carriage_return,
    empty_file,
    lines_from,
    lines_of,
    not_found,
    reading,
    stream_lines,
    to_type,
    user_path,
)

Row = tuple[int, Sequence[object]]
"""A row's line in the file (the header is line 1; of parquet the row), and its values."""


@dataclass(frozen=True)
class Records:
    """The columns of one table, each read when asked for."""

    file: str
    columns: tuple[str, ...]
    lines: Sequence[int]  # 1-based line of the file (the header is line 1); of parquet and hub data the row
    column: Callable[[str], Sequence[object]]  # strings from TSV and CSV, else what the file holds


@dataclass(frozen=True)
class Source:
    """One table, read from its beginning as often as asked, a row at a time."""

    file: str
    columns: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]  # raises DataError at the row that is wrong; values as in `Records`


@dataclass(frozen=True)
class Table:
    """A table as text, for `predict`: every column of the input, and which one to read."""

    file: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]
    text_column: str

    @property
    def texts(self) -> tuple[str, ...]:
        index = self.columns.index(self.text_column)
        return tuple(row[index] for row in self.rows)


def read_table(file: str | Path, *, text: str | None = None, usual: str | None = None) -> Table:
    """A .tsv, .csv, .jsonl or .parquet file with a text column (`text`; or `usual` if there; or inferred), labels or not."""
    records = read_records(user_path(file))
    column = text_column(records.columns, text=text, usual=usual, file=records.file)
    texts_of(records, column)
    rows = tuple(zip(*([as_text(v) for v in records.column(name)] for name in records.columns), strict=True))
    return Table(records.file, records.columns, rows, tuple(records.lines), column)


def text_column(columns: Sequence[str], *, text: str | None, usual: str | None, file: str) -> str:
    """The column to read: `text`, `usual` if there is one of that name, or inferred."""
    return choose_text_column(columns, text=usual if text is None and usual in columns else text, file=file)


def read_records(path: Path) -> Records:
    """The columns of one file, or a DataError saying what is wrong, where, and what to do."""
    with reading(path):
        return READERS[_readable(path)](path)


def open_source(path: Path) -> Source:
    """The rows of one file, one by one; the columns are known at once (of JSONL, after a first pass over it)."""
    with reading(path):
        return SOURCES[_readable(path)](path)


def pipe_source(file: IO[bytes], *, table: bool) -> Source:
    """The rows of a pipe, which can be read once: a text a line, or with `table` a .tsv with a header. Waits for that."""
    name = Path("stdin")
    lines = lines_from(file, name)
    if not table:
        return Source(str(name), ("text",), lambda: ((n, [line.removesuffix("\r")]) for n, line in enumerate(lines, 1)))
    rows = _tsv_rows(name, lines)
    return Source(str(name), tuple(str(column) for column in next(rows)[1]), lambda: rows)


def _readable(path: Path) -> str:
    """The kind of a file that is there."""
    if path.is_dir():
        raise DataError("a folder, where a file is expected", file=path, hint=_inside(path))
    if not path.exists():
        raise not_found(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError("not a regular file", file=path, hint="save it as a file first")
    return kind_of(path)


# --- TSV and CSV

_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def unquote_tsv(field: str) -> str:
    return field[1:-1].replace('""', '"') if field[:1] == '"' and _QUOTED.fullmatch(field) else field


def quote_tsv(field: str) -> str:
    """The field as `unquote_tsv` gives it back: quoted only where it would be taken for quoted."""
    return '"' + field.replace('"', '""') + '"' if field[:1] == '"' and _QUOTED.fullmatch(field) else field


def _tsv_rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    def rows() -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(lines, 1):
            line = line.removesuffix("\r")
            if "\r" in line:
                raise carriage_return(path, number)
            if '"' in line:
                yield number, [unquote_tsv(field) for field in line.split("\t")]
            else:
                yield number, line.split("\t") if line.strip() else [line]

    more = "a tab inside a field? Replace it by a space"
    fewer = "a tab is missing, or a text goes over a line break: of a .tsv each row is one line; .csv and .jsonl can hold line breaks"
    return _delimited(path, rows(), more, fewer)


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    def rows() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader((line + "\n" for line in lines), strict=True)
        start = 1
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise _csv_error(path, start, str(error)) from None
            if row is None:
                return
            yield start, row
            start = reader.line_num + 1

    quote = 'put a field that holds a comma between quotes, and double the quotes inside: "a ""b"", c"'
    return _delimited(path, rows(), quote, "a comma is missing, or a quote is in the wrong place")


def _csv_error(path: Path, row: int, error: str) -> DataError:
    if "unexpected end" in error or "field limit" in error:
        hint = 'close the quote; a quote that is part of a text is doubled: "he said ""no"""'
        return DataError("a quote is opened in this row and not closed", file=path, row=row, hint=hint)
    if "expected after" in error:
        hint = 'a quote that is part of a text is doubled: "he said ""no""", and nothing follows a closing one'
        return DataError("text follows a closing quote in the row that begins here", file=path, row=row, hint=hint)
    return carriage_return(path, row)


def _delimited(path: Path, rows: Iterator[tuple[int, list[str]]], more: str, fewer: str) -> Iterator[Row]:
    """The header first, then the rows under it, each with as many fields."""
    first, header = next(rows)
    columns = tuple(name.strip() for name in header)
    if not any(columns):
        hint = "begin with a line such as text⇥label"
        raise DataError("the first line, which names the columns, is blank", file=path, row=first, hint=hint)
    _check_columns(path, columns, first)
    yield first, columns
    number = first
    for number, row in rows:
        if len(row) != len(columns):
            if not row or (len(row) == 1 and not row[0].strip()):
                raise DataError("a blank line between rows", file=path, row=number, hint="delete it, or fill it in")
            hint = one_column_hint(columns) if len(columns) == 1 else more if len(row) > len(columns) else fewer
            found = f"{len(row)} field{'s' * (len(row) != 1)} where the header has {len(columns)}"
            raise DataError(f"{found} ({', '.join(columns)})", file=path, row=number, hint=hint)
        yield number, row
    if number == first:
        raise DataError("a header and no row under it", file=path, hint="add rows, one text with its label a line")


Delimited = Callable[[Path, Iterable[str]], Iterator[Row]]


def _read_delimited(path: Path, split: Delimited) -> Records:
    rows = split(path, lines_of(path))
    columns = tuple(str(name) for name in next(rows)[1])
    lines, kept = [], []
    for number, row in rows:
        lines.append(number)
        kept.append(row)
    values = {name: tuple(row[i] for row in kept) for i, name in enumerate(columns)}
    return Records(str(path), columns, lines, values.__getitem__)


def _stream_delimited(path: Path, split: Delimited) -> Source:
    def rows() -> Iterator[Row]:
        with reading(path):
            found = split(path, stream_lines(path))
            next(found)
            yield from found

    columns = tuple(str(name) for name in next(split(path, stream_lines(path)))[1])
    return Source(str(path), columns, rows)


def _check_columns(path: Path, columns: Sequence[str], row: int | None) -> None:
    twice = sorted({c for c in columns if columns.count(c) > 1})
    if twice:
        what = f"two columns have the name '{twice[0]}'" if twice[0] else "two columns have no name"
        raise DataError(what, file=path, row=row, hint="rename one of them in the header")


# --- JSONL and parquet


def _objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(lines, 1):
        try:
            yield number, _object(line)
        except (ValueError, RecursionError) as error:  # a JSONDecodeError is a ValueError
            what = str(error)
            if not line.strip():
                what = "a blank line between rows"
            elif isinstance(error, json.JSONDecodeError):
                what = f"not JSON: {error.msg}, at character {error.colno}"
            hint = 'each line is one whole object, such as {"text": "…", "label": 1}'
            if number == 1 and line.lstrip()[:1] in ("[", "{"):  # a list, or an object over several lines
                hint += "; a JSON file becomes one with jq -c '.[]' FILE > NEW.jsonl"
            raise DataError(what, file=path, row=number, hint=to_type(hint, path)) from None


def _read_jsonl(path: Path) -> Records:
    rows = [row for _, row in _objects(path, lines_of(path))]
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Records(str(path), columns, range(1, len(rows) + 1), lambda name: [row.get(name) for row in rows])


def _stream_jsonl(path: Path) -> Source:
    columns: dict[str, None] = {}
    for _, row in _objects(path, stream_lines(path)):
        columns |= dict.fromkeys(row)

    def rows() -> Iterator[Row]:
        with reading(path):
            for number, row in _objects(path, stream_lines(path)):
                yield number, [row.get(name) for name in columns]

    return Source(str(path), tuple(columns), rows)


def _object(line: str) -> dict[str, object]:
    value = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
    if not isinstance(value, dict):
        raise ValueError(f"not an object, but a {_type_name(value)}")
    if "\\ud" in line.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair (\\ud8…): no character, so no text") from None
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value: dict[str, object] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key '{key}' is there twice")
        value[key] = item
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _read_parquet(path: Path) -> Records:
    file, columns, rows = _open_parquet(path)

    def column(name: str) -> Sequence[object]:
        with _parquet_errors(path, name):
            values: list[object] = file.read(columns=[name]).column(name).to_pylist()
        if len(values) != rows:
            raise _bad_parquet(path, ValueError(f"{rows} rows announced, {len(values)} in '{name}'"))
        return values

    return Records(str(path), columns, range(1, rows + 1), column)


def _stream_parquet(path: Path) -> Source:
    _, columns, announced = _open_parquet(path)

    def rows() -> Iterator[Row]:
        file, _, _ = _open_parquet(path)
        number = 0
        with _parquet_errors(path, ""):
            batches = file.iter_batches(PARQUET_ROWS)
        while True:
            with _parquet_errors(path, ""):
                batch = next(batches, None)
            if batch is None:
                break
            values = []
            for name in columns:
                with _parquet_errors(path, name):
                    values.append(batch.column(name).to_pylist())
            for row in zip(*values, strict=True):
                number += 1
                yield number, row
        if number != announced:
            raise _bad_parquet(path, ValueError(f"{announced} rows announced, {number} there"))

    return Source(str(path), columns, rows)


PARQUET_ROWS = 1024
"""Rows that are in memory at once."""


def _open_parquet(path: Path) -> tuple[Any, tuple[str, ...], int]:
    """The file, its columns and the number of its rows, which is not 0."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # pages are read as they are needed: a file of one huge row group is not held
        file = pq.ParquetFile(path, buffer_size=1 << 18, pre_buffer=False)
        columns, rows = tuple(file.schema_arrow.names), int(file.metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        if path.stat().st_size == 0:
            raise empty_file(path) from None
        raise _bad_parquet(path, error) from None
    _check_columns(path, columns, None)
    if not rows:
        hint = "add rows, each a text with its label"
        raise DataError(f"no rows (columns: {', '.join(columns)})", file=path, hint=hint)
    return file, columns, rows


@contextmanager
def _parquet_errors(path: Path, column: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError:
        hint = "write the file again from UTF-8 strings"
        raise DataError(f"a string in '{column}' is not UTF-8", file=path, hint=hint) from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _bad_parquet(path, error) from None


def _bad_parquet(path: Path, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    hint = "write it again, or give the table as .tsv, .csv or .jsonl"
    return DataError(f"cannot be read as parquet: {reason}", file=path, hint=hint)


READERS: dict[str, Callable[[Path], Records]] = {
    ".tsv": lambda path: _read_delimited(path, _tsv_rows),
    ".csv": lambda path: _read_delimited(path, _csv_rows),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
SOURCES: dict[str, Callable[[Path], Source]] = {
    ".tsv": lambda path: _stream_delimited(path, _tsv_rows),
    ".csv": lambda path: _stream_delimited(path, _csv_rows),
    ".jsonl": _stream_jsonl,
    ".parquet": _stream_parquet,
}

_HINT_OF_KIND = {
    ".json": "one JSON object a line, named .jsonl; of a list, jq -c '.[]' FILE > NEW.jsonl makes it",
    ".ndjson": "rename it to .jsonl",
    ".xlsx": "save the sheet as CSV UTF-8 (.csv)",
    ".xls": "save the sheet as CSV UTF-8 (.csv)",
    ".gz": "unpack it first: gunzip FILE",
    ".zip": "unpack it first: unzip FILE",
    ".txt": "rename it to .tsv (columns separated by tabs, named in the first line) or .csv (by commas)",
}


def kind_of(path: Path) -> str:
    """The ending that says the format, or a DataError for one we cannot read."""
    kind = path.suffix.lower()
    if kind in READERS:
        return kind
    what = f"the ending '{path.suffix}' is not known" if path.suffix else "the name has no ending that says the format"
    hint = _HINT_OF_KIND.get(kind, "give a .tsv, .csv, .jsonl or .parquet file")
    raise DataError(what, file=path, hint=to_type(hint, path))


# --- values


def texts_of(records: Records, column: str) -> tuple[str, ...]:
    """The texts of a column, each a string with something in it."""
    values = zip(records.lines, records.column(column), strict=True)
    return tuple(checked_text(value, column, records.file, line) for line, value in values)


def checked_text(value: object, column: str, file: str, line: int) -> str:
    """The text in `column` of one row, or a DataError that says what it is instead."""
    if isinstance(value, str) and "\0" not in value and not is_blank(value):
        return value
    hint = "fill it in, or delete the row"
    if value is None:
        what = f"no text: '{column}' is missing or null"
    elif not isinstance(value, str):
        what = f"the text in '{column}' is a {_type_name(value)}, not a string"
        hint = "put it between quotes, or choose another column with --text"
    elif is_blank(value):
        what = f"the text in '{column}' is empty"
    else:
        what, hint = f"the text in '{column}' holds a NUL character", "remove it"
    raise DataError(what, file=file, row=line, hint=hint)


def is_blank(text: str) -> bool:
    """Nothing to read: spaces of any kind, control and invisible characters only."""
    return all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in text)


def as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _type_name(value: object) -> str:
    names = {bool: "boolean", int: "number", float: "number", list: "list", dict: "nested object", bytes: "byte string"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _inside(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in READERS)[:8]
    return f"give one of the files in it: {', '.join(names)}" if names else "give a .tsv, .csv, .jsonl or .parquet file"
