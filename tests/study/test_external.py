"""Results from elsewhere: what is compared, what is refused, and what the command prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from katei import api, cli
from katei.core.errors import DataError, UserError
from katei.data import write_table
from katei.study.external import compare_file

BOOK = "method,correct,rows\nlora,52,54\nadalora,51,54\nprompt-tuning,44,54\np-tuning,46,54\nia3,50,54\nllama-adapter,52,54\n"


def write(folder: Path, text: str, name: str = "results.csv") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def predictions(methods: dict[str, float], *, rows: int = 60, seeds: int = 1, folds: int = 0) -> list[list[str]]:
    """A header and rows of probabilities; the number is how far a method separates the classes."""
    rng = np.random.default_rng(0)
    fold = [rng.permutation(np.arange(rows) % folds) for _ in range(seeds)] if folds else None
    table = [["method", "row", "label", "seed", "fold", "probability_no", "probability_yes"]]
    for method, separation in methods.items():
        for seed in range(seeds):
            for row in range(rows):
                yes = row % 3 == 0
                p = 1 / (1 + np.exp(-(rng.standard_normal() * 1.5 + separation * (1 if yes else -1))))
                of_fold = str(fold[seed][row]) if fold else ""
                table.append([method, str(row), "yes" if yes else "no", str(seed), of_fold, f"{1 - p:.9f}", f"{p:.9f}"])
    if not folds:
        table = [[*line[:4], *line[5:]] for line in table]
    return table


def saved(folder: Path, table: list[list[str]], name: str = "results.csv") -> Path:
    write_table(folder / name, table[0], table[1:])
    return folder / name


# -------------------------------------------------------------------- what is compared


def test_no_pair_of_the_books_methods_can_be_told_apart(tmp_path: Path) -> None:
    result = api.compare_from(write(tmp_path, BOOK))
    by_name = {m["method"]: m for m in result["methods"]}
    assert by_name["lora"]["accuracy_interval"] == pytest.approx((0.873, 0.995), abs=1e-3)
    assert by_name["prompt-tuning"]["accuracy_interval"] == pytest.approx((0.686, 0.907), abs=1e-3)
    best = {"lora", "llama-adapter", "adalora", "ia3"}
    top = [d for d in result["differences"] if {d["first"], d["second"]} <= best]
    assert len(top) == 6
    assert not any(d["different"] for d in result["differences"])
    assert min(d["p"] for d in top) > 0.5
    assert result["verdict"].startswith("No two of the 6 methods can be told apart on 54 rows")
    assert "each had test rows of its own" in result["note"]


def test_counts_far_apart_are_told_apart_also_on_rows_of_unequal_number(tmp_path: Path) -> None:
    result = api.compare_from(write(tmp_path, "method,correct,rows\na,95,100\nb,30,60\n"))
    assert result["differences"][0]["different"]
    assert result["verdict"].startswith("a is better than b (+0.450")


@pytest.mark.parametrize("name", ["results.csv", "results.tsv", "results.jsonl", "results.parquet"])
def test_every_format_gives_the_same(tmp_path: Path, name: str) -> None:
    table = predictions({"a": 3, "b": 0.5}, rows=30)
    first, other = (api.compare_from(saved(tmp_path, table, n)) for n in ("first.csv", name))
    assert {**first, "file": ""} == {**other, "file": ""}


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    table = predictions({"a": 2, "b": 1}, seeds=2)
    shuffled = [table[0], *np.random.default_rng(1).permutation(np.array(table[1:])).tolist()]
    first, other = (compare_file(saved(tmp_path, t, n)) for t, n in ((table, "a.csv"), (shuffled, "b.csv")))
    for one, two in zip(first.differences, other.differences, strict=True):
        assert one.interval == pytest.approx(two.interval, abs=1e-9)
        assert one.p == pytest.approx(two.p, rel=1e-6)


def test_designs_are_recognised(tmp_path: Path) -> None:
    for seeds, folds, kind in ((1, 0, "rows"), (3, 0, "seeds"), (2, 5, "folds")):
        table = predictions({"good": 3, "poor": 0.3}, seeds=seeds, folds=folds)
        comparison = compare_file(saved(tmp_path, table))
        assert (comparison.kind, comparison.rows, comparison.seeds, comparison.folds) == (kind, 60, seeds, folds)
        assert comparison.methods[0].method == "good"
        assert comparison.of("accuracy")[0].different
        assert comparison.of("roc_auc")[0].different
        assert comparison.commonest == ("no", pytest.approx(2 / 3))


def test_predictions_of_a_run_are_read_as_they_are(tmp_path: Path) -> None:
    """predictions.parquet: `line` for the row, and validation rows beside those of the test."""
    head = ["trial", "method", "seed", "split", "line", "label", "prediction", "probability_0", "probability_1"]
    rows = []
    for method, right in (("lora", "0.9"), ("ia3", "0.8")):
        for split, count in (("valid", 7), ("test", 12)):
            for i in range(count):
                label = i % 2
                p = (right, f"{1 - float(right):.1f}")
                rows.append(
                    [method, method, "0", split, str(i + 2), str(label), str(label), *(p if label == 0 else p[::-1])]
                )
    write_table(tmp_path / "predictions.parquet", head, rows)
    comparison = compare_file(tmp_path / "predictions.parquet")
    assert comparison.rows == 12
    assert [m.accuracy for m in comparison.methods] == [1.0, 1.0]


def test_predictions_without_probabilities_have_no_area(tmp_path: Path) -> None:
    text = "method,row,label,prediction\n" + "".join(
        f"{m},{i},x,{'x' if i else p}\n" for m, p in ("ax", "by") for i in range(9)
    )
    comparison = compare_file(write(tmp_path, text))
    assert comparison.of("roc_auc") == ()
    assert [m.accuracy for m in comparison.methods] == [1.0, pytest.approx(8 / 9)]


def test_labels_of_one_class_alone_have_no_area(tmp_path: Path) -> None:
    table = [line for line in predictions({"a": 2, "b": 1}) if line[2] != "yes"]
    comparison = compare_file(saved(tmp_path, table))
    assert comparison.of("roc_auc") == ()
    assert "roc_auc" not in comparison.methods[0].estimates


# -------------------------------------------------------------------- what is refused

HEAD = "method,row,label,prediction\n"
PROBABILITIES = "method,row,label,probability_x,probability_y\n"
MISTAKES = {
    "no method": ("row,label,prediction\n1,a,a\n", None, "no column 'method'", "method, row, label"),
    "no prediction": ("method,row,label\na,1,x\n", None, "neither a prediction nor a probability_LABEL", "prediction"),
    "other separator": ("method;correct;rows\na;5;6\n", None, "no column 'method'", "separated by semicolons"),
    "too many correct": ("method,correct,rows\na,55,54\n", 2, "55 correct of 54 rows", "0 to rows"),
    "fewer than none": ("method,correct,rows\na,-1,54\n", 2, "-1 correct", "0 to rows"),
    "no rows": ("method,correct,rows\na,0,0\n", 2, "'rows' is 0", "tested on"),
    "nan": ("method,correct,rows\na,nan,54\n", 2, "'correct' is nan", "cannot be compared"),
    "infinite": ("method,correct,rows\na,5,inf\n", 2, "'rows' is inf", "cannot be compared"),
    "a word": ("method,correct,rows\na,many,54\n", 2, "'correct' is 'many', not a number", "0.93"),
    "no count": ("method,correct,rows\na,,54\n", 2, "'correct' is empty", "0.93"),
    "a fraction": ("method,correct,rows\na,5.5,54\n", 2, "'correct' is 5.5", "whole number"),
    "a method twice": (
        "method,correct,rows\na,5,54\nb,5,54\na,6,54\n",
        4,
        "'a' stands in row 2 already",
        "seed column",
    ),
    "a header alone": ("method,correct,rows\n", None, "no row under it", "add rows"),
    "empty": ("", None, "the file is empty", "give a table"),
    "a row twice": (HEAD + "a,1,x,x\na,1,x,y\n", 3, "method 'a' has row '1' twice", "column seed"),
    "other rows": (
        HEAD + "a,1,x,x\na,2,y,y\nb,1,x,x\n",
        3,
        "'a' was scored on row '2', method 'b' was not",
        "same rows",
    ),
    "more rows": (
        HEAD + "a,1,x,x\nb,1,x,x\nb,2,y,y\n",
        4,
        "'b' was scored on row '2', method 'a' was not",
        "same rows",
    ),
    "two labels": (HEAD + "a,1,x,x\nb,1,y,x\n", 3, "label 'y' here and 'x' in row 2", "one label"),
    "no label": (HEAD + "a,1,,x\n", 2, "'label' is empty", "fill it in"),
    "label of no column": (PROBABILITIES + "a,1,z,0.5,0.5\n", 2, "the label 'z' has no probability", "probability_z"),
    "sum": (PROBABILITIES + "a,1,x,0.5,0.7\n", 2, "add up to 1.200", "each class"),
    "below 0": (PROBABILITIES + "a,1,x,-0.5,1.5\n", 2, "'probability_x' is -0.5", "0 to 1"),
    "no probability": (PROBABILITIES + "a,1,x,nan,0.5\n", 2, "'probability_x' is nan", "cannot be compared"),
    "one class": ("method,row,label,probability_x\na,1,x,1\n", None, "one class alone", "other classes"),
    "seeds": (
        "method,row,label,prediction,seed\na,1,x,x,0\na,2,x,x,0\na,1,x,x,1\n",
        None,
        "seed '1' lacks row '2'",
        "every seed",
    ),
    "folds": (
        "method,row,label,prediction,fold\na,1,x,x,0\na,2,y,x,1\nb,1,x,x,1\nb,2,y,x,1\n",
        4,
        "row '1' is in fold '1' here and in fold '0' in row 2",
        "same folds",
    ),
    "one fold": ("method,row,label,prediction,fold\na,1,x,x,0\na,2,y,x,0\n", None, "a single fold", "leave the column"),
    "unlike repeats": (
        "method,row,label,prediction,seed,fold\na,1,x,x,0,0\na,2,y,x,0,1\na,3,y,x,0,2\na,1,x,x,1,0\na,2,y,x,1,1\na,3,y,x,1,1\n",
        None,
        "repeats of 2 and 3 folds",
        "same number",
    ),
    "no test rows": (
        "method,line,label,prediction,split\na,1,x,x,train\n",
        None,
        "no row of the split 'test'",
        "leave the column",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(tmp_path: Path, mistake: str) -> None:
    text, row, what, hint = MISTAKES[mistake]
    file = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        compare_file(file)
    error = caught.value
    assert what in error.message
    assert error.row == row
    assert error.file == str(file)
    assert hint in (error.hint or "")


def test_a_file_that_is_not_there_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        compare_file(tmp_path / "none.csv")


# -------------------------------------------------------------------- the command


def katei(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["katei", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_the_command_prints_tables_a_verdict_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(tmp_path, predictions({"good": 3, "poor": 0.3}))
    code, out, err = katei(monkeypatch, capsys, "--from", file, "--reference", "poor", "--json")
    result = json.loads(out.splitlines()[-1])
    assert (code, err) == (0, "")
    assert result["design"] == {"kind": "rows", "rows": 60, "seeds": 1, "folds": 0}
    assert result["methods"][0]["log_loss_interval"][0] < result["methods"][0]["log_loss"]
    assert result["references"] == ["poor"]
    assert "difference in accuracy" in out
    assert "good − poor" in out
    assert "different" in out
    assert result["verdict"] in " ".join(out.splitlines())
    code, out, _ = katei(monkeypatch, capsys, "--from", file, "--lang", "ja")
    assert code == 0
    assert "正解率" in out
    assert "より良いと言えます。" in out
    assert "better" not in out


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("poems --from FILE", "--from trains nothing, so DATA has no meaning"),
        ("--from FILE --epochs 3 --seeds 2", "--seeds, --epochs has no meaning"),
        ("--from FILE --lang fr", "no language 'fr'"),
        ("--from FILE --margin 0", "the margin is 0.0"),
        ("--from FILE --reference lorra", "did you mean 'lora'?"),
        ("--from none.csv", "no such file"),
    ],
)
def test_wrong_flags_are_named(
    typed: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, BOOK)
    arguments = [str(file) if word == "FILE" else word for word in typed.split()]
    code, out, err = katei(monkeypatch, capsys, *arguments, "--json")
    assert code == 2
    assert said in err
    assert json.loads(out.splitlines()[-1])["error"]["message"] in err
