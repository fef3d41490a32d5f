"""From what a user names (a run folder, one of its trials, or an adapter's own folder) to an adapter on its base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from katei.base.load import load_base, load_causal_lm
from katei.base.packed import Base
from katei.core.errors import AdapterError, RunError, nearest
from katei.data import load_dataset, read_table
from katei.methods.contract import HEAD, Stack
from katei.methods.full import Full
from katei.methods.head_only import HeadOnly, HeadOnlyStack
from katei.methods.saved import AdapterNote, SavedAdapter, read_adapter, read_note
from katei.study.recipe import load_recipe


def adapter_folder(run: Path, trial: str | None = None) -> Path:
    """The folder of the adapter meant by `run` and `trial`. Raises RunError that lists the trials."""
    if not run.exists():
        raise RunError("no such run or adapter folder", file=run, hint="`katei train` or `katei compare` makes one")
    if (run / "katei.json").exists() or (run / "adapter_config.json").exists():
        return run
    trials = run / "trials"
    if not trials.is_dir():
        raise RunError(
            "is neither a finished run nor an adapter folder",
            file=run,
            hint="a folder with trials/ or adapter_config.json in it",
        )
    names = trial_names(run)
    if trial is not None:
        if trial not in names:
            raise RunError(f"has no trial named '{trial}'", file=run, hint=nearest(trial, names))
        return trials / trial
    if len(names) != 1:
        raise RunError(f"has {len(names)} trials", file=run, hint=f"--trial one of: {', '.join(names)}")
    return trials / names[0]


def trial_names(run: Path) -> list[str]:
    """The trials of a run folder; none for an adapter's own folder."""
    trials = run / "trials"
    found = trials.iterdir() if trials.is_dir() else []
    return sorted(path.name for path in found if path.is_dir() and not path.name.startswith("."))


def note_of(folder: Path) -> AdapterNote:
    """What is known of an adapter, whose files are checked, without loading its base."""
    return _full_note(folder) or read_adapter(folder).note


def adapter_digest(folder: Path) -> str:
    """sha256 of an adapter's (or full model's) files: what it computes, and under which labels."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        with file.open("rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def rows_to_compare(run: Path, data: str | Path | None, note: AdapterNote, most: int = 64) -> list[str]:
    """Texts to compare a merged model on: those of `data`, else the run's own test (or valid, or train) rows."""
    if data is None:
        recipe_file = next(
            (folder / "recipe.toml" for folder in (run, run.parent.parent) if (folder / "recipe.toml").exists()), None
        )
        if recipe_file is None:
            raise AdapterError(
                "a merge is checked on real rows, and this adapter's run is not beside it",
                file=run,
                hint="--data a file with texts",
            )
        recipe = load_recipe(recipe_file, {})
        dataset = load_dataset(recipe.data, text=recipe.text, label=recipe.label)
        return list((dataset.test or dataset.valid or dataset.train).texts[:most])
    if Path(data).is_dir():
        dataset = load_dataset(data)
        return list((dataset.test or dataset.valid or dataset.train).texts[:most])
    return list(read_table(data, usual=note.text_column).texts[:most])


def open_adapter(
    folder: Path, *, model: str | None = None, precision: str = "fp32", device: str = "auto", say: Callable[[str], None]
) -> tuple[Base, Stack, AdapterNote]:
    """Load an adapter and its base (the one it names, or `model`)."""
    full = _full_note(folder)
    if full is not None:
        return _open_full(folder, full, precision, device, say)
    saved = read_adapter(folder)
    base = open_base_of(saved, model=model, precision=precision, device=device, say=say)
    return base, saved.stack(base), saved.note


def open_base_of(
    saved: SavedAdapter, *, model: str | None, precision: str, device: str, say: Callable[[str], None]
) -> Base:
    name = base_name(saved, model)
    loaded = load_base(name, precision=precision, device=device, say=say)
    return Base(loaded.model, loaded.tokenizer, name=name, fingerprint=loaded.fingerprint)


def open_causal_lm_of(
    saved: SavedAdapter, *, model: str | None, device: str, say: Callable[[str], None]
) -> tuple[Base, Any]:
    """The base in fp32 with its language-model head: the backbone as a `Base`, and the whole model it is part of.

    A fully fine-tuned model's own weights stand below its base's language-model head.
    """
    name = base_name(saved, model)
    loaded = load_causal_lm(name, precision="fp32", device=device, say=say)
    whole: Any = loaded.model
    if saved.note.method == Full.name:
        whole.base_model.load_state_dict(load_base(str(saved.folder), device=device, say=say).model.state_dict())
        return Base(whole.base_model, loaded.tokenizer, name=name), whole
    return Base(whole.base_model, loaded.tokenizer, name=name, fingerprint=loaded.fingerprint), whole


def read_any(folder: Path) -> SavedAdapter:
    """An adapter, or a fully fine-tuned model seen as one: a head and nothing else, on a base of its own."""
    full = _full_note(folder)
    if full is None:
        return read_adapter(folder, headless=True)
    return SavedAdapter(folder, HeadOnly(), full, {}, _head_of(folder))


def base_name(saved: SavedAdapter, model: str | None) -> str:
    name = model or saved.note.base
    if not name:
        raise AdapterError(
            "does not say which base it belongs to", file=saved.folder, hint="--model the base it was trained on"
        )
    return name


def _full_note(folder: Path) -> AdapterNote | None:
    """The note of a fully fine-tuned model, None for an adapter."""
    note = read_note(folder)
    return note if note is not None and note.method == Full.name else None


def _open_full(
    folder: Path, note: AdapterNote, precision: str, device: str, say: Callable[[str], None]
) -> tuple[Base, Stack, AdapterNote]:
    """A fully fine-tuned model is its own base; its head alone is left to read."""
    loaded = load_base(str(folder), precision=precision, device=device, say=say)
    base = Base(loaded.model, loaded.tokenizer, name=str(folder), fingerprint=loaded.fingerprint)
    stack = HeadOnlyStack(base, len(note.labels), [0])
    with torch.no_grad():
        stack.tensors[HEAD][0].copy_(_head_of(folder))
    return base, stack, note


def _head_of(folder: Path) -> Tensor:
    """The score head among a fully fine-tuned model's weights, (classes, width)."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if "score.weight" in tensors.keys():  # noqa: SIM118 (not a dict)
                head_CD: Tensor = tensors.get_tensor("score.weight")
                return head_CD
    raise AdapterError("no score head among its weights", file=folder, hint="copy the trial's folder again, whole")
