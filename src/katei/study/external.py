"""Results obtained elsewhere, as a table → a comparison.

    predictions   method, row, label, and prediction or one probability_LABEL per class; optionally seed, fold
                  (a run's predictions.parquet is one: `line` counts as row, rows of other splits than test are left out)
    counts        method, correct, rows

Everything is checked first: a table in which methods were not scored on the same rows compares nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import numpy as np

from katei.core.errors import DataError, UserError, nearest
from katei.data.columns import one_column_hint
from katei.data.lines import user_path
from katei.data.tables import Records, read_records
from katei.study.comparison import Comparison, Counts, Labels, Outcome, Rows
from katei.study.spread import Floats
from katei.study.statistics import compare_counts, compare_outcomes

PROBABILITY = "probability_"
SHAPES = "give method, row, label, prediction (or probability_LABEL columns), or method, correct, rows"


def compare_file(path: str | Path, *, margin: float = 0.05, references: Sequence[str] = ()) -> Comparison:
    """Raises UserError for a table that cannot be compared, saying the file, the row and what to do."""
    records = read_records(user_path(path))
    if {"correct", "rows"} <= set(records.columns) and "label" not in records.columns:
        return compare_counts(_counts(records), margin=margin, references=references)
    outcomes, rows = _predictions(records)
    return compare_outcomes(outcomes, rows, margin=margin, references=references)


# -------------------------------------------------------------------- counts


def _counts(records: Records) -> list[Counts]:
    methods = _texts(records, "method")
    correct, rows = _integers(records, "correct"), _integers(records, "rows")
    first: dict[str, int] = {}
    for line, method, right, all_rows in zip(records.lines, methods, correct, rows, strict=True):
        if all_rows < 1:
            raise _wrong(records, line, f"'rows' is {all_rows}", "give how many rows the method was tested on")
        if not 0 <= right <= all_rows:
            raise _wrong(records, line, f"{right} correct of {all_rows} rows", "correct is a count, from 0 to rows")
        if method in first:
            what = f"the method '{method}' stands in row {first[method]} already"
            raise _wrong(records, line, what, "one line a method; of several seeds give predictions with a seed column")
        first[method] = line
    return [Counts(m, c, r) for m, c, r in zip(methods, correct, rows, strict=True)]


# -------------------------------------------------------------------- predictions


def _predictions(records: Records) -> tuple[list[Outcome], Rows]:
    columns = set(records.columns)
    row_column = "row" if "row" in columns or "line" not in columns else "line"
    for name in ("method", row_column, "label"):
        if name not in columns:
            raise _missing(records, name)
    probability_columns = [c for c in records.columns if c.startswith(PROBABILITY)]
    if "prediction" not in columns and not probability_columns:
        raise DataError("neither a prediction nor a probability_LABEL column", file=records.file, hint=SHAPES)
    methods, row_names, labels = (_texts(records, c) for c in ("method", row_column, "label"))
    predictions = _texts(records, "prediction") if "prediction" in columns else None
    if row_column == "line" and "role" in columns:  # a run's rows: with folds they are of more than one file
        row_names = tuple(f"{split} {line}" for split, line in zip(_texts(records, "split"), row_names, strict=True))
    repeated = _has(records, "repeat")  # of k-fold in a run: each fold of a repeat has a seed of its own
    seeds = _texts(records, "repeat" if repeated else "seed") if repeated or "seed" in columns else ("",) * len(methods)
    folds = _texts(records, "fold") if _has(records, "fold") else None
    probability_RC = _probabilities(records, probability_columns) if probability_columns else None
    keep = _test_rows(records)
    names = _classes(records, labels, predictions, probability_columns, keep)
    class_of = {name: i for i, name in enumerate(names)}

    label_of: dict[str, tuple[str, int]] = {}
    fold_of: dict[tuple[str, str], tuple[str, int]] = {}
    found: dict[str, dict[tuple[str, str], int]] = {}  # method → (seed, row) → index in the table
    for i in keep:
        line, method, row, seed = records.lines[i], methods[i], row_names[i], seeds[i]
        known, where = label_of.setdefault(row, (labels[i], line))
        if known != labels[i]:
            what = f"row '{row}' has the label '{labels[i]}' here and '{known}' in row {where} of the file"
            raise _wrong(records, line, what, "a row has one label; number rows so that no two texts share a number")
        mine = found.setdefault(method, {})
        if (seed, row) in mine:
            of_seed = f" with seed '{seed}'" if seed else ""
            what = f"method '{method}' has row '{row}'{of_seed} twice, first in row {records.lines[mine[seed, row]]} of the file"
            hint = "keep one"
            if not seed:
                hint += "; for several seeds or repeats add a column seed, for k-fold a column fold"
            raise _wrong(records, line, what, hint)
        mine[seed, row] = i
        if folds is not None:
            known, where = fold_of.setdefault((seed, row), (folds[i], line))
            if known != folds[i]:
                what = f"row '{row}' is in fold '{folds[i]}' here and in fold '{known}' in row {where} of the file"
                raise _wrong(records, line, what, "test every method in the same folds")
    _check_same(records, found)

    seed_names = list(dict.fromkeys(seed for seed, _ in next(iter(found.values()))))
    order = list(label_of)
    if len(seed_names) * len(order) != len(next(iter(found.values()))):
        seed = next(s for s in seed_names if any((s, row) not in next(iter(found.values())) for row in order))
        row = next(row for row in order if (seed, row) not in next(iter(found.values())))
        raise DataError(
            f"seed '{seed}' lacks row '{row}'", file=records.file, hint="score the same rows with every seed"
        )
    outcomes = []
    for method, mine in found.items():
        index_SE = np.array([[mine[seed, row] for row in order] for seed in seed_names])
        probability_SEC = None if probability_RC is None else probability_RC[index_SE]
        if predictions is not None:
            prediction_SE = np.array([[class_of[predictions[i]] for i in line] for line in index_SE])
        else:
            assert probability_SEC is not None
            prediction_SE = probability_SEC.argmax(-1)
        outcomes.append(Outcome(method, prediction_SE, probability_SEC))
    labels_E = np.array([class_of[label_of[row][0]] for row in order])
    fold_SE = None if folds is None else _folds(records, fold_of, seed_names, order)
    return outcomes, Rows(labels_E, tuple(names), fold_SE)


def _test_rows(records: Records) -> list[int]:
    """Every row; of a run's predictions those of test, or of valid where there is no test."""
    everything = list(range(len(records.lines)))
    if "split" not in records.columns:
        return everything
    splits = _texts(records, "role" if "role" in records.columns else "split")
    for wanted in ("test", "valid"):
        if kept := [i for i in everything if splits[i] == wanted]:
            return kept
    raise DataError("no row of the split 'test'", file=records.file, hint="leave the column split out to use every row")


