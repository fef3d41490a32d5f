"""A pipe's rows answered as they come: what has arrived by the time a pass begins goes through it, at most a window.

One thread reads, checks and queues rows; the queue is bounded, so a fast writer waits and memory does not grow. Nobody waits for a
window to fill or for the end of the input.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import IO

from katei.base.packed import Base
from katei.core.errors import DataError, RecipeError, nearest
from katei.data.tables import Row, Source, checked_text, pipe_source, text_column
from katei.data.writing import has_break, header, line_writer
from katei.methods.contract import Stack
from katei.methods.saved import AdapterNote
from katei.ship.answers import Answers
from katei.ship.predict import WINDOW, Tick, answer_window, check_columns

FORMATS = ("tsv", "jsonl")


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise RecipeError(f"no format '{format}' on stdout", hint=f"--format {nearest(format, FORMATS)}")


def predict_pipe(
    base: Base,
    stack: Stack,
    note: AdapterNote,
    source: IO[bytes],
    sink: IO[bytes],
    answers: Answers,
    *,
    text: str | None,
    format: str,
    tick: Tick = lambda done, rows: None,
) -> int:
    """Answer every row of `source` on `sink`, flushed window by window; with `text` the rows are a .tsv with that column.

    Raises DataError at a bad row, when all rows before it have been answered. Returns the number of rows.
    """
    rows = pipe_source(source, table=text is not None)
    column = text_column(rows.columns, text=text, usual=None, file=rows.file)
    check_columns(rows, answers, rows.file)
    columns = [*rows.columns, *answers.columns]
    kind = f".{format}"
    if kind == ".tsv" and has_break([*answers.columns, *answers.labels]):
        raise _break(rows.file, None, "a label")
    write = line_writer(kind, columns)
    index = rows.columns.index(column)
    sink.write(header(kind, columns).encode())
    sink.flush()
    done = 0
    for window in _windows(rows, index, column, breaks=kind != ".tsv"):
        answered = answer_window(base, stack, note, rows.file, index, window, answers)
        sink.write("".join(map(write, answered)).encode())
        sink.flush()
        done += len(window)
        tick(done, 0)
    return done


def _windows(rows: Source, index: int, column: str, *, breaks: bool) -> Iterator[list[Row]]:
    """The rows that are there, at most a window of them; what is wrong with one comes after those before it."""
    ready: queue.Queue[Row | BaseException | None] = queue.Queue(4 * WINDOW)

    def read() -> None:
        end: BaseException | None = None
        try:
            for line, values in rows.rows():
                checked_text(values[index], column, rows.file, line)
                if not breaks and has_break([str(value) for value in values]):
                    raise _break(rows.file, line, "a text")
                ready.put((line, values))
        except BaseException as error:  # the thread has nobody to tell but its reader
            end = error
        ready.put(end)

    threading.Thread(target=read, name="katei-reader", daemon=True).start()
    end: list[BaseException | None] = []
    while not end:
        window: list[Row] = []
        item = ready.get()
        while True:
            if item is None or isinstance(item, BaseException):
                end.append(item)
                break
            window.append(item)
            if len(window) == WINDOW:
                break
            try:
                item = ready.get_nowait()
            except queue.Empty:
                break
        if window:
            yield window
    if end[0] is not None:
        raise end[0]


def _break(file: str, row: int | None, what: str) -> DataError:
    message = f"{what} holds a tab or a carriage return, which has no place in TSV"
    return DataError(message, file=file, row=row, hint="--format jsonl")
