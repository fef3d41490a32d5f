"""Rows in, rows out: the input's columns, then `prediction`, one `probability_LABEL` per class, and what else was asked for.

    check_input     a first pass over the file: everything that can be wrong with it, before any base is loaded
    predict_file    windows of rows → tokens → packed passes → lines in the input's order (`katei.ship.partial`)

Memory does not grow with the file. A row's answer depends on its window alone, and windows are counted from the file's first row:
so a killed and continued call computes the same bits.

Dimensions: E rows · C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from katei import __version__
from katei.base.packed import Base, check_ids
from katei.core.errors import BaseError, DataError
from katei.data import open_source
from katei.data.lines import reading, user_path
from katei.data.tables import Row, Source, as_text, checked_text, text_column
from katei.data.writing import check_tsv_fields, header, in_batches, line_writer, write_parquet
from katei.engine.lockstep import score_rows
from katei.methods.contract import Stack
from katei.methods.saved import AdapterNote
from katei.ship.answers import Answers
from katei.ship.partial import SAVE_SECONDS, Partial, resumed

FORMATS = (".tsv", ".csv", ".jsonl", ".parquet")
WINDOW = 512
"""Rows that are tokenized and packed together. A full window goes through by length, since rows of one length make the fewest
attention calls; a shorter one (a small file, a file's end) in its own order."""
PARQUET_GROUP = 32_768
"""Rows of a row group that is written."""

Tick = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


def predict_texts(
    base: Base, stack: Stack, note: AdapterNote, texts: Sequence[str], *, token_budget: int = 1024
) -> NDArray[np.float64]:
    """Class probabilities of each text, (texts, C), in order."""
    result = np.empty((len(texts), stack.classes))
    for start in range(0, len(texts), WINDOW):
        ids = token_ids(base, texts[start : start + WINDOW], note.max_length)
        result[start : start + WINDOW] = _score_window(base, stack, ids, token_budget)
    return result


def token_ids(base: Base, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of many texts in one call. Raises BaseError for a token that the base has no embedding for."""
    short = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
    ids: list[list[int]] = base.tokenizer(list(texts), **short)["input_ids"]
    for row in ids:
        if max(row, default=0) >= base.vocabulary:
            check_ids(row, base.vocabulary, base.tokenizer)
    return ids


def _score_window(base: Base, stack: Stack, ids: Sequence[Sequence[int]], token_budget: int) -> NDArray[np.float64]:
    order = list(range(len(ids)))
    if len(ids) == WINDOW:
        order.sort(key=lambda i: len(ids[i]))
    result = np.empty((len(ids), stack.classes))
    result[order] = score_rows(base, [stack], [(0, 0, ids[i]) for i in order], token_budget=token_budget)
    return result


# -------------------------------------------------------------------- a file


@dataclass(frozen=True)
class Job:
    """A checked file, and where its answers go."""

    source: Source
    text: int
    """Which column holds the texts."""
    rows: int
    sha256: str
    stamp: tuple[int, int]
    """Size and time of the file when it was checked."""
    out: Path


def default_out(file: Path) -> Path:
    """poems.tsv → poems.predictions.tsv"""
    return file.with_name(f"{file.stem}.predictions{file.suffix}")


def check_input(file: Path, out: Path, note: AdapterNote, text: str | None, answers: Answers) -> Job:
    """Read and check every row, in constant memory, before any base is loaded."""
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
    path = user_path(file)
    with reading(path):
        stamp = _stamp(path) if path.is_file() else (0, 0)
        source = open_source(path)
    column = text_column(source.columns, text=text, usual=note.text_column, file=source.file)
    check_columns(source, answers, file)
    breaks = out.suffix.lower() == ".tsv" and path.suffix.lower() != ".tsv"  # a .tsv's own fields hold no breaks
    index = source.columns.index(column)
    rows = 0
    for line, values in source.rows():
        checked_text(values[index], column, source.file, line)
        if breaks:
            check_tsv_fields([as_text(value) for value in values], source.file, line, out)
        rows += 1
    if out.suffix.lower() == ".tsv":
        check_tsv_fields([*source.columns, *answers.columns, *answers.labels], out, 1, out)
    with reading(path), path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Job(source, index, rows, digest, stamp, out)


def check_columns(source: Source, answers: Answers, file: Path | str) -> None:
    clash = [name for name in answers.columns if name in source.columns]
    if clash:
        raise DataError(
            f"already has a column named '{clash[0]}'", file=file, hint="rename or drop it: predict writes that column"
        )


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def predict_file(
    base: Base,
    stack: Stack,
    note: AdapterNote,
    job: Job,
    answers: Answers,
    *,
    adapter: str,
    token_budget: int = 1024,
    save_seconds: float = SAVE_SECONDS,
    tick: Tick = lambda done, rows: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, int]:
    """Answer every row of the job into its `out`, which appears whole or not at all. Returns `rows` and `abstained`.

    `adapter` is the digest of the adapter's files: with the input's and the settings it says whose answers an interrupted call left.
    """
    kind = job.out.suffix.lower()
    settings = asdict(answers) | {"text": job.text, "format": kind, "budget": token_budget, "window": WINDOW}
    identity = {
        "input": job.sha256,
        "adapter": adapter,
        "base": f"{base.fingerprint} {base.dtype} {base.device.type}",
        "setting": json.dumps(settings, ensure_ascii=False),
        "version of katei": __version__,
    }
    columns = [*job.source.columns, *answers.columns]
    with resumed(job.out, identity, save_seconds=save_seconds, say=say) as partial:
        # a parquet file cannot be appended to: its rows wait as JSON
        write = (
            (lambda row: json.dumps(row, ensure_ascii=False) + "\n")
            if kind == ".parquet"
            else line_writer(kind, columns)
        )
        if not partial.done.size and kind != ".parquet":
            partial.write(header(kind, columns))
        rows = islice(job.source.rows(), partial.done.rows, None)
        tick(partial.done.rows, job.rows)
        for window in in_batches(rows, WINDOW):
            answered = answer_window(base, stack, note, job.source.file, job.text, window, answers, token_budget)
            partial.write("".join(map(write, answered)))
            partial.step(len(window), sum(not row[len(job.source.columns)] for row in answered))
            tick(partial.done.rows, job.rows)
        path = Path(job.source.file)
        if partial.done.rows != job.rows or _stamp(path) != job.stamp:
            raise DataError("changed while it was read", file=path, hint="the same command, when it is whole")
        _finish(partial, job.out, kind, columns)
        return {"rows": partial.done.rows, "abstained": partial.done.abstained}


def answer_window(
    base: Base,
    stack: Stack,
    note: AdapterNote,
    file: str,
    text: int,
    window: Sequence[Row],
    answers: Answers,
    token_budget: int = 1024,
) -> list[list[str]]:
    """The fields of each row with its answer behind them."""
    texts = [str(values[text]) for _, values in window]
    try:
        ids = token_ids(base, texts, note.max_length)
    except BaseError:
        for line, values in window:  # again one by one, to name the row
            try:
                base.tokenize(str(values[text]), note.max_length)
            except BaseError as error:
                raise DataError(error.message, file=file, row=line, hint=error.hint) from None
        raise
    probability_EC = _score_window(base, stack, ids, token_budget)
    return [
        [*map(as_text, values), *answer]
        for (_, values), answer in zip(window, answers.rows(probability_EC), strict=True)
    ]


def _finish(partial: Partial, out: Path, kind: str, columns: Sequence[str]) -> None:
    rows = partial.folder / "rows"
    if kind == ".parquet":
        if partial.saved:
            partial.save()  # so that a kill while the table is written costs no row
        partial.flush()
        with rows.open(encoding="utf-8", newline="\n") as lines:
            written: Iterator[list[str]] = map(json.loads, lines)
            write_parquet(out, columns, written, rows_per_group=PARQUET_GROUP)
        return
    partial.flush()
    rows.chmod(0o644)
    rows.replace(out)
