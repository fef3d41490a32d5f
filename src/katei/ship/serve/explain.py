"""Which parts of a text mattered: occlusion.

    effect of a part = p(the predicted class | the text) − p(the same class | the text without the part's tokens)

Above 0 the part spoke for the answer, below 0 against it. It is measured, not estimated from a gradient: the text without a part
is an ordinary row, and all of them share passes with everybody else's. What it cannot show: parts that only act together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from katei.ship.serve.engine import Row
from katei.ship.serve.reader import Part
from katei.ship.serve.shelf import Served

MOST_PARTS = 64
"""A longer text is taken in groups of neighbouring tokens: the cost is parts × tokens."""


@dataclass(frozen=True)
class Effect:
    part: Part
    effect: float | None
    """None where nothing would be left of the text."""


def occluded(served: Served, ids: Sequence[int], parts: Sequence[Part]) -> list[Row]:
    """The whole text, then the text without each part that can be left out."""
    rows = [Row(served.stack, served.adapter, tuple(ids))]
    for part in parts:
        left = _without(ids, part)
        if left:
            rows.append(Row(served.stack, served.adapter, left))
    return rows


def effects(ids: Sequence[int], parts: Sequence[Part], answers: Sequence[NDArray[np.float64]]) -> list[Effect]:
    """`answers` belong to the rows of `occluded`."""
    whole_C, *rest = answers
    label, others = int(whole_C.argmax()), iter(rest)
    return [
        Effect(part, float(whole_C[label] - next(others)[label]) if _without(ids, part) else None) for part in parts
    ]


def _without(ids: Sequence[int], part: Part) -> tuple[int, ...]:
    gone = set(part.tokens)
    return tuple(token for i, token in enumerate(ids) if i not in gone)
