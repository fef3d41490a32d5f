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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from katei import __version__
from katei.base.packed import Base
from katei.core.errors import AdapterError
from katei.core.files import write_json
from katei.methods import METHODS, build_method
from katei.methods.contract import HEAD, Method, Stack, TrialFacts

PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""peft keeps these vectors on its own model, so their files' names carry no path into the base."""


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


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from a folder, before any base is loaded."""

    folder: Path
    method: Method
    note: AdapterNote
    tensors: dict[str, Tensor]
    """peft's names below the backbone, the head left out."""
    head_CD: Tensor

    def stack(self, base: Base) -> Stack:
        """A stack of this one adapter. Raises AdapterError where its tensors do not fit the base."""
        if self.note.fingerprint and base.fingerprint and self.note.fingerprint != base.fingerprint:
            raise AdapterError(
                f"the adapter was trained on other weights than those of '{base.name}'",
                file=self.folder,
                hint=f"its base was '{self.note.base}'",
            )
        stack = self.method.saved_as().build(base, len(self.note.labels), [0], [TrialFacts(total_steps=10**6)])
        load_into_(stack, 0, self)
        return stack


def load_into_(stack: Stack, n: int, saved: SavedAdapter) -> None:
    """Fill adapter n of a stack."""
    head_CD = stack.tensors[HEAD][n]
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


def read_adapter(folder: Path) -> SavedAdapter:
    """Read what katei or peft saved. Raises AdapterError; nothing is executed, only JSON and safetensors are read."""
    if not folder.is_dir():
        raise AdapterError("no such adapter folder", file=folder, hint="a trial's folder, such as RUN/trials/lora")
    note = _read_note(folder)
    config = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").exists() else None
    if config is None and note is None:
        raise AdapterError(
            "no adapter_config.json and no katei.json here",
            file=folder,
            hint="a trial's folder, such as RUN/trials/lora",
        )
    tensors: dict[str, Tensor] = {}
    if config is not None:
        if not (folder / "adapter_model.safetensors").exists():
            pickled = (folder / "adapter_model.bin").exists()
            raise AdapterError(
                "adapter_model.safetensors is missing"
                + (", and katei does not read pickled weights (adapter_model.bin)" if pickled else ""),
                file=folder,
                hint="save it with peft's save_pretrained(..., safe_serialization=True)" if pickled else None,
            )
        tensors = _read_tensors(folder / "adapter_model.safetensors")
    head = {name: tensors.pop(name) for name in list(tensors) if name.endswith("score.weight")}
    if (folder / "head.safetensors").exists():
        head |= _read_tensors(folder / "head.safetensors")
    if len(head) != 1:
        raise AdapterError(
            "no score head in this adapter" if not head else f"{len(head)} score heads in this adapter",
            file=folder,
            hint="peft leaves it out for LLaMA-Adapter: put its weight, named score.weight, into head.safetensors beside the adapter",
        )
    head_CD = next(iter(head.values())).float()
    method = _method(config, note, folder)
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
            "text",
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
    if note is not None:
        return build_method(note.method, note.settings, where=str(folder / "katei.json"))
    assert config is not None
    kind = config.get("peft_type")
    cls = next((m for m in METHODS.values() if m.peft_type is not None and m.peft_type == kind), None)
    if cls is None:
        known = ", ".join(m.peft_type for m in METHODS.values() if m.peft_type)
        raise AdapterError(
            f"katei does not know peft's {kind}", file=folder / "adapter_config.json", hint=f"it reads {known}"
        )
    try:
        return cls.from_peft(config)
    except KeyError as missing:
        raise AdapterError(f"adapter_config.json has no {missing}", file=folder / "adapter_config.json") from None


def _read_note(folder: Path) -> AdapterNote | None:
    path = folder / "katei.json"
    if not path.exists():
        return None
    value = read_json(path)
    try:
        note = AdapterNote(**value)
        if not all(isinstance(label, str) for label in note.labels) or len(note.labels) < 2:
            raise TypeError("labels must be two or more strings")
        return AdapterNote(**{**value, "labels": tuple(note.labels)})
    except TypeError as error:
        raise AdapterError(f"not a note katei wrote: {error}", file=path) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"cannot be read: {error}", file=path) from None
    if not isinstance(value, dict):
        raise AdapterError("is not a JSON object", file=path)
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"is not a whole safetensors file: {error}", file=path, hint="copy or train it again"
        ) from None
