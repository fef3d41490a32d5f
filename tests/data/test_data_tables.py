"""Reading tables: quotes, line ends, encodings, line numbers; and writing them so that they read back as they were."""

from __future__ import annotations

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from katei.data import load_dataset, read_table, write_table
from katei.data.tables import is_blank, quote_tsv, unquote_tsv

EXAMPLES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
character = st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r\0") | st.sampled_from(
    '"",\u2028\x85\x0b '
)
line_text = st.text(character, max_size=12)
any_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from('"\n\r,\t'), max_size=12
)
filled = line_text.filter(lambda text: not is_blank(text))


@EXAMPLES
@given(field=line_text)
def test_a_tsv_field_round_trips(field):
    assert unquote_tsv(quote_tsv(field)) == field
    if '"' not in field:
        assert quote_tsv(field) == field


@EXAMPLES
@given(rows=st.lists(st.tuples(filled, line_text), min_size=1, max_size=6))
def test_a_tsv_file_round_trips(rows, tmp_path):
    write_table(tmp_path / "a.tsv", ["text", "more"], rows)
    table = read_table(tmp_path / "a.tsv", text="text")
    assert table.rows == tuple(rows)
    assert table.lines == tuple(range(2, 2 + len(rows)))


@EXAMPLES
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@given(rows=st.lists(st.tuples(any_text.filter(lambda text: not is_blank(text)), any_text), min_size=1, max_size=4))
def test_other_formats_round_trip_with_line_breaks_and_tabs(kind, rows, tmp_path):
    write_table(tmp_path / f"a.{kind}", ["text", "more"], rows)
    assert read_table(tmp_path / f"a.{kind}", text="text").rows == tuple(rows)


