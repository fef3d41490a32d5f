"""Bad tables: each a DataError that names the file, the row and what to do, before any model is loaded."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from katei.core.errors import DataError
from katei.data import bundled_poems, load_dataset, load_split, read_table, write_table

GOOD = "text\tlabel\na\t0\nb\t1\nc\t0\n"


def parquet(columns: dict[str, list[Any]]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def not_utf8_parquet() -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    raw = pa.array([b"a", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": raw, "label": [0, 1]}), sink)
    return sink.getvalue()


def jsonl(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@dataclass
class Bad:
    name: str
    files: dict[str, str | bytes]
    row: int | None
    says: str  # in the message
    data: str | None = None  # what the user types; the only file where left out
    file: str | None = None  # the file blamed; `data` where left out
    hint: str = ""  # in the hint
    flags: dict[str, str] = field(default_factory=dict)


A, B = {"text": "a", "label": 0}, {"text": "b", "label": 1}
BAD = [
    # the path
    Bad("no such file", {"train.tsv": GOOD}, None, "no such file", data="trian.tsv", hint="did you mean"),
    Bad("no such folder", {"poems/train.tsv": GOOD}, None, "no such file", data="peoms", hint="poems"),
    Bad("no such parent", {"train.tsv": GOOD}, None, "no such file", data="x/y/z.tsv", hint="no folder"),
    Bad("no home", {"train.tsv": GOOD}, None, "no such file", data="~nobody-has-this-name/z.tsv", hint="no folder"),
    Bad("empty name", {"train.tsv": GOOD}, None, "no data given", data="", file="", hint="train.tsv"),
    Bad("an address", {"train.tsv": GOOD}, None, "an address", data="https://example.org/a.tsv", hint="download"),
    Bad("unknown ending", {"a.xlsx": b"PK\x03\x04"}, None, "'.xlsx' is not known", hint="CSV"),
    Bad("text ending", {"a.txt": GOOD}, None, "'.txt' is not known", hint=".tsv"),
    Bad("no ending", {"a": GOOD}, None, "no ending", hint=".tsv"),
    Bad("JSON, not JSONL", {"a.json": "[]"}, None, "'.json' is not known", hint="jq -c"),
    Bad("not a regular file", {}, None, "not a regular file", data="/dev/null", hint="save"),
    # the folder
    Bad(
        "folder without train", {"d/test.tsv": GOOD}, None, "no train split; there is: test", data="d", hint="train.tsv"
    ),
    Bad(
        "train is a .txt",
        {"d/train.txt": GOOD, "d/test.tsv": GOOD},
        None,
        "no train",
        data="d",
        hint="train.txt is not",
    ),
    Bad("empty folder", {"d/sub/x": ""}, None, "no train, valid or test", data="d", hint="train.tsv"),
    Bad("same split twice", {"d/train.tsv": GOOD, "d/train.csv": GOOD}, None, "two files for the train", data="d"),
    Bad(
        "valid under two names",
        {"d/dev.tsv": GOOD, "d/train.tsv": GOOD, "d/valid.tsv": GOOD},
        None,
        "two files",
        data="d",
    ),
    # the bytes
    Bad("empty", {"a.tsv": ""}, None, "is empty"),
    Bad("only blank lines", {"a.tsv": "\r\n \n\u3000\n"}, None, "is empty"),
    Bad("only a BOM", {"a.jsonl": b"\xef\xbb\xbf"}, None, "is empty"),
    Bad("empty CSV", {"a.csv": ""}, None, "is empty"),
    Bad(
        "not UTF-8: CP932",
        {"a.tsv": "text\tlabel\na\t0\nかな\t1\n".encode("cp932")},
        3,
        "not UTF-8",
        hint="iconv -f CP932",
    ),
    Bad("not UTF-8: EUC-JP", {"a.csv": "text,label\nかな,1\n".encode("euc_jp")}, 2, "not UTF-8", hint="EUC-JP"),
    Bad("not UTF-8: Latin", {"a.jsonl": jsonl(A).encode() + '{"text":"é"}'.encode("latin-1")}, 2, "0xe9", hint="1252"),
    Bad("UTF-16", {"a.tsv": GOOD.encode("utf-16")}, 1, "UTF-16", hint="iconv"),
    Bad("UTF-16 without its mark", {"a.tsv": GOOD.encode("utf-16-le")}, 1, "NUL", hint="UTF-8"),
    Bad("gzip", {"a.tsv": gzip.compress(GOOD.encode())}, 1, "gzip", hint="gunzip"),
    Bad("zip", {"a.csv": b"PK\x03\x04rest"}, 1, "spreadsheet"),
    Bad("parquet named .csv", {"a.csv": parquet({"text": ["a"], "label": [1]})}, 1, "parquet", hint=".parquet"),
    Bad("a web page", {"a.csv": "<!DOCTYPE html>\n<html>"}, 1, "web page", hint="raw"),
    Bad(
        "a pointer of Git LFS",
        {"a.csv": "version https://git-lfs.github.com/spec/v1\noid"},
        1,
        "LFS",
        hint="git lfs pull",
    ),
    Bad("NUL bytes", {"a.tsv": GOOD + "d\0\t1\n"}, 5, "NUL"),
    # the shape
    Bad("header only", {"a.tsv": "text\tlabel\n"}, None, "no row under it"),
    Bad("header only, CSV", {"a.csv": "text,label\r\n\r\n"}, None, "no row under it"),
    Bad(
        "fewer fields", {"a.tsv": GOOD + "a line\nwithout\t1\n"}, 5, "1 field where the header has 2", hint="line break"
    ),
    Bad("more fields", {"a.tsv": GOOD + "a\ttab\t1\n"}, 5, "3 fields where the header has 2", hint="tab"),
    Bad("more fields, CSV", {"a.csv": "text,label\na, b,1\n"}, 2, "3 fields", hint="between quotes"),
    Bad("fewer fields, CSV", {"a.csv": "text,label\na,1\nb\n"}, 3, "1 field where"),
    Bad("blank line between", {"a.tsv": "text\tlabel\na\t0\n\nb\t1\n"}, 3, "blank line"),
    Bad("blank line between, CSV", {"a.csv": "text,label\na,0\n\nb,1\n"}, 3, "blank line"),
    Bad("blank line between, JSONL", {"a.jsonl": jsonl(A, "", B)}, 2, "blank line"),
    Bad("blank first line", {"a.tsv": "\n" + GOOD}, 1, "first line"),
    Bad("two columns of a name", {"a.tsv": "text\ttext\na\t0\n"}, 1, "two columns have the name 'text'"),
    Bad("two columns without a name", {"a.csv": "text,label,,\na,0,,\n"}, 1, "two columns have no name"),
    Bad("one column", {"a.tsv": "text\na\n"}, None, "only one column", hint="tabs"),
    Bad("commas in a .tsv", {"a.tsv": "text,label\na,0\n"}, None, "only one column", hint="name the file .csv"),
    Bad("tabs in a .csv", {"a.csv": GOOD}, None, "only one column", hint="name the file .tsv"),
    Bad("semicolons in a .csv", {"a.csv": "text;label\na;0\n"}, None, "only one column", hint="semicolons"),
    Bad("no header", {"a.tsv": "a\t0\nb\t1\nc\t0\n"}, 1, "looks like a row", hint="names the columns"),
    Bad("CR in a line", {"a.tsv": "text\tlabel\na\rb\t0\n"}, 2, "carriage return", hint="tr "),
    Bad("old Mac lines", {"a.csv": "text,label\ra,0\rb,1\r"}, 1, "carriage return", hint="tr "),
    Bad("a text over two lines of a TSV", {"a.tsv": 'text\tlabel\n"a\nb"\t1\n'}, 2, "1 field", hint=".csv"),
    # quotes of a CSV
    Bad("unterminated quote", {"a.csv": 'text,label\na,0\n"b,1\nc,0\n'}, 3, "not closed", hint="close the quote"),
    Bad("unterminated, much below", {"a.csv": 'text,label\n"b,1\n' + "c,0\n" * 50_000}, 2, "not closed"),
    Bad("text after a closing quote", {"a.csv": 'text,label\n"b,1\n"c",0\n'}, 2, "closing quote", hint="doubled"),
    # JSON
    Bad("not JSON", {"a.jsonl": jsonl(A, "{'text': 'b'}")}, 2, "not JSON", hint="object"),
    Bad("not whole", {"a.jsonl": jsonl(A, '{"text": "b"')}, 2, "not JSON"),
    Bad("a list of objects", {"a.jsonl": '[\n{"text": "a", "label": 1}\n]'}, 1, "not JSON", hint="jq -c"),
    Bad("an indented object", {"a.jsonl": json.dumps(A, indent=1)}, 1, "not JSON", hint="jq -c"),
    Bad("not an object", {"a.jsonl": jsonl(A, '["b", 1]')}, 2, "not an object, but a list"),
    Bad("a null line", {"a.jsonl": jsonl(A, "null")}, 2, "not an object, but a null"),
    Bad("missing text", {"a.jsonl": jsonl(A, {"label": 1})}, 2, "'text' is missing"),
    Bad("null text", {"a.jsonl": jsonl(A, {"text": None, "label": 1})}, 2, "'text' is missing or null"),
    Bad("text is a number", {"a.jsonl": jsonl(A, {"text": 5, "label": 1})}, 2, "a number, not a string", hint="--text"),
    Bad("text is a list", {"a.jsonl": jsonl(A, {"text": ["b"], "label": 1})}, 2, "a list, not a string"),
    Bad("missing label", {"a.jsonl": jsonl(A, {"text": "b"})}, 2, "no label"),
    Bad("null label", {"a.jsonl": jsonl(A, {"text": "b", "label": None})}, 2, "no label"),
    Bad(
        "label is a float",
        {"a.jsonl": jsonl(A, {"text": "b", "label": 1.0})},
        2,
        "a number with a point",
        hint="integers",
    ),
    Bad("label is a boolean", {"a.jsonl": jsonl(A, {"text": "b", "label": True})}, 2, "a boolean"),
    Bad("label is a list", {"a.jsonl": jsonl(A, {"text": "b", "label": [1]})}, 2, "a list"),
    Bad(
        "labels of two kinds",
        {"a.jsonl": jsonl(A, {"text": "b", "label": "1"})},
        2,
        "a string, the one in row 1 an integer",
    ),
    Bad("NaN", {"a.jsonl": jsonl(A, '{"text": "b", "label": NaN}')}, 2, "NaN is not JSON"),
    Bad("Infinity", {"a.jsonl": jsonl(A, '{"text": "b", "label": -Infinity}')}, 2, "-Infinity is not JSON"),
    Bad("a huge number", {"a.jsonl": jsonl(A, '{"text": "b", "label": 1e999}')}, 2, "a number with a point: inf"),
    Bad("too many digits", {"a.jsonl": jsonl(A, f'{{"text": "b", "label": {"9" * 5000}}}')}, 2, "digits"),
    Bad("half a surrogate pair", {"a.jsonl": jsonl(A, '{"text": "b\\ud83d", "label": 1}')}, 2, "surrogate"),
    Bad("NUL in a JSON text", {"a.jsonl": jsonl(A, '{"text": "b\\u0000", "label": 1}')}, 2, "NUL"),
    Bad("NUL in a JSON label", {"a.jsonl": jsonl('{"text": "b", "label": "x\\u0000"}')}, 1, "NUL"),
    Bad("a key twice", {"a.jsonl": jsonl(A, '{"text": "b", "text": "c", "label": 1}')}, 2, "'text' is there twice"),
    Bad("nested without end", {"a.jsonl": jsonl(A, "[" * 200_000)}, 2, ""),
    # parquet
    Bad("not parquet", {"a.parquet": b"PAR1 and then nothing"}, None, "cannot be read as parquet"),
    Bad("cut short", {"a.parquet": parquet({"text": ["a"], "label": [1]})[:-20]}, None, "cannot be read as parquet"),
    Bad("empty parquet file", {"a.parquet": b""}, None, "is empty"),
    Bad("no rows", {"a.parquet": parquet({"text": [], "label": []})}, None, "no rows"),
    Bad(
        "null in parquet",
        {"a.parquet": parquet({"text": ["a", None], "label": [0, 1]})},
        2,
        "'text' is missing or null",
    ),
    Bad(
        "floats in parquet",
        {"a.parquet": parquet({"text": ["a", "b"], "label": [0.0, 1.0]})},
        1,
        "a number with a point",
    ),
    Bad("bytes in parquet", {"a.parquet": parquet({"text": [b"a", b"b"], "label": [0, 1]})}, 1, "byte string"),
    Bad("NaN in parquet", {"a.parquet": parquet({"text": ["a"], "label": [float("nan")]})}, 1, "NaN"),
    Bad("parquet not UTF-8", {"a.parquet": not_utf8_parquet()}, None, "not UTF-8"),
    # columns
    Bad(
        "no such text column",
        {"a.tsv": GOOD},
        None,
        "no column 'txt'",
        flags={"text": "txt"},
        hint="did you mean 'text'",
    ),
    Bad(
        "no such label column", {"a.tsv": GOOD}, None, "no column 'y'", flags={"label": "y"}, hint="known: text, label"
    ),
    Bad("one column as both", {"a.tsv": GOOD}, None, "both text and label", flags={"text": "text", "label": "text"}),
    Bad("three columns", {"a.csv": "id,a,b\n1,x,0\n2,y,1\n"}, None, "which is the text and label", hint="--label"),
    Bad(
        "three columns, label known",
        {"a.csv": "a,b,label\n1,x,0\n2,y,1\n"},
        None,
        "which is the text?",
        hint="'a', 'b'",
    ),
    Bad(
        "test lacks the column",
        {"d/train.tsv": GOOD, "d/test.tsv": GOOD.replace("text", "poem")},
        None,
        "no column 'text', which train has",
        data="d",
        file="d/test.tsv",
    ),
    # texts and labels
    Bad("empty text", {"a.tsv": GOOD + "\t1\n"}, 5, "'text' is empty"),
    Bad("spaces only", {"a.tsv": GOOD + " \u3000\t1\n"}, 5, "'text' is empty"),
    Bad("invisible characters only", {"a.csv": "text,label\na,0\n\u200b\u00a0,1\n"}, 3, "'text' is empty"),
    Bad("quoted nothing", {"a.tsv": GOOD + '""\t1\n'}, 5, "'text' is empty"),
    Bad("empty text after a long field", {"a.csv": 'text,label\n"a\n\nb",0\n"",1\n'}, 5, "'text' is empty"),
    Bad("empty label", {"a.tsv": GOOD + "d\t\n"}, 5, "no label"),
    Bad("label of spaces", {"a.csv": "text,label\na,0\nb, \n"}, 3, "no label"),
    Bad("label is nan", {"a.csv": "text,label\na,0\nb,nan\n"}, 3, "NaN"),
    Bad("one class", {"a.tsv": "text\tlabel\na\t1\nb\t1\n"}, None, "all 2 rows have the label '1'", hint="--label"),
    Bad(
        "a label for each",
        {"a.tsv": "t\tx\n" + "".join(f"a\t{i}\n" for i in range(11))},
        None,
        "of its own",
        hint="--label",
    ),
    Bad(
        "label that train lacks",
        {"d/train.tsv": GOOD, "d/valid.tsv": GOOD + "d\t2\n"},
        5,
        "the label '2' is not in the training rows",
        data="d",
        file="d/valid.tsv",
        hint="known: 0, 1",
    ),
    Bad(
        "bad row of test",
        {"d/train.tsv": GOOD, "d/test.jsonl": jsonl(A, B, {"text": "", "label": 1})},
        3,
        "is empty",
        data="d",
        file="d/test.jsonl",
    ),
]


def write_all(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name.replace(" ", "-"))
def test_malformed_input_is_a_data_error_with_file_row_and_hint(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path, bad.files)
    data = bad.data if bad.data is not None else next(iter(bad.files))
    with pytest.raises(DataError) as caught:
        load_dataset(data, **bad.flags)
    error = caught.value
    assert bad.says in error.message
    assert (error.file or "").replace("~", "") == (bad.file if bad.file is not None else data).replace("~", "")
    assert error.row == bad.row
    assert error.hint
    assert bad.hint in error.hint


def test_the_table_is_as_long_as_promised():
    assert len({bad.name for bad in BAD}) == len(BAD) >= 40


def test_a_folder_is_no_table_for_predict(tmp_path):
    write_all(tmp_path, {"train.tsv": GOOD})
    with pytest.raises(DataError, match="a folder") as caught:
        read_table(tmp_path)
    assert "train.tsv" in (caught.value.hint or "")


def test_what_predict_cannot_read(tmp_path):
    write_all(tmp_path, {"a.tsv": "id\tpoem\n1\ta\n2\t \n", "b.csv": "a,b,c\n1,2,3\n"})
    with pytest.raises(DataError, match="'poem' is empty") as caught:
        read_table(tmp_path / "a.tsv")
    assert caught.value.row == 3
    with pytest.raises(DataError, match="which is the text"):
        read_table(tmp_path / "b.csv")
    with pytest.raises(DataError, match="no column 'd'"):
        read_table(tmp_path / "b.csv", text="d")
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "c.csv")


@pytest.mark.parametrize("refusal", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_what_the_system_refuses(tmp_path, monkeypatch, refusal):
    write_all(tmp_path, {"a.tsv": GOOD})

    def refuse(path: Path) -> bytes:
        raise refusal

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path / "a.tsv")
    assert caught.value.file == str(tmp_path / "a.tsv")
    assert caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_on_a_folder(tmp_path):
    write_all(tmp_path, {"d/train.tsv": GOOD})
    (tmp_path / "d").chmod(0)
    try:
        with pytest.raises(DataError):
            load_dataset(tmp_path / "d")
    finally:
        (tmp_path / "d").chmod(0o755)


def test_a_name_too_long_and_a_name_with_nul(tmp_path):
    for name in ("x" * 5000, "a\0b.tsv"):
        with pytest.raises(DataError):
            load_dataset(name)


def test_links_that_lead_nowhere_or_round(tmp_path):
    (tmp_path / "a.tsv").symlink_to(tmp_path / "gone.tsv")
    (tmp_path / "b.tsv").symlink_to(tmp_path / "b.tsv")
    for name in ("a.tsv", "b.tsv"):
        with pytest.raises(DataError):
            load_dataset(tmp_path / name)


def test_an_unknown_label_for_evaluate(tmp_path):
    write_all(tmp_path, {"a.tsv": GOOD, "d/train.tsv": GOOD})
    with pytest.raises(DataError, match="the label '0' is not in the training rows") as caught:
        load_split(tmp_path / "a.tsv", text=None, label=None, label_names=("1", "2"))
    assert caught.value.row == 2
    with pytest.raises(DataError, match="no test split; there is: train"):
        load_split(tmp_path / "d", text=None, label=None, label_names=("0", "1"))


def test_no_poems_in_that_language():
    with pytest.raises(DataError, match="'fr'"):
        bundled_poems("fr")


def test_a_tab_has_no_place_in_a_tsv(tmp_path):
    with pytest.raises(DataError, match="tab or line break"):
        write_table(tmp_path / "a.tsv", ["text"], [["a\tb"]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_bytes_at_random_never_raise_anything_else(kind, tmp_path):
    """A good file with bytes changed, removed and repeated: loaded, or a DataError."""
    rng = random.Random(0)
    good: dict[str, Callable[[], bytes]] = {
        "tsv": lambda: b'text\tlabel\n"a""b"\t0\nb\t1\n',
        "csv": lambda: b'text,label\n"a""b",0\nb,1\n',
        "jsonl": lambda: jsonl(A, B).encode(),
        "parquet": lambda: parquet({"text": ["a", "b"], "label": [0, 1]}),
    }
    path = tmp_path / f"a.{kind}"
    for _ in range(150):
        content = bytearray(good[kind]())
        for _ in range(rng.randrange(1, 5)):
            i = rng.randrange(len(content))
            content[i : i + rng.randrange(3)] = rng.choice(
                [b"", bytes([rng.randrange(256)]), b'"', b"\n", b"\r", b"\0", b"\t"]
            )
        path.write_bytes(content)
        with suppress(DataError):
            load_dataset(path)
