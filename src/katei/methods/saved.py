"""An adapter on disk: peft's own format, and a note of what peft's format has no place for.

    adapter_config.json         peft's; its prompt methods' shapes included
    adapter_model.safetensors   peft's names and shapes, with the head where peft keeps one (`modules_to_save`)
    head.safetensors            `score.weight`, only where peft's file has no place for it (LLaMA-Adapter, head only)
    katei.json                  method and settings, labels, base, max length, how it was trained

Reads what katei wrote and what peft wrote (then labels are 0, 1, … and the base is the one the config names).
Full fine-tuning has no adapter: its folder is a model (`katei.ship.models`), with `katei.json` beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, isfinite, zeros

from katei import __version__
from katei.base.packed import Base
from katei.core.errors import AdapterError, RecipeError, UserError
from katei.core.files import write_json
from katei.core.settings import build
from katei.methods import METHODS, build_method
from katei.methods.contract import HEAD, Method, Stack, TrialFacts
from katei.methods.full import Full

PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""peft keeps these vectors on its own model, so their files' names carry no path into the base."""

READ = {
    "LORA": ("r", "lora_alpha", "lora_dropout", "use_rslora"),
    "ADALORA": ("init_r", "target_r", "lora_alpha", "lora_dropout", "rank_pattern"),
    "IA3": ("feedforward_modules",),
    "PROMPT_TUNING": ("num_virtual_tokens",),
    "P_TUNING": ("num_virtual_tokens",),
    "PREFIX_TUNING": ("num_virtual_tokens",),
    "ADAPTION_PROMPT": ("adapter_len", "adapter_layers"),
}
"""What each kind of adapter_config.json says about the function computed, and katei reads."""

NO_MATTER = {
    "": "auto_mapping base_model_name_or_path inference_mode modules_to_save peft_type peft_version revision target_modules "
    "task_type",
    "LORA": "corda_config ensure_weight_tying ephemeral_gpu_offload eva_config exclude_modules fan_in_fan_out "
    "init_lora_weights layers_pattern loftq_config lora_ga_config megatron_config megatron_core qalora_group_size "
    "runtime_config velora_config",
    "ADALORA": "beta1 beta2 corda_config deltaT ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "init_lora_weights layers_pattern loftq_config lora_ga_config megatron_config megatron_core orth_reg_weight "
    "qalora_group_size r runtime_config tfinal tinit total_step use_rslora velora_config",
    "IA3": "exclude_modules fan_in_fan_out init_ia3_weights",
    "PROMPT_TUNING": "prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs tokenizer_name_or_path",
    "P_TUNING": "encoder_dropout encoder_hidden_size encoder_num_layers encoder_reparameterization_type",
    "PREFIX_TUNING": "encoder_hidden_size init_weights",
    "ADAPTION_PROMPT": "",
}
"""Options of peft 0.21 that say how an adapter was trained or stored: what was loaded computes the same without them. Any other
option must be off, or the adapter is refused: nothing that changes the function is passed over."""

PROMPT_SHAPE = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")
"""Repeated by the shape of the vectors themselves, which is checked."""

