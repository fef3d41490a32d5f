"""Shapes of well-known bases, so that a run can be planned without downloading anything: their config.json in the numbers that count.

What is not listed is the transformers default of that model type. Sources: each model's config.json on the hub.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


def _shape(
    kind: str, vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "max_position_embeddings": positions,
        **more,
    }


_LLAMA3 = {"head_dim": 128}
_QWEN25_TIED = {"tie_word_embeddings": True}
_QWEN3 = {"head_dim": 128}
_GEMMA3 = {"head_dim": 256, "sliding_window": 512, "tie_word_embeddings": True}

SHAPES: dict[str, dict[str, Any]] = {
    "llm-jp/llm-jp-3-150m": _shape("llama", 99584, 512, 12, 8, 8, 2048, 4096),
    "llm-jp/llm-jp-3-440m": _shape("llama", 99584, 1024, 16, 8, 8, 3584, 4096),
    "llm-jp/llm-jp-3-980m": _shape("llama", 99584, 1536, 20, 8, 8, 5376, 4096),
    "llm-jp/llm-jp-3-1.8b": _shape("llama", 99584, 2048, 24, 16, 16, 7168, 4096),
    "llm-jp/llm-jp-3-3.7b": _shape("llama", 99584, 3072, 28, 24, 24, 8192, 4096),
    "llm-jp/llm-jp-3-7.2b": _shape("llama", 99584, 4096, 32, 32, 32, 11008, 4096),
    "llm-jp/llm-jp-3-13b": _shape("llama", 99584, 5120, 40, 40, 40, 13824, 4096),
    "HuggingFaceTB/SmolLM2-135M": _shape("llama", 49152, 576, 30, 9, 3, 1536, 8192, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-360M": _shape("llama", 49152, 960, 32, 15, 5, 2560, 8192, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-1.7B": _shape("llama", 49152, 2048, 24, 32, 32, 8192, 8192, tie_word_embeddings=True),
    "TinyLlama/TinyLlama_v1.1": _shape("llama", 32000, 2048, 22, 32, 4, 5632, 2048),
    "meta-llama/Llama-3.2-1B": _shape(
        "llama", 128256, 2048, 16, 32, 8, 8192, 131072, head_dim=64, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.2-3B": _shape(
        "llama", 128256, 3072, 28, 24, 8, 8192, 131072, tie_word_embeddings=True, **_LLAMA3
    ),
    "meta-llama/Llama-3.1-8B": _shape("llama", 128256, 4096, 32, 32, 8, 14336, 131072, **_LLAMA3),
    "mistralai/Mistral-7B-v0.3": _shape(
        "mistral", 32768, 4096, 32, 32, 8, 14336, 32768, head_dim=128, sliding_window=None
    ),
    "Qwen/Qwen2.5-0.5B": _shape("qwen2", 151936, 896, 24, 14, 2, 4864, 32768, **_QWEN25_TIED),
    "Qwen/Qwen2.5-1.5B": _shape("qwen2", 151936, 1536, 28, 12, 2, 8960, 32768, **_QWEN25_TIED),
    "Qwen/Qwen2.5-3B": _shape("qwen2", 151936, 2048, 36, 16, 2, 11008, 32768, **_QWEN25_TIED),
    "Qwen/Qwen2.5-7B": _shape("qwen2", 152064, 3584, 28, 28, 4, 18944, 131072),
    "Qwen/Qwen3-0.6B": _shape("qwen3", 151936, 1024, 28, 16, 8, 3072, 40960, tie_word_embeddings=True, **_QWEN3),
    "Qwen/Qwen3-1.7B": _shape("qwen3", 151936, 2048, 28, 16, 8, 6144, 40960, tie_word_embeddings=True, **_QWEN3),
    "Qwen/Qwen3-4B": _shape("qwen3", 151936, 2560, 36, 32, 8, 9728, 40960, tie_word_embeddings=True, **_QWEN3),
    "Qwen/Qwen3-8B": _shape("qwen3", 151936, 4096, 36, 32, 8, 12288, 40960, **_QWEN3),
    "google/gemma-3-270m": _shape("gemma3_text", 262144, 640, 18, 4, 1, 2048, 32768, **_GEMMA3),
    "google/gemma-3-1b-pt": _shape("gemma3_text", 262144, 1152, 26, 4, 1, 6912, 32768, **_GEMMA3),
}


def bundled(name: str) -> PreTrainedConfig | None:
    """The config of a base listed above, by its hub id or the part behind the slash, in any case; variants such as `-Instruct`
    have the shape of their base. None for any other name.
    """
    wanted = name.lower().rsplit("/", 1)[-1]
    for known, values in SHAPES.items():
        short = known.lower().rsplit("/", 1)[-1]
        if wanted == short or wanted.startswith((f"{short}-", short.removesuffix("-pt") + "-")):
            given = dict(values)
            return AutoConfig.for_model(given.pop("model_type"), **given)
    return None
