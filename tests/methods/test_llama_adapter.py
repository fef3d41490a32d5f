"""LLaMA-Adapter beyond where peft has it: against the equation, computed densely, in every architecture."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch

from katei.base.packed import Base
from katei.base.stream import PackedRow
from katei.core.errors import RecipeError
from katei.methods.contract import HEAD, Stack, TrialFacts
from tests.helpers.models import CONFIGS, perturb_, pooled_one_by_one, random_tokens, settings, tiny_base, tiny_model

ROWS = random_tokens(7, longest=16).ids


def add_by_hand(model: Any, stack: Stack, n: int) -> None:
    """Hooks that add g · softmax(q (W_k p)ᵀ)(W_v p) W_o to the library's own attention, one row at a time, no packing."""
    rotate = importlib.import_module(type(model).__module__).apply_rotary_pos_emb

    def hook(block: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        x_1TD, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        prompt_PD, gate = (stack.tensors[f"{block.layer_idx}.{name}"][n].detach() for name in ("prompt_PD", "gate"))
        heads = {"q": block.q_proj(x_1TD), "k": block.k_proj(prompt_PD[None]), "v": block.v_proj(prompt_PD[None])}
        q, k, v = (heads[name].unflatten(-1, (-1, block.head_dim)).transpose(1, 2) for name in "qkv")
        if hasattr(block, "q_norm"):
            q, k = block.q_norm(q), block.k_norm(k)
        q, _ = rotate(q, q, cos, sin)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        added = torch.softmax(q @ k.transpose(2, 3) * block.scaling, -1) @ v
        return (output[0] + gate * block.o_proj(added.transpose(1, 2).flatten(2)), *output[1:])

    for layer in model.layers:
        if f"{layer.self_attn.layer_idx}.gate" in stack.tensors:
            layer.self_attn.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_it_is_the_equation(architecture: str) -> None:
    backbone = tiny_model(architecture)
    base = Base(copy.deepcopy(backbone))
    stack = settings("llama-adapter", layers=3).build(base, 3, [0, 1], [TrialFacts(1)] * 2)
    perturb_(stack)
    plain = pooled_one_by_one(backbone, ROWS)
    add_by_hand(backbone, stack, 1)
    expected = pooled_one_by_one(backbone, ROWS)
    stream = base.stream([PackedRow(0, 1 - i % 2, ROWS[i // 2]) for i in range(14)], [stack])
    with torch.no_grad(), base.running(stream, [stack]):
        ours = stream.unsort(base.pooled(stream, [stack]))[::2]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.05


def test_at_the_start_only_gates_and_the_head_learn() -> None:
    base = tiny_base()
    stack = settings("llama-adapter").build(base, 3, [0], [TrialFacts(1)])
    stream = base.stream([PackedRow(0, 0, row) for row in ROWS], [stack])
    with base.running(stream, [stack]):
        stack.scores(base.pooled(stream, [stack]), stream.parts[0]).square().sum().backward()
    assert {name for name, t in stack.tensors.items() if t.grad is not None and t.grad.any()} == {
        "2.gate",
        "3.gate",
        HEAD,
    }


def test_more_layers_than_the_base_has_are_refused() -> None:
    with pytest.raises(RecipeError, match="layers is 5, but the base has 4"):
        settings("llama-adapter", layers=5).build(tiny_base(), 2, [0], [TrialFacts(1)])