INITS_OF_THE_ADAPTER = (True, False, None, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base as it is; the others (pissa, olora, loftq …) change its weights too."""


@dataclass(frozen=True)
class AdapterNote:
    """What katei.json holds: everything needed to use the adapter, and how it came to be."""

    name: str
    method: str
    settings: dict[str, Any]
    labels: tuple[str, ...]
    base: str
    fingerprint: str
    max_length: int
    text_column: str
    training: dict[str, Any]
    katei: str = __version__
    temperature: float | None = None
    """Of its probabilities, fitted on rows it was not trained on (`katei.core.calibration`); None where nobody did."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from a folder, before any base is loaded."""

    folder: Path
    method: Method
    note: AdapterNote
    tensors: dict[str, Tensor]
    """peft's names below the backbone, the head left out."""
    head_CD: Tensor
    """(0, 0) where the adapter was trained for generation and has none."""

    @property
    def generates(self) -> bool:
        """It was trained to continue texts: it has no labels and no head."""
        return not self.note.labels

    def stack(self, base: Base) -> Stack:
        """A stack of this one adapter. Raises AdapterError where its tensors do not fit the base."""
        if self.note.fingerprint and base.fingerprint and self.note.fingerprint != base.fingerprint:
            raise AdapterError(
                f"the adapter was trained on other weights than those of '{base.name}'",
                file=self.folder,
                hint=f"its base was '{self.note.base}'",
            )
        stack = self.method.saved_as().build(base, len(self.note.labels) or 2, [0], [TrialFacts(total_steps=10**6)])
        try:
            load_into_(stack, 0, self)
        except AdapterError as error:
            raise AdapterError(error.message, file=self.folder, hint=error.hint) from None
        return stack


def load_into_(stack: Stack, n: int, saved: SavedAdapter) -> None:
    """Fill adapter n of a stack."""
    head_CD = stack.tensors[HEAD][n]
    if saved.generates:
        stack.load_peft_(n, saved.tensors)
        return
    if head_CD.shape != saved.head_CD.shape:
        raise AdapterError(
            f"the head has shape {tuple(saved.head_CD.shape)}, which does not fit {tuple(head_CD.shape)}: (classes, width)",
            file=saved.folder,
            hint="was it trained on another base?",
        )
    stack.load_peft_(n, saved.tensors)
    head_CD.detach().copy_(saved.head_CD)


def save_adapter(folder: Path, stack: Stack, n: int, method: Method, note: AdapterNote, base_path: str) -> None:
    """Write trial n's adapter into `folder`, which exists and is the caller's to make whole or remove."""
    head_CD = stack.tensors[HEAD][n].detach().cpu().clone().contiguous()
    if method.peft_type is not None:
        prompt = method.peft_type in PROMPT_TYPES
        prefix = "" if prompt else "base_model.model.model."
        tensors = {prefix + name: tensor.cpu().contiguous() for name, tensor in stack.peft_tensors(n).items()}
        config = {
            "peft_type": method.peft_type,
            "task_type": "SEQ_CLS",
            "inference_mode": True,
            "base_model_name_or_path": base_path,
        }
        if stack.head_in_peft:
            tensors["base_model.score.weight" if prompt else "base_model.model.score.weight"] = head_CD
            config["modules_to_save"] = ["classifier", "score"]
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config | stack.peft_config(n))
    if not stack.head_in_peft:
        save_file({"score.weight": head_CD}, folder / "head.safetensors", metadata={"format": "pt"})
    write_json(folder / "katei.json", asdict(note))


