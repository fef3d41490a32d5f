"""AdamW and the learning-rate schedule of one trial: what transformers' Trainer does, a row at a time.

Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; torch.optim.AdamW's fused kernel does the arithmetic, so one trial's
update never depends on its companions. Schedule: linear warm-up, then linear to zero (`get_linear_schedule_with_warmup`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from katei.core.errors import RecipeError
from katei.methods.contract import Stack


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one trial is trained. Defaults are the book's, but for the learning rate, which is the method's own."""

    learning_rate: float
    epochs: int = 10
    batch_size: int = 1
    accumulation: int = 1
    """Batches per optimizer step; the step's loss is the mean over all its rows."""
    weight_decay: float = 0.0
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises to its full value."""
    clip_norm: float = 1.0
    """Largest norm of a trial's gradient; 0 turns clipping off."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    patience: int = 0
    """Stop when the validation loss has not improved for this many epochs; 0 never stops early."""
    keep: str = "last"
    """Which epoch's adapter stays: the last, or the best by validation loss."""

    def __post_init__(self) -> None:
        def must(holds: bool, field: str, why: str, example: str) -> None:
            if not holds:
                raise RecipeError(f"{field} is {getattr(self, field)}, but {why}", hint=f"{field} = {example}")

        # bounded, so that no number of an adapter can overflow: companions share products with it
        must(0 < self.learning_rate <= 1000, "learning_rate", "it must be positive, 1000 at most", "1e-4")
        must(1 <= self.epochs <= 100_000, "epochs", "a trial trains for 1 to 100,000", "10")
        must(self.batch_size >= 1, "batch_size", "it counts rows", "1")
        must(self.accumulation >= 1, "accumulation", "it counts batches", "1")
        decays = self.weight_decay >= 0 and self.learning_rate * self.weight_decay < 1
        must(decays, "weight_decay", "it must be 0 or more, and below 1 / learning rate", "0.01")
        must(0 <= self.warmup < 1, "warmup", "it is a share of the steps, 0 or more and below 1", "0.1")
        must(0 <= self.clip_norm < math.inf, "clip_norm", "it must be 0 (off) or more", "1.0")
        must(0 <= self.beta1 < 1, "beta1", "it lies between 0 and 1", "0.9")
        must(0 <= self.beta2 < 1, "beta2", "it lies between 0 and 1", "0.999")
        must(0 < self.epsilon < math.inf, "epsilon", "it must be positive", "1e-8")
        must(self.patience >= 0, "patience", "it counts epochs", "3")
        must(self.keep in ("last", "best"), "keep", "it is one of: last, best", '"best"')

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step `step` (0-based) of `total_steps`."""
        warmup_steps = math.ceil(self.warmup * total_steps)
        if step < warmup_steps:
            return self.learning_rate * step / max(1, warmup_steps)
        return self.learning_rate * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


class AdamW:
    """The moments of one trial, and its step."""

    def __init__(self, stack: Stack, n: int, training: Training):
        self.training = training
        self.runs = stack.trained(n)
        self.first = [torch.zeros_like(numbers) for numbers, _, _ in self.runs]
        self.second = [torch.zeros_like(numbers) for numbers, _, _ in self.runs]

    def step_(self, step: int, total_steps: int) -> Tensor:
        """Clip and update in place. `step` is 0-based. Returns the gradient's norm before clipping, 0-d, on the device.

        A gradient that is not finite changes nothing: one trial's overflow must not reach the shared products.
        """
        gradients = [gradient for _, gradient, _ in self.runs]
        norm = torch.nn.utils.get_total_norm(gradients)
        skip = (~torch.isfinite(norm)).float()
        if self.training.clip_norm:
            scale = (self.training.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale)
        for decays in (True, False):
            chosen = [i for i, run in enumerate(self.runs) if run[2] is decays]
            if chosen:
                torch._fused_adamw_(
                    [self.runs[i][0] for i in chosen],
                    [self.runs[i][1] for i in chosen],
                    [self.first[i] for i in chosen],
                    [self.second[i] for i in chosen],
                    [],
                    [torch.tensor(float(step + 1), device=norm.device) for _ in chosen],
                    lr=self.training.rate(step, total_steps),
                    beta1=self.training.beta1,
                    beta2=self.training.beta2,
                    weight_decay=self.training.weight_decay if decays else 0.0,
                    eps=self.training.epsilon,
                    amsgrad=False,
                    maximize=False,
                    found_inf=skip,
                )
        return norm

    def state(self) -> dict[str, Tensor]:
        return {f"first.{i}": m for i, m in enumerate(self.first)} | {
            f"second.{i}": m for i, m in enumerate(self.second)
        }

    def load_state_(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
