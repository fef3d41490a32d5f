"""Rows in, rows out: the input's columns, then `prediction` and one `probability_LABEL` per class."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from katei.base.packed import Base
from katei.core.errors import DataError
from katei.core.files import write_atomic, write_text
from katei.data import Table, read_table
from katei.engine.lockstep import score_rows
from katei.methods.contract import Stack
from katei.methods.saved import AdapterNote

FORMATS = (".tsv", ".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Prediction:
    label: str
    probabilities: dict[str, float]


def predict_texts(base: Base, stack: Stack, note: AdapterNote, texts: Sequence[str], *, token_budget: int = 2048) -> NDArray[np.float64]:
    """Class probabilities of each text, (texts, C), in order."""
    rows = [(0, 0, base.tokenize(text, note.max_length)) for text in texts]
    return score_rows(base, [stack], rows, token_budget=token_budget)


def text_column(table: Table, wanted: str | None, note: AdapterNote, file: Path) -> str:
    """The column to read: the one named, the one the adapter was trained on, or the only one."""
    if wanted is not None and wanted not in table.columns:
        raise DataError(f"no column named '{wanted}'", file=file, hint=f"--text one of: {', '.join(table.columns)}")
    if wanted is not None:
        return wanted
    if note.text_column in table.columns:
        return note.text_column
    if len(table.columns) == 1:
        return table.columns[0]
    raise DataError(
        f"no column named '{note.text_column}', the one this adapter was trained on", file=file, hint=f"--text one of: {', '.join(table.columns)}"
    )


def default_out(file: Path) -> Path:
    """poems.tsv → poems.predictions.tsv"""
    return file.with_name(f"{file.stem}.predictions{file.suffix}")


def check_input(file: Path, out: Path, note: AdapterNote, text: str | None) -> tuple[Table, str]:
    """Read and check the rows before any base is loaded. Returns the table and the name of its text column."""
    if out.suffix.lower() not in FORMATS:
        raise DataError(f"cannot write '{out.suffix}'", file=out, hint=f"--out a file ending in one of: {', '.join(FORMATS)}")
    if out.exists() and out.resolve() == file.resolve():
        raise DataError("would be overwritten by its own predictions", file=file, hint="--out another file")
    table = read_table(file)
    column = text_column(table, text, note, file)
    clash = [name for name in added_columns(note) if name in table.columns]
    if clash:
        raise DataError(f"already has a column named '{clash[0]}'", file=file, hint="rename or drop it: predict writes that column")
    for line, value in zip(table.lines, table.column(column), strict=True):
        if not value.strip():
            raise DataError("the text is empty", file=file, row=line, hint="give it a text or take the row out")
    return table, column


def added_columns(note: AdapterNote) -> list[str]:
    return ["prediction", *(f"probability_{label}" for label in note.labels)]


def predict_file(
    base: Base, stack: Stack, note: AdapterNote, file: Path, out: Path, *, text: str | None = None, token_budget: int = 2048
) -> int:
    """Classify every row of `file` into `out` (written whole or not at all). Returns the number of rows."""
    table, column = check_input(file, out, note, text)
    probability_EC = predict_texts(base, stack, note, table.column(column), token_budget=token_budget)
    rows = [[*values, note.labels[int(p_C.argmax())], *p_C.tolist()] for values, p_C in zip(table.rows, probability_EC, strict=True)]
    write_rows(out, [*table.columns, *added_columns(note)], rows)
    return len(rows)


def write_rows(out: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table in the format its name ends in, as `katei.data.read_table` reads it back."""
    kind = out.suffix.lower()
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)})
        write_atomic(out, lambda temporary: pq.write_table(table, temporary))
        return
    if kind == ".jsonl":
        lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)
        write_text(out, "".join(f"{line}\n" for line in lines))
        return
    buffer = io.StringIO()
    if kind == ".csv":
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    else:
        for number, row in enumerate([columns, *rows]):
            fields = [_tsv_field(value, out, number + 1) for value in row]
            buffer.write("\t".join(fields) + "\n")
    write_text(out, buffer.getvalue())


def _tsv_field(value: object, out: Path, row: int) -> str:
    text = str(value)
    if any(c in text for c in "\t\n\r"):
        raise DataError("a text holds a tab or a line break, which TSV has no way to write", file=out, row=row, hint="--out a .jsonl or .csv file")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return '"' + text.replace('"', '""') + '"'
    return text