def read_adapter(folder: Path, *, diverged: bool = False, headless: bool = False) -> SavedAdapter:
    """Read what katei or peft saved. Raises AdapterError; nothing is executed, only JSON and safetensors are read.

    `diverged` lets numbers pass that are not finite; `headless` an adapter that peft trained for generation (CAUSAL_LM).
    """
    if not folder.is_dir():
        raise AdapterError("no such adapter folder", file=folder, hint="a trial's folder, such as RUN/trials/lora")
    note = read_note(folder)
    config = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").exists() else None
    if config is None and note is None:
        raise AdapterError(
            "no adapter_config.json and no katei.json here",
            file=folder,
            hint="a trial's folder, such as RUN/trials/lora",
        )
    if note is not None and note.method == Full.name:
        raise AdapterError(
            "is a fully fine-tuned model, not an adapter",
            file=folder,
            hint="`katei predict` and `katei evaluate` take it, transformers' AutoModelForSequenceClassification too",
        )
    tensors: dict[str, Tensor] = {}
    if config is not None:
        if not (folder / "adapter_model.safetensors").exists():
            pickled = (folder / "adapter_model.bin").exists()
            raise AdapterError(
                "adapter_model.safetensors is missing"
                + (", and katei does not read pickled weights (adapter_model.bin)" if pickled else ""),
                file=folder,
                hint="save it with peft's save_pretrained, which writes safetensors"
                if pickled
                else "copy the adapter's folder again, whole",
            )
        tensors = _read_tensors(folder / "adapter_model.safetensors")
    if config is None and note is not None and METHODS.get(note.method, Full).peft_type is not None:
        raise AdapterError("adapter_config.json is missing", file=folder, hint="copy the adapter's folder again, whole")
    head = {name: tensors.pop(name) for name in list(tensors) if name.endswith("score.weight")}
    if (folder / "head.safetensors").exists():
        head |= _read_tensors(folder / "head.safetensors")
    generates = note is None and not head and (config or {}).get("task_type") == "CAUSAL_LM"
    if generates and not headless:
        raise AdapterError(
            "was trained for generation, so it has no classes to score",
            file=folder,
            hint="`katei generate` continues texts with it; `katei merge` and `katei export` take it too",
        )
    if len(head) != 1 and not generates:
        raise AdapterError(
            "no score head in this adapter" if not head else f"{len(head)} score heads in this adapter",
            file=folder,
            hint="peft leaves it out for LLaMA-Adapter: put its weight, named score.weight, into head.safetensors beside the adapter",
        )
    method = _method(config, note, folder)
    head_CD = next(iter(head.values()), zeros(0, 0))
    classes = 0 if generates else len(note.labels) if note is not None else max(2, len(head_CD) if head_CD.ndim else 0)
    if head_CD.ndim != 2 or len(head_CD) != classes:
        raise AdapterError(
            f"the head has shape {tuple(head_CD.shape)}, but the labels are {classes}: it should be (classes, width)",
            file=folder,
            hint="copy or train it again",
        )
    if not diverged:
        _check_finite({**tensors, "score.weight": head_CD}, folder)
    head_CD = head_CD.float()
    if note is None:
        assert config is not None
        base = str(config.get("base_model_name_or_path") or "")
        note = AdapterNote(
            folder.name,
            method.name,
            method.settings(),
            tuple(str(c) for c in range(len(head_CD))),
            base,
            "",
            200,
            "",
            {},
            "",
        )
    return SavedAdapter(folder, method, note, _unprefixed(tensors, config), head_CD)


