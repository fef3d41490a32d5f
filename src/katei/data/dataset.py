"""DATA → the splits of a labelled data set, checked before any model is loaded; and what to be warned of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from katei.core.errors import DataError, nearest
from katei.data.columns import choose_columns
from katei.data.hub import ELSE, HUB_ID, load_hub
from katei.data.lines import not_found, reading, user_path
from katei.data.tables import READERS, Records, read_records, texts_of
from katei.data.warnings import data_warnings

SPLIT_OF_NAME = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
BUNDLED = {"poems": "ja", "poems-en": "en"}


@dataclass(frozen=True)
class Split:
    """One table of rows."""

    file: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]  # class index, 0 … classes - 1
    lines: tuple[int, ...]  # 1-based line of the file for each row (the header is line 1)


@dataclass(frozen=True)
class Dataset:
    train: Split
    valid: Split | None
    test: Split | None
    text_column: str
    label_column: str
    label_names: tuple[str, ...]  # class index → the label as written; integers in numeric order, else by code point
    warnings: tuple[str, ...]
    sha256: str  # of the texts and labels of all splits

    @property
    def splits(self) -> dict[str, Split]:
        named = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}


def bundled_poems(language: str = "ja") -> Path:
    """The folder of the poems written for this project: `ja` or `en`."""
    if language not in BUNDLED.values():
        raise DataError(f"no bundled poems in '{language}'", hint=nearest(language, BUNDLED.values()))
    return Path(__file__).parent / "poems" / language


def load_dataset(data: str | Path, *, text: str | None = None, label: str | None = None) -> Dataset:
    """A folder with train (valid, test), one file (train alone), a hub id, `poems` or `poems-en`; checked."""
    source = _find(data)
    if "train" not in source.splits:
        raise _no_split(source, "train", "name the file of training rows train.tsv (or .csv, .jsonl, .parquet)")
    tables = {name: source.splits[name]() for name in ("train", "valid", "test") if name in source.splits}
    train = tables["train"]
    text_column, label_column = choose_columns(train.columns, text=text, label=label, file=train.file)
    labels = {}
    for name, table in tables.items():
        for column in (text_column, label_column):
            if column not in table.columns:
                hint = f"name the columns as in {train.file}; here they are: {', '.join(table.columns)}"
                raise DataError(f"no column '{column}', which train has", file=table.file, hint=hint)
        labels[name] = _labels(table, label_column)
    label_names = _label_names(train, labels["train"], label_column, header_given=label is not None)
    splits = {name: _split(table, text_column, labels[name], label_names) for name, table in tables.items()}
    return Dataset(
        splits["train"],
        splits.get("valid"),
        splits.get("test"),
        text_column,
        label_column,
        label_names,
        (*source.warnings, *data_warnings(splits, label_names)),
        _digest(splits, label_names),
    )


def load_split(file: str | Path, *, text: str | None, label: str | None, label_names: Sequence[str]) -> Split:
    """One labelled table to evaluate: a file, or the test split of a folder, hub id or bundled set.

    Its labels must be among `label_names`, those the adapter was trained on.
    """
    source = _find(file)
    name = "train" if source.single else "test"
    if name not in source.splits:
        raise _no_split(source, name, "give the file itself, or name one of them test.tsv")
    table = source.splits[name]()
    text_column, label_column = choose_columns(table.columns, text=text, label=label, file=table.file)
    return _split(table, text_column, _labels(table, label_column), label_names)


# --- where the rows are


@dataclass(frozen=True)
class _Source:
    data: str
    splits: Mapping[str, Callable[[], Records]]
    single: bool = False  # one file, whose name says nothing about splits
    warnings: tuple[str, ...] = ()


def _find(data: str | Path) -> _Source:
    if not str(data).strip():
        raise DataError("no data given", hint=ELSE)
    path = user_path(data)
    with reading(path):
        if path.is_dir():
            return _folder(path)
        if path.exists():
            return _Source(str(path), {"train": partial(read_records, path)}, single=True)
        if str(data) in BUNDLED:
            return _folder(bundled_poems(BUNDLED[str(data)]))
        if "://" in str(data):
            raise DataError(
                "an address, where a folder or a file is expected", file=str(data), hint=f"download it first; {ELSE}"
            )
        local = path.suffix.lower() in READERS or path.parent.is_dir()  # a path with a typo, rather than owner/name
        if not local and HUB_ID.fullmatch(str(data)):
            return _hub(str(data))
        raise not_found(path, f"else {ELSE}")


def _folder(folder: Path) -> _Source:
    found: dict[str, Path] = {}
    warnings = []
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        name, _, rest = entry.name.lower().partition(".")
        split = SPLIT_OF_NAME.get(name)
        if split is None or not rest or entry.is_dir():
            continue
        if rest.startswith("predictions."):
            continue  # what `katei predict` writes beside its input
        if f".{rest}" not in READERS:
            warnings.append(f"{entry} is not read: a split's name is {name} and one of {', '.join(READERS)}.")
        elif split in found:
            what = f"two files for the {split} split: {found[split].name} and {entry.name}"
            raise DataError(what, file=folder, hint="keep one: remove or rename the other")
        else:
            found[split] = entry
    if not found:
        names = ", ".join(entry.name for entry in entries[:8]) or "nothing"
        hint = "name them train.tsv, valid.tsv, test.tsv (or .csv, .jsonl, .parquet), or give one file"
        raise DataError(f"no train, valid or test table in this folder, but {names}", file=folder, hint=hint)
    readers = {name: partial(read_records, path) for name, path in found.items()}
    return _Source(str(folder), readers, warnings=tuple(warnings))


def _hub(name: str) -> _Source:
    splits: dict[str, Callable[[], Records]] = {}
    for split, records in load_hub(name).items():
        known = SPLIT_OF_NAME.get(split)
        if known is None:
            continue
        if known in splits:
            raise DataError(f"two splits for {known}", file=name, hint=f"save the one you want as a file; {ELSE}")
        splits[known] = partial(_given, records)
    return _Source(name, splits)


def _given(records: Records) -> Records:
    return records


def _no_split(source: _Source, name: str, hint: str) -> DataError:
    there = ", ".join(source.splits) or "none that is named train, valid or test"
    hint = "; ".join([*(warning.rstrip(".") for warning in source.warnings), hint])
    return DataError(f"no {name} split; there is: {there}", file=source.data, hint=hint)


# --- labels

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def _labels(table: Records, column: str) -> list[str]:
    """The label of each row as it is written. A column holds integers or strings, not both."""
    labels: list[str] = []
    kinds: dict[type, int] = {}
    for line, value in zip(table.lines, table.column(column), strict=True):
        name = value.strip() if isinstance(value, str) else value
        what, hint = None, "fill it in, or delete the row"
        if name is None or name == "":
            what = f"no label: '{column}' is missing or empty"
        elif (isinstance(name, float) and name != name) or (isinstance(name, str) and name.lower() == "nan"):
            what = f"no label: '{column}' is NaN"
        elif isinstance(name, bool) or not isinstance(name, int | str):
            what = f"the label in '{column}' is {_a(name)}: {str(name)[:40]}"
            hint = 'labels are integers or strings: write 1 or "1"; another column is named with --label'
        elif isinstance(name, str) and "\0" in name:
            what, hint = f"the label in '{column}' holds a NUL character", "remove it"
        elif kinds and type(name) not in kinds:
            first = next(iter(kinds.values()))
            what = f"the label in '{column}' is {_a(name)}, the one in row {first} {'a string' if isinstance(name, int) else 'an integer'}"
            hint = "write all labels as integers or all as strings"
        if what is not None:
            raise DataError(what, file=table.file, row=line, hint=hint)
        kinds.setdefault(type(name), line)
        labels.append(str(name))
    return labels


def _a(value: object) -> str:
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number with a point",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _label_names(train: Records, labels: Sequence[str], column: str, *, header_given: bool) -> tuple[str, ...]:
    """The classes of train in order; or why these cannot be classes."""
    classes = set(labels)
    if column in classes and not header_given and Path(train.file).suffix.lower() in (".tsv", ".csv"):
        hint = f"begin the file with a line that names the columns, such as text⇥label; if '{column}' is the name, give --label '{column}'"
        raise DataError(
            "the first line looks like a row, not like the names of the columns", file=train.file, row=1, hint=hint
        )
    if len(classes) == 1:
        hint = "a classifier needs rows of two classes or more; is this the label column? --label names another"
        raise DataError(f"all {len(labels)} rows have the label '{labels[0]}'", file=train.file, hint=hint)
    if len(classes) == len(labels) > 10:
        hint = "a class needs several rows; is this the label column? --label names another"
        raise DataError(
            f"each of the {len(labels)} rows has a label of its own in '{column}'", file=train.file, hint=hint
        )
    if all(_INTEGER.fullmatch(name) for name in classes):
        return tuple(sorted(classes, key=int))
    return tuple(sorted(classes))


def _split(table: Records, text_column: str, labels: Sequence[str], label_names: Sequence[str]) -> Split:
    index = {name: i for i, name in enumerate(label_names)}
    for line, name in zip(table.lines, labels, strict=True):
        if name not in index:
            hint = f"correct it, or add rows of this label to train; {nearest(name, list(label_names)[:20])}"
            raise DataError(f"the label '{name}' is not in the training rows", file=table.file, row=line, hint=hint)
    return Split(table.file, texts_of(table, text_column), tuple(index[name] for name in labels), tuple(table.lines))


def _digest(splits: Mapping[str, Split], label_names: Sequence[str]) -> str:
    digest = sha256()
    for name, split in splits.items():
        for text, label in zip(split.texts, split.labels, strict=True):
            digest.update(json.dumps([name, text, label_names[label]]).encode() + b"\n")
    return digest.hexdigest()
