"""How well a base continues a text it may have seen: one pass over the text, every token judged by what stands before it.

    log p(x_t | x_<t)      rank of x_t among all tokens, 1 = the likeliest      longest run of rank 1: greedy decoding repeats it

A high share of rank 1 and long runs hint that a text was in the training data; a text that is merely predictable has them too, so
compare with texts of the same kind that the base cannot have seen.        Dimensions: T tokens · D width · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from katei.base.packed import Base
from katei.base.stream import PackedRow
from katei.core.errors import RecipeError
from katei.methods.contract import Stack
from katei.methods.head_only import HeadOnlyStack
from katei.ship.generate import prompt_ids
from katei.ship.models import capped

CHUNK = 256
"""Tokens whose scores over the vocabulary are held at once."""


@dataclass(frozen=True)
class JudgedToken:
    token: str
    log_probability: float
    """In nats."""
    rank: int
    greedy: bool
    """Greedy decoding would have written it."""


@dataclass(frozen=True)
class Memorised:
    """A text as the base expected it. Its first token is left out where nothing stands before it."""

    tokens: list[JudgedToken]
    nats_per_token: float
    perplexity: float
    rank_1: float
    """Share of tokens that were the likeliest."""
    longest_tokens: int
    """Length of the longest exact greedy continuation."""
    longest_after: str
    """What stands before it,"""
    longest: str
    """and its own text."""


def memorised(base: Base, lm_head: Any, text: str, voice: Stack | None = None) -> Memorised:
    """Judge every token of `text`. Raises RecipeError for a text too short or too long to judge."""
    ids = prompt_ids(base, text)
    if len(ids) < 2:
        raise RecipeError("one token says nothing: what would it continue?", hint="--memorised with a longer text")
    most = getattr(base.config, "max_position_embeddings", None)
    if most is not None and len(ids) > most:
        raise RecipeError(
            f"the text has {len(ids)} tokens, and this base takes {most}", hint="--memorised with a part of it"
        )
    return judge(base, lm_head, ids, voice)


def judge(base: Base, lm_head: Any, ids: Sequence[int], voice: Stack | None = None) -> Memorised:
    """Judge every token but the first."""
    stacks = [voice or HeadOnlyStack(base, 2, [0])]
    stream = base.stream([PackedRow(0, 0, ids)], stacks, trunks=False)
    log_ps, ranks, firsts = [], [], []
    with torch.no_grad(), base.running(stream, stacks):
        h_TD = base.norm(base.hidden_at(stream, stacks, [base.depth])[base.depth][None])[0][-len(ids) : -1]
        for start in range(0, len(ids) - 1, CHUNK):
            scores_TV = capped(base.config, lm_head(h_TD[start : start + CHUNK]).float())
            next_T = torch.tensor(ids[1 + start : 1 + start + len(scores_TV)], device=scores_TV.device)
            own_T1 = scores_TV.gather(1, next_T[:, None])
            log_ps += (own_T1[:, 0].double() - torch.logsumexp(scores_TV.double(), 1)).tolist()
            ranks += ((scores_TV > own_T1).sum(1) + 1).tolist()
            firsts += (scores_TV.argmax(1) == next_T).tolist()
    words = [base.tokenizer.decode([token]) for token in ids[1:]]
    tokens = [JudgedToken(*judged) for judged in zip(words, log_ps, ranks, firsts, strict=True)]
    start, length = _longest(firsts)
    before = base.tokenizer.decode(ids[: 1 + start], skip_special_tokens=True)
    whole = base.tokenizer.decode(ids[: 1 + start + length], skip_special_tokens=True)
    mean = -sum(log_ps) / len(log_ps)
    return Memorised(
        tokens, mean, math.exp(min(mean, 700.0)), sum(firsts) / len(firsts), length, before, whole[len(before) :]
    )


def _longest(firsts: Sequence[bool]) -> tuple[int, int]:
    """Start and length of the longest run of True; the first of several."""
    best, start = (0, 0), 0
    for i, first in enumerate(firsts):
        if not first:
            start = i + 1
        elif i + 1 - start > best[1]:
            best = (start, i + 1 - start)
    return best
