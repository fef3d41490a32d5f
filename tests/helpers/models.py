"""Tiny random models in memory, one per architecture, and stacks pushed away from their starting point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from katei.base.packed import Base
from katei.engine.lockstep import Tokens
from katei.methods import METHODS
from katei.methods.contract import Method, Stack

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, head_dim=16),
    "mistral": MistralConfig(**SHAPE, head_dim=16, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=5),
    "gemma3": Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2
    ),
}


def tiny_model(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen model whose norms and biases are random too."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(CONFIGS[architecture]).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=rng) * 0.2
            parameter.copy_(noise if "bias" in name else parameter + noise)
        else:
            parameter.mul_(3.0)  # attention that is not nearly uniform
    for parameter in model.parameters():  # the rotary table stays in float32, as in a model loaded from disk
        parameter.data = parameter.data.to(dtype)
    return model


def tiny_base(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Base:
    return Base(tiny_model(architecture, seed, dtype))


def settings(name: str, **more: Any) -> Method:
    """The method at a size that fits four tiny layers."""
    small: dict[str, dict[str, Any]] = {
        "lora": {"rank": 3, "alpha": 5.0},
        "adalora": {"rank": 4, "target_rank": 2.0, "alpha": 5.0},
        "prompt-tuning": {"virtual_tokens": 3},
        "p-tuning": {"virtual_tokens": 3, "hidden": 12},
        "prefix-tuning": {"virtual_tokens": 3},
        "llama-adapter": {"layers": 2, "length": 3},
    }
    return METHODS[name](**{**small.get(name, {}), **more})  # type: ignore[return-value]


STACKED = [name for name in METHODS if name != "full"]
"""Methods that share a base; full fine-tuning owns its own."""


def perturb_(stack: Stack, seed: int = 0, size: float = 0.3) -> None:
    """Away from the start, where zero gates and zero B make broken code look right."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        stack.theta_NM += size * torch.randn(stack.theta_NM.shape, generator=rng)


def random_tokens(rows: int, classes: int = 3, seed: int = 0, shortest: int = 2, longest: int = 14) -> Tokens:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (rows,), generator=rng).tolist()
    ids = [tuple(torch.randint(3, 300, (n,), generator=rng).tolist()) for n in lengths]
    return Tokens(tuple(ids), tuple(i % classes for i in range(rows)))


def pooled_one_by_one(model: PreTrainedModel, rows: Sequence[Sequence[int]], attention: str = "eager") -> torch.Tensor:
    """The library's own forward, a row at a time: (B, D)."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    with torch.no_grad():
        out = [model(input_ids=torch.tensor([list(row)]), use_cache=False).last_hidden_state[0, -1] for row in rows]
    model.set_attn_implementation(before)
    return torch.stack(out)
