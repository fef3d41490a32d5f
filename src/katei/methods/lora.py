"""LoRA: low-rank adaptation. Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3; rsLoRA: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732.

    y = W x + s · B A dropout(x)        s = alpha / r, with rsLoRA alpha / √r

A: kaiming-uniform(√5), B: zeros (peft `lora/layer.py`, reset_lora_parameters), so step 0 is the base model.
Trainable numbers: Σ over targets of r · (inputs + outputs), and the head.    At the linear place of q_proj and v_proj.
All trials' columns lie side by side: y += (where(own, x A_catᵀ, 0)) B_cat, two products for any number of trials.

Dimensions: T tokens · N adapters · R rank · I inputs · O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from katei.base.packed import Base, Site, place_number
from katei.base.stream import Part
from katei.core.errors import RecipeError
from katei.methods.contract import (
    Method,
    Stack,
    TensorSpec,
    TrialFacts,
    constant,
    fill_,
    plain,
    same,
    target_names,
    transposed,
    uniform,
)


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str | None] = "LORA"
    learning_rate: ClassVar[float] = 3e-4
    merges: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False
    """Scale by alpha / √rank in place of alpha / rank."""

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.alpha, self.dropout)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRA:
        plain(
            config,
            use_dora=False,
            rank_pattern={},
            alpha_pattern={},
            bias="none",
            layers_to_transform=None,
            lora_bias=False,
        )
        return cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config["lora_dropout"],
            targets=target_names(config),
            rslora=config.get("use_rslora", False),
        )

    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> LoRAStack:
        return LoRAStack(self, base, classes, seeds)


def check_low_rank(rank: int, alpha: float, dropout: float) -> None:
    if rank < 1:
        raise RecipeError(f"rank is {rank}, but an adapter needs a rank of 1 or more", hint="rank = 8")
    if not alpha > 0 or not math.isfinite(alpha):
        raise RecipeError(f"alpha is {alpha}, but it scales the adapter and must be positive", hint="alpha = 8")
    if not 0 <= dropout < 1:
        raise RecipeError(f"dropout is {dropout}, but it is a share, 0 or more and below 1", hint="dropout = 0.05")


class LoRAStack(Stack):
    def __init__(self, method: LoRA, base: Base, classes: int, seeds: Sequence[int]):
        self.method = method
        self.sites: list[Site] = base.sites_named(method.targets)
        specs: dict[str, TensorSpec] = {}
        for site in self.sites:
            specs[f"{site.name}.A_RI"] = TensorSpec(
                (method.rank, site.inputs), uniform((method.rank, site.inputs), site.inputs**-0.5)
            )
            specs[f"{site.name}.B_RO"] = TensorSpec(
                (method.rank, site.outputs), constant((method.rank, site.outputs), 0.0)
            )
        super().__init__(base, classes, seeds, specs)
        self.linear_sites = {site.name: place_number(site.name) for site in self.sites}
        self.lowest_layer = min(site.layer for site in self.sites)

    def linear(self, site: str, x_TI: Tensor, y_TO: Tensor, part: Part) -> Tensor:
        a_NRI, b_NRO = self.tensors[f"{site}.A_RI"], self.tensors[f"{site}.B_RO"]
        keep_TI = part.keep_TI(place_number(site), x_TI.shape[1], self.method.dropout)
        x_TI = x_TI.to(a_NRI.dtype)
        delta_TO = low_rank(x_TI if keep_TI is None else x_TI * keep_TI, a_NRI, b_NRO, part)
        return torch.add(y_TO, delta_TO.to(y_TO.dtype), alpha=self.method.scaling)

    def merge(self, n: int, site: str, w_OI: Tensor) -> Tensor:
        if site not in self.linear_sites:
            return w_OI
        a_RI, b_RO = self.tensors[f"{site}.A_RI"][n], self.tensors[f"{site}.B_RO"][n]
        return w_OI + self.method.scaling * (b_RO.T @ a_RI).detach()

    def peft_config(self, n: int) -> dict[str, Any]:
        return {
            "r": self.method.rank,
            "lora_alpha": self.method.alpha,
            "lora_dropout": self.method.dropout,
            "target_modules": sorted(self.method.targets),
            "use_rslora": self.method.rslora,
            "bias": "none",
        }

    def _places(self, n: int) -> dict[str, tuple[Tensor, Any]]:
        places: dict[str, tuple[Tensor, Any]] = {}
        for site in self.sites:
            places[f"{site.name}.lora_A.weight"] = (self.tensors[f"{site.name}.A_RI"][n], same)
            places[f"{site.name}.lora_B.weight"] = (self.tensors[f"{site.name}.B_RO"][n], transposed)
        return places

    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        return {name: shaped(place).detach().contiguous() for name, (place, shaped) in self._places(n).items()}

    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        fill_(self.tensors, tensors, self._places(n))


def low_rank(x_TI: Tensor, a_NRI: Tensor, b_NRO: Tensor, part: Part) -> Tensor:
    """`B_n A_n x` for each token's own adapter n: (T, O)."""
    adapters, rank = a_NRI.shape[:2]
    if adapters == 1:
        return (x_TI @ a_NRI[0].T) @ b_NRO[0]
    h_TS = x_TI @ a_NRI.flatten(0, 1).T  # S = N · R columns, every adapter's side by side
    h_TS = torch.where(part.owner_TN(rank), h_TS, 0.0)
    return h_TS @ b_NRO.flatten(0, 1)
