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
    rows = [prompt_ids(base, prompt) for prompt in prompts]
    starts = [len(row) for row in rows]
    rngs = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(rows))]
    stops = stop_tokens(base)
    open_rows = list(range(len(rows)))
    for _ in range(sampling.new_tokens):
        stream = base.stream([PackedRow(0, 0, rows[i]) for i in open_rows], stacks)
        with torch.no_grad(), base.running(stream, stacks):
            scores_BV = token_scores(base, lm_head, stream.unsort(base.pooled(stream, stacks)))
        for i, scores_V in zip(list(open_rows), scores_BV, strict=True):
            token = choose_token(scores_V, sampling, rngs[i])
            if token in stops:
                open_rows.remove(i)
            else:
                rows[i].append(token)
        if not open_rows:
            break
    return [continuation(base, row, start) for row, start in zip(rows, starts, strict=True)]


def token_scores(base: Base, lm_head: Any, pooled_BD: Tensor) -> Tensor:
    """Scores of the next token of each row, (B, V), on the host."""
    scores_BV: Tensor = lm_head(pooled_BD).float().cpu()
    softcap = getattr(base.config, "final_logit_softcapping", None)
    return torch.tanh(scores_BV / softcap) * softcap if softcap else scores_BV


def stop_tokens(base: Base) -> set[int]:
    """The tokens after which a text is over."""
    stop = base.config.eos_token_id
    return set(stop if isinstance(stop, list) else [stop]) | {base.tokenizer.eos_token_id}


def continuation(base: Base, row: Sequence[int], start: int) -> str:
    """The text of the tokens from `start` on."""
    # decoded with the prompt, then cut: a token may hold half a character, or a space that depends on what stands before
    before = base.tokenizer.decode(row[:start], skip_special_tokens=True)
    whole = base.tokenizer.decode(row, skip_special_tokens=True)
    text: str = (
        whole[len(before) :]
        if whole.startswith(before)
        else base.tokenizer.decode(row[start:], skip_special_tokens=True)
    )
    return text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character, whose other tokens did not come


def prompt_ids(base: Base, prompt: str) -> list[int]:
    """A prompt's tokens, without the token that ends a text."""
    ids = base.tokenize(prompt)
    if len(ids) > 1 and ids[-1] == base.tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text; a prompt goes on
    if not ids:
        raise RecipeError("the prompt is empty", hint='katei generate --model gemma3-270m "春の夜の"')
    return ids


def choose_token(scores_V: Tensor, sampling: Sampling, rng: torch.Generator) -> int:
    """The next token: the likeliest, or a draw."""
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    p_V = torch.softmax(scores_V.double() / sampling.temperature, 0)
    if sampling.top_p < 1:
        sorted_V, order_V = p_V.sort(descending=True)
        sorted_V[sorted_V.cumsum(0) - sorted_V >= sampling.top_p] = 0.0  # the smallest set that reaches top_p stays
        return int(order_V[torch.multinomial(sorted_V, 1, generator=rng)])
    return int(torch.multinomial(p_V, 1, generator=rng))
