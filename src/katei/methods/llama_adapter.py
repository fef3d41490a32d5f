"""LLaMA-Adapter: gated attention to a trained prompt in the top layers. Zhang et al. 2023, https://arxiv.org/abs/2303.16199,
section 3.

    o = softmax(q kᵀ) v + g · softmax(q (W_k p)ᵀ) (W_v p)        p: (P, D) per layer; W_k, W_v the frozen projections

At the attend place of the top `layers` layers. **Which gate**: one number g per layer, no tanh, zero at the start: peft's
(`tuners/adaption_prompt/layer.py`). The authors' code has tanh(g) per head, litgpt g per head: other methods under the same
name. Queries are the rotated (and, where the model does so, normalised) ones; prompt keys are normalised like the model's
own but not rotated. p starts from N(0, 1).
Trainable numbers: layers · (P · width + 1), and the head. (peft leaves the head frozen at random and does not save it: there
we differ on purpose.) At step 0 the output is the base's, and only gates receive a gradient.

Dimensions: N adapters · P prompt length · D width · H heads · G key/value heads · K head size · B rows · L longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from katei.base import ops
from katei.base.packed import Base
from katei.base.stream import Part
from katei.core.errors import RecipeError
from katei.methods.contract import Method, Stack, TensorSpec, TrialFacts, constant, fill_, normal, same
from katei.methods.prompt_tuning import check_length


@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(Method):
    name: ClassVar[str] = "llama-adapter"
    peft_type: ClassVar[str | None] = "ADAPTION_PROMPT"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    search: ClassVar[Mapping[str, tuple[float | str, ...]]] = {"length": (5, 10, 20)}

    layers: int = 8
    """How many of the top layers; the book's 8."""
    length: int = 10

    def __post_init__(self) -> None:
        check_length("length", self.length)
        if self.layers < 1:
            raise RecipeError(f"layers is {self.layers}, but it counts the top layers", hint="layers = 8")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LLaMAAdapter:
        return cls(layers=config["adapter_layers"], length=config["adapter_len"])

    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> LLaMAAdapterStack:
        return LLaMAAdapterStack(self, base, classes, seeds)


class LLaMAAdapterStack(Stack):
    head_in_peft = False
    attends = True

    def __init__(self, method: LLaMAAdapter, base: Base, classes: int, seeds: Sequence[int]):
        if method.layers > base.depth:
            raise RecipeError(
                f"layers is {method.layers}, but the base has {base.depth}", hint=f"layers = {base.depth}"
            )
        self.method = method
        self.base = base
        self.lowest_layer = base.depth - method.layers
        shape = (method.length, base.width)
        specs: dict[str, TensorSpec] = {}
        for layer in range(self.lowest_layer, base.depth):
            specs[f"{layer}.prompt_PD"] = TensorSpec(shape, normal(shape))
            specs[f"{layer}.gate"] = TensorSpec((1,), constant((1,), 0.0))
        super().__init__(base, classes, seeds, specs)

    def attend(
        self, block: Any, q_BHLK: Tensor, out_BHLK: Tensor, adapter_B: Tensor, part: Part, scaling: float
    ) -> Tensor:
        layer = block.layer_idx
        if layer < self.lowest_layer:
            return out_BHLK
        k_NGPK = part.once(("llama-adapter k", layer), lambda: self._project(block, "k", layer).to(q_BHLK.dtype))
        v_NGPK = part.once(("llama-adapter v", layer), lambda: self._project(block, "v", layer).to(q_BHLK.dtype))
        k_BGPK, v_BGPK = (x if self.adapters == 1 else x[adapter_B] for x in (k_NGPK, v_NGPK))
        if self.adapters == 1:
            k_BGPK, v_BGPK = (x.expand(len(adapter_B), *x.shape[1:]) for x in (k_BGPK, v_BGPK))
        added_BHLK = ops.torch_attention(q_BHLK, k_BGPK, v_BGPK, scaling)
        gate_B = self.tensors[f"{layer}.gate"][adapter_B]
        return out_BHLK + gate_B[:, :, None, None].to(out_BHLK.dtype) * added_BHLK

    def _project(self, block: Any, which: str, layer: int) -> Tensor:
        """The frozen projection of this layer's prompts, (N, G, P, K), without the linear place's hooks."""
        projection = block.k_proj if which == "k" else block.v_proj
        prompt_NPD = self.tensors[f"{layer}.prompt_PD"].to(projection.weight.dtype)
        y_NPO = F.linear(prompt_NPD, projection.weight, projection.bias)
        x_NPGK: Tensor = torch.unflatten(y_NPO, 2, (-1, self.base.head_size))
        norm = getattr(block, "k_norm", None) if which == "k" else None
        if norm is not None:
            x_NPGK = norm(x_NPGK)
        return x_NPGK.transpose(1, 2)

    def peft_config(self, n: int) -> dict[str, Any]:
        return {"adapter_layers": self.method.layers, "adapter_len": self.method.length}

    def _places(self, n: int) -> dict[str, tuple[Tensor, Any]]:
        places: dict[str, tuple[Tensor, Any]] = {}
        for layer in range(self.lowest_layer, self.base.depth):
            name = f"layers.{layer}.self_attn.adaption"
            places[f"{name}_prompt"] = (self.tensors[f"{layer}.prompt_PD"][n], _without_batch)
            places[f"{name}_gate"] = (self.tensors[f"{layer}.gate"][n], same)
        return places

    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        return {
            name: (place[None] if name.endswith("_prompt") else place).detach().clone().contiguous()
            for name, (place, _) in self._places(n).items()
        }

    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        fill_(self.tensors, tensors, self._places(n))


def _without_batch(x_1PD: Tensor) -> Tensor:
    return x_1PD[0]
