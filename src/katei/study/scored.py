"""A run's predictions.parquet as outcomes: every method's answers on the test rows, seed by seed (or repeat by repeat of k-fold).

    predictions, trials → scored_rows → Scored(outcomes, rows, places)   as study.statistics compares them

Dimensions: S seeds or repeats · E rows · C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from katei.study.comparison import Outcome, Rows

PROBABILITY = "probability_"

Place = tuple[str, int]
"""The split a row comes from, and its line there."""
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Scored:
    """What every method answered on the same rows. `left_out`: methods whose answers are missing or not numbers."""

    outcomes: tuple[Outcome, ...]
    rows: Rows
    places: tuple[Place, ...]
    left_out: tuple[str, ...]


def role_of(columns: Columns) -> Sequence[str]:
    """What each row was to its trial: "valid" or "test". Runs on the given split have one column for it and the file."""
    return columns["role"] if "role" in columns else columns["split"]


def scored_rows(columns: Columns, label_names: Sequence[str], trials: Sequence[Mapping[str, Any]]) -> Scored | None:
    """The test rows of the trials that count in the comparison, and of the reference points; None where there are none.

    Of a tuned study these are the chosen settings', of a learning curve those with all training rows.
    """
    known = {t["name"]: t for t in trials}
    counts = {name for name, t in known.items() if t.get("chosen", True) and t.get("share", 1.0) == 1.0}
    role = role_of(columns)
    picked = [
        i for i, name in enumerate(columns["trial"]) if role[i] == "test" and (name in counts or name not in known)
    ]
    if not picked:
        return None
    class_of = {name: c for c, name in enumerate(label_names)}
    label_of: dict[Place, int] = {}
    for i in picked:
        label_of[columns["split"][i], columns["line"][i]] = class_of[columns["label"][i]]
    places = tuple(label_of)
    row_of = {place: e for e, place in enumerate(places)}

    cells: dict[
        str, dict[tuple[Any, int], dict[int, int]]
    ] = {}  # method → (repeat, which seed) → row → index in the table
    seeds: dict[tuple[str, Any, Any], list[Any]] = {}
    for i in picked:
        method, repeat, fold = columns["method"][i], _at(columns, "repeat", i), _at(columns, "fold", i)
        mine = seeds.setdefault((method, repeat, fold), [])
        if columns["seed"][i] not in mine:
            mine.append(columns["seed"][i])
        cell = repeat, mine.index(columns["seed"][i])
        row = row_of[columns["split"][i], columns["line"][i]]
        cells.setdefault(method, {}).setdefault(cell, {})[row] = i

    most = max(cells.values(), key=len)
    wanted = sorted(most, key=str)
    probabilities = np.array([columns[f"{PROBABILITY}{name}"] for name in label_names], dtype=np.float64).T
    outcomes, left_out, fold_SE = [], [], None
    for method, answered in cells.items():
        if sorted(answered, key=str) != wanted or any(len(row_E) != len(places) for row_E in answered.values()):
            left_out.append(method)
            continue
        index_SE = np.array([[answered[cell][e] for e in range(len(places))] for cell in wanted])
        probability_SEC = probabilities[index_SE]
        if not np.isfinite(probability_SEC).all():
            left_out.append(method)
            continue
        outcomes.append(Outcome(method, probability_SEC.argmax(-1), probability_SEC))
        if _at(columns, "fold", index_SE[0, 0]) is not None:
            fold_SE = np.array([[int(columns["fold"][i]) for i in line] for line in index_SE])
    if not outcomes:
        return None
    labels_E = np.array([label_of[place] for place in places])
    return Scored(tuple(outcomes), Rows(labels_E, tuple(label_names), fold_SE), places, tuple(left_out))


def _at(columns: Columns, name: str, i: int) -> Any:
    return columns[name][i] if name in columns else None
