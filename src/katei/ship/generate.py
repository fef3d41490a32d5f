"""Continuations of a prompt, by the base or by the base with an adapter: all prompts in one packed stream.

The whole stream is computed again for every new token: any method's adapter acts as it was trained, at a cost that is fine for
a few dozen tokens.        Dimensions: B prompts · D width · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from katei.base.packed import Base
from katei.base.stream import PackedRow
from katei.core.errors import RecipeError
from katei.methods.contract import Stack
from katei.methods.head_only import HeadOnlyStack


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else a draw."""

    new_tokens: int = 40
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise RecipeError(f"new_tokens is {self.new_tokens}, but it counts tokens", hint="--new-tokens 40")
        if not 0 <= self.temperature < math.inf:
            raise RecipeError(
                f"temperature is {self.temperature}, but it must be 0 or more",
                hint="--temperature 0 is greedy, 0.8 varied",
            )
        if not 0 <= self.seed < 2**62:
            raise RecipeError(f"seed is {self.seed}, but it is a whole number of 0 or more", hint="--seed 0")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p is {self.top_p}, but it is a share", hint="--top-p 0.9")


def generate(
    base: Base, lm_head: Any, prompts: Sequence[str], sampling: Sampling, stack: Stack | None = None
) -> list[str]:
    """The continuation of each prompt, without the prompt. `lm_head` maps (B, D) to (B, V) scores."""
    stacks = [stack or HeadOnlyStack(base, 2, [0])]
    rows = [_prompt_ids(base, prompt) for prompt in prompts]
    starts = [len(row) for row in rows]
    rngs = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(rows))]
    stop = base.config.eos_token_id
    stops = set(stop if isinstance(stop, list) else [stop]) | {base.tokenizer.eos_token_id}
    open_rows = list(range(len(rows)))
    for _ in range(sampling.new_tokens):
        stream = base.stream([PackedRow(0, 0, rows[i]) for i in open_rows], stacks)
        with torch.no_grad(), base.running(stream, stacks):
            scores_BV = lm_head(stream.unsort(base.pooled(stream, stacks))).float().cpu()
        softcap = getattr(base.config, "final_logit_softcapping", None)
        if softcap:
            scores_BV = torch.tanh(scores_BV / softcap) * softcap
        for i, scores_V in zip(list(open_rows), scores_BV, strict=True):
            token = _choose(scores_V, sampling, rngs[i])
            if token in stops:
                open_rows.remove(i)
            else:
                rows[i].append(token)
        if not open_rows:
            break
    # decoded with the prompt, then cut: a token may hold half a character, or a space that depends on what stands before
    texts = []
    for row, start in zip(rows, starts, strict=True):
        before = base.tokenizer.decode(row[:start], skip_special_tokens=True)
        whole = base.tokenizer.decode(row, skip_special_tokens=True)
        text = (
            whole[len(before) :]
            if whole.startswith(before)
            else base.tokenizer.decode(row[start:], skip_special_tokens=True)
        )
        texts.append(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # half a character, whose other tokens did not come
    return texts


def _prompt_ids(base: Base, prompt: str) -> list[int]:
    ids = base.tokenize(prompt)
    if len(ids) > 1 and ids[-1] == base.tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text; a prompt goes on
    if not ids:
        raise RecipeError("the prompt is empty", hint='katei generate --model gemma3-270m "春の夜の"')
    return ids


def _choose(scores_V: Tensor, sampling: Sampling, rng: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    p_V = torch.softmax(scores_V.double() / sampling.temperature, 0)
    if sampling.top_p < 1:
        sorted_V, order_V = p_V.sort(descending=True)
        sorted_V[sorted_V.cumsum(0) - sorted_V >= sampling.top_p] = 0.0  # the smallest set that reaches top_p stays
        return int(order_V[torch.multinomial(sorted_V, 1, generator=rng)])
    return int(torch.multinomial(p_V, 1, generator=rng))
