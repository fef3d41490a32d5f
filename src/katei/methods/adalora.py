"""AdaLoRA: a rank budget that moves to where it matters. Zhang et al. 2023, https://arxiv.org/abs/2303.10512, sections 3.1-3.3.

    y = W x + s · B diag(E) A dropout(x)        s = alpha / (initial rank + 1e-5), peft's
    loss += w · mean over all A, Bᵀ of ‖P Pᵀ − I‖_F

After each optimizer step every triplet (one row of A, one number of E, one column of B) is scored by smoothed sensitivity ×
uncertainty of |θ · ∂loss/∂θ| (equations 9-11), and E of the lowest ones is set to zero so that the budget follows

    b(t) = b_T + (b_0 − b_T) · (1 − (t − t_i) / (T − t_i − t_f))³        t_i = `warmup`, t_f = `final`, shares of the T steps

T is the trial's true number of steps: nothing is left for a training loop to remember (peft never prunes unless the caller's
loop calls `update_and_allocate`, and neither Trainer nor TRL does). Scores, order and starting values follow peft's
`tuners/adalora/layer.py` (RankAllocator): E zeros, A and B from N(0, 0.02²).
Trainable numbers: Σ over targets of r₀ · (inputs + outputs + 1), and the head.

Dimensions: T tokens · N adapters · R rank · I inputs · O outputs · S sites · X triplets (all sites' ranks) · Q their numbers.
"""

from __future__ import annotations

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
    normal,
    plain,
    same,
    target_names,
    transposed,
)
from katei.methods.lora import check_low_rank, low_rank


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    name: ClassVar[str] = "adalora"
    peft_type: ClassVar[str | None] = "ADALORA"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[float | str, ...]]] = {
        "alpha": (4.0, 8.0, 16.0, 32.0),
        "orthogonality": (0.1, 0.5),
    }

    rank: int = 12
    """Rank of every site at the start (peft's init_r)."""
    target_rank: float = 8.0
    """Mean rank per site at the end (peft's target_r); a fraction is allowed, the budget counts all sites together."""
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    warmup: float = 0.0
    """Share of the steps before pruning begins (peft's tinit, in steps, is 0)."""
    final: float = 0.0
    """Share of the steps trained with the final ranks (peft's tfinal, in steps, is 0)."""
    interval: int = 1
    """Steps between two prunings (peft's deltaT)."""
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    """Weight of the penalty (peft's orth_reg_weight)."""

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.alpha, self.dropout)
        if not 0 < self.target_rank < self.rank:
            raise RecipeError(
                f"target_rank is {self.target_rank} and rank is {self.rank}: nothing could be pruned",
                hint="target_rank lies between 0 and rank; to keep every rank, use the method lora",
            )
        if not (self.warmup >= 0 and self.final >= 0 and self.warmup + self.final < 1):
            raise RecipeError(
                f"warmup {self.warmup} and final {self.final} leave no steps to prune in",
                hint="warmup = 0.1, final = 0.2",
            )
        if self.interval < 1:
            raise RecipeError(f"interval is {self.interval}, but it counts steps", hint="interval = 1")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise RecipeError("beta1 and beta2 lie between 0 and 1", hint="beta1 = 0.85")
        if self.orthogonality < 0:
            raise RecipeError(f"orthogonality is {self.orthogonality}, below 0", hint="orthogonality = 0.5")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> AdaLoRA:
        plain(config, bias="none", layers_to_transform=None)
        return cls(
            rank=config["init_r"],
            target_rank=config["target_r"],
            alpha=config["lora_alpha"],
            dropout=config["lora_dropout"],
            targets=target_names(config),
        )

    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> AdaLoRAStack:
        return AdaLoRAStack(self, base, classes, seeds, facts)


@dataclass(frozen=True)
class Budget:
    """The schedule of one trial, in steps and triplets."""

    start: int
    target: int
    first_step: int
    last_step: int
    """At this step the final ranks are fixed."""
    interval: int

    def at(self, step: int) -> int | None:
        """Triplets that may stay after `step` (1-based), or None when nothing is pruned at this step."""
        if step > self.last_step or (step <= self.first_step and step != self.last_step):
            return None
        if step != self.last_step and step % self.interval:
            return None
        left = 1 - (step - self.first_step) / (self.last_step - self.first_step)
        return int((self.start - self.target) * left**3 + self.target)


