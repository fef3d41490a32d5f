"""Which rows train, choose and judge: the split as given, several seeds, or repeated stratified folds.

    recipe, labels of each split → design_study → StudyDesign: cells that every method is trained in

    given, seeds   train │ valid │ test, as the data have them; once per seed
    folds          train + valid in k stratified parts, each the test rows once per repeat; of the others a stratified fifth is
                   valid and chooses epoch and setting, so no test row ever chooses. The data's own test rows are left alone.

Row numbers count through train, valid and test, in this order: the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from katei.core.errors import RecipeError
from katei.study.comparison import ALPHA
from katei.study.power import Design, minimum_detectable_difference
from katei.study.recipe import Recipe

VALID_SHARE = 0.2
"""Of a fold's training rows, held back to choose by."""
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Cell:
    """One training part, the rows that choose and the rows that judge; the same for every method."""

    repeat: int | None
    fold: int | None
    seed: int
    train: tuple[int, ...]
    valid: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class StudyDesign:
    """The cells, and what they can be expected to show."""

    kind: str  # given, seeds or folds
    cells: tuple[Cell, ...]
    folds: int
    repeats: int
    seeds: int
    rows: int
    """Rows that are scored, in every repeat or with every seed."""
    detectable: float | None
    """Difference in accuracy that such a study sees in 8 of 10 cases; None without test rows, or where it sees none."""
    text: str

    @property
    def scored(self) -> tuple[int, ...]:
        """The rows that are scored, in their order."""
        return tuple(sorted({row for cell in self.cells for row in cell.test}))

    def suffix(self, cell: Cell) -> str:
        """What tells a cell's trials from another's: "-r0f1", "-seed1", or nothing."""
        if cell.fold is not None:
            return f"-r{cell.repeat}f{cell.fold}"
        return f"-seed{cell.seed}" if self.seeds > 1 else ""

    def as_json(self, tune: int) -> dict[str, Any]:
        first = self.cells[0]
        return {
            "kind": self.kind,
            "rows": self.rows,
            "folds": self.folds,
            "repeats": self.repeats,
            "seeds": self.seeds,
            "tune": tune,
            "train_rows": len(first.train),
            "valid_rows": len(first.valid),
            "test_rows": len(first.test),
            "minimum_detectable_difference": self.detectable,
            "text": self.text,
        }


def design_study(recipe: Recipe, labels: Mapping[str, Sequence[int]], label_names: Sequence[str]) -> StudyDesign:
    """Raises RecipeError where a class has too few rows for the folds."""
    if recipe.folds:
        return _folds(recipe, labels, label_names)
    starts = np.cumsum([0, *(len(labels.get(name, ())) for name in SPLITS)]).tolist()
    train, valid, test = (tuple(range(a, b)) for a, b in pairwise(starts))
    cells = tuple(Cell(None, None, seed, train, valid, test) for seed in recipe.seeds)
    seeds = len(recipe.seeds)
    detectable = _detectable(recipe, len(test), seeds=seeds)
    where = f"trained on {len(train)} rows" + (f" with {seeds} seeds" if seeds > 1 else "")
    text = f"The split as given: {where}, scored on {len(test)} test rows. " if test else f"Every method is {where}. "
    text += _says(detectable, len(test), recipe)
    kind = "seeds" if seeds > 1 else "given"
    return StudyDesign(kind, cells, 0, 1, seeds, len(test), detectable, text)


def _folds(recipe: Recipe, labels: Mapping[str, Sequence[int]], label_names: Sequence[str]) -> StudyDesign:
    from sklearn.model_selection import RepeatedStratifiedKFold

    label_E = np.array([*labels["train"], *labels.get("valid", ())])
    _check_rows(recipe, label_E, label_names)
    seed = recipe.seeds[0]
    splitter = RepeatedStratifiedKFold(n_splits=recipe.folds, n_repeats=recipe.repeats, random_state=seed)
    cells = []
    for i, (others, test) in enumerate(splitter.split(label_E, label_E)):
        train, valid = hold_out(others, label_E, seed + i)
        cells.append(Cell(*divmod(i, recipe.folds), seed + i, train, valid, tuple(test.tolist())))
    rows = len(label_E)
    detectable = _detectable(recipe, rows, seeds=recipe.repeats, folds=recipe.folds)
    times = f", {recipe.repeats} times over" if recipe.repeats > 1 else ""
    source = "train and valid" if labels.get("valid") else "train"
    text = (
        f"{recipe.folds} stratified folds of the {rows} rows of {source}{times}: each row is tested once per repeat by a trial "
        f"that never saw it, trained on about {len(cells[0].train)} rows; {len(cells[0].valid)} more choose the epoch"
        f"{' and the setting' if recipe.tune else ''}. "
    )
    if labels.get("test"):
        text += f"The data's own {len(labels['test'])} test rows are left alone. "
    text += _says(detectable, rows, recipe)
    return StudyDesign("folds", tuple(cells), recipe.folds, recipe.repeats, 1, rows, detectable, text)


def hold_out(
    rows: Sequence[int] | np.ndarray[Any, Any], label_E: np.ndarray[Any, Any], seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(train, valid): a stratified fifth of the rows is valid, a row of each class at least stays in train."""
    from sklearn.model_selection import StratifiedShuffleSplit

    rows = np.asarray(rows)
    classes = len(np.unique(label_E[rows]))
    held = max(round(VALID_SHARE * len(rows)), classes)
    splitter = StratifiedShuffleSplit(1, test_size=held, random_state=seed)
    train, valid = next(splitter.split(rows, label_E[rows]))
    return tuple(np.sort(rows[train]).tolist()), tuple(np.sort(rows[valid]).tolist())


def _check_rows(recipe: Recipe, label_E: np.ndarray[Any, Any], label_names: Sequence[str]) -> None:
    """Each fold tests a row of every class, and leaves two to train and to choose by."""
    counts = np.bincount(label_E, minlength=len(label_names))
    rarest, fewest = label_names[int(counts.argmin())], int(counts.min())

    def enough(folds: int) -> bool:
        return fewest >= folds and fewest - -(-fewest // folds) >= 2

    if enough(recipe.folds):
        return
    fewer = next((k for k in range(min(recipe.folds, fewest), 1, -1) if enough(k)), None)
    raise RecipeError(
        f"{recipe.folds} folds, but the class '{rarest}' has {fewest} row{'s' * (fewest != 1)} in train and valid",
        hint=f"--folds {fewer}, or more rows of '{rarest}'" if fewer else f"more rows of '{rarest}', or no --folds",
    )


def _detectable(recipe: Recipe, rows: int, *, seeds: int = 1, folds: int = 0) -> float | None:
    if not rows:
        return None
    compared = len(set(recipe.methods) - set(recipe.references)) or 1
    alpha = ALPHA / max(compared * (compared - 1) // 2, 1)
    return minimum_detectable_difference(Design(rows, seeds, folds=folds, alpha=alpha))


def _says(detectable: float | None, rows: int, recipe: Recipe) -> str:
    if not rows:
        return "Without test rows nothing can be said about accuracy."
    if len(recipe.methods) == 1 and not recipe.references:
        return "There is one method, and nothing to compare it with."
    if detectable is None:
        return "It can be expected to show no difference between two methods, however large."
    return (
        f"Between two methods of about 0.9 accuracy it can be expected (8 times in 10, all pairs corrected for) to show "
        f"differences of {detectable:.2f} and more."
    )
