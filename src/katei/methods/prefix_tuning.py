"""Prefix tuning / P-tuning v2: trained keys and values in front of every layer's. Li and Liang 2021,
https://arxiv.org/abs/2101.00190, section 4.2; Liu et al. 2021, https://arxiv.org/abs/2110.07602.

    o = softmax(q [k_prefix; k]ᵀ) [v_prefix; v]        at every layer; prefix: (P, layers · 2 · G · K)

At the attend place. As in peft (`tuners/prefix_tuning/model.py`, `peft_model.get_prompt`): N(0, 1) at the start, no rotation of
the prefix' keys, the text's positions begin at P. The re-parameterising MLP of the first paper (`projection`) is left out, as
P-tuning v2 and peft's default do.
Trainable numbers: P · layers · 2 · kv_heads · head_size, and the head.

Dimensions: N adapters · P prefix length · G key/value heads · K head size · Y layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from katei.base.packed import Base
from katei.base.stream import Part
from katei.core.errors import RecipeError
from katei.methods.contract import Method, Stack, TensorSpec, TrialFacts, constant, fill_, normal, same
from katei.methods.prompt_tuning import check_length, peft_dims


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    name: ClassVar[str] = "prefix-tuning"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    search: ClassVar[Mapping[str, tuple[float | str, ...]]] = {
        "virtual_tokens": (5, 10, 20),
        "init": ("random", "zero"),
    }

    virtual_tokens: int = 10
    init: Literal["random", "zero"] = "random"

    def __post_init__(self) -> None:
        check_length("virtual_tokens", self.virtual_tokens)
        if self.init not in ("random", "zero"):
            raise RecipeError(f"init is '{self.init}'", hint="one of: random, zero")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> PrefixTuning:
        return cls(virtual_tokens=config["num_virtual_tokens"])

    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> PrefixTuningStack:
        return PrefixTuningStack(self, base, classes, seeds)


class PrefixTuningStack(Stack):
    def __init__(self, method: PrefixTuning, base: Base, classes: int, seeds: Sequence[int]):
        self.method = method
        self.depth, self.kv_heads, self.head_size = base.depth, base.kv_heads, base.head_size
        shape = (method.virtual_tokens, base.depth * 2 * base.kv_heads * base.head_size)
        init = normal(shape) if method.init == "random" else constant(shape, 0.0)
        super().__init__(base, classes, seeds, {"prefix": TensorSpec(shape, init)})
        self.prefix_tokens = method.virtual_tokens
        self.peft_dims = peft_dims(base, base.kv_heads, base.kv_heads * base.head_size)

    def prefix(self, layer: int, part: Part) -> tuple[Tensor, Tensor]:
        p_NPYGK = torch.unflatten(self.tensors["prefix"], 2, (self.depth * 2, self.kv_heads, self.head_size))
        return p_NPYGK[:, :, 2 * layer].transpose(1, 2), p_NPYGK[:, :, 2 * layer + 1].transpose(1, 2)

    def peft_config(self, n: int) -> dict[str, Any]:
        return {"num_virtual_tokens": self.method.virtual_tokens, "prefix_projection": False, **self.peft_dims}

    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.tensors["prefix"][n].detach().clone()}

    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        fill_(self.tensors, tensors, {"prompt_embeddings": (self.tensors["prefix"][n], same)})
