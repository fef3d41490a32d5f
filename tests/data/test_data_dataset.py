"""Splits, columns, labels, warnings, the hub: what `load_dataset` makes of good data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from katei.core.errors import DataError
from katei.data import bundled_poems, cut_warnings, load_dataset, load_split

BALANCED = [(f"text {i}", str(i % 2)) for i in range(20)]


def write_tsv(path: Path, rows: list[tuple[str, str]], header: str = "text\tlabel") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "\n" + "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_importing_is_quick():
    code = "import sys, katei.data; print([m for m in ('torch', 'datasets', 'pyarrow', 'pandas', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# --- splits


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "Valid"])
def test_a_folder_of_splits_in_any_format(name, tmp_path):
    write_tsv(tmp_path / "train.tsv", BALANCED)
    (tmp_path / f"{name}.csv").write_text("label,text\n1,v\n0,w\n")  # columns go by name, not by place
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "t", "label": 1, "more": None}) + "\n")
    (tmp_path / "README.md").write_text("notes")
    dataset = load_dataset(str(tmp_path))
    assert dataset.valid is not None
    assert dataset.test is not None
    assert (dataset.valid.texts, dataset.valid.labels, dataset.valid.lines) == (("v", "w"), (1, 0), (2, 3))
    assert (dataset.test.texts, dataset.test.labels, dataset.test.lines) == (("t",), (1,), (1,))
    assert dataset.test.file == str(tmp_path / "test.jsonl")
    assert list(dataset.splits) == ["train", "valid", "test"]


def test_one_file_is_train(tmp_path):
    dataset = load_dataset(write_tsv(tmp_path / "test.tsv", BALANCED))
    assert dataset.valid is dataset.test is None
    assert len(dataset.train.texts) == 20


def test_a_split_that_is_not_read_is_said(tmp_path):
    write_tsv(tmp_path / "train.tsv", BALANCED)
    (tmp_path / "valid.txt").write_text("x")
    (tmp_path / "test.tsv.gz").write_bytes(b"\x1f\x8b")
    warnings = load_dataset(tmp_path).warnings
    assert len(warnings) == 2
    assert any("valid.txt is not read" in warning for warning in warnings)
    assert any("test.tsv.gz is not read" in warning for warning in warnings)


@pytest.mark.parametrize("data", ["poems", "poems-en"])
def test_the_bundled_poems(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset(data)
    assert {name: len(split.texts) for name, split in dataset.splits.items()} == {"train": 162, "valid": 54, "test": 54}
    assert {name: sorted((split.labels.count(0), split.labels.count(1))) for name, split in dataset.splits.items()} == {
        "train": [42, 120],
        "valid": [16, 38],
        "test": [16, 38],
    }
    assert (dataset.text_column, dataset.label_column, dataset.label_names) == ("poem", "label", ("0", "1"))
    assert dataset.warnings == ()


def test_a_folder_of_your_own_named_poems_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tsv(tmp_path / "poems" / "train.tsv", BALANCED)
    assert len(load_dataset("poems").train.texts) == 20


def test_load_split_takes_a_file_or_the_test_split(tmp_path):
    write_tsv(tmp_path / "d" / "train.tsv", BALANCED)
    write_tsv(tmp_path / "d" / "test.tsv", [("t", "1")], header="poem\tlabel")
    names = ("0", "1", "2")
    assert load_split(tmp_path / "d", text=None, label=None, label_names=names).labels == (1,)
    assert len(load_split(tmp_path / "d" / "train.tsv", text=None, label=None, label_names=names).texts) == 20
    assert len(load_split("poems", text="poem", label="label", label_names=names).texts) == 54
    with pytest.raises(DataError, match="no column 'text'") as caught:
        load_split(tmp_path / "d", text="text", label="label", label_names=names)
    assert "--text" in (caught.value.hint or "")


# --- columns


@pytest.mark.parametrize(
    ("header", "flags", "text", "label"),
    [
        ("poem\tlabel", {}, "poem", "label"),
        ("label\tpoem", {}, "poem", "label"),
        ("class\twords", {}, "words", "class"),
        ("voice\tsentence", {}, "sentence", "voice"),
        ("a\tb", {}, "a", "b"),
        ("Label\tText", {}, "Text", "Label"),
        (" text \tlabel ", {}, "text", "label"),
        ("本文\tラベル", {}, "本文", "ラベル"),
        ("text\tpoem", {}, "text", "poem"),
        ("text\tlabel", {"text": "label"}, "label", "text"),
        ("a\tb", {"label": "a"}, "b", "a"),
        ("a\tb", {"text": "b", "label": "a"}, "b", "a"),
        ("id\ttext\tlabel", {}, "text", "label"),
        ("id\tsentence\tlabel", {}, "sentence", "label"),
        ("id\tsentence\ttext\tlabel\tclass", {}, "text", "label"),
        ("id\tpoem\tvoice", {"label": "voice"}, "poem", "voice"),
        ("id\twords\tlabel", {"text": "words"}, "words", "label"),
        ("text\tlabel\ttarget", {"label": "target"}, "text", "target"),
    ],
)
def test_columns_named_or_inferred(header, flags, text, label, tmp_path):
    width = len(header.split("\t"))
    path = write_tsv(tmp_path / "a.tsv", [tuple(f"{r}{c}" for c in range(width)) for r in "xyx"], header)
    dataset = load_dataset(path, **flags)
    assert (dataset.text_column, dataset.label_column) == (text, label)


# --- labels


@pytest.mark.parametrize(
    ("written", "names", "indices"),
    [
        (["1", "0", "1"], ("0", "1"), (1, 0, 1)),
        (["10", "9", "-1"], ("-1", "9", "10"), (2, 1, 0)),
        (["2", "5", "2"], ("2", "5"), (0, 1, 0)),
        (["10", "9", "01"], ("01", "10", "9"), (1, 2, 0)),  # one is not written as an integer is: all are strings
        (["wabi", "kai", "wabi "], ("kai", "wabi"), (1, 0, 1)),
        (["静", "笑", "静"], ("笑", "静"), (1, 0, 1)),
        (["１", "1", "１"], ("1", "１"), (1, 0, 1)),
        (["1.0", "0.5", "1.0"], ("0.5", "1.0"), (1, 0, 1)),
        (["True", "False", "True"], ("False", "True"), (1, 0, 1)),
    ],
)
def test_labels_keep_their_names_and_have_an_order(written, names, indices, tmp_path):
    dataset = load_dataset(write_tsv(tmp_path / "a.tsv", [("abc"[i], label) for i, label in enumerate(written)]))
    assert dataset.label_names == names
    assert dataset.train.labels == indices


def test_a_number_is_the_same_label_in_every_format(tmp_path):
    write_tsv(tmp_path / "train.tsv", BALANCED)
    (tmp_path / "valid.jsonl").write_text('{"text": "v", "label": 1}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "t", "label": "1"}\n')
    dataset = load_dataset(tmp_path)
    assert dataset.valid is not None
    assert dataset.test is not None
    assert dataset.valid.labels == dataset.test.labels == (1,)


def test_a_header_that_is_also_a_label_is_taken_when_it_is_named(tmp_path):
    path = write_tsv(tmp_path / "a.tsv", [("a", "spam"), ("b", "ham")], header="message\tspam")
    with pytest.raises(DataError, match="looks like a row") as caught:
        load_dataset(path)
    assert "--label 'spam'" in (caught.value.hint or "")
    assert load_dataset(path, label="spam").label_names == ("ham", "spam")


def test_the_hash_is_of_the_contents(tmp_path):
    write_tsv(tmp_path / "a" / "train.tsv", BALANCED)
    write_tsv(tmp_path / "a" / "dev.tsv", BALANCED[:3])
    write_tsv(tmp_path / "b" / "train.tsv", [(label, text) for text, label in BALANCED], header="label\twords")
    write_tsv(tmp_path / "b" / "valid.tsv", [(label, text) for text, label in BALANCED[:3]], header="label\twords")
    one, other = load_dataset(tmp_path / "a"), load_dataset(tmp_path / "b")
    assert one.sha256 == other.sha256
    seen = {one.sha256}
    for changed in ([("text 0!", "0"), *BALANCED[1:]], [("text 0", "1"), *BALANCED[1:]], BALANCED[:-1], BALANCED[::-1]):
        seen.add(load_dataset(write_tsv(tmp_path / "a" / "train.tsv", changed).parent).sha256)
    assert len(seen) == 5


# --- warnings


def warnings_of(folder: Path, **splits: list[tuple[str, str]]) -> tuple[str, ...]:
    for name, rows in splits.items():
        write_tsv(folder / f"{name}.tsv", rows)
    return load_dataset(folder).warnings


def test_nothing_to_warn_of(tmp_path):
    assert warnings_of(tmp_path, train=BALANCED, test=[("t", "0"), ("u", "1")]) == ()


def test_leakage_is_counted_with_an_example(tmp_path):
    test = [("t", "0"), ("text  3", "1"), ("ｔｅｘｔ 4", "0")]  # the same but for a space, and for the width of letters
    (warning,) = warnings_of(tmp_path, train=BALANCED, test=test)
    assert warning.startswith("Leakage: 2 of 3 rows of test")
    assert "row 5 of train" in warning
    assert "row 3 of test" in warning


def test_leakage_is_said_for_each_pair_of_splits(tmp_path):
    split = [("text 0", "0"), ("text 1", "1")]
    warnings = warnings_of(tmp_path, train=BALANCED, valid=split, test=split)
    assert ["2 of 2 rows of valid" in w or "2 of 2 rows of test" in w for w in warnings] == [True] * 3
    assert "is in valid too" in warnings[2]


def test_duplicates_and_contradictions(tmp_path):
    same, other = warnings_of(tmp_path, train=[*BALANCED, ("text 0", "0"), ("text 0", "0"), ("text 1", "0")])
    assert same.startswith("Duplicates: 3 of 23 rows of train")
    assert "rows 2 and 22" in same
    assert other.startswith(
        "Contradiction: 1 text with more than one label: first row 3 of train ('1') and row 24 of train ('0')"
    )


def test_imbalance_and_few_rows_state_the_counts(tmp_path):
    imbalance, few = warnings_of(tmp_path, train=[*[(f"a{i}", "0") for i in range(30)], ("b", "1"), ("c", "1")])
    assert imbalance.startswith("Imbalance: of 32 rows of train 30 have the label '0', 2 '1'")
    assert "94%" in imbalance
    assert few.startswith("Few rows: 1 label of 2 with fewer than 8 rows in train: '1' 2.")


def test_a_label_that_a_split_lacks_and_labels_that_look_alike(tmp_path):
    (absent,) = warnings_of(tmp_path, train=BALANCED, test=[("t", "0")])
    assert absent.startswith("Absent: test has no row of 1 label: '1'")
    (alike,) = warnings_of(tmp_path / "b", train=[(f"t{i}", ("pos", "Pos")[i % 2]) for i in range(20)])
    assert "'Pos' and 'pos' count as two classes" in alike
    (alike,) = warnings_of(tmp_path / "c", train=[(f"t{i}", ("1", "1.0")[i % 2]) for i in range(20)])
    assert "'1' and '1.0'" in alike


def test_cut_warnings_say_how_many_and_how_much():
    assert cut_warnings({"train": [5, 6, 7], "test": []}, 7) == ()
    (warning,) = cut_warnings({"train": [10, 10, 30, 50], "test": [20]}, 20)
    assert warning.startswith(
        "train: 2 texts of 4 (50.0%) cut to 20 tokens; 40 tokens lost (40.0% of all, 50.0% of these texts)"
    )
    assert "--max-length 50" in warning


# --- the hub


def test_a_hub_id_without_a_network_says_what_else_can_be_given(tmp_path):
    """In a process of its own, with an endpoint nobody listens at: one attempt, no retries, no traceback."""
    code = (
        "from katei.core.errors import DataError; from katei.data import load_dataset\n"
        "try: load_dataset('owner/name')\n"
        "except DataError as e: print(e.file, e.message, e.hint, sep='|')\n"
    )
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60, check=True
    )
    file, message, hint = done.stdout.strip().split("|")
    assert file == "owner/name"
    assert "the hub cannot be reached" in message
    assert "train.tsv" in hint
    assert "poems" in hint
    assert "Retrying" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    import threading

    from katei.data import hub

    stop = threading.Event()
    error = hub._within(0.05, stop.wait)
    stop.set()
    assert isinstance(error, TimeoutError)


def test_offline_by_choice_asks_nobody(monkeypatch, tmp_path):
    from katei.data import hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "_probe", lambda name: pytest.fail("the hub was asked"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("not in the cache")))
    with pytest.raises(DataError, match="not in the cache"):
        load_dataset("owner/name")


def test_a_hub_data_set_has_its_splits_and_the_names_of_its_classes(monkeypatch, tmp_path):
    import datasets

    from katei.data import hub

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})

    def table(labels: list[int]) -> datasets.Dataset:
        texts = [f"{len(labels)} {i}" for i in range(len(labels))]
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    asked = []
    answer = {"train": table([0, 1] * 10), "validation": table([1, 0]), "unsupervised": table([-1])}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_probe", lambda name: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *args: asked.append(args) or answer)
    dataset = load_dataset("owner/name:plain")
    assert asked == [("owner/name", "plain")]
    assert dataset.label_names == ("neg", "pos")
    assert dataset.valid is not None
    assert dataset.valid.labels == (1, 0)
    assert dataset.train.file == "owner/name:plain (train)"
    assert dataset.test is None
    answer["test"] = table([1, -1])  # a test split without its labels
    with pytest.raises(DataError, match="no label") as caught:
        load_dataset("owner/name")
    assert (caught.value.file, caught.value.row) == ("owner/name (test)", 2)


def test_bundled_poems_are_folders():
    assert (bundled_poems() / "train.tsv").is_file()
    assert bundled_poems("en").name == "en"
