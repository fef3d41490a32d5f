"""llama.cpp itself (the package xllamacpp brings it as a wheel), and tiny bases with tokenizers it knows."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import edit_config, tiny_base_folder

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


def readable_base(folder: Path, architecture: str, **changes: Any) -> Path:
    """A tiny base whose tokenizer and layers llama.cpp has code for."""
    base = tiny_base_folder(folder, architecture, layers=7 if architecture == "gemma3" else 3)
    if architecture == "gemma3":
        edit_config(base, layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(7)])
        _sentencepiece_like(base)
    else:
        _byte_level(base)
    if changes:
        edit_config(base, **changes)
    return base


def _byte_level(base: Path) -> None:
    """The tiny tokenizer, with words cut as SmolLM's are."""
    described = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    _save(Tokenizer.from_str(json.dumps(described)), base, bos="<s>", eos="</s>", pad="<pad>")


def _sentencepiece_like(base: Path) -> None:
    """As Gemma's: ▁ for a space, bytes for what has no token, a token that is added but not special."""
    words = ["<pad>", "</s>", "<s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [tuple(m.split()) for m in "t h|th e|▁ the|i n|▁ a|e r|o n|a n|▁ i".split("|")]
    vocabulary = {word: i for i, word in enumerate([*words, *("".join(m) for m in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    backend.add_tokens(["[image]"])
    _save(backend, base, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")
    edit_config(base, bos_token_id=2, eos_token_id=1)


def _save(backend: Tokenizer, base: Path, **special: str) -> None:
    named = {f"{name}_token": token for name, token in special.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)


class Runtime:
    """A llama.cpp server on this machine, asked over HTTP as anybody would."""

    def __init__(self, server: Any):
        self.server = server
        self.address: str = server.listening_address

    def ask(self, path: str, **question: Any) -> Any:
        body = json.dumps(question).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return tokens

    def log_probabilities(
        self, ids: Sequence[int], vocabulary: int, said: int, likeliest: int | None = None
    ) -> NDArray[np.float64]:
        """Of every token after `ids`, or of the likeliest, NaN elsewhere.

        The server is made to say the token `said`: for half a character it would not answer.
        """
        answer = self.ask(
            "/completion",
            prompt=list(ids),
            n_predict=1,
            n_probs=likeliest or vocabulary,
            logit_bias=[[said, 1000.0]],
            temperature=0.0,
            cache_prompt=False,
        )
        out = np.full(vocabulary, np.nan)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            out[token["id"]] = token["logprob"]
        return out

    def embedding(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """What leaves the final norm at the last token (or, with rank pooling, what llama.cpp's classifier says)."""
        answer = self.ask("/embeddings", input=list(ids), embd_normalize=-1)
        return np.array(answer[0]["embedding"], dtype=np.float64).reshape(-1)


@contextmanager
def running(file: Path, *, lora: Path | None = None, pooling: str | None = None) -> Iterator[Runtime]:
    """llama.cpp with a model, its cache in fp32; with `pooling` (last or rank) it embeds instead of continuing."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        params.lora_adapters = [adapter]
    if pooling is not None:
        params.embedding = True
        params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
    server = xllamacpp.Server(params)
    try:
        yield Runtime(server)
    finally:
        del server
