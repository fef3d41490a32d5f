"""Continuations of prompts, by the base and by adapters side by side: all of them in one packed stream.

The whole stream is computed again for every new token: any method's adapter acts as it was trained, at a cost that is fine for
a few dozen tokens.        Dimensions: B prompts · D width · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from katei.base.packed import Base, check_ids
from katei.base.stream import PackedRow
from katei.core.errors import RecipeError
from katei.methods.contract import Stack
from katei.methods.head_only import HeadOnlyStack
from katei.ship.models import capped


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


HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no character, or not yet."""

OnText = Callable[[int, int, str], None]
"""Called with (voice, prompt, more text) as soon as that text can no longer change."""


def generate(
    base: Base,
    lm_head: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    voices: Sequence[Stack | None] = (None,),
    *,
    stop: Sequence[str] = (),
    chat: bool = False,
    stop_ids: Sequence[int] = (),
    on_text: OnText | None = None,
) -> list[list[str]]:
    """The continuation of each prompt by each voice, without the prompt: [voice][prompt]. All of them in one pass per token.

    A voice is an adapter, or None for the base alone. A continuation ends before the first of the words in `stop`, at the end of a
    text, or at one of `stop_ids`; with `chat` each prompt is a user's message and the continuation the answer to it. `lm_head`
    maps (B, D) to (B, V) scores. Voices draw the same numbers for the same prompt, whatever stands beside them.
    """
    if any(not word for word in stop):
        raise RecipeError("a stop word is empty", hint='--stop "。"')
    stacks = [voice or HeadOnlyStack(base, 2, [0]) for voice in voices]
    ends = _ends(base, chat) | set(stop_ids)
    ids = [_chat_ids(base, prompt) if chat else prompt_ids(base, prompt) for prompt in prompts]
    rows = [_Row(base.tokenizer, v, i, list(ids[i]), stop) for v in range(len(voices)) for i in range(len(prompts))]
    rngs = [torch.Generator().manual_seed(sampling.seed + row.prompt) for row in rows]
    going = list(range(len(rows)))
    for _ in range(sampling.new_tokens):
        stream = base.stream([PackedRow(rows[r].voice, 0, rows[r].ids) for r in going], stacks)
        with torch.no_grad(), base.running(stream, stacks):
            scores_BV = token_scores(base, lm_head, stream.unsort(base.pooled(stream, stacks)))
        for r, scores_V in zip(list(going), scores_BV, strict=True):
            token = choose_token(scores_V, sampling, rngs[r])
            if token in ends or rows[r].add(token):
                going.remove(r)
            if on_text is not None and (more := rows[r].certain(r not in going)):
                on_text(rows[r].voice, rows[r].prompt, more)
        if not going:
            break
    for row in rows:
        if on_text is not None and (more := row.certain(True)):
            on_text(row.voice, row.prompt, more)
    return [[row.text() for row in rows if row.voice == v] for v in range(len(voices))]


def token_scores(base: Base, lm_head: Any, pooled_BD: Tensor) -> Tensor:
    """Scores of the next token of each row, (B, V), on the host."""
    return capped(base.config, lm_head(pooled_BD).float().cpu())


def continuation(base: Base, ids: Sequence[int], start: int) -> str:
    """The text of the tokens from `start` on."""
    row = _Row(base.tokenizer, 0, 0, list(ids[:start]), ())
    row.ids.extend(ids[start:])
    return row.text()


class _Row:
    """One prompt and what one voice has added to it."""

    def __init__(self, tokenizer: Any, voice: int, prompt: int, ids: list[int], stop: Sequence[str]):
        self.tokenizer, self.voice, self.prompt, self.ids, self.stop = tokenizer, voice, prompt, ids, tuple(stop)
        self.start = len(ids)
        self.before = tokenizer.decode(ids, skip_special_tokens=True)
        self.given = ""

    def add(self, token: int) -> bool:
        """Take a token; True if a stop word is whole now, wherever its letters lie among the tokens."""
        self.ids.append(token)
        return bool(self.stop) and self._cut(self._readable()) is not None

    def text(self) -> str:
        """What was added, up to a stop word, and without half a character whose other tokens did not come."""
        readable = self._readable()
        return readable[: self._cut(readable)].rstrip(HALF)

    def certain(self, ended: bool) -> str:
        """Text that was not given out before and that no later token can change or turn into a stop word."""
        text = self.text()
        if not ended:
            held = max((n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
            text = text[: len(text) - held].rstrip(HALF)
        if not text.startswith(self.given):  # a tokenizer that mends what it wrote: the whole text is given at the end
            return ""
        more = text[len(self.given) :]
        self.given = text
        return more

    def _readable(self) -> str:
        """Without the half character at its end, which the next token may complete."""
        # decoded with the prompt, then cut: a token may hold half a character, or a space that depends on what stands before
        whole: str = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if whole.startswith(self.before):
            return whole[len(self.before) :].rstrip(HALF)
        alone: str = self.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True)
        return alone.rstrip(HALF)

    def _cut(self, text: str) -> int | None:
        places = [place for word in self.stop if (place := text.find(word)) >= 0]
        return min(places, default=None)


def prompt_ids(base: Base, prompt: str) -> list[int]:
    """Tokens of a text that goes on: some tokenizers end every text."""
    ids = base.tokenize(prompt)
    if len(ids) > 1 and ids[-1] == base.tokenizer.eos_token_id:
        ids = ids[:-1]
    if not ids:
        raise RecipeError("the prompt is empty", hint='katei generate --model gemma3-270m "春の夜の"')
    return ids


def _chat(base: Base, messages: list[dict[str, str]], **more: Any) -> str:
    if not base.tokenizer.chat_template:
        raise RecipeError(
            f"the tokenizer of {base.name or 'this base'} has no chat template",
            hint="leave out --chat, or use a base that was trained to chat, such as smollm2",
        )
    text: str = base.tokenizer.apply_chat_template(messages, tokenize=False, **more)
    return text


def _chat_ids(base: Base, prompt: str) -> list[int]:
    text = _chat(base, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    check_ids(ids, base.vocabulary, base.tokenizer)
    return ids


def stop_tokens(base: Base) -> set[int]:
    """The tokens after which a text is over."""
    own = base.config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), base.tokenizer.eos_token_id} - {None}


def _ends(base: Base, chat: bool) -> set[int]:
    """Tokens a text ends with; in a chat also what the template puts behind an answer."""
    ends = stop_tokens(base)
    if chat:
        asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        front, whole = _chat(base, [asked], add_generation_prompt=True), _chat(base, [asked, answer])
        if whole.startswith(front + "b"):
            behind = base.tokenizer(whole[len(front) + 1 :], add_special_tokens=False)["input_ids"][:1]
            ends |= set(behind) & set(base.tokenizer.all_special_ids + list(base.tokenizer.added_tokens_decoder))
    return ends


def choose_token(scores_V: Tensor, sampling: Sampling, rng: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    p_V = torch.softmax(scores_V.double() / sampling.temperature, 0)
    if sampling.top_p < 1:
        sorted_V, order_V = p_V.sort(descending=True)
        sorted_V[sorted_V.cumsum(0) - sorted_V >= sampling.top_p] = 0.0  # the smallest set that reaches top_p stays
        return int(order_V[torch.multinomial(sorted_V, 1, generator=rng)])
    return int(torch.multinomial(p_V, 1, generator=rng))