def _probabilities(records: Records, columns: Sequence[str]) -> Floats:
    if len(columns) == 1:
        hint = f"add the other classes' columns, such as {PROBABILITY}0 and {PROBABILITY}1"
        raise DataError(f"one class alone has probabilities: '{columns[0]}'", file=records.file, hint=hint)
    values = np.array([_numbers(records, c) for c in columns]).T
    for line, row in zip(records.lines, values, strict=True):
        for column, value in zip(columns, row, strict=True):
            if not 0 <= value <= 1:
                raise _wrong(records, line, f"'{column}' is {value:g}", "a probability is a number from 0 to 1")
        if abs(row.sum() - 1) > 0.01:
            raise _wrong(
                records, line, f"the probabilities add up to {row.sum():.3f}, not 1", "give one column for each class"
            )
    return values


def _classes(
    records: Records,
    labels: Sequence[str],
    predictions: Sequence[str] | None,
    columns: Sequence[str],
    keep: Sequence[int],
) -> list[str]:
    """The names of the classes: of the probability columns, else every label and prediction."""
    if not columns:
        return sorted(
            {labels[i] for i in keep} | {predictions[i] for i in keep} if predictions else set(labels), key=_numeric
        )
    names = [c.removeprefix(PROBABILITY) for c in columns]
    for i in keep:
        for what, value in (("label", labels[i]), ("prediction", predictions[i] if predictions else names[0])):
            if value not in names:
                hint = f"add a column '{PROBABILITY}{value}', or mend the {what}; {nearest(value, names)}"
                raise _wrong(records, records.lines[i], f"the {what} '{value}' has no probability column", hint)
    return names


