"""A study's trials: every method with every setting in every cell, and what each came to.

recipe, design → planned_trials → Planned  --training.py-->  Ended
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from katei.core.errors import RecipeError
from katei.engine.lockstep import Epoch, Trial
from katei.methods.full import Full
from katei.study.design import Cell, StudyDesign
from katei.study.recipe import Recipe
from katei.study.tuning import Setting, draw_settings


@dataclass(frozen=True)
class Planned:
    """A trial, and its place in the study. `share`: of the cell's training rows, for a learning curve."""

    trial: Trial
    cell: Cell
    setting: Setting
    share: float = 1.0

    @property
    def method(self) -> str:
        return self.trial.method.name

    @property
    def race(self) -> tuple[str, Cell, float]:
        """Trials of which one is chosen."""
        return self.method, self.cell, self.share


@dataclass
class Ended:
    """What a trial came to. `probabilities` by role ("valid", "test") of the trials that were scored."""

    planned: Planned
    epochs: list[Epoch]
    finished: str | None
    best_epoch: int | None
    trainable: int
    total: int
    ranks: dict[str, int] | None = None
    probabilities: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    chosen: bool = False

    @property
    def trial(self) -> Trial:
        return self.planned.trial

    @property
    def test_EC(self) -> NDArray[np.float64] | None:
        """Probabilities of the cell's test rows; None where there are none, or they are not numbers."""
        found = self.probabilities.get("test")
        return found if found is not None and len(found) and np.isfinite(found).all() else None


def planned_trials(recipe: Recipe, design: StudyDesign) -> list[Planned]:
    """Method by method and setting by setting, so that rows that share a pass share few adapters. Raises RecipeError."""
    planned = []
    for name in recipe.trained:
        for setting in draw_settings(recipe, name):
            for cell in design.cells:
                number = "" if setting.number is None else f"-s{setting.number}"
                label = f"{name}{design.suffix(cell)}{number}"
                trial = Trial(label, setting.method, cell.seed, setting.training, cell.train, cell.valid)
                planned.append(Planned(trial, cell, setting))
    _check_no_valid(planned, recipe)
    return planned


def on_share(planned: Planned, name: str, rows: tuple[int, ...], share: float) -> Planned:
    return replace(planned, trial=replace(planned.trial, name=name, rows=rows), share=share)


def groups_of(planned: Iterable[Planned]) -> list[list[Planned]]:
    """Trials that train together: all over the shared base, then each full fine-tuning by itself."""
    planned = list(planned)
    shared = [p for p in planned if not isinstance(p.trial.method, Full)]
    return ([shared] if shared else []) + [[p] for p in planned if isinstance(p.trial.method, Full)]


def by_method(ended: Sequence[Ended]) -> dict[str, list[Ended]]:
    """In order of first appearance; `ended` has each method's trials side by side."""
    return {name: list(mine) for name, mine in groupby(ended, key=lambda e: e.planned.method)}


def _check_no_valid(planned: Sequence[Planned], recipe: Recipe) -> None:
    if all(p.cell.valid for p in planned):
        return
    if recipe.tune:
        raise RecipeError(
            "tuning chooses by validation rows, and there are none", hint="add valid.tsv to the data, or --folds 5"
        )
    for trial in (p.trial for p in planned):
        if trial.training.keep == "best" or trial.training.patience:
            setting = 'keep = "best"' if trial.training.keep == "best" else f"patience = {trial.training.patience}"
            raise RecipeError(
                f"{trial.name}: {setting} needs a validation loss, and there are no valid rows",
                hint="add valid.tsv to the data, or leave the setting out",
            )
