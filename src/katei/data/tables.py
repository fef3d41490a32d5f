"""One file → its columns, with the line each row stands on; and back.

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
from dataclasses import dataclass
from pathlib import Path

from katei.core.errors import DataError
from katei.core.files import write_atomic, write_text
from katei.data.columns import choose_text_column, one_column_hint
from katei.data.lines import carriage_return, empty_file, lines_of, not_found, reading, to_type, user_path


@dataclass(frozen=True)
class Records:
    """The columns of one table, each read when asked for."""

    file: str
    columns: tuple[str, ...]
    lines: Sequence[int]  # 1-based line of the file (the header is line 1); of parquet and hub data the row
    column: Callable[[str], Sequence[object]]  # strings from TSV and CSV, else what the file holds


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
    named = usual if text is None and usual in records.columns else text
    column = choose_text_column(records.columns, text=named, file=records.file)
    texts_of(records, column)
    rows = tuple(zip(*([_as_text(v) for v in records.column(name)] for name in records.columns), strict=True))
    return Table(records.file, records.columns, rows, tuple(records.lines), column)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write what `read_table` reads back as it was, in the format the name says."""
    kind = _kind(path)
    rows = list(rows)
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(columns)})
        write_atomic(path, lambda temporary: pq.write_table(table, temporary))
    elif kind == ".jsonl":
        objects = (dict(zip(columns, row, strict=True)) for row in rows)
        write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects))
    elif kind == ".csv":
        write_text(path, "".join(",".join(_csv_field(f) for f in row) + "\n" for row in [columns, *rows]))
    else:
        for number, row in enumerate(rows, 2):
            if any(c in field for field in row for c in "\t\n\r"):
                hint = f"write --out {path.with_suffix('.csv').name} or {path.with_suffix('.jsonl').name}"
                what = "a tab or line break inside a field has no place in a .tsv"
                raise DataError(what, file=path, row=number, hint=hint)
        write_text(path, "".join("\t".join(quote_tsv(f) for f in row) + "\n" for row in [columns, *rows]))


def read_records(path: Path) -> Records:
    """The columns of one file, or a DataError saying what is wrong, where, and what to do."""
    with reading(path):
        if path.is_dir():
            raise DataError("a folder, where a file is expected", file=path, hint=_inside(path))
        if not path.exists():
            raise not_found(path)
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError("not a regular file", file=path, hint="save it as a file first")
        return READERS[_kind(path)](path)


# --- TSV and CSV

_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def unquote_tsv(field: str) -> str:
    return field[1:-1].replace('""', '"') if _QUOTED.fullmatch(field) else field


def quote_tsv(field: str) -> str:
    """The field as `unquote_tsv` gives it back: quoted only where it would be taken for quoted."""
    return '"' + field.replace('"', '""') + '"' if _QUOTED.fullmatch(field) else field


def _read_tsv(path: Path) -> Records:
    def rows() -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(lines_of(path), 1):
            line = line.removesuffix("\r")
            if "\r" in line:
                raise carriage_return(path, number)
            yield number, [unquote_tsv(field) for field in line.split("\t")] if line.strip() else [line]

    more = "a tab inside a field? Replace it by a space"
    fewer = "a tab is missing, or a text goes over a line break: of a .tsv each row is one line; .csv and .jsonl can hold line breaks"
    return _delimited(path, rows(), more, fewer)


def _read_csv(path: Path) -> Records:
    def rows() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader((line + "\n" for line in lines_of(path)), strict=True)
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


def _csv_field(field: str) -> str:
    return '"' + field.replace('"', '""') + '"' if not field.strip() or any(c in field for c in ',"\r\n') else field


