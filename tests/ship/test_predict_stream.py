"""Prediction of many rows: killed anywhere and going on to the same bytes, bad rows found first, and what else is said of a row."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from katei import api, cli
from katei.core.calibration import with_temperature
from katei.core.errors import AdapterError, DataError, RecipeError, RunError
from katei.data.tables import Source
from katei.ship import predict as shipping
from katei.ship.adapters import open_adapter
from katei.ship.predict import WINDOW, predict_texts
from tests.helpers.rows import some_texts
from tests.helpers.trained import Trained, train_study

TEXTS = [text for text, _ in some_texts(1200, seed=1)]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_study(tmp_path_factory.mktemp("lora"), methods=("lora",))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    path.write_text("poem\tid\n" + "".join(f"{t}\t{i}\n" for i, t in enumerate(TEXTS)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(lora: Trained) -> np.ndarray:
    return predict_texts(*open_adapter(lora.trial("lora"), say=lambda text: None), TEXTS)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------- killed

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from katei import api
from katei.ship import adapters, partial, predict

predict.WINDOW = 64
run, file, folder = map(Path, sys.argv[1:4])
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)


def after(calls, honest):
    left = [calls]
    def call(*a, **k):
        left[0] -= 1
        return die() if left[0] < 0 else honest(*a, **k)
    return call


def prepare(moment):
    tick = lambda done, rows: None
    if moment.startswith("row"):
        tick = lambda done, rows: die() if done >= int(moment[3:]) else None
    if moment == "in a journal":  # its rows are on the disk, it is not
        partial.write_json = after(1, partial.write_json)
    if moment == "before the end":
        Path.replace = after(3, Path.replace)  # three journals go well
    if moment == "after the end":
        partial.shutil.rmtree = die
    if moment == "in a write":
        honest = partial.Partial.write
        def write(self, content, left=[2]):
            left[0] -= 1
            if left[0] < 0:
                honest(self, content[:len(content) // 2])
                self._file.flush()
                die()
            honest(self, content)
        partial.Partial.write = write
    return tick


MOMENTS = ("row1", "row64", "row128", "in a journal", "in a write", "before the end", "after the end")
for kind in ("tsv", "csv", "jsonl", "parquet"):
    for i, moment in enumerate({"tsv": MOMENTS, "parquet": ["row64", "in a write", "before the end"]}.get(kind, ["row64"])):
        out = folder / f"{kind}{i}" / f"out.{kind}"
        out.parent.mkdir()
        child = os.fork()
        if child == 0:
            api.predict(run, file, out=out, save_seconds=0, tick=prepare(moment))
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), moment
        left = sorted(p.name for p in out.parent.iterdir())
        if moment == "after the end" and kind != "parquet":
            assert out.name in left, (kind, moment, left)
        if moment not in ("after the end", "before the end"):
            assert out.name not in left, (kind, moment, left)
"""


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    lora: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "WINDOW", 64)
    file = tmp_path / "rows.tsv"
    file.write_text("poem\tid\n" + "".join(f"{t}\t{i}\n" for i, t in enumerate(TEXTS[:200])), encoding="utf-8")
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(lora.run), str(file), str(tmp_path / "killed")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    for kind in ("tsv", "csv", "jsonl", "parquet"):
        once = tmp_path / f"once.{kind}"
        api.predict(lora.run, file, out=once)
        folders = sorted((tmp_path / "killed").glob(f"{kind}*"))
        assert len(folders) == {"tsv": 7, "parquet": 3}.get(kind, 1)
        went_on = 0
        for folder in folders:
            said: list[str] = []
            out = folder / f"out.{kind}"
            assert api.predict(lora.run, file, out=out, say=said.append)["rows"] == 200
            assert out.read_bytes() == once.read_bytes(), folder
            assert entries(folder) == [out.name]
            went_on += any("going on after" in text for text in said)
        assert went_on >= len(folders) / 2, "work that was on record is done again"


