"""GGUF files as llama.cpp reads them: a whole causal LM, or a LoRA adapter for one.

    write_model     every weight in llama.cpp's names, fp32 or rounded once to fp16, with metadata and tokenizer
    write_lora      A and B of each site, for `--lora` beside the base's own GGUF

What differs from transformers, as in llama.cpp's `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py`:

    llama        rotates neighbouring numbers where transformers rotates halves: rows of q and k (and of LoRA's B) are reordered
    gemma3       multiplies by the norms' weight, transformers by 1 + weight
    all          norms and biases stay in fp32; a tied output is not written; LoRA's scale is alpha / rank

Dimensions: O outputs · I inputs · R rank · C classes · D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from katei.core.errors import AdapterError, BaseError
from katei.ship.gguf_tokenizer import add_tokenizer

FILE_TYPES = {"fp32": 0, "fp16": 1}
"""`general.file_type` of what we write: ALL_F32, MOSTLY_F16."""


@dataclass(frozen=True)
class Architecture:
    name: str
    """llama.cpp's."""
    model: Any
    """gguf.MODEL_ARCH, by whose table the tensors are named."""
    reorders: bool = False
    """q's and k's rows lie in the order of the original Llama's rotation."""
    norm_shift: float = 0.0
    classifies: bool = False
    """llama.cpp reads a score head (`cls.output`) and answers with its softmax when asked for rank pooling."""


