"""What a user is warned of: sentences, none of which stops a run."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

FEW_ROWS = 8  # of a class in train: below, a warning
IMBALANCE = 5.0  # rows of the largest class over those of the smallest: from here on, a warning

Rows = list[tuple[str, int, int]]  # split, line and class of each row with one text


class SplitLike(Protocol):
    @property
    def texts(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[int]: ...
    @property
    def lines(self) -> Sequence[int]: ...


def cut_warnings(lengths: Mapping[str, Sequence[int]], max_length: int) -> tuple[str, ...]:
    """A sentence for each split with texts longer than `max_length`. `lengths`: the tokens of each text, uncut."""
    found = []
    for name, tokens in lengths.items():
        cut = [n for n in tokens if n > max_length]
        if cut:
            lost = sum(cut) - max_length * len(cut)
            found.append(
                f"{name}: {_count(len(cut), 'text')} of {len(tokens)} ({len(cut) / len(tokens):.1%}) cut to {max_length} tokens; "
                f"{_count(lost, 'token')} lost ({lost / sum(tokens):.1%} of all, {lost / sum(cut):.1%} of these texts). "
                f"--max-length {max(cut)} would keep everything."
            )
    return tuple(found)


def data_warnings(splits: Mapping[str, SplitLike], label_names: Sequence[str]) -> list[str]:
    train = splits["train"]
    where: dict[str, list[tuple[str, int, int]]] = defaultdict(
        list
    )  # text → (split, line, class) of each row that has it
    for name, split in splits.items():
        for text, line, label in zip(split.texts, split.lines, split.labels, strict=True):
            where[_same_when(text)].append((name, line, label))
    repeated = {text: rows for text, rows in where.items() if len(rows) > 1}
    return [
        *_leaks(repeated, splits),
        *_duplicates(repeated, splits),
        *_contradictions(repeated, label_names),
        *_counts(train, label_names),
        *_absent(splits, label_names),
        *_look_alikes(label_names),
    ]


def _same_when(text: str) -> str:
    """Two texts are the same when they differ in spaces and in width (Ａ, A) alone."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _leaks(repeated: Mapping[str, Rows], splits: Mapping[str, SplitLike]) -> list[str]:
    found = []
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        both = [(t, rows) for t, rows in repeated.items() if {a, b} <= {name for name, *_ in rows}]
        if both:
            text, rows = both[0]
            lines = {name: line for name, line, _ in reversed(rows)}
            of_b = sum(name == b for _, rows in both for name, *_ in rows)
            found.append(
                f"Leakage: {of_b} of {len(splits[b].texts)} rows of {b} have a text that is in {a} too, so scores on {b} flatter: "
                f"first row {lines[b]} of {b} and row {lines[a]} of {a}, {_quoted(text)}."
            )
    return found


def _duplicates(repeated: Mapping[str, Rows], splits: Mapping[str, SplitLike]) -> list[str]:
    found = []
    for name, split in splits.items():
        lines_of = {text: [line for n, line, _ in rows if n == name] for text, rows in repeated.items()}
        twice = {text: lines for text, lines in lines_of.items() if len(lines) > 1}
        if twice:
            text, lines = next(iter(twice.items()))
            extra = sum(len(lines) - 1 for lines in twice.values())
            found.append(
                f"Duplicates: {extra} of {len(split.texts)} rows of {name} repeat the text of another: "
                f"first rows {lines[0]} and {lines[1]}, {_quoted(text)}."
            )
    return found


def _contradictions(repeated: Mapping[str, Rows], label_names: Sequence[str]) -> list[str]:
    both = [(text, rows) for text, rows in repeated.items() if len({label for *_, label in rows}) > 1]
    if not both:
        return []
    text, rows = both[0]
    name, line, label = rows[0]
    name2, line2, label2 = next(row for row in rows if row[2] != label)
    return [
        f"Contradiction: {_count(len(both), 'text')} with more than one label: first row {line} of {name} "
        f"('{label_names[label]}') and row {line2} of {name2} ('{label_names[label2]}'), {_quoted(text)}."
    ]


def _counts(train: SplitLike, label_names: Sequence[str]) -> list[str]:
    count = Counter(train.labels)
    ordered = sorted(range(len(label_names)), key=lambda c: count[c])
    largest, smallest = count[ordered[-1]], count[ordered[0]]
    found = []
    if largest >= IMBALANCE * smallest:
        found.append(
            f"Imbalance: of {len(train.labels)} rows of train {largest} have the label '{label_names[ordered[-1]]}', "
            f"{smallest} '{label_names[ordered[0]]}'; always answering the first is right in {largest / len(train.labels):.0%}."
        )
    few = [c for c in ordered if count[c] < FEW_ROWS]
    if few:
        shown = ", ".join(f"'{label_names[c]}' {count[c]}" for c in few[:8]) + (", …" if len(few) > 8 else "")
        found.append(
            f"Few rows: {_count(len(few), 'label')} of {len(label_names)} with fewer than {FEW_ROWS} rows in train: {shown}."
        )
    return found


def _absent(splits: Mapping[str, SplitLike], label_names: Sequence[str]) -> list[str]:
    found = []
    for name, split in splits.items():
        missing = [label for c, label in enumerate(label_names) if c not in set(split.labels)]
        if missing:
            shown = ", ".join(f"'{label}'" for label in missing[:8]) + (", …" if len(missing) > 8 else "")
            found.append(
                f"Absent: {name} has no row of {_count(len(missing), 'label')}: {shown}; ROC AUC is not defined there."
            )
    return found


def _look_alikes(label_names: Sequence[str]) -> list[str]:
    found = []
    seen: dict[object, str] = {}
    for name in label_names:
        key: object = unicodedata.normalize("NFKC", name).casefold()
        with suppress(ValueError):
            key = float(str(key))
        if key in seen:
            found.append(f"Look-alikes: the labels '{seen[key]}' and '{name}' count as two classes.")
        seen.setdefault(key, name)
    return found


def _quoted(text: str, width: int = 40) -> str:
    return f'"{text[:width]}…"' if len(text) > width else f'"{text}"'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