def _unprefixed(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Names below the backbone; AdaLoRA's pruned rows, which peft drops, back in their places as zeros."""
    named = {name[name.index("layers.") :] if "layers." in name else name: t.float() for name, t in tensors.items()}
    for key, kept in ((config or {}).get("rank_pattern") or {}).items():
        site = key[key.index("layers.") :].rsplit(".lora_E", 1)[0]
        for part, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            name = f"{site}.{part}"
            if name in named and named[name].shape[axis] == sum(kept):
                shape = list(named[name].shape)
                shape[axis] = len(kept)
                whole = named[name].new_zeros(shape)
                index = [i for i, keep in enumerate(kept) if keep]
                if axis == 0:
                    whole[index] = named[name]
                else:
                    whole[:, index] = named[name]
                named[name] = whole
    return named


def _method(config: Mapping[str, Any] | None, note: AdapterNote | None, folder: Path) -> Method:
    """The method, from the note or from peft's config; where there are both they must agree."""
    from_peft = None if config is None else _peft_method(config, folder / "adapter_config.json")
    if note is None:
        assert from_peft is not None
        return from_peft
    try:
        method = build_method(note.method, note.settings, where="settings")
    except UserError as error:
        raise AdapterError(error.message, file=folder / "katei.json", hint=error.hint) from None
    if from_peft is None:
        return method
    ours, theirs = {"method": note.method, **method.settings()}, {"method": from_peft.name, **from_peft.settings()}
    for key in ("method", "rank", "alpha", "rslora", "virtual_tokens", "layers", "length"):
        if key in ours and key in theirs and ours[key] != theirs[key]:
            raise AdapterError(
                f"katei.json says {key} = {ours[key]!r}, adapter_config.json {theirs[key]!r}",
                file=folder,
                hint="remove katei.json if peft saved this adapter; labels are then 0, 1, …",
            )
    return method


def _peft_method(config: Mapping[str, Any], file: Path) -> Method:
    kind = config.get("peft_type")
    cls = next((m for m in METHODS.values() if m.peft_type is not None and m.peft_type == kind), None)
    if cls is None:
        known = ", ".join(m.peft_type for m in METHODS.values() if m.peft_type)
        raise AdapterError(f"katei does not know peft's {kind}", file=file, hint=f"it reads {known}")
    _check_options(config, str(kind), file)
    try:
        method = cls.from_peft(config)
        return build_method(cls.name, method.settings(), where="its settings")  # checks their types
    except KeyError as missing:
        raise AdapterError(f"has no {missing}", file=file, hint="save the adapter again with peft") from None
    except UserError as error:
        raise AdapterError(error.message, file=file, hint=error.hint) from None
    except (TypeError, ValueError, AttributeError):
        odd = ", ".join(f"{name} = {config[name]!r}" for name in (*READ[str(kind)], "target_modules") if name in config)
        raise AdapterError(f"is not a config peft wrote: {odd}", file=file, hint="save it again with peft") from None


def _check_options(config: Mapping[str, Any], kind: str, file: Path) -> None:
    """Raise AdapterError for an option katei neither reads nor may pass over, unless it is off."""
    known = {*READ[kind], *NO_MATTER[""].split(), *NO_MATTER[kind].split()}
    if kind in PROMPT_TYPES:
        known |= set(PROMPT_SHAPE)
    for name, value in config.items():
        if name not in known and value not in (None, False, [], {}, "", "none"):
            raise AdapterError(
                f"was made with {name} = {value!r}, which katei does not implement",
                file=file,
                hint="merge it in peft (merge_and_unload) and use the result as a base, or train again without it",
            )
    init = config.get("init_lora_weights")
    if kind in ("LORA", "ADALORA") and init not in INITS_OF_THE_ADAPTER:
        raise AdapterError(
            f"was made with init_lora_weights = {init!r}, which changes the base's weights too",
            file=file,
            hint="convert it in peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def read_note(folder: Path) -> AdapterNote | None:
    """katei.json, checked; None where there is none (peft's own adapters)."""
    path = folder / "katei.json"
    if not path.exists():
        return None
    whole = "copy the adapter's folder again, whole"
    try:
        note = build(AdapterNote, read_json(path), where="note")
    except RecipeError as error:
        raise AdapterError(f"not a note katei wrote: {error.message}", file=path, hint=whole) from None
    if len(set(note.labels)) != len(note.labels) or len(note.labels) < 2:
        raise AdapterError(
            f"labels must be two or more, all different, but are {list(note.labels)}", file=path, hint=whole
        )
    if note.max_length < 1:
        raise AdapterError(f"max_length is {note.max_length}, but it counts tokens", file=path, hint=whole)
    if note.temperature is not None and not 0 < note.temperature < math.inf:
        raise AdapterError(f"temperature is {note.temperature}, but it must be positive", file=path, hint=whole)
    return note


def _check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{name} holds whole numbers, not weights", file=folder, hint="save it again with peft")
        if not bool(isfinite(tensor).all()):
            raise AdapterError(
                f"{name} holds numbers that are infinite or not numbers",
                file=folder,
                hint="the trial diverged: train it again with a smaller learning rate (--lr)",
            )


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"cannot be read: {error}", file=path, hint="copy the adapter's folder again, whole"
        ) from None
    if not isinstance(value, dict):
        raise AdapterError("is not a JSON object", file=path, hint="copy the adapter's folder again, whole")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"is not a whole safetensors file: {error}", file=path, hint="copy or train it again"
        ) from None