ARCHITECTURES = {
    "llama": Architecture("llama", gguf.MODEL_ARCH.LLAMA, reorders=True),
    "qwen2": Architecture("qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": Architecture("qwen3", gguf.MODEL_ARCH.QWEN3, classifies=True),
    "gemma3_text": Architecture("gemma3", gguf.MODEL_ARCH.GEMMA3, norm_shift=1.0),
}
"""By transformers' `model_type`."""


def architecture(config: Any) -> Architecture:
    """Raises BaseError for a base whose function llama.cpp's code would not compute."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise _refused(f"the architecture '{kind}' is not one of those written here: {', '.join(ARCHITECTURES)}")
    if kind == "gemma3_text":
        layers = config.layer_types
        if layers != ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(len(layers))]:
            raise _refused("llama.cpp's gemma3 attends fully in every sixth layer, this base in others")
        if config.query_pre_attn_scalar != config.head_dim or config.attn_logit_softcapping:
            raise _refused("its attention is scaled otherwise than llama.cpp's gemma3 does it")
    elif any(t != "full_attention" for t in getattr(config, "layer_types", None) or []):
        raise _refused("it attends through a sliding window, which llama.cpp does not do for this architecture")
    kinds = {rope.get("rope_type", "default") for rope in _ropes(config).values()}
    if not kinds <= {"default", "linear", "llama3"}:
        raise _refused(f"its rotary table is of the kind {', '.join(sorted(kinds))}")
    if getattr(config, "mlp_bias", False) or (kind != "qwen2" and getattr(config, "attention_bias", False)):
        raise _refused("it has biases that llama.cpp's architecture of this name has no place for")
    return ARCHITECTURES[kind]


def model_tensors(
    config: Any, weights: Mapping[str, Tensor], output_VD: Tensor | None, precision: str
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and values as the file holds them. `weights` are the backbone's, `output_VD` the language-model head's or None if tied."""
    arch = architecture(config)
    whole = dict(weights) if output_VD is None else {**weights, "lm_head.weight": output_VD}
    for name, weight in whole.items():
        value = _as_llama_cpp(arch, config, name, weight.detach().float().cpu())
        half = precision == "fp16" and value.ndim == 2
        rounded = value.half() if half else value
        if half and not bool(torch.isfinite(rounded).all()):
            raise BaseError(f"{name} holds numbers too large for fp16", hint="--precision fp32")
        yield tensor_name(arch, config, name), rounded.contiguous().numpy()
    factors = _llama3_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", factors


def write_model(
    file: Path,
    *,
    config: Any,
    tokenizer: Any,
    weights: Mapping[str, Tensor],
    output_VD: Tensor | None,
    precision: str,
    name: str,
    head_CD: Tensor | None = None,
    labels: tuple[str, ...] = (),
) -> None:
    """Write a causal LM. Where llama.cpp has a place for a classifier of this architecture, `head_CD` goes along."""
    arch = architecture(config)
    writer = gguf.GGUFWriter(file, arch.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    _add_shape(writer, config)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    if arch.classifies and head_CD is not None:
        writer.add_classifier_output_labels(list(labels))
        writer.add_tensor("cls.output.weight", head_CD.detach().float().cpu().contiguous().numpy())
    for tensor, value in model_tensors(config, weights, output_VD, precision):
        writer.add_tensor(tensor, value)
    _finish(writer)


def lora_tensors(config: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[tuple[str, NDArray[Any]]]:
    """`factors` maps a site to A (R, I) and B (O, R)."""
    arch = architecture(config)
    for site, (a_RI, b_OR) in factors.items():
        name = tensor_name(arch, config, f"{site}.weight")
        yield f"{name}.lora_a", a_RI.detach().float().cpu().contiguous().numpy()
        b_OR = _as_llama_cpp(arch, config, f"{site}.weight", b_OR.detach().float().cpu())
        yield f"{name}.lora_b", b_OR.contiguous().numpy()


def write_lora(
    file: Path, *, config: Any, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float, name: str
) -> None:
    """Write an adapter that adds `scaling` · B A at each site."""
    ranks = {a_RI.shape[0] for a_RI, _ in factors.values()}
    if len(ranks) != 1:
        raise AdapterError("has sites of different ranks", hint="`katei merge` folds it into the base")
    writer = gguf.GGUFWriter(file, architecture(config).name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scaling * ranks.pop())  # llama.cpp divides by each tensor's rank
    for tensor, value in lora_tensors(config, factors):
        writer.add_tensor(tensor, value)
    _finish(writer)


def read_tensors(file: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of a GGUF that is not quantized, by name, in torch's order of dimensions."""
    return {t.name: np.asarray(t.data) for t in gguf.GGUFReader(file).tensors}


def check_written(file: Path, expected: Iterator[tuple[str, NDArray[Any]]]) -> int:
    """Read the file again: every expected tensor is there, to the bit. Returns how many."""
    found, count = read_tensors(file), 0
    for name, value in expected:
        there = found.get(name)
        if (
            there is None
            or there.shape != value.shape
            or there.dtype != value.dtype
            or not np.array_equal(there, value)
        ):
            raise AdapterError(f"{name} is not in the file as it was written", file=file, hint="is the disk full?")
        count += 1
    return count


def tensor_name(arch: Architecture, config: Any, name: str) -> str:
    """llama.cpp's name of a backbone's (or `lm_head`'s) weight."""
    full = name if name.startswith("lm_head.") else f"model.{name}"
    names = gguf.get_tensor_name_map(arch.model, config.num_hidden_layers)
    found = names.get_name(full, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise _refused(f"llama.cpp's {arch.name} has no tensor for {name}")
    return str(found)


def _as_llama_cpp(arch: Architecture, config: Any, name: str, weight: Tensor) -> Tensor:
    if arch.norm_shift and name.endswith("norm.weight"):
        return weight + arch.norm_shift
    leaf = name.split(".")[-2]
    if arch.reorders and leaf in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
        return neighbours(weight, heads)
    return weight


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from two halves (0 1 2 … | 0' 1' 2' …) to pairs of neighbours (0 0' 1 1' …)."""
    return torch.unflatten(weight, 0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_shape(writer: Any, config: Any) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = _ropes(config)
    main = ropes.get("full_attention") or next(iter(ropes.values()))
    writer.add_rope_freq_base(main["rope_theta"])
    if main.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(main["factor"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """The rotary tables by kind of layer; one without a kind where all layers share it."""
    parameters = config.rope_parameters
    return {"": parameters} if "rope_theta" in parameters else dict(parameters)


def _llama3_factors(config: Any) -> NDArray[np.float32] | None:
    """What Llama 3 divides each frequency by (convert_hf_to_gguf.py: generate_extra_tensors); None without such a table."""
    rope = next(iter(_ropes(config).values()))
    if rope.get("rope_type") != "llama3":
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / size)
        turns = rope["original_max_position_embeddings"] / wavelength
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _refused(why: str) -> BaseError:
    return BaseError(
        f"this base cannot be written as a GGUF: {why}", hint="`katei merge` writes a transformers folder of any base"
    )
