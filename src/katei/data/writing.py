"""Rows of text → a .tsv, .csv, .jsonl or .parquet file: what `katei.data.tables` reads back as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from katei.core.errors import DataError
from katei.core.files import write_atomic, write_text
from katei.data.tables import kind_of, quote_tsv

Fields = Sequence[str]
T = TypeVar("T")


def write_table(path: Path, columns: Fields, rows: Iterable[Fields]) -> None:
    """Write all rows at once, in the format the name says."""
    kind = kind_of(path)
    rows = list(rows)
    if kind == ".parquet":
        write_parquet(path, columns, rows, rows_per_group=max(1, len(rows)))
        return
    if kind == ".tsv":
        for number, row in enumerate(rows, 2):
            check_tsv_fields(row, path, number, path)
    line = line_writer(kind, columns)
    write_text(path, header(kind, columns) + "".join(map(line, rows)))


def header(kind: str, columns: Fields) -> str:
    """The lines before the first row."""
    return "" if kind == ".jsonl" else line_writer(kind, columns)(columns)


def line_writer(kind: str, columns: Fields) -> Callable[[Fields], str]:
    """A row's line in a text format, its end included. For a .tsv, `check_tsv_fields` comes first."""
    match kind:
        case ".jsonl":
            dump = json.JSONEncoder(ensure_ascii=False).encode
            return lambda row: dump(dict(zip(columns, row, strict=True))) + "\n"
        case ".csv":
            return lambda row: ",".join(map(_csv_field, row)) + "\n"
        case ".tsv":
            return lambda row: "\t".join(map(quote_tsv, row)) + "\n"
    raise AssertionError(f"'{kind}' is not written line by line")


def check_tsv_fields(fields: Fields, file: str | Path, row: int, out: Path) -> None:
    """Raise DataError, which names `row` of `file`, for a field that the .tsv file `out` has no place for."""
    if has_break(fields):
        hint = f"write --out {out.with_suffix('.csv').name} or {out.with_suffix('.jsonl').name}"
        raise DataError("a tab or line break inside a field has no place in a .tsv", file=file, row=row, hint=hint)


def has_break(fields: Fields) -> bool:
    """Some field holds a tab or a line break, for which a .tsv has no place."""
    return any(_BREAK.search(field) for field in fields)


def write_parquet(path: Path, columns: Fields, rows: Iterable[Fields], *, rows_per_group: int) -> None:
    """Write rows as strings, a row group at a time; a group is in memory at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in columns])

    def tables() -> Iterator[pa.Table]:
        for group in in_batches(rows, rows_per_group):
            arrays = [pa.array([row[i] for row in group], pa.string()) for i in range(len(columns))]
            yield pa.Table.from_arrays(arrays, schema=schema)

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema) as writer:
            for table in tables():
                writer.write_table(table)

    write_atomic(path, write)


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last perhaps shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


_BREAK = re.compile("[\t\n\r]")
_CSV_SPECIAL = re.compile('[,"\r\n]')


def _csv_field(field: str) -> str:
    quoted = not field.strip() or _CSV_SPECIAL.search(field)
    return '"' + field.replace('"', '""') + '"' if quoted else field
