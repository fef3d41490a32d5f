"""peft's own model for one of our trials, with our initial values: the other side of parity tests and of benchmarks.

Where peft is wrong it is put right by hand, as a careful user would: LLaMA-Adapter's head is un-frozen.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from katei.methods.contract import HEAD, Method, Stack


def peft_config(method: Method, total_steps: int) -> Any:
    m: Any = method
    kind = {"task_type": "SEQ_CLS"}
    match method.name:
        case "lora":
            low_rank = {"lora_alpha": m.alpha, "target_modules": list(m.targets), "lora_dropout": m.dropout}
            return LoraConfig(**kind, r=m.rank, use_rslora=m.rslora, **low_rank)
        case "adalora":
            return AdaLoraConfig(
                **kind,
                init_r=m.rank,
                target_r=m.target_rank,
                lora_alpha=m.alpha,
                target_modules=list(m.targets),
                total_step=total_steps,
                tinit=int(m.warmup * total_steps),
                tfinal=int(m.final * total_steps),
                deltaT=m.interval,
            )
        case "prompt-tuning":
            return PromptTuningConfig(**kind, num_virtual_tokens=m.virtual_tokens)
        case "p-tuning":
            return PromptEncoderConfig(
                **kind,
                num_virtual_tokens=m.virtual_tokens,
                encoder_reparameterization_type=m.encoder.upper(),
                encoder_hidden_size=m.hidden,
            )
        case "prefix-tuning":
            return PrefixTuningConfig(**kind, num_virtual_tokens=m.virtual_tokens)
        case "ia3":
            return IA3Config(**kind)
        case "llama-adapter":
            return AdaptionPromptConfig(**kind, adapter_layers=m.layers, adapter_len=m.length)
    raise ValueError(method.name)


def sequence_classifier(backbone: PreTrainedModel, classes: int, attention: str = "eager") -> Any:
    """The library's classifier around a copy of a backbone."""
    config = copy.deepcopy(backbone.config)
    config.num_labels, config.pad_token_id = classes, 0
    config._attn_implementation = attention
    model = AutoModelForSequenceClassification.from_config(config)
    weights = {f"model.{name}": tensor for name, tensor in backbone.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["score.weight"], missing
    assert not unexpected, unexpected
    return model.eval()


def peft_model(classifier: Any, stack: Stack, n: int, method: Method, total_steps: int) -> Any:
    """peft around `classifier`, holding adapter n's present values."""
    model = get_peft_model(classifier, peft_config(method, total_steps))
    if method.name == "llama-adapter":
        classifier.score.weight.requires_grad_(True)
    with torch.no_grad():
        for theirs, ours in pairs(model, stack, n):
            theirs.copy_(ours.reshape(theirs.shape) if theirs.numel() == ours.numel() else ours)
    return model


def pairs(model: Any, stack: Stack, n: int) -> list[tuple[Tensor, Tensor]]:
    """Every trained tensor of peft's beside ours, ours in peft's layout; all of both are there."""
    values = {name: tensor[n].detach() for name, tensor in stack.tensors.items()}
    names: dict[str, Tensor] = {"score.weight": values[HEAD]}
    if "embedding_PD" in values:  # P-tuning: peft's Sequential counts the ReLUs between the layers
        names["prompt_encoder.default.embedding.weight"] = values["embedding_PD"]
        for key, value in values.items():
            if key.startswith("mlp"):
                kind = "weight" if key.endswith("w_OI") else "bias"
                names[f"mlp_head.{2 * int(key[3])}.{kind}"] = value
            if key.startswith("lstm."):
                names[f"lstm_head.{key.removeprefix('lstm.')}"] = value
    elif "prompt_PD" in values or "prefix" in values:
        names["embedding.weight"] = values.get("prompt_PD", values.get("prefix"))  # type: ignore[assignment]
    else:
        names |= stack.peft_tensors(n)
    found: list[tuple[Tensor, Tensor]] = []
    used = set()
    for path, parameter in model.named_parameters():
        if (
            not parameter.requires_grad or "ranknum" in path
        ):  # AdaLoRA's count of ranks, un-frozen by peft in half precision
            continue
        plain = path.replace(".modules_to_save.default", "").replace(".default.weight", ".weight")
        plain = plain.removesuffix(".default")
        key = next((k for k in names if plain.endswith(k)), None)
        key = key or next((k for k in names if path.endswith(k)), None)
        assert key is not None, f"peft trains {path}, we do not"
        used.add(key)
        found.append((parameter, names[key]))
    assert used == set(names), f"peft does not train {sorted(set(names) - used)}"
    return found
