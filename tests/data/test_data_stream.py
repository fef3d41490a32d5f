"""Row by row is the same as whole: values, lines, errors; whatever the blocks are; and in constant memory."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.test_data_malformed import BAD, Bad, write_all

from katei.core.errors import DataError
from katei.data import lines, open_source, read_table, tables
from katei.data.tables import as_text, checked_text, read_records

PIECES = [
    "春",
    "a",
    '"',
    '""',
    "\n",
    "\r\n",
    "\t",
    ",",
    "\r",
    " ",
    "\u2028",
    "é🦊",
    '{"a": "b"}\n',
    "x\ty\n",
    "x,y\n",
    "\n\n",
]


def streamed(path: Path) -> tuple[tuple[str, ...], list[tuple[int, tuple[object, ...]]]]:
    source = open_source(path)
    return source.columns, [(line, tuple(values)) for line, values in source.rows()]


def whole(path: Path) -> tuple[tuple[str, ...], list[tuple[int, tuple[object, ...]]]]:
    records = read_records(path)
    values = zip(*(records.column(name) for name in records.columns), strict=True)
    return records.columns, list(zip(records.lines, values, strict=True))


def outcome(read: Any, path: Path) -> tuple[Any, DataError | None]:
    try:
        return read(path), None
    except DataError as error:
        return None, error


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_any_file_in_any_blocks_gives_what_it_gives_whole(
    kind: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK", block)
    rng = random.Random(block)
    path, read, refused = tmp_path / f"a.{kind}", 0, 0
    start = {"tsv": "t\tu\n", "csv": "t,u\n", "jsonl": '{"a": "春", "b": 1}\n'}[kind]
    for _ in range(300):
        content = bytearray((start + "".join(rng.choices(PIECES, k=rng.randrange(9)))).encode())
        if rng.random() < 0.1:
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + content + rng.choice([b"", b"\n", b" \r\n\n"]))
        expected, wrong = outcome(whole, path)
        found, wrong_too = outcome(streamed, path)
        assert found == expected
        if wrong is None:
            read += 1
            assert wrong_too is None
            continue
        refused += 1
        assert wrong_too is not None
        if "not UTF-8" not in wrong.message and "NUL" not in wrong.message:  # read whole, these come first
            assert (wrong_too.message, wrong_too.row) == (wrong.message, wrong.row)
    assert read > 10
    assert refused > 10


def typed(bad: Bad) -> Path:
    return Path(bad.data if bad.data is not None else next(iter(bad.files)))


ROWS_OF_A_FILE = [bad for bad in BAD if "~" not in str(typed(bad)) and typed(bad).suffix in tables.READERS]
"""The others are folders, endings that are not read, and names."""


@pytest.mark.parametrize("bad", ROWS_OF_A_FILE, ids=lambda bad: bad.name.replace(" ", "-"))
def test_what_is_refused_whole_is_refused_row_by_row_and_nothing_else(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path, bad.files)
    path, text = typed(bad), bad.flags.get("text")

    def whole() -> None:
        read_table(path, text=text)

    def row_by_row() -> None:
        source = open_source(path)
        column = tables.text_column(source.columns, text=text, usual=None, file=source.file)
        for line, values in source.rows():
            checked_text(values[source.columns.index(column)], column, source.file, line)

    assert refusal(row_by_row) == refusal(whole)  # None for both where labels are what is wrong: predict reads none


def refusal(read: Callable[[], None]) -> tuple[str, int | None, str | None] | None:
    try:
        read()
    except DataError as error:
        return error.message, error.row, error.hint
    return None


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK", 1 << 14)
    path = tmp_path / f"a.{kind}"
    texts = [f"{i} and some words that are long enough to be seen" for i in range(20_000)]
    match kind:
        case "tsv":
            path.write_text("text\tlabel\n" + "".join(f"{text}\t0\n" for text in texts))
        case "csv":
            path.write_text("text,label\n" + "".join(f'"{text}",0\n' for text in texts))
        case "jsonl":
            path.write_text("".join(f'{{"text": "{text}", "label": 0}}\n' for text in texts))
        case "parquet":
            pq.write_table(pa.table({"text": texts, "label": [0] * len(texts)}), path)
    tracemalloc.start()
    count = sum(as_text(values[0]) == texts[i] for i, (_, values) in enumerate(open_source(path).rows()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == len(texts)
    assert peak < 1 << 20  # whole, they take more than 3 MiB


def test_a_source_is_read_as_often_as_asked(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na\nb\n")
    source = open_source(tmp_path / "a.csv")
    assert list(source.rows()) == list(source.rows()) == [(2, ["a"]), (3, ["b"])]
