"""Head only (linear probe): nothing but the classifier on the frozen base's pooled token is trained.

    scores = W_head h_last        a reference point: what the base knows without being changed

Trainable numbers: classes · width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from katei.base.packed import Base
from katei.methods.contract import Method, Stack, TrialFacts, fill_


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    name: ClassVar[str] = "head"
    peft_type: ClassVar[str | None] = None
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = True

    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> HeadOnlyStack:
        return HeadOnlyStack(base, classes, seeds)


class HeadOnlyStack(Stack):
    head_in_peft = False

    def __init__(self, base: Base, classes: int, seeds: Sequence[int]):
        super().__init__(base, classes, seeds, {})
        self.lowest_layer = base.depth

    def merge(self, n: int, site: str, w_OI: Tensor) -> Tensor:
        return w_OI

    def peft_config(self, n: int) -> dict[str, Any]:
        return {}

    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        return {}

    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        fill_(self.tensors, tensors, {})
