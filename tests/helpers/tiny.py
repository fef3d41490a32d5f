"""Tiny random base folders, as a user would have them on disk: config, safetensors, tokenizer.

    folder = tiny_base_folder(tmp_path, "qwen2", layers=3)
    base = load_base(str(folder))

Weights are wide enough that attention is not uniform, and norms and biases are not at their starting values: a test
on such a model notices a forgotten norm weight, a swapped bias or an ignored position.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from katei.base.quiet import quiet

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
SPECIAL = ("<pad>", "<s>", "</s>")
# Enough merges that one token is not one byte, in both languages; a token is listed after its parts.
MERGES = [
    tuple(pair.split(" "))
    for line in ("t h|th e|i n|o n|a n|e r|Ġ th|Ġ a|Ġ the|in g|an d", "ã ģ|ã Ĥ|ã ĥ|ã Ģ|ãģ ®|ãģ ¦|ãģ «|ãģ Ł|ãĢ Ĥ|ãĢ ģ")
    for pair in line.split("|")
]


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE: reads any text back exactly, Japanese included; puts `<s>` in front, as Llama and llm-jp do."""
    vocabulary = {
        token: number for number, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))
    }
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_config(architecture: str = "llama", *, layers: int = 4, vocabulary: int = 300) -> PreTrainedConfig:
    """Hidden 64, four heads over two key/value heads of 16. Gemma 3: sliding (5 tokens) and full attention in turn."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    match architecture:
        case "llama":
            return LlamaConfig(**shape, head_dim=16)
        case "mistral":
            return MistralConfig(**shape, head_dim=16, sliding_window=5)
        case "qwen2":
            return Qwen2Config(**shape)
        case "qwen3":
            return Qwen3Config(**shape, head_dim=16)
        case "gemma3":
            kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
            return Gemma3TextConfig(**shape, head_dim=16, sliding_window=5, layer_types=kinds, query_pre_attn_scalar=16)
    raise ValueError(f"no tiny {architecture!r}; there are {ARCHITECTURES}")


def tiny_base_folder(
    tmp_path: Path, architecture: str = "llama", layers: int = 4, seed: int = 0, vocabulary: int = 300
) -> Path:
    """A base folder `tmp_path/tiny-…`, made once per `tmp_path`; the same bytes for the same arguments."""
    folder = tmp_path / f"tiny-{architecture}-{layers}-{seed}-{vocabulary}"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, layers=layers, vocabulary=vocabulary))
    randomise_(model, seed)
    tiny_tokenizer(folder)
    with quiet():
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomise_(model: torch.nn.Module, seed: int) -> None:
    """Matrices of unit gain (embeddings of std 0.5), norms 20 % around their start, biases of std 0.2."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if parameter.ndim == 1:
            parameter.add_(noise, alpha=0.2)
        elif "embed" in name:
            parameter.copy_(noise * 0.5)
        else:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)


def edit_config(folder: Path, **changes: object) -> None:
    """Overwrite keys of a folder's config.json (`None` removes), to make broken bases."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