@EXAMPLES
@given(field=line_text)
def test_a_tsv_field_written_by_a_csv_library_reads_as_it_was(field, tmp_path):
    """The `csv` module quotes more than is needed; that must make no difference."""
    sink = io.StringIO()
    csv.writer(sink, delimiter="\t", lineterminator="\n").writerows([["text", "label"], [f"x{field}", "1"]])
    (tmp_path / "a.tsv").write_bytes(sink.getvalue().encode())
    assert read_table(tmp_path / "a.tsv").texts == (f"x{field}",)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (
            '"てごわい敵とバトルだ！""…""とか言ってる場合じゃない!?"',
            'てごわい敵とバトルだ！"…"とか言ってる場合じゃない!?',
        ),
        ('"a, b"', "a, b"),
        ('""""', '"'),
        ('"""a"""', '"a"'),
        ('"never closed', '"never closed'),
        ('never opened"', 'never opened"'),
        ('say "a" twice', 'say "a" twice'),
        ('"a"b"', '"a"b"'),  # begins and ends with a quote, but does not double the one inside
        ('"a" and "b"', '"a" and "b"'),
        ('"', '"'),
        ('"""', '"""'),
        ("'a'", "'a'"),
    ],
)
def test_quotes_of_a_tsv(written, read, tmp_path):
    (tmp_path / "a.tsv").write_text(f"poem\tlabel\n{written}\t1\nnext\t0\n", encoding="utf-8")
    dataset = load_dataset(tmp_path / "a.tsv")
    assert dataset.train.texts == (read, "next")
    assert dataset.train.labels == (1, 0)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("tail", [b"", b"\n", b"\r\n\r\n \r\n", b"\n\t\n"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_bom_line_ends_and_blank_lines_at_the_end(bom, end, tail, kind, tmp_path):
    lines = {
        "tsv": ["text\tlabel", '"春の ""夜"""\t1', "b\t0"],
        "csv": ["text,label", '"春の ""夜""",1', "b,0"],
        "jsonl": ['{"text": "春の \\"夜\\"", "label": 1}', '{"label": 0, "text": "b"}'],
    }[kind]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(bom + end.join(line.encode() for line in lines) + tail)
    dataset = load_dataset(path)
    assert dataset.train.texts == ('春の "夜"', "b")
    assert dataset.train.labels == (1, 0)
    assert dataset.train.lines == ((1, 2) if kind == "jsonl" else (2, 3))
    assert (dataset.text_column, dataset.label_column) == ("text", "label")


def test_csv_line_numbers_count_lines_inside_quotes(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines, and a comma",1\nc,0\n"d\r\n\n",1\ne,0\n', newline="")
    train = load_dataset(tmp_path / "a.csv").train
    assert train.lines == (2, 4, 5, 8)
    assert train.texts == ("two\nlines, and a comma", "c", "d\r\n\n", "e")


def test_characters_that_other_readers_take_for_line_ends_stay_text(tmp_path):
    text = "a\u2028b\x85c\x0bd\x0ce\x1cf"
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{text}\t1\nb\t0\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x\u2028y", "label": 1}}\n{json.dumps({"text": "b", "label": 0})}\n')
    assert load_dataset(tmp_path / "a.tsv").train.texts == (text, "b")
    assert load_dataset(tmp_path / "a.jsonl").train.texts == ("x\u2028y", "b")


def test_parquet_with_what_pandas_makes_of_it(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"poem": ["a", "b", "c", "d"], "label": pd.Categorical(["x", "y", "x", "y"])})
    frame.iloc[[0, 2, 3]].to_parquet(tmp_path / "a.parquet")
    assert "__index_level_0__" in pq.read_schema(tmp_path / "a.parquet").names
    table = read_table(tmp_path / "a.parquet")
    assert table.texts == ("a", "c", "d")
    assert table.lines == (1, 2, 3)
    frame.to_csv(tmp_path / "a.csv")  # with an index column that has no name
    dataset = load_dataset(tmp_path / "a.csv")
    assert (dataset.text_column, dataset.label_column, dataset.train.texts) == ("poem", "label", ("a", "b", "c", "d"))


def test_a_table_keeps_all_columns_as_text(tmp_path):
    rows = [{"id": 1, "text": "あ", "tags": ["x", "é"]}, {"text": "b", "score": 0.5, "tags": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read_table(tmp_path / "a.jsonl")
    assert table.columns == ("id", "text", "tags", "score")
    assert table.rows == (("1", "あ", '["x", "é"]', ""), ("", "b", "", "0.5"))
    assert table.text_column == "text"
    assert table.texts == ("あ", "b")


def test_one_column_is_the_text_of_predict(tmp_path):
    (tmp_path / "a.tsv").write_text("anything\na\nb, c\n")
    assert read_table(tmp_path / "a.tsv").texts == ("a", "b, c")
    (tmp_path / "b.csv").write_text("id,label,poem\n1,0,a\n")
    assert read_table(tmp_path / "b.csv").text_column == "poem"
    (tmp_path / "c.csv").write_text("label,what\n1,a\n")
    assert read_table(tmp_path / "c.csv").text_column == "what"


def test_the_usual_column_of_an_adapter_is_taken_where_the_table_has_it(tmp_path):
    (tmp_path / "a.csv").write_text("a,b,text\n1,2,3\n")
    assert read_table(tmp_path / "a.csv", usual="b").text_column == "b"
    assert read_table(tmp_path / "a.csv", usual="z").text_column == "text"
    assert read_table(tmp_path / "a.csv", usual="b", text="a").text_column == "a"


def test_endings_in_capitals_and_every_string_type_of_parquet(tmp_path):
    (tmp_path / "A.TSV").write_text("text\tlabel\na\t1\nb\t0\n")
    assert load_dataset(tmp_path / "A.TSV").train.labels == (1, 0)
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"text": pa.array(["a", "b"]).cast(kind), "label": pa.array([1, 0], pa.int8())})
        pq.write_table(table, tmp_path / "a.parquet")
        assert load_dataset(tmp_path / "a.parquet").train.texts == ("a", "b")
