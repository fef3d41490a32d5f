"""Full fine-tuning: every weight of the base is trained, and the head. A reference point, and what does not fit.

It owns its base: a copy nobody shares, so it trains alone, through the same step as everything else.
Trainable numbers: all of the backbone's (tied embeddings once), and the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from katei.base.packed import Base
from katei.core.errors import RecipeError
from katei.methods.contract import Method, Stack, TrialFacts


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    name: ClassVar[str] = "full"
    peft_type: ClassVar[str | None] = None
    learning_rate: ClassVar[float] = 2e-5
    merges: ClassVar[bool] = True

    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> FullStack:
        return FullStack(base, classes, seeds)


class FullStack(Stack):
    """N is 1: `base` is this trial's own, and its weights are changed in place."""

    head_in_peft = False

    def __init__(self, base: Base, classes: int, seeds: Sequence[int]):
        assert len(seeds) == 1, "full fine-tuning owns its base, so it has one trial"
        if base.dtype != torch.float32:
            raise RecipeError(
                f"full fine-tuning of a base held in {str(base.dtype).removeprefix('torch.')} would lose every small step to rounding",
                hint="--precision fp32",
            )
        super().__init__(base, classes, seeds, {})
        self.weights: dict[str, Tensor] = {}
        for name, parameter in base.model.named_parameters():
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)
            self.weights[name] = parameter

    def trained(self, n: int) -> list[tuple[Tensor, Tensor, bool]]:
        runs = super().trained(n)
        for name, weight in self.weights.items():
            assert weight.grad is not None
            leaf = name.rsplit(".", 2)
            decays = not name.endswith("bias") and "norm" not in leaf[-2].lower()
            runs.append((weight.detach(), weight.grad, decays))
        return runs

    def zero_grad_(self) -> None:
        super().zero_grad_()
        for weight in self.weights.values():
            assert weight.grad is not None
            weight.grad.zero_()

    @property
    def trainable(self) -> int:
        return self.numbers + sum(weight.numel() for weight in self.weights.values())

    def total(self, base: Base) -> int:
        return self.trainable

    def current(self, n: int) -> dict[str, Tensor]:
        return super().current(n) | {f"weights.{name}": weight.detach() for name, weight in self.weights.items()}

    def restore_(self, n: int, snapshot: Mapping[str, Tensor]) -> None:
        super().restore_(n, snapshot)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(snapshot[f"weights.{name}"])

    def merge(self, n: int, site: str, w_OI: Tensor) -> Tensor:
        return w_OI

    def peft_config(self, n: int) -> dict[str, Any]:
        return {}

    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.weights.items()}

    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        from katei.methods.contract import fill_, same

        fill_(self.tensors, tensors, {name: (weight, same) for name, weight in self.weights.items()})