def test_ctrl_c_keeps_what_is_done(lora: Trained, file: Path, tmp_path: Path) -> None:
    def stop(done: int, rows: int) -> None:
        if done == WINDOW:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.predict(lora.run, file, out=tmp_path / "o.tsv", tick=stop)
    assert entries(tmp_path) == ["o.tsv.partial"]
    seen: list[int] = []
    api.predict(lora.run, file, out=tmp_path / "o.tsv", tick=lambda done, rows: seen.append(done))
    assert seen == [512, 1024, 1200]


@pytest.mark.parametrize("changed", ["input", "adapter", "setting", "precision"])
def test_answers_to_something_else_are_not_taken_up(changed: str, lora: Trained, file: Path, tmp_path: Path) -> None:
    run, mine, more = tmp_path / "run", tmp_path / "rows.tsv", {}
    shutil.copytree(lora.run, run)
    shutil.copyfile(file, mine)

    def stop(done: int, rows: int) -> None:
        if done == WINDOW:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.predict(run, mine, out=tmp_path / "o.tsv", tick=stop)
    match changed:
        case "input":
            mine.write_text(mine.read_text(encoding="utf-8").replace("\t700\n", "\t7000\n"), encoding="utf-8")
        case "adapter":
            note = run / "trials" / "lora" / "katei.json"
            note.write_text(note.read_text(encoding="utf-8").replace("cold", "cool"), encoding="utf-8")
        case "setting":
            more = {"abstain": 0.7}
        case "precision":
            more = {"precision": "bf16"}
    said: list[str] = []
    api.predict(run, mine, out=tmp_path / "o.tsv", say=said.append, **more)
    name = {"precision": "base"}.get(changed, changed)
    assert any(f"512 rows answered with another {name}" in text for text in said), said
    api.predict(run, mine, out=tmp_path / "fresh.tsv", **more)
    assert (tmp_path / "o.tsv").read_bytes() == (tmp_path / "fresh.tsv").read_bytes()
    assert not (tmp_path / "o.tsv.partial").exists()


def test_two_at_once_and_a_folder_in_the_way(lora: Trained, file: Path, tmp_path: Path) -> None:
    def again(done: int, rows: int) -> None:
        with pytest.raises(RunError, match="another katei is writing"):
            api.predict(lora.run, file, out=tmp_path / "o.tsv")

    api.predict(lora.run, file, out=tmp_path / "o.tsv", tick=again)
    (tmp_path / "p.tsv.partial").mkdir()
    (tmp_path / "p.tsv.partial" / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="in the way"):
        api.predict(lora.run, file, out=tmp_path / "p.tsv")
    assert (tmp_path / "p.tsv.partial" / "thesis.tex").read_text() == "precious"


def test_a_file_that_changes_meanwhile_leaves_nothing(lora: Trained, file: Path, tmp_path: Path) -> None:
    shutil.copyfile(file, tmp_path / "rows.tsv")

    def append(done: int, rows: int) -> None:
        if done == WINDOW:
            with (tmp_path / "rows.tsv").open("a") as sink:
                sink.write("more\t1\n")

    with pytest.raises(DataError, match="changed while it was read"):
        api.predict(lora.run, tmp_path / "rows.tsv", out=tmp_path / "o.tsv", tick=append, save_seconds=0)
    assert entries(tmp_path) == ["rows.tsv"]


# -------------------------------------------------------------------- rows