def _delimited(path: Path, rows: Iterator[tuple[int, list[str]]], more: str, fewer: str) -> Records:
    """The header and the rows under it, each with as many fields."""
    first, header = next(rows)
    columns = tuple(name.strip() for name in header)
    if not any(columns):
        hint = "begin with a line such as text⇥label"
        raise DataError("the first line, which names the columns, is blank", file=path, row=first, hint=hint)
    _check_columns(path, columns, first)
    lines: list[int] = []
    kept: list[list[str]] = []
    for number, row in rows:
        if len(row) != len(columns):
            if not row or (len(row) == 1 and not row[0].strip()):
                raise DataError("a blank line between rows", file=path, row=number, hint="delete it, or fill it in")
            hint = one_column_hint(columns) if len(columns) == 1 else more if len(row) > len(columns) else fewer
            found = f"{len(row)} field{'s' * (len(row) != 1)} where the header has {len(columns)}"
            raise DataError(f"{found} ({', '.join(columns)})", file=path, row=number, hint=hint)
        lines.append(number)
        kept.append(row)
    if not kept:
        raise DataError("a header and no row under it", file=path, hint="add rows, one text with its label a line")
    values = {name: tuple(row[i] for row in kept) for i, name in enumerate(columns)}
    return Records(str(path), columns, lines, values.__getitem__)


def _check_columns(path: Path, columns: Sequence[str], row: int | None) -> None:
    twice = sorted({c for c in columns if columns.count(c) > 1})
    if twice:
        what = f"two columns have the name '{twice[0]}'" if twice[0] else "two columns have no name"
        raise DataError(what, file=path, row=row, hint="rename one of them in the header")


# --- JSONL and parquet


def _read_jsonl(path: Path) -> Records:
    rows: list[dict[str, object]] = []
    lines = lines_of(path)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_object(line))
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
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Records(str(path), columns, range(1, len(rows) + 1), lambda name: [row.get(name) for row in rows])


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns, rows = tuple(file.schema_arrow.names), file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        if path.stat().st_size == 0:
            raise empty_file(path) from None
        raise _bad_parquet(path, error) from None
    _check_columns(path, columns, None)
    if not rows:
        hint = "add rows, each a text with its label"
        raise DataError(f"no rows (columns: {', '.join(columns)})", file=path, hint=hint)

    def column(name: str) -> Sequence[object]:
        try:
            values: list[object] = file.read(columns=[name]).column(name).to_pylist()
        except UnicodeDecodeError:
            hint = "write the file again from UTF-8 strings"
            raise DataError(f"a string in '{name}' is not UTF-8", file=path, hint=hint) from None
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise _bad_parquet(path, error) from None
        if len(values) != rows:
            raise _bad_parquet(path, ValueError(f"{rows} rows announced, {len(values)} in '{name}'"))
        return values

    return Records(str(path), columns, range(1, rows + 1), column)


def _bad_parquet(path: Path, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    hint = "write it again, or give the table as .tsv, .csv or .jsonl"
    return DataError(f"cannot be read as parquet: {reason}", file=path, hint=hint)


READERS: dict[str, Callable[[Path], Records]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
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


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind in READERS:
        return kind
    what = f"the ending '{path.suffix}' is not known" if path.suffix else "the name has no ending that says the format"
    hint = _HINT_OF_KIND.get(kind, "give a .tsv, .csv, .jsonl or .parquet file")
    raise DataError(what, file=path, hint=to_type(hint, path))


# --- values


def texts_of(records: Records, column: str) -> tuple[str, ...]:
    """The texts of a column, each a string with something in it."""
    texts: list[str] = []
    for line, value in zip(records.lines, records.column(column), strict=True):
        what, hint = None, "fill it in, or delete the row"
        if value is None:
            what = f"no text: '{column}' is missing or null"
        elif not isinstance(value, str):
            what = f"the text in '{column}' is a {_type_name(value)}, not a string"
            hint = "put it between quotes, or choose another column with --text"
        elif is_blank(value):
            what = f"the text in '{column}' is empty"
        elif "\0" in value:
            what, hint = f"the text in '{column}' holds a NUL character", "remove it"
        if what is not None:
            raise DataError(what, file=records.file, row=line, hint=hint)
        texts.append(str(value))
    return tuple(texts)


def is_blank(text: str) -> bool:
    """Nothing to read: spaces of any kind, control and invisible characters only."""
    return all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in text)


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _type_name(value: object) -> str:
    names = {bool: "boolean", int: "number", float: "number", list: "list", dict: "nested object", bytes: "byte string"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _inside(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in READERS)[:8]
    return f"give one of the files in it: {', '.join(names)}" if names else "give a .tsv, .csv, .jsonl or .parquet file"
