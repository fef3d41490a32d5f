"""Prompt tuning: trained vectors in front of the text. Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2.

    h = layers([p_1 … p_P, embed(x_1), …])        p: (P, D), the only thing trained, and the head

At the embed place. Vectors start random (peft's default, nn.Embedding's N(0, 1)), from random words of the vocabulary, or from
a given text. Rows start at position 0 with their virtual tokens and are pooled at their true last token. (peft pools a
padding token when rows are batched, see DESIGN: there we differ on purpose.)
Trainable numbers: P · width, and the head.

Dimensions: N adapters · P virtual tokens · D width · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from katei.base.packed import Base
from katei.core.errors import RecipeError
from katei.methods.contract import Method, Stack, TensorSpec, TrialFacts, fill_, normal, same

PEFT_INIT = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    name: ClassVar[str] = "prompt-tuning"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    learning_rate: ClassVar[float] = 1e-3
    merges: ClassVar[bool] = False
    search: ClassVar[Mapping[str, tuple[float | str, ...]]] = {
        "virtual_tokens": (5, 10, 20),
        "init": ("random", "vocabulary"),
    }

    virtual_tokens: int = 10
    init: Literal["random", "vocabulary", "text"] = "random"
    init_text: str = ""
    """The words the vectors start from with `init = "text"`, repeated or cut to length."""

    def __post_init__(self) -> None:
        check_length("virtual_tokens", self.virtual_tokens)
        if self.init not in PEFT_INIT:
            raise RecipeError(f"init is '{self.init}'", hint=f"one of: {', '.join(PEFT_INIT)}")
        if (self.init == "text") != bool(self.init_text.strip()):
            raise RecipeError(
                'init = "text" and init_text go together', hint='init = "text", init_text = "この詩の声は"'
            )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> PromptTuning:
        return cls(virtual_tokens=config["num_virtual_tokens"])

    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> PromptTuningStack:
        return PromptTuningStack(self, base, classes, seeds)


def check_length(name: str, length: int) -> None:
    if not 1 <= length <= 1024:
        raise RecipeError(f"{name} is {length}, but it counts vectors, 1 to 1024", hint=f"{name} = 10")


def peft_dims(base: Base, heads: int, width: int) -> dict[str, int]:
    """The shape fields peft's prompt configs carry and its loader needs."""
    return {"token_dim": width, "num_attention_heads": heads, "num_layers": base.depth, "num_transformer_submodules": 1}


class PromptTuningStack(Stack):
    def __init__(self, method: PromptTuning, base: Base, classes: int, seeds: Sequence[int]):
        self.method = method
        shape = (method.virtual_tokens, base.width)
        super().__init__(base, classes, seeds, {"prompt_PD": TensorSpec(shape, self._init(method, base))})
        self.virtual_tokens = method.virtual_tokens
        self.peft_dims = peft_dims(base, base.heads, base.width)

    @staticmethod
    def _init(method: PromptTuning, base: Base) -> Callable[[torch.Generator], Tensor]:
        if method.init == "random":
            return normal((method.virtual_tokens, base.width))

        def words(rng: torch.Generator) -> Tensor:
            if method.init == "vocabulary":
                ids = torch.randint(0, base.vocabulary, (method.virtual_tokens,), generator=rng)
            else:
                text = base.tokenize(method.init_text)
                ids = torch.tensor((text * (method.virtual_tokens // len(text) + 1))[: method.virtual_tokens])
            return base.embedding(ids.to(base.device)).detach().float().cpu()  # type: ignore[no-any-return]

        return words

    def embed(self) -> Tensor:
        return self.tensors["prompt_PD"]

    def peft_config(self, n: int) -> dict[str, Any]:
        # the vectors are in the file: the start they were given is over, and peft would need a tokenizer for "TEXT"
        return {"num_virtual_tokens": self.method.virtual_tokens, "prompt_tuning_init": "RANDOM", **self.peft_dims}

    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.tensors["prompt_PD"][n].detach().clone()}

    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        fill_(self.tensors, tensors, {"prompt_embeddings": (self.tensors["prompt_PD"][n], same)})
