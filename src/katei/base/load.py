"""A base model by name: folder, GGUF file, hub id or built-in → a frozen model and its tokenizer.

    resolve_base("smollm2")      the folder with config, safetensors and tokenizer; downloads or converts at most once
    load_config, load_tokenizer  without the weights, so that data can be checked and a run planned first
    load_base                    the backbone, for training and prediction
    load_causal_lm               with its language-model head, for generation and merging

Safetensors only, no code from a model's folder is ever run, and every weight must come from the file: what
transformers would fill in at random is a BaseError here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from katei.base.builtin import BUILTINS, WHAT_MODEL_MAY_BE
from katei.base.convert import convert_builtin, convert_gguf
from katei.base.device import pick_device, pick_dtype
from katei.base.folder import Say, check_folder, fingerprint, read_config, silent, weight_files
from katei.base.hub import HUB_ID, hub_folder
from katei.base.quiet import forget_how_loaded, quiet
from katei.core.errors import BaseError, nearest


@dataclass(frozen=True)
class LoadedBase:
    """A frozen model in evaluation mode, none of its weights asking for a gradient."""

    model: PreTrainedModel
    """The backbone without a head (`load_base`), or the causal LM (`load_causal_lm`)."""
    tokenizer: PreTrainedTokenizerBase
    name: str
    """As the user typed it."""
    path: str
    """The folder the weights came from."""
    fingerprint: str
    """sha256 that names the weights (`katei.base.folder.fingerprint`); the same for every precision and device."""


def resolve_base(name: str, *, say: Say = silent, weights: bool = True) -> Path:
    """The folder with config.json, safetensors and tokenizer files that `name` stands for, checked. Raises BaseError.

    A built-in's name wins over a folder of that name (type `./smollm2` for the folder); what exists on disk wins over
    the hub. `weights=False` leaves a hub id's weights where they are.
    """
    if not name.strip() or "\0" in name:
        raise BaseError("no base model given", hint=WHAT_MODEL_MAY_BE)
    if name in BUILTINS:
        return convert_builtin(BUILTINS[name], say)
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return check_folder(path)
        if path.is_file():
            if path.suffix == ".safetensors":
                raise BaseError("this is one file of a base", file=path, hint=f"give its folder: {path.parent}")
            return convert_gguf(path, say)
    except OSError as error:
        raise BaseError(f"cannot be read: {error.strerror}", file=path, hint=WHAT_MODEL_MAY_BE) from error
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return hub_folder(name, say, weights=weights)
    if path.suffix == ".gguf" or "/" in name or "\\" in name or name.startswith(("~", ".")):
        raise BaseError("there is no such file or folder", file=name, hint=WHAT_MODEL_MAY_BE)
    raise BaseError(
        f"no base model '{name}'", hint=f"{nearest(name, BUILTINS)}; or a folder, a GGUF file, a hub id (owner/name)"
    )


def load_config(name: str, *, say: Say = silent) -> PreTrainedConfig:
    """The transformers config, once it is sure that this is a decoder katei can use. Reads no weights."""
    return _config(resolve_base(name, say=say, weights=False))


def load_tokenizer(name: str, *, say: Say = silent) -> PreTrainedTokenizerBase:
    """The tokenizer, without the weights."""
    return _tokenizer(resolve_base(name, say=say, weights=False))


def load_base(
    name: str,
    *,
    precision: str = "fp32",
    device: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Say = silent,
) -> LoadedBase:
    """The frozen backbone, on `device`, in `precision`. `tokenizer` is its own, where it is there already."""
    return _load(AutoModel, name, precision, device, say, tokenizer)


def load_causal_lm(
    name: str,
    *,
    precision: str = "fp32",
    device: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Say = silent,
) -> LoadedBase:
    """The frozen causal LM, language-model head included. `tokenizer` as for `load_base`."""
    return _load(AutoModelForCausalLM, name, precision, device, say, tokenizer)


def _load(
    kind: Any, name: str, precision: str, device: str, say: Say, tokenizer: PreTrainedTokenizerBase | None = None
) -> LoadedBase:
    dtype, place = pick_dtype(precision), pick_device(device)
    folder = resolve_base(name, say=say)
    config, tokenizer = _config(folder), tokenizer or _tokenizer(folder)
    if dtype == torch.float16 and place.type == "cpu":
        say("fp16 is slow on a CPU (products take about 5 times as long as in fp32); bf16 takes as little memory")
    if tokenizer.vocab_size > config.vocab_size:
        raise BaseError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model's embedding {config.vocab_size:,} rows",
            file=folder,
            hint="the tokenizer files belong to another model; copy those of this one",
        )
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them in `_check_all_loaded`, which lets none pass
                **_SAFE,
            )
    except Exception as error:
        raise _cannot("load the weights", folder, error) from error
    _check_all_loaded(info, folder)
    model = model.to(place).eval().requires_grad_(False)
    _check_finite(folder, dtype, precision)
    return LoadedBase(model, tokenizer, name, str(folder), fingerprint(folder))


_SAFE = {"trust_remote_code": False, "local_files_only": True}


def _config(folder: Path) -> PreTrainedConfig:
    """Raises BaseError for an architecture we cannot run packed: unknown, an encoder, without attention, wrapped."""
    written = read_config(folder)
    kind = written.get("model_type")
    if kind not in CONFIG_MAPPING:
        own_code = (
            "it brings its own code, which katei never runs"
            if "auto_map" in written
            else "transformers does not know it"
        )
        raise BaseError(
            f"architecture {kind!r} is not supported: {own_code}",
            file=folder,
            hint="use a base of a native decoder, such as Llama",
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, **_SAFE)
    except Exception as error:
        raise _cannot("read config.json", folder, error) from error
    if config.sub_configs or config.get_text_config() is not config:
        raise BaseError(
            f"{kind} wraps a language model with other parts (vision, audio); katei takes the language model alone",
            file=folder,
            hint="use the text-only base, such as gemma3_text for gemma3",
        )
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BaseError(
            f"{kind} is not a decoder-only language model", file=folder, hint="use a base such as Llama, Qwen or Gemma"
        )
    try:
        with quiet(), torch.device("meta"):
            shape = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise _cannot("build the model config.json describes", folder, error) from error
    causal = [bool(module.is_causal) for module in shape.modules() if hasattr(module, "is_causal")]
    if not all(causal):
        raise BaseError(
            f"{kind} is an encoder: its tokens see what comes after them",
            file=folder,
            hint="use a decoder, such as Llama",
        )
    if len(causal) < config.num_hidden_layers:
        raise BaseError(
            f"only {len(causal)} of the {config.num_hidden_layers} layers of {kind} attend; katei needs all of them to",
            file=folder,
            hint="use a base whose layers all attend, such as Llama, Qwen 3 or Gemma 3",
        )
    return config


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **_SAFE)
    except Exception as error:
        raise _cannot("load the tokenizer", folder, error) from error
    forget_how_loaded(tokenizer)
    return tokenizer


def _check_all_loaded(info: dict[str, Any], folder: Path) -> None:
    missing = sorted(info["missing_keys"])
    reshaped = [f"{name} (file {list(theirs)}, model {list(ours)})" for name, theirs, ours in info["mismatched_keys"]]
    unused = sorted(key for key in info["unexpected_keys"] if "layers." in key and not key.endswith("inv_freq"))
    for names, what in (
        (missing, "are not in its files"),
        (sorted(reshaped), "have another shape there"),
        (unused, "fit nowhere in the model"),
    ):
        if names:
            raise BaseError(
                f"{len(names)} weights {what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}",
                file=folder,
                hint="config.json and the weights must be of the same model; download the base again",
            )


def _check_finite(folder: Path, dtype: torch.dtype, precision: str) -> None:
    """Raise BaseError for a weight that is not finite in `dtype`. Reads the files by themselves, a tensor at a time: the model's
    own weights are mapped from them, and a row of the embedding that is never looked up need not enter memory.
    """
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            with safe_open(
                file, framework="pt"
            ) as tensors:  # anew each time: what was read leaves the process with the mapping
                weight = tensors.get_tensor(name).flatten()
            finite = (torch.isfinite(part.to(dtype).sum(dtype=torch.float32)) for part in weight.split(_LOOKED_AT))
            if not all(map(bool, finite)):
                raise BaseError(
                    f"{name} holds numbers that are infinite or not numbers in {precision}",
                    file=folder,
                    hint="try --precision bf16 or fp32"
                    if precision == "fp16"
                    else "the file is damaged; download the base again",
                )


_LOOKED_AT = 1 << 20
"""Numbers at a time."""


def _cannot(do: str, folder: Path, error: Exception) -> BaseError:
    first = (str(error).strip().splitlines() or [""])[0]
    return BaseError(
        f"transformers cannot {do}: {first or type(error).__name__}",
        file=folder,
        hint="download or copy the base again",
    )
