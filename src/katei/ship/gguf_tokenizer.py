"""A Hugging Face tokenizer as llama.cpp reads one: two kinds of byte-pair encoding, each with its own conventions.

    "gpt2"     byte-level BPE (Llama 3, Qwen, SmolLM): tokens, merges, and the *name* of the rule that cuts words ("pre")
    "llama"    SentencePiece-like BPE with byte fallback (Llama 2, Gemma): tokens and scores, ▁ for a space

llama.cpp has its own code for both, so what it would do otherwise than the tokenizer is refused here, not written: an unknown
cutting rule, a template that adds other tokens than BOS and EOS, another normalizer.
https://github.com/ggml-org/llama.cpp: `conversion/base.py` (get_vocab_base) and `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from katei.core.errors import BaseError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTTING_RULES: dict[str, tuple[str, bool]] = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST: ("llama-bpe", True),
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST: ("qwen2", False),
}
"""A split's regular expression → llama.cpp's name for it, and whether whole words skip the merges there."""

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""gguf.TokenType"""


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Write `tokenizer` into a GGUFWriter, for an embedding of `rows` rows. Raises BaseError for what llama.cpp would do otherwise."""
    described = _described(tokenizer)
    model = described["model"]
    if model.get("type") != "BPE":
        raise _refused(f"its tokenizer is of the kind {model.get('type')}, and only byte-pair encodings are written")
    add_bos, add_eos = _added(tokenizer)
    if model.get("byte_fallback"):
        space_in_front = _space_in_front(described)
        tokens, types = _tokens(tokenizer, rows, sentencepiece=True)
        scores, unreachable = _scores(model, tokens, types)
        if unreachable:
            raise _refused(f"its tokenizer has words no merge leads to ({', '.join(unreachable[:3])})")
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_add_space_prefix(space_in_front)
    else:
        pre = _cutting_rule(described)
        tokens, types = _tokens(tokenizer, rows, sentencepiece=False)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([_merge(pair) for pair in model["merges"]])
        writer.add_add_space_prefix(False)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _described(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json"""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("its tokenizer has no tokenizer.json")
    described: dict[str, Any] = json.loads(backend.to_str())
    return described


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets BOS in front and EOS behind; llama.cpp knows no other additions."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise _refused("its tokenizer adds other tokens to a text than BOS in front and EOS behind")


def _tokens(tokenizer: Any, rows: int, *, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """A name and a kind for each row of the embedding; rows without a token are unused."""
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(rows):
        if number not in names:
            tokens.append(f"[PAD{number}]")
            types.append(UNUSED)
        elif number in added:
            special = added[number].special
            unknown = sentencepiece and number == tokenizer.unk_token_id
            tokens.append(names[number] if special else added[number].content.replace("▁", " "))
            types.append(UNKNOWN if unknown else CONTROL if special else USER_DEFINED)
        else:
            tokens.append(names[number])
            types.append(BYTE if sentencepiece and BYTE_TOKEN.fullmatch(names[number]) else NORMAL)
    return tokens, types


def _scores(model: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[list[float], list[str]]:
    """SentencePiece joins what gives the word of the highest score: minus the rank of the first merge that gives it.

    Also the words of several characters that no merge gives: llama.cpp would join them, the tokenizer never does.
    """
    rank_of: dict[str, int] = {}
    for rank, (left, right) in enumerate(
        pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]
    ):
        rank_of.setdefault(left + right, rank)
    scores = [float(-rank_of.get(token, len(rank_of))) for token in tokens]
    unreachable = [
        token
        for token, kind in zip(tokens, types, strict=True)
        if kind == NORMAL and len(token) > 1 and token not in rank_of
    ]
    return scores, unreachable


def _space_in_front(described: Mapping[str, Any]) -> bool:
    """Whether a space is put before every text, of a tokenizer that writes ▁ for spaces and does nothing else to a text."""
    normalizer = described.get("normalizer")
    steps: list[Any] = []
    if normalizer:
        steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    to_underline = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    pre = described.get("pre_tokenizer") or {}
    if pre.get("type") == "Metaspace" and not steps:
        return bool(pre["prepend_scheme"] != "never")
    splits_at_spaces = not pre or (pre.get("type") == "Split" and pre.get("pattern") == {"String": " "})
    if steps in ([to_underline], [prepend, to_underline]) and splits_at_spaces:  # no space is left to split at
        return len(steps) == 2
    raise _refused("its tokenizer changes a text before cutting it in a way llama.cpp does not know")


def _cutting_rule(described: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer cuts a text into words."""
    normalizer, pre = described.get("normalizer"), described.get("pre_tokenizer") or {}
    if normalizer not in (None, {"type": "NFC"}):
        raise _refused("its tokenizer changes a text before cutting it in a way llama.cpp does not know")
    steps = pre.get("pretokenizers", [pre])
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        whole_words = bool(described["model"].get("ignore_merges"))
        if last.get("use_regex", True) and not whole_words:
            if len(steps) == 1:
                return "gpt-2"
            if len(steps) == 2 and steps[0] == {"type": "Digits", "individual_digits": True}:
                return "smollm"
        elif len(steps) == 2 and steps[0].get("type") == "Split" and steps[0].get("behavior") == "Isolated":
            name, skips = CUTTING_RULES.get(steps[0]["pattern"].get("Regex", ""), ("", False))
            if name and skips == whole_words:
                return name
    raise _refused(
        "its tokenizer cuts words by a rule this file has no name of llama.cpp's for (it knows gpt-2, smollm, llama-bpe, qwen2)"
    )


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _refused(why: str) -> BaseError:
    return BaseError(
        f"this base cannot be written as a GGUF: {why}",
        hint="llama.cpp's own convert_hf_to_gguf.py, given the folder `katei merge --as causal-lm` writes, may know it",
    )
