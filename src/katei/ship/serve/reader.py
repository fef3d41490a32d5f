"""Texts → tokens, for any thread: a tokenizer holds settings that two calls at once would change under one another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from katei.base.packed import Base, check_ids
from katei.core.errors import DataError
from katei.data.tables import is_blank
from katei.ship.generate import continuation, prompt_ids

CHARACTERS = 64
"""A text of more characters than this for each token allowed is too long, without counting its tokens."""


class TooLong(DataError):
    kind = "limit"


@dataclass(frozen=True)
class Read:
    """One text as an adapter reads it."""

    ids: tuple[int, ...]
    cut: bool
    """The text is longer than the adapter's own length, and the rest was left out, as in training."""


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens that end at whole characters: characters `start:stop` of the text."""

    tokens: tuple[int, ...]
    start: int
    stop: int


class Reader:
    def __init__(self, base: Base, most_tokens: int):
        self.base, self.most_tokens = base, most_tokens
        self._lock = threading.Lock()

    def read(self, text: str, max_lengths: Sequence[int], where: str) -> dict[int, Read]:
        """`text` cut to each of `max_lengths`: the ids `predict_texts` would use. Raises DataError or BaseError."""
        self._check(text, where)
        with self._lock:
            whole = self.base.tokenize(text)
            self._check_length(len(whole), where)
            return {
                most: Read(tuple(whole if len(whole) <= most else self.base.tokenize(text, most)), len(whole) > most)
                for most in set(max_lengths)
            }

    def prompt(self, text: str, where: str) -> tuple[int, ...]:
        self._check(text, where, blank=True)
        with self._lock:
            ids = prompt_ids(self.base, text)
        self._check_length(len(ids), where)
        return tuple(ids)

    def continuation(self, ids: Sequence[int], start: int) -> str:
        with self._lock:
            return continuation(self.base, list(ids), start)

    def parts(self, text: str, max_length: int, most: int, where: str) -> tuple[tuple[int, ...], list[Part]]:
        """The ids of `text`, and its tokens by the characters they stand for, at most `most` groups of them.

        A token of a part of a character joins its neighbours; what a tokenizer adds of its own belongs to no part.
        """
        self._check(text, where)
        tokenizer = self.base.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise DataError("this base's tokenizer does not tell which characters a token stands for")
        with self._lock:
            self._check_length(len(self.base.tokenize(text)), where)
            told = tokenizer(
                text,
                truncation=True,
                max_length=max_length,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
        ids: tuple[int, ...] = tuple(told["input_ids"])
        check_ids(ids, self.base.vocabulary, tokenizer)
        groups: list[tuple[list[int], int]] = []  # (tokens, where their characters end)
        for token, ((start, stop), special) in enumerate(
            zip(told["offset_mapping"], told["special_tokens_mask"], strict=True)
        ):
            if special:
                continue
            if groups and (start < groups[-1][1] or start == stop):
                groups[-1][0].append(token)
                groups[-1] = (groups[-1][0], max(groups[-1][1], stop))
            else:
                groups.append(([token], stop))
        size = -(-len(groups) // most)
        merged = [groups[i : i + size] for i in range(0, len(groups), size)] if groups else []
        parts, begin = [], 0
        for group in merged:
            stop = max(begin, group[-1][1])
            parts.append(Part(tuple(token for tokens, _ in group for token in tokens), begin, stop))
            begin = stop
        return ids, parts

    def _check(self, text: str, where: str, *, blank: bool = False) -> None:
        """As `katei predict` checks a file's texts; a prompt may be blank, but not empty."""
        if not text or (not blank and is_blank(text)):
            raise DataError(f"{where} is empty", hint="leave it out, or send a text")
        if "\0" in text:
            raise DataError(f"{where} holds a NUL character", hint="remove it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where} holds half a surrogate pair, which is no character", hint="remove it") from None
        if len(text) > CHARACTERS * self.most_tokens:
            raise TooLong(f"{where} has {len(text):,} characters, too many for {self.most_tokens:,} tokens")

    def _check_length(self, tokens: int, where: str) -> None:
        if tokens > self.most_tokens:
            raise TooLong(
                f"{where} has {tokens:,} tokens; at most {self.most_tokens:,} are taken",
                hint="send a shorter text, or start the server with a larger --max-tokens",
            )
