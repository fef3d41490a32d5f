"""(IA)³: learned rescaling. Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3.

    k = l_k ⊙ (W_k x)      v = l_v ⊙ (W_v x)      ffn = W_down (l_ff ⊙ silu(W_gate x) ⊙ (W_up x))

l = 1 at the start, so step 0 is the base model. In a gated MLP, scaling the inner activation equals scaling up_proj's
output, so all three vectors multiply the output of a linear site. (peft scales the input of down_proj: the same numbers,
so its file's `down_proj.ia3_l` is our `up_proj`.) Which projections: peft's choice per architecture
(`TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING`): k and v for Llama and Mistral, q and v for Gemma and Qwen.
Trainable numbers per layer: outputs of the two projections + MLP width; and the head.

Dimensions: T tokens · N adapters · O outputs · I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from katei.base import ops
from katei.base.packed import Base, Site
from katei.base.stream import Part, Segments
from katei.core.errors import AdapterError, RecipeError
from katei.methods.contract import Method, Stack, TensorSpec, TrialFacts, constant, fill_, target_names

SCALES_KEYS = ("llama", "mistral")
"""Architectures for which peft scales k and v; elsewhere q and v."""


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str | None] = "IA3"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = True

    targets: tuple[str, ...] | None = None
    """Linear modules whose outputs are scaled; None is peft's choice for the architecture, with up_proj for down_proj."""

    def __post_init__(self) -> None:
        if self.targets is not None and "down_proj" in self.targets:
            raise RecipeError(
                "(IA)³ scales outputs here, and peft's down_proj means that module's input",
                hint="name up_proj instead: in a gated MLP it is the same scaling",
            )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> IA3:
        scaled_inputs = set(config.get("feedforward_modules") or [])
        if not scaled_inputs <= {"down_proj"}:
            raise AdapterError(
                f"this (IA)³ adapter scales the inputs of {', '.join(sorted(scaled_inputs))}",
                hint="katei reads down_proj as a scaled input",
            )
        targets = (t for t in target_names(config))
        return cls(targets=tuple("up_proj" if t in scaled_inputs else t for t in targets))

    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> IA3Stack:
        return IA3Stack(self, base, classes, seeds)


class IA3Stack(Stack):
    def __init__(self, method: IA3, base: Base, classes: int, seeds: Sequence[int]):
        self.method = method
        default = ("k_proj" if base.model_type in SCALES_KEYS else "q_proj", "v_proj", "up_proj")
        self.targets = method.targets or default
        self.sites: list[Site] = base.sites_named(self.targets)
        specs = {f"{site.name}.l_O": TensorSpec((site.outputs,), constant((site.outputs,), 1.0)) for site in self.sites}
        super().__init__(base, classes, seeds, specs)
        self.linear_sites = {site.name: site.outputs for site in self.sites}
        self.lowest_layer = min(site.layer for site in self.sites)

    def linear(self, site: str, x_TI: Tensor, y_TO: Tensor, part: Part) -> Tensor:
        l_NO = self.tensors[f"{site}.l_O"]
        if ops.device_kind(y_TO) == "cpu":
            return _Scale.apply(y_TO, l_NO, part.segments)  # type: ignore[no-any-return, no-untyped-call]
        return _ScaleTogether.apply(y_TO, l_NO, part.adapter_T, part.others_TM(self.adapters))  # type: ignore[no-any-return, no-untyped-call]

    def merge(self, n: int, site: str, w_OI: Tensor) -> Tensor:
        return w_OI * self.tensors[f"{site}.l_O"][n].detach()[:, None] if site in self.linear_sites else w_OI

    def merge_bias(self, n: int, site: str, bias_O: Tensor) -> Tensor:
        return bias_O * self.tensors[f"{site}.l_O"][n].detach() if site in self.linear_sites else bias_O

    def peft_config(self, n: int) -> dict[str, Any]:
        feedforward = ["down_proj"] if "up_proj" in self.targets else []
        return {
            "target_modules": sorted([t for t in self.targets if t != "up_proj"] + feedforward),
            "feedforward_modules": feedforward,
        }

    def _places(self, n: int) -> dict[str, tuple[Tensor, Any]]:
        places: dict[str, tuple[Tensor, Any]] = {}
        for site in self.sites:
            name = f"{site.name.removesuffix('up_proj')}down_proj" if site.leaf == "up_proj" else site.name
            places[f"{name}.ia3_l"] = (self.tensors[f"{site.name}.l_O"][n], torch.flatten)
        return places

    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        # peft keeps a column for a scaled output, a row for a scaled input
        return {
            name: (place[None] if ".down_proj." in name else place[:, None]).detach().contiguous()
            for name, (place, _) in self._places(n).items()
        }

    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        fill_(self.tensors, tensors, self._places(n))


class _Scale(Function):
    """y ⊙ l_n for each token's own adapter n: (T, O). Keeps y alone."""

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, l_NO: Tensor, segments: Segments) -> Tensor:
        out_TO = torch.empty_like(y_TO)
        for n, start, stop in segments:
            torch.mul(y_TO[start:stop], l_NO[n].to(y_TO.dtype), out=out_TO[start:stop])
        ctx.save_for_backward(y_TO, l_NO)
        ctx.segments = segments
        return out_TO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        y_TO, l_NO = ctx.saved_tensors
        g_TO = grads[0]
        to_y = torch.empty_like(y_TO) if ctx.needs_input_grad[0] else None
        to_l = torch.zeros_like(l_NO)
        for n, start, stop in ctx.segments:
            g = g_TO[start:stop]
            if to_y is not None:
                torch.mul(g, l_NO[n].to(g.dtype), out=to_y[start:stop])
            to_l[n] = (g * y_TO[start:stop]).float().sum(0)
        return to_y, to_l, None


class _ScaleTogether(Function):
    """The same for a GPU: no launch for each adapter."""

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, l_NO: Tensor, adapter_T: Tensor, others_TN: Tensor | None) -> Tensor:
        ctx.save_for_backward(y_TO, l_NO, adapter_T, others_TN)
        return y_TO * l_NO.to(y_TO.dtype)[adapter_T]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        y_TO, l_NO, adapter_T, others_TN = ctx.saved_tensors
        g_TO = grads[0]
        to_y = g_TO * l_NO.to(g_TO.dtype)[adapter_T] if ctx.needs_input_grad[0] else None
        each_TO = (g_TO * y_TO).to(l_NO.dtype)
        # a product with ones and zeros: in a fixed order, which a GPU's index_add has not
        to_l = each_TO.sum(0, keepdim=True) if others_TN is None else (~others_TN).to(l_NO.dtype).mT @ each_TO
        return to_y, to_l, None, None
