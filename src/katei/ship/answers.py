"""What is said of a row's probabilities: the columns that prediction adds to a table.

    prediction   probability_LABEL of each label   and, if asked for, top_1   top_1_probability   top_2   …

Dimensions: E rows · C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from katei.core.calibration import with_temperature
from katei.core.errors import AdapterError, RecipeError
from katei.methods.saved import AdapterNote


@dataclass(frozen=True)
class Answers:
    """How probabilities become columns of text."""

    labels: tuple[str, ...]
    temperature: float = 1.0
    """Of all probabilities that are written; 1 leaves them as the model gives them."""
    abstain: float | None = None
    """Below this probability of the likeliest class there is no prediction: the column is empty, as no label is."""
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.abstain is not None and not 0 <= self.abstain <= 1:
            raise RecipeError(f"abstain is {self.abstain}, but it is a probability", hint="--abstain 0.8")
        if not 0 <= self.top_k <= len(self.labels):
            what = f"top-k is {self.top_k}, but there are {len(self.labels)} labels"
            raise RecipeError(what, hint=f"--top-k {len(self.labels)} or less")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise RecipeError(f"the temperature is {self.temperature}, but it must be positive", hint="train again")

    @property
    def columns(self) -> list[str]:
        tops = [name for k in range(1, self.top_k + 1) for name in (f"top_{k}", f"top_{k}_probability")]
        return ["prediction", *(f"probability_{label}" for label in self.labels), *tops]

    def rows(self, probability_EC: NDArray[np.float64]) -> list[list[str]]:
        """The fields of each row, in the order of `columns`."""
        probability_EC = with_temperature(probability_EC, self.temperature)
        best_E = probability_EC.argmax(1).tolist()
        written = []
        for best, p_C in zip(best_E, probability_EC.tolist(), strict=True):
            certain = self.abstain is None or p_C[best] >= self.abstain
            written.append([self.labels[best] if certain else "", *map(repr, p_C)])
        if self.top_k:
            order_EC = np.argsort(-probability_EC, axis=1, kind="stable")[:, : self.top_k].tolist()
            for fields, order, p_C in zip(written, order_EC, probability_EC.tolist(), strict=True):
                fields += [field for c in order for field in (self.labels[c], repr(p_C[c]))]
        return written


def answers_of(
    folder: Path, note: AdapterNote, *, calibrated: bool = False, abstain: float | None = None, top_k: int | None = None
) -> Answers:
    """What was asked for, checked; `folder` is the adapter's."""
    if top_k is not None and top_k < 1:
        raise RecipeError(f"top-k is {top_k}, but it counts labels", hint="--top-k 3")
    temperature = temperature_of(folder, note) if calibrated else 1.0
    return Answers(note.labels, temperature, abstain, top_k or 0)


def temperature_of(folder: Path, note: AdapterNote) -> float:
    """The one recorded with the adapter. Raises AdapterError without."""
    if note.temperature is None:
        raise AdapterError(
            "has no temperature: it was trained without validation rows, or classifies all of them right",
            file=folder,
            hint="train it with more validation rows (valid.tsv), or leave out --calibrated",
        )
    return note.temperature