class AdaLoRAStack(Stack):
    def __init__(self, method: AdaLoRA, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]):
        self.method = method
        self.sites: list[Site] = base.sites_named(method.targets)
        r = method.rank
        specs: dict[str, TensorSpec] = {}
        # all E first: one row of the buffer begins with its X triplets' singular values
        for site in self.sites:
            specs[f"{site.name}.E_R"] = TensorSpec((r,), constant((r,), 0.0))
        for site in self.sites:
            specs[f"{site.name}.A_RI"] = TensorSpec((r, site.inputs), normal((r, site.inputs), 0.02))
        for site in self.sites:
            specs[f"{site.name}.B_RO"] = TensorSpec((r, site.outputs), normal((r, site.outputs), 0.02))
        super().__init__(base, classes, seeds, specs)
        self.linear_sites = {site.name: place_number(site.name) for site in self.sites}
        self.lowest_layer = min(site.layer for site in self.sites)
        self.dropout = method.dropout
        self.triplets = r * len(self.sites)
        self.budgets = [self._budget(f.total_steps) for f in facts]
        self._score_layout(base.device)
        low_rank_numbers = len(self.triplet_of_Q)
        self.sensitivity_NQ = torch.zeros(self.adapters, low_rank_numbers, device=base.device)
        self.uncertainty_NQ = torch.zeros(self.adapters, low_rank_numbers, device=base.device)
        self.kept_NX = torch.ones(self.adapters, self.triplets, dtype=torch.bool, device=base.device)

    def _budget(self, steps: int) -> Budget:
        m = self.method
        budget = Budget(
            self.triplets,
            int(m.target_rank * len(self.sites)),
            int(m.warmup * steps),
            steps - int(m.final * steps),
            m.interval,
        )
        if budget.target < 1 or budget.target >= budget.start or budget.last_step <= budget.first_step:
            raise RecipeError(
                f"AdaLoRA could prune nothing: {budget.start} ranks over {len(self.sites)} sites, target {budget.target}, {steps} steps",
                hint="more epochs, or a target_rank between 1 / sites and rank",
            )
        return budget

    def _score_layout(self, device: torch.device) -> None:
        """For each of a row's first Q numbers, its triplet and its weight in the triplet's score (a mean over A's row, B's column)."""
        owners, weights = [torch.arange(self.triplets)], [torch.ones(self.triplets)]
        for attribute in ("inputs", "outputs"):
            for s, site in enumerate(self.sites):
                width = getattr(site, attribute)
                first = s * self.method.rank
                owners.append(torch.arange(first, first + self.method.rank).repeat_interleave(width))
                weights.append(torch.full((self.method.rank * width,), 1.0 / width))
        self.triplet_of_Q = torch.cat(owners).to(device)
        self.weight_of_Q = torch.cat(weights).to(device)

    def linear(self, site: str, x_TI: Tensor, y_TO: Tensor, part: Part) -> Tensor:
        e_NR, a_NRI, b_NRO = (self.tensors[f"{site}.{name}"] for name in ("E_R", "A_RI", "B_RO"))
        keep_TI = part.keep_TI(place_number(site), x_TI.shape[1], self.method.dropout)
        x_TI = x_TI if keep_TI is None else x_TI.to(a_NRI.dtype) * keep_TI
        return low_rank(x_TI, y_TO, a_NRI * e_NR[:, :, None], b_NRO, self.scaling, part)

    @property
    def scaling(self) -> float:
        return self.method.alpha / (self.method.rank + 1e-5)

    def penalty_N(self) -> Tensor | None:
        if not self.method.orthogonality:
            return None
        same_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.endswith((".A_RI", ".B_RO")):
                same_shape.setdefault(tuple(tensor.shape), []).append(tensor)
        eye_RR = torch.eye(self.method.rank, device=self.theta_NM.device)
        norms_N = torch.zeros(self.adapters, device=self.theta_NM.device)
        for tensors in same_shape.values():
            p_NSRI = torch.stack(tensors, dim=1)
            norms_N = norms_N + torch.linalg.vector_norm(p_NSRI @ p_NSRI.transpose(2, 3) - eye_RR, dim=(2, 3)).sum(1)
        return self.method.orthogonality * norms_N / (2 * len(self.sites))

    def after_step(self, n: int, step: int) -> None:
        budget = self.budgets[n]
        with torch.no_grad():
            e_X = self.theta_NM[n, : self.triplets]
            if step < budget.last_step:
                self._smooth(n)
            allowed = budget.at(step)
            if allowed is not None:
                score_Q = self.sensitivity_NQ[n] * self.uncertainty_NQ[n] * self.weight_of_Q
                score_X = torch.zeros_like(e_X).index_add_(0, self.triplet_of_Q, score_Q)
                threshold = torch.kthvalue(score_X, self.triplets - allowed).values
                self.kept_NX[n] = score_X > threshold
                e_X.masked_fill_(~self.kept_NX[n], 0.0)
            elif step > budget.last_step:
                e_X.masked_fill_(~self.kept_NX[n], 0.0)

    def _smooth(self, n: int) -> None:
        m, numbers = self.method, len(self.triplet_of_Q)
        importance_Q = (self.theta_NM[n, :numbers] * self.grad_NM[n, :numbers]).abs()
        sensitivity_Q = self.sensitivity_NQ[n].lerp(importance_Q, 1 - m.beta1)
        uncertainty_Q = self.uncertainty_NQ[n].lerp((importance_Q - sensitivity_Q).abs(), 1 - m.beta2)
        # where the step was skipped (see `AdamW.step_`) its gradient says nothing, and would stay in the averages for good
        usable = torch.isfinite(self.grad_NM[n]).all()
        self.sensitivity_NQ[n] = torch.where(usable, sensitivity_Q, self.sensitivity_NQ[n])
        self.uncertainty_NQ[n] = torch.where(usable, uncertainty_Q, self.uncertainty_NQ[n])

    def ranks(self, n: int) -> dict[str, int]:
        """Rank left at each site: the numbers of E that are not zero."""
        return {site.name: int((self.tensors[f"{site.name}.E_R"][n] != 0).sum()) for site in self.sites}

    def total(self, base: Base) -> int:
        return super().total(base) + len(self.sites)  # peft keeps a frozen count of ranks at each site

    def buffers(self) -> dict[str, Tensor]:
        return {"sensitivity_Q": self.sensitivity_NQ, "uncertainty_Q": self.uncertainty_NQ, "kept_X": self.kept_NX}

    def merge(self, n: int, site: str, w_OI: Tensor) -> Tensor:
        if site not in self.linear_sites:
            return w_OI
        e_R, a_RI, b_RO = (self.tensors[f"{site}.{name}"][n].detach() for name in ("E_R", "A_RI", "B_RO"))
        return w_OI + self.scaling * (b_RO.T @ (a_RI * e_R[:, None]))

    def peft_config(self, n: int) -> dict[str, Any]:
        m, budget = self.method, self.budgets[n]
        return {
            "init_r": m.rank,
            "target_r": m.target_rank if m.target_rank % 1 else int(m.target_rank),
            "lora_alpha": m.alpha,
            "lora_dropout": m.dropout,
            "target_modules": sorted(m.targets),
            "tinit": budget.first_step,
            "tfinal": max(0, int(m.final * (budget.last_step / (1 - m.final)))),
            "deltaT": m.interval,
            "beta1": m.beta1,
            "beta2": m.beta2,
            "orth_reg_weight": m.orthogonality,
            "total_step": max(1, round(budget.last_step / (1 - m.final))),
        }

    def _places(self, n: int) -> dict[str, tuple[Tensor, Any]]:
        places: dict[str, tuple[Tensor, Any]] = {}
        for site in self.sites:
            e_R, a_RI, b_RO = (self.tensors[f"{site.name}.{name}"][n] for name in ("E_R", "A_RI", "B_RO"))
            places |= {
                f"{site.name}.lora_A": (a_RI, same),
                f"{site.name}.lora_B": (b_RO, transposed),
                f"{site.name}.lora_E": (e_R, torch.flatten),
            }
        return places

    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        # every rank is written, pruned ones with E = 0: the same function, and no rank_pattern to get wrong
        tensors = {}
        for name, (place, shaped) in self._places(n).items():
            value = place[:, None] if name.endswith("lora_E") else shaped(place)
            tensors[name] = value.detach().clone().contiguous()
        return tensors

    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        fill_(self.tensors, tensors, self._places(n))
        self.kept_NX[n] = self.theta_NM[n, : self.triplets] != 0
