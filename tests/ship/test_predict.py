"""Prediction: columns in, columns out, whatever the format; labels by name; from a run, a trial, an adapter, a full model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from katei import api
from katei.core.errors import DataError, RunError
from katei.ship.adapters import open_adapter
from katei.ship.predict import predict_texts
from tests.helpers.trained import Trained

ROWS = [
    {"id": "1", "poem": "春の風、砕けた鏡", "note": 'says "no", twice'},
    {"id": "2", "poem": "the iron gate 🦊", "note": ""},
    {"id": "3", "poem": "ひ", "note": "最後"},
]
ADDED = ["prediction", "probability_cold", "probability_暖かい"]


def write(path: Path) -> Path:
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path)
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(ROWS[0]))
                writer.writeheader()
                writer.writerows(ROWS)
        case ".tsv":
            lines = ["\t".join(ROWS[0]), *("\t".join(row.values()) for row in ROWS)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    match path.suffix:
        case ".parquet":
            return pq.read_table(path).to_pylist()
        case ".jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        case ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
    header, *lines = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


@pytest.fixture(scope="module")
def expected(llama: Trained) -> np.ndarray:
    base, stack, note = open_adapter(llama.trial("lora"), say=lambda text: None)
    return predict_texts(base, stack, note, [row["poem"] for row in ROWS])


@pytest.mark.parametrize("ending_in", [".tsv", ".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("ending_out", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_every_format_keeps_the_columns_and_adds_ours(
    ending_in: str, ending_out: str, llama: Trained, expected: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / f"out{ending_out}"
    result = api.predict(llama.run, write(tmp_path / f"rows{ending_in}"), out=out, trial="lora")
    assert (result["rows"], result["out"]) == (3, str(out))
    written = read(out)
    assert list(written[0]) == [*ROWS[0], *ADDED]
    assert [{name: row[name] for name in ROWS[0]} for row in written] == ROWS
    probabilities = np.array([[float(row[name]) for name in ADDED[1:]] for row in written])
    assert (probabilities == expected).all()
    assert [row["prediction"] for row in written] == [("cold", "暖かい")[c] for c in expected.argmax(1)]


def test_a_row_scores_the_same_alone_and_in_company(llama: Trained, expected: np.ndarray) -> None:
    base, stack, note = open_adapter(llama.trial("lora"), say=lambda text: None)
    for row, together in zip(ROWS, expected, strict=True):
        alone = predict_texts(base, stack, note, [row["poem"]])[0]
        assert np.abs(alone - together).max() < 1e-6
    passes = predict_texts(base, stack, note, [row["poem"] for row in ROWS], token_budget=1)
    assert np.abs(passes - expected).max() < 1e-6


def test_the_default_out_stands_beside_the_input(llama: Trained, tmp_path: Path) -> None:
    file = write(tmp_path / "詩.csv")
    assert api.predict(llama.run, file, trial="lora")["out"] == str(tmp_path / "詩.predictions.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["詩.csv", "詩.predictions.csv"]


def test_the_text_column_by_name(llama: Trained, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv")
    api.predict(llama.run, file, out=tmp_path / "poem.jsonl", trial="lora")
    with pytest.raises(DataError, match="is empty") as refused:
        api.predict(llama.run, file, out=tmp_path / "note.jsonl", trial="lora", text="note")
    assert refused.value.row == 3
    api.predict(llama.run, file, out=tmp_path / "id.jsonl", trial="lora", text="id")
    assert read(tmp_path / "id.jsonl")[0][ADDED[1]] != read(tmp_path / "poem.jsonl")[0][ADDED[1]]


def test_a_column_of_ours_in_the_input_is_a_clash(llama: Trained, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("poem\tprobability_cold\n朝\t0.5\n", encoding="utf-8")
    with pytest.raises(DataError, match="already has a column named 'probability_cold'"):
        api.predict(llama.run, tmp_path / "a.tsv", trial="lora")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tsv"]


@pytest.mark.parametrize(
    "name", ["run with --trial", "trial folder", "exported folder", "full", "llama-adapter", "head"]
)
def test_everything_a_user_may_point_at(name: str, llama: Trained, tmp_path: Path) -> None:
    where, trial = llama.run, "lora"
    match name:
        case "trial folder":
            where, trial = llama.trial("lora"), None
        case "exported folder":
            api.export(llama.run, out=tmp_path / "exported", trial="lora")
            where, trial = tmp_path / "exported", None
        case "full" | "llama-adapter" | "head":
            trial = name
    scores = api.evaluate(where, llama.data, trial=trial)
    results = json.loads((llama.run / "results.json").read_text(encoding="utf-8"))["trials"]
    test = next(t["test"] for t in results if t["name"] == (trial or "lora"))
    assert scores["accuracy"] == test["accuracy"]
    assert scores["loss"] == pytest.approx(test["loss"], rel=1e-5)


def test_a_run_of_one_trial_needs_no_name_and_one_of_many_lists_them(llama: Trained, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has 9 trials") as refused:
        api.predict(llama.run, llama.data / "test.tsv", out=tmp_path / "o.tsv")
    assert "adalora" in (refused.value.hint or "")
    api.train(llama.data, out=tmp_path / "one", method="head", model=str(llama.base), epochs=1)
    assert api.predict(tmp_path / "one", llama.data / "test.tsv", out=tmp_path / "o.tsv")["rows"] == 8


def test_texts_are_cut_as_in_training(llama: Trained, tmp_path: Path) -> None:
    api.train(llama.data, out=tmp_path / "run", method="lora", model=str(llama.base), epochs=1, max_length=6)
    base, stack, note = open_adapter(tmp_path / "run" / "trials" / "lora", say=lambda text: None)
    assert note.max_length == 6
    long, longer = "the iron gate " * 3, "the iron gate " * 9
    assert (predict_texts(base, stack, note, [long]) == predict_texts(base, stack, note, [longer])).all()


def test_a_failed_prediction_leaves_the_older_one(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "rows.tsv")
    (tmp_path / "out.tsv").write_text("older")
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        api.predict(llama.run, file, out=tmp_path / "out.tsv", trial="lora")
    assert (tmp_path / "out.tsv").read_text() == "older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tsv", "rows.tsv"]
