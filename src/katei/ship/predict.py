"""Rows in, rows out: the input's columns, then `prediction` and one `probability_LABEL` per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from katei.base.packed import Base
from katei.core.errors import DataError
from katei.data import Table, read_table, write_table
from katei.engine.lockstep import score_rows
from katei.methods.contract import Stack
from katei.methods.saved import AdapterNote

FORMATS = (".tsv", ".csv", ".jsonl", ".parquet")


def predict_texts(
    base: Base, stack: Stack, note: AdapterNote, texts: Sequence[str], *, token_budget: int = 1024
) -> NDArray[np.float64]:
    """Class probabilities of each text, (texts, C), in order."""
    rows = [(0, 0, base.tokenize(text, note.max_length)) for text in texts]
    return score_rows(base, [stack], rows, token_budget=token_budget)


def default_out(file: Path) -> Path:
    """poems.tsv → poems.predictions.tsv"""
    return file.with_name(f"{file.stem}.predictions{file.suffix}")


def check_input(file: Path, out: Path, note: AdapterNote, text: str | None) -> Table:
    """Read and check the rows before any base is loaded."""
    if out.suffix.lower() not in FORMATS:
        raise DataError(
            f"cannot write '{out.suffix}'", file=out, hint=f"--out a file ending in one of: {', '.join(FORMATS)}"
        )
    if out.is_dir():
        raise DataError(
            "is a folder, where a file is to be written", file=out, hint=f"--out {out / default_out(file).name}"
        )
    if out.parent.exists() and not out.parent.is_dir():
        raise DataError(f"cannot be written, since {out.parent} is a file", file=out, hint="--out another path")
    if out.exists() and out.resolve() == file.resolve():
        raise DataError("would be overwritten by its own predictions", file=file, hint="--out another file")
    table = read_table(file, text=text, usual=note.text_column)
    clash = [name for name in added_columns(note) if name in table.columns]
    if clash:
        raise DataError(
            f"already has a column named '{clash[0]}'", file=file, hint="rename or drop it: predict writes that column"
        )
    return table


def added_columns(note: AdapterNote) -> list[str]:
    return ["prediction", *(f"probability_{label}" for label in note.labels)]


def predict_table(
    base: Base, stack: Stack, note: AdapterNote, table: Table, out: Path, *, token_budget: int = 1024
) -> int:
    """Classify every row of `table` into `out` (written whole or not at all). Returns the number of rows."""
    probability_EC = predict_texts(base, stack, note, table.texts, token_budget=token_budget)
    rows = [
        [*values, note.labels[int(p_C.argmax())], *(repr(float(p)) for p in p_C)]
        for values, p_C in zip(table.rows, probability_EC, strict=True)
    ]
    write_table(out, [*table.columns, *added_columns(note)], rows)
    return len(rows)