def _check_same(records: Records, found: dict[str, dict[tuple[str, str], int]]) -> None:
    """Every method has the same seeds × rows as the first."""
    (first, wanted), *others = found.items()
    for method, mine in others:
        for a, b, here, there in ((first, method, wanted, mine), (method, first, mine, wanted)):
            missing = next((key for key in here if key not in there), None)
            if missing is not None:
                seed, row = missing
                of_seed = f" with seed '{seed}'" if seed else ""
                what = f"method '{a}' was scored on row '{row}'{of_seed}, method '{b}' was not"
                hint = "score every method on the same rows and seeds, or leave the others out"
                raise _wrong(records, records.lines[here[missing]], what, hint)


def _folds(
    records: Records, fold_of: dict[tuple[str, str], tuple[str, int]], seeds: Sequence[str], order: Sequence[str]
) -> Labels:
    names = list(dict.fromkeys(fold for fold, _ in fold_of.values()))
    fold_SE = np.array([[names.index(fold_of[seed, row][0]) for row in order] for seed in seeds])
    counts = {len(np.unique(fold_E)) for fold_E in fold_SE}
    if counts == {1}:
        raise DataError("a single fold", file=records.file, hint="leave the column fold out: these are plain test rows")
    if len(counts) > 1:
        hint = "make every repeat of the same number of folds"
        raise DataError(f"repeats of {' and '.join(map(str, sorted(counts)))} folds", file=records.file, hint=hint)
    return fold_SE


# -------------------------------------------------------------------- values


def _has(records: Records, name: str) -> bool:
    """A column with something in it: a run writes `repeat` and `fold` also where there are none."""
    return name in records.columns and any(value not in (None, "") for value in records.column(name))


def _texts(records: Records, name: str) -> tuple[str, ...]:
    if name not in records.columns:
        raise _missing(records, name)
    texts = []
    for line, value in zip(records.lines, records.column(name), strict=True):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or (isinstance(value, float) and not isfinite(value)) or not str(value).strip():
            raise _wrong(records, line, f"'{name}' is empty", "fill it in, or delete the row")
        texts.append(str(value).strip())
    return tuple(texts)


def _numbers(records: Records, name: str) -> list[float]:
    numbers = []
    for line, value in zip(records.lines, records.column(name), strict=True):
        try:
            if isinstance(value, bool) or value is None:
                raise ValueError
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            shown = "empty" if value in (None, "") else f"'{value}'"
            raise _wrong(records, line, f"'{name}' is {shown}, not a number", "write it as 0.93") from None
        if not isfinite(number):
            raise _wrong(
                records, line, f"'{name}' is {number}", "a score that could not be computed cannot be compared"
            )
        numbers.append(number)
    return numbers


def _integers(records: Records, name: str) -> list[int]:
    numbers = _numbers(records, name)
    for line, number in zip(records.lines, numbers, strict=True):
        if not number.is_integer():
            raise _wrong(
                records, line, f"'{name}' is {number:g}, but it counts rows", "give a whole number, such as 52"
            )
    return [int(number) for number in numbers]


def _numeric(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _missing(records: Records, name: str) -> UserError:
    here = f"{SHAPES}; here are: {', '.join(records.columns)}"
    hint = one_column_hint(records.columns) if len(records.columns) == 1 else here
    return DataError(f"no column '{name}'", file=records.file, hint=hint)


def _wrong(records: Records, line: int, what: str, hint: str) -> UserError:
    return DataError(what, file=records.file, row=line, hint=hint)
