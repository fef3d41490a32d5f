"""LoRA: low-rank adaptation. Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3; rsLoRA: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732.

    y = W x + s · B A dropout(x)        s = alpha / r, with rsLoRA alpha / √r

A: kaiming-uniform(√5), B: zeros (peft `lora/layer.py`, reset_lora_parameters), so step 0 is the base model.
Trainable numbers: Σ over targets of r · (inputs + outputs), and the head.    At the linear place of q_proj and v_proj.
Each trial's tokens lie together in the stream, so its two small products read them where they are.

Dimensions: T tokens · N adapters · R rank · I inputs · O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from katei.base import ops
from katei.base.packed import Base, Site, place_number
from katei.base.stream import Part, Segments
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
    search: ClassVar[Mapping[str, tuple[float | str, ...]]] = {
        "rank": (1, 2, 4, 8, 16),
        "alpha": (4.0, 8.0, 16.0, 32.0),
    }

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
        self.dropout = method.dropout

    def linear(self, site: str, x_TI: Tensor, y_TO: Tensor, part: Part) -> Tensor:
        a_NRI, b_NRO = self.tensors[f"{site}.A_RI"], self.tensors[f"{site}.B_RO"]
        keep_TI = part.keep_TI(place_number(site), x_TI.shape[1], self.method.dropout)
        x_TI = x_TI if keep_TI is None else x_TI.to(a_NRI.dtype) * keep_TI
        return low_rank(x_TI, y_TO, a_NRI, b_NRO, self.method.scaling, part)

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


def low_rank(x_TI: Tensor, y_TO: Tensor, a_NRI: Tensor, b_NRO: Tensor, scaling: float, part: Part) -> Tensor:
    """`y + s · B_n A_n x` for each token's own adapter n: (T, O)."""
    if ops.device_kind(x_TI) == "cpu":
        return _LowRank.apply(x_TI, y_TO, a_NRI, b_NRO, scaling, part.segments)  # type: ignore[no-any-return, no-untyped-call]
    others_TM = part.others_TM(*a_NRI.shape[:2])
    return _LowRankTogether.apply(x_TI, y_TO, a_NRI, b_NRO, scaling, others_TM)  # type: ignore[no-any-return, no-untyped-call]


def low_rank_plain(x_TI: Tensor, y_TO: Tensor, a_NRI: Tensor, b_NRO: Tensor, scaling: float, part: Part) -> Tensor:
    """The same in plain torch, every token through every adapter."""
    all_TNO = torch.einsum("ti,nri,nro->tno", x_TI.to(a_NRI.dtype), a_NRI, b_NRO)
    own_TO = all_TNO[torch.arange(len(x_TI)), part.adapter_T]
    return torch.add(y_TO, own_TO.to(y_TO.dtype), alpha=scaling)


class _LowRank(Function):
    """Adapter by adapter, each with its own tokens: products as small as they are, nothing masked, nothing of one trial near
    another's. Where every adapter has equally many tokens it is one batched product.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, y_TO: Tensor, a_NRI: Tensor, b_NRO: Tensor, scaling: float, segments: Segments
    ) -> Tensor:
        wide_TI = x_TI.to(a_NRI.dtype)
        h_TR = wide_TI.new_empty(x_TI.shape[0], a_NRI.shape[1])
        out_TO = torch.empty_like(y_TO)
        for x, h, y, out, a_RI, b_RO in _walk(segments, (wide_TI, h_TR, y_TO, out_TO), (a_NRI, b_NRO)):
            torch.matmul(x, a_RI.mT, out=h)
            if y.dtype == h.dtype:
                _add_product(y, h, b_RO, scaling, out)
            else:
                torch.add(y, (h @ b_RO).to(y.dtype), alpha=scaling, out=out)
        ctx.save_for_backward(x_TI, h_TR, a_NRI, b_NRO)
        ctx.scaling, ctx.segments = scaling, segments
        return out_TO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_TI, h_TR, a_NRI, b_NRO = ctx.saved_tensors
        g_TO = (grads[0] if grads[0].dtype == h_TR.dtype else grads[0].to(h_TR.dtype)).contiguous()
        wide_TI = x_TI.to(h_TR.dtype)
        to_a, to_b = torch.zeros_like(a_NRI), torch.zeros_like(b_NRO)
        to_x = torch.empty_like(wide_TI) if ctx.needs_input_grad[0] else None
        streams = (wide_TI, h_TR, g_TO, g_TO if to_x is None else to_x)
        for x, h, g, into, a_RI, b_RO, da, db in _walk(ctx.segments, streams, (a_NRI, b_NRO, to_a, to_b)):
            torch.matmul(h.mT, g, out=db)
            to_h = (g @ b_RO.mT).mul_(ctx.scaling)
            torch.matmul(to_h.mT, x, out=da)
            if to_x is not None:
                torch.matmul(to_h, a_RI, out=into)
        return None if to_x is None else to_x.to(x_TI.dtype), grads[0], to_a, to_b.mul_(ctx.scaling), None, None


class _LowRankTogether(Function):
    """Every token through every adapter, and what others' adapters made of it set to zero: a few large products where a GPU would wait
    for the launches of many small ones.

    Dimensions: M = N · R.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        y_TO: Tensor,
        a_NRI: Tensor,
        b_NRO: Tensor,
        scaling: float,
        others_TM: Tensor | None,
    ) -> Tensor:
        a_MI, b_MO = a_NRI.flatten(0, 1), b_NRO.mul(scaling).flatten(0, 1)
        h_TM = _own(x_TI.to(a_MI.dtype) @ a_MI.mT, others_TM)
        ctx.save_for_backward(x_TI, h_TM, a_MI, b_MO, others_TM)
        ctx.scaling, ctx.shape = scaling, a_NRI.shape[:2]
        if y_TO.dtype == h_TM.dtype:
            return torch.addmm(y_TO, h_TM, b_MO)
        return y_TO + (h_TM @ b_MO).to(y_TO.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_TI, h_TM, a_MI, b_MO, others_TM = ctx.saved_tensors
        g_TO = grads[0].to(h_TM.dtype)
        to_b = (h_TM.mT @ g_TO).mul_(ctx.scaling).unflatten(0, ctx.shape)
        to_h = _own(g_TO @ b_MO.mT, others_TM)
        to_a = (to_h.mT @ x_TI.to(h_TM.dtype)).unflatten(0, ctx.shape)
        to_x = (to_h @ a_MI).to(x_TI.dtype) if ctx.needs_input_grad[0] else None
        return to_x, grads[0], to_a, to_b, None, None


def _own(h_TM: Tensor, others_TM: Tensor | None) -> Tensor:
    return h_TM if others_TM is None else h_TM.masked_fill_(others_TM, 0.0)


def _add_product(y: Tensor, h: Tensor, b_RO: Tensor, scaling: float, out: Tensor) -> None:
    product = torch.addmm if y.ndim == 2 else torch.baddbmm
    product(y, h, b_RO, alpha=scaling, out=out)


def _walk(
    segments: Segments, streams: tuple[Tensor, ...], adapters: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    """Views of each segment's tokens and of its adapter; of all at once, with a leading N, where the segments are a rectangle."""
    lengths = {stop - start for _, start, stop in segments}
    owners = [n for n, _, _ in segments]
    if len(segments) > 1 and len(lengths) == 1 and owners == list(range(adapters[0].shape[0])):
        yield (*(torch.unflatten(t, 0, (len(segments), -1)) for t in streams), *adapters)
        return
    for n, start, stop in segments:
        yield (*(t[start:stop] for t in streams), *(t[n] for t in adapters))