def test_windows_change_no_answer_and_no_order(lora: Trained, file: Path, tmp_path: Path, expected: np.ndarray) -> None:
    api.predict(lora.run, file, out=tmp_path / "o.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["id"], row["poem"]) for row in rows] == [(str(i), text) for i, text in enumerate(TEXTS)]
    written = np.array([[float(row["probability_cold"]), float(row["probability_暖かい"])] for row in rows])
    assert (written == expected).all()
    base, stack, note = open_adapter(lora.trial("lora"), say=lambda text: None)
    some = range(0, len(TEXTS), 97)
    alone = np.concatenate([predict_texts(base, stack, note, [TEXTS[i]]) for i in some])
    assert np.abs(alone - expected[list(some)]).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "content", "row", "said"),
    [
        ("a.tsv", "poem\n" + "x\n" * 5000 + " \n" + "y\n" * 9, 5002, "is empty"),
        ("a.tsv", "poem\n" + "x\n" * 5000 + "b\0d\n", 5002, "NUL"),
        ("a.csv", "poem,id\n" + "x,1\n" * 5000 + '"open,1\n' + "x,1\n" * 50, 5002, "not closed"),
        ("a.jsonl", '{"poem": "x"}\n' * 5000 + '{"text": "y"}\n', 5001, "missing or null"),
        ("a.jsonl", '{"poem": "x"}\n' * 5000 + '{"poem": "y\n', 5001, "not JSON"),
    ],
)
def test_a_bad_row_deep_in_the_file_is_named_before_anything_is_loaded(
    name: str, content: str, row: int, said: str, lora: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr("katei.ship.adapters.open_adapter", lambda *a, **k: pytest.fail("a base is loaded"))
    with pytest.raises(DataError, match=re.escape(said)) as refused:
        api.predict(lora.run, tmp_path / name)
    assert (refused.value.file, refused.value.row) == (str(tmp_path / name), row)
    assert refused.value.hint
    assert entries(tmp_path) == [name]


def test_a_line_break_that_a_tsv_cannot_hold_is_found_first(
    lora: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text('poem,id\nx,1\n"y\nz",2\n')
    monkeypatch.setattr("katei.ship.adapters.open_adapter", lambda *a, **k: pytest.fail("a base is loaded"))
    with pytest.raises(DataError, match="no place in a") as refused:
        api.predict(lora.run, tmp_path / "a.csv", out=tmp_path / "o.tsv")
    assert refused.value.row == 3
    assert "o.csv" in (refused.value.hint or "")


def test_parquet_in_row_groups(lora: Trained, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "PARQUET_GROUP", 500)
    api.predict(lora.run, file, out=tmp_path / "o.parquet")
    written = pq.ParquetFile(tmp_path / "o.parquet")
    assert written.metadata.num_row_groups == 3
    assert written.read().column("poem").to_pylist() == TEXTS


# -------------------------------------------------------------------- what is said of a row


def predicted(lora: Trained, file: Path, out: Path, **flags: Any) -> tuple[dict[str, Any], list[dict[str, str]]]:
    result = api.predict(lora.run, file, out=out, **flags)
    return result, [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_abstaining(lora: Trained, file: Path, tmp_path: Path, expected: np.ndarray) -> None:
    threshold = float(np.median(expected.max(1)))
    result, rows = predicted(lora, file, tmp_path / "o.jsonl", abstain=threshold)
    names = ("cold", "暖かい")
    said = [names[p.argmax()] if p.max() >= threshold else "" for p in expected]
    assert [row["prediction"] for row in rows] == said
    assert result["abstained"] == said.count("") > 100
    assert list(rows[0]) == ["poem", "id", "prediction", "probability_cold", "probability_暖かい"]
    again, _ = predicted(lora, file, tmp_path / "o.jsonl", abstain=0.0)
    assert again["abstained"] == 0


def test_top_k(lora: Trained, file: Path, tmp_path: Path, expected: np.ndarray) -> None:
    _, rows = predicted(lora, file, tmp_path / "o.jsonl", top_k=2)
    names = ("cold", "暖かい")
    for row, p_C in zip(rows, expected, strict=True):
        assert list(row)[-4:] == ["top_1", "top_1_probability", "top_2", "top_2_probability"]
        best = int(p_C.argmax())
        assert (row["top_1"], row["top_2"]) == (names[best], names[1 - best])
        assert (float(row["top_1_probability"]), float(row["top_2_probability"])) == (p_C[best], p_C[1 - best])


def test_calibrated_by_the_adapters_own_note(lora: Trained, file: Path, tmp_path: Path, expected: np.ndarray) -> None:
    with pytest.raises(AdapterError, match=r"has no temperature.*all of them right") as refused:
        api.predict(lora.run, file, out=tmp_path / "o.jsonl", calibrated=True)
    assert "--calibrated" in (refused.value.hint or "")

    def check(run: Path, temperature: float) -> None:
        api.predict(run, file, out=tmp_path / "o.jsonl", calibrated=True)
        rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
        written = np.array([[float(row["probability_cold"]), float(row["probability_暖かい"])] for row in rows])
        assert np.allclose(written, with_temperature(expected, temperature), atol=1e-12)
        assert [row["prediction"] for row in rows] == [("cold", "暖かい")[c] for c in expected.argmax(1)]

    alone = tmp_path / "alone" / "adapter"
    shutil.copytree(lora.trial("lora"), alone)
    note = json.loads((alone / "katei.json").read_text(encoding="utf-8"))
    (alone / "katei.json").write_text(json.dumps(note | {"temperature": 2.5}), encoding="utf-8")
    check(alone, 2.5)
    for wrong in (0, -1.0, "hot"):
        (alone / "katei.json").write_text(json.dumps(note | {"temperature": wrong}), encoding="utf-8")
        with pytest.raises(AdapterError, match="temperature"):
            api.predict(alone, file, out=tmp_path / "o.jsonl", calibrated=True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"abstain": 1.2}, "it is a probability"),
        ({"abstain": float("nan")}, "it is a probability"),
        ({"top_k": 3}, "there are 2 labels"),
        ({"top_k": 0}, "it counts labels"),
    ],
)
def test_wrong_flags_are_refused_first(flags: dict[str, Any], said: str, lora: Trained, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        api.predict(lora.run, tmp_path / "nowhere.tsv", **flags)


# -------------------------------------------------------------------- stdin to stdout


class Pipe:
    """A running `predict_pipe`, fed and read by hand."""

    def __init__(self, run: Path, **flags: Any):
        source, self._feed = os.pipe()
        self._answers, sink = os.pipe()
        self.feed = os.fdopen(self._feed, "wb", buffering=0)
        self.answers = os.fdopen(self._answers, "rb")
        self.error: Exception | None = None

        def answer() -> None:
            with os.fdopen(source, "rb") as lines, os.fdopen(sink, "wb") as out:
                try:
                    self.result = api.predict_pipe(run, lines, out, **flags)
                except Exception as error:
                    self.error = error

        self.thread = threading.Thread(target=answer)
        self.thread.start()

    def line(self) -> str:
        return self.answers.readline().decode().rstrip("\n")

    def end(self) -> str:
        """Close the input; what is left of the output."""
        self.feed.close()
        rest = self.answers.read().decode()
        self.thread.join(60)
        self.answers.close()
        return rest


@pytest.fixture
def pipe(lora: Trained) -> Iterator[Any]:
    made: list[Pipe] = []

    def start(**flags: Any) -> Pipe:
        made.append(Pipe(lora.run, **flags))
        return made[-1]

    yield start
    for one in made:
        if not one.feed.closed:
            one.end()


@pytest.fixture(scope="module")
def rounding(lora: Trained, expected: np.ndarray) -> float:
    """Which lines share a pass depends on when they arrive, so the last bits of float32 differ: at most twice as much as they
    do between a file's windows and a row alone."""
    opened = open_adapter(lora.trial("lora"), say=lambda text: None)
    alone = np.concatenate([predict_texts(*opened, [text]) for text in TEXTS])
    return 2 * float(np.abs(alone - expected).max())


def test_a_line_is_answered_before_the_next_is_written(pipe: Any, expected: np.ndarray, rounding: float) -> None:
    talk = pipe()
    assert talk.line() == "text\tprediction\tprobability_cold\tprobability_暖かい"
    for text, p_C in zip(TEXTS[:3], expected, strict=False):
        talk.feed.write(f"{text}\r\n".encode())
        fields = talk.line().split("\t")
        assert fields[:2] == [text, ("cold", "暖かい")[p_C.argmax()]]
        assert np.abs(np.array(fields[2:], dtype=float) - p_C).max() <= rounding
    talk.feed.write(TEXTS[3].encode())  # no line break at the end
    assert talk.end().startswith(TEXTS[3])
    assert talk.error is None
    assert (talk.result["rows"], talk.result["out"]) == (4, "-")


def test_many_lines_as_json_in_order(pipe: Any, expected: np.ndarray, rounding: float) -> None:
    talk = pipe(format="jsonl", top_k=1, abstain=0.0)

    def write() -> None:
        talk.feed.write("".join(f"{text}\n" for text in TEXTS).encode())
        talk.feed.close()

    writer = threading.Thread(target=write)
    writer.start()
    rows = [json.loads(line) for line in talk.answers.read().decode().splitlines()]
    writer.join()
    talk.end()
    assert [row["text"] for row in rows] == TEXTS
    written = np.array([[float(row["probability_cold"]), float(row["probability_暖かい"])] for row in rows])
    assert np.abs(written - expected).max() <= rounding
    assert list(rows[0])[-2:] == ["top_1", "top_1_probability"]


def test_a_table_through_the_pipe_keeps_its_columns(pipe: Any) -> None:
    talk = pipe(text="poem")
    talk.feed.write(b'id\tpoem\n7\t"say ""no"""\n')
    assert talk.line().split("\t")[:3] == ["id", "poem", "prediction"]
    assert talk.line().split("\t")[:2] == ["7", 'say "no"']  # quoted only where it would be taken for quoted
    assert talk.end() == ""


@pytest.mark.parametrize(
    ("content", "row", "said", "flags"),
    [
        (b"a\nb\n\nc\n", 3, "is empty", {}),
        (b"a\nb\n\xff\n", 3, "not UTF-8", {}),
        (b"a\nb\nc\0\n", 3, "NUL", {}),
        (b"a\nb\nc\td\n", 3, "no place in TSV", {}),
        (b"poem\tid\na\t1\nb\t1\nc\n", 4, "1 field where the header has 2", {"text": "poem"}),
    ],
)
def test_a_bad_line_is_named_when_those_before_it_are_answered(
    content: bytes, row: int, said: str, flags: dict[str, str], pipe: Any
) -> None:
    talk = pipe(**flags)
    for line in content.splitlines(keepends=True):
        talk.feed.write(line)
    answers = talk.end().splitlines()
    assert [line.split("\t")[0] for line in answers[1:]] == ["a", "b"][: len(answers) - 1]
    assert isinstance(talk.error, DataError)
    assert said in talk.error.message
    assert (talk.error.file, talk.error.row) == ("stdin", row)


@pytest.mark.parametrize(
    ("content", "said", "flags"),
    [
        (b"", "is empty", {}),
        (b"prediction\tpoem\na\tb\n", "already has a column", {"text": "poem"}),
        (b"id\tpoem\na\tb\n", "no column 'poet'", {"text": "poet"}),
        (b"\x1f\x8b\x08\x00", "gzip", {}),
    ],
)
def test_what_no_line_can_mend(content: bytes, said: str, flags: dict[str, str], pipe: Any) -> None:
    talk = pipe(**flags)
    talk.feed.write(content)
    talk.end()
    assert isinstance(talk.error, DataError)
    assert said in talk.error.message


def test_a_pipe_holds_a_window_or_two(lora: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is faster than the model waits."""
    from katei.ship.pipe import _windows

    given = 0

    def rows() -> Iterator[tuple[int, list[str]]]:
        nonlocal given
        while given < 100_000:
            given += 1
            yield given, ["x"]

    windows = _windows(Source("stdin", ("text",), rows), 0, "text", breaks=True)
    taken = sum(len(next(windows)) for _ in range(3))
    threading.Event().wait(0.3)
    assert given <= taken + 4 * WINDOW + 2


def test_the_command_with_a_dash(lora: Trained, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "katei.cli", "predict", str(lora.run), "-"]
    done = subprocess.run([*command, "--json"], input=b"\xe6\x9c\x9d\nthe gate\n", capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.decode().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["text", "朝", "the gate"]
    assert json.loads(last)["rows"] == 2


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("- --out o.tsv", "the answers go to stdout"),
        ("- --format xml", "no format 'xml'"),
        ("a.tsv --format jsonl", "--format is for -"),
        ("- --top-k 9", "there are 2 labels"),
    ],
)
def test_flags_that_do_not_go_together(
    typed: str, said: str, lora: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["katei", "predict", str(lora.run), *typed.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    written = capsys.readouterr()
    assert said in written.err
    assert written.out == ""
