"""The adapters that are served, side by side on the one base they share.

    katei serve runs/demo runs/more/trials/lora        names: demo/lora, demo/ia3, …, more/lora

Adapters of equal method, settings and number of classes share a stack, as trials do in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from katei.base.folder import fingerprint
from katei.base.load import load_base, load_causal_lm, resolve_base
from katei.base.packed import Base
from katei.core.errors import AdapterError, BaseError, RecipeError, RunError, UserError, nearest
from katei.methods.contract import Method, Stack, TrialFacts
from katei.methods.full import Full
from katei.methods.head_only import HeadOnlyStack
from katei.methods.saved import AdapterNote, SavedAdapter, load_into_, read_adapter, read_note
from katei.ship.adapters import adapter_folder, open_adapter

Say = Callable[[str], None]


@dataclass(frozen=True)
class Served:
    """One adapter: `name` in requests, its place among the stacks, and what its file says of it."""

    name: str
    stack: int
    adapter: int
    note: AdapterNote

    def about(self) -> dict[str, Any]:
        note = self.note
        return {
            "name": self.name,
            "method": note.method,
            "settings": note.settings,
            "labels": list(note.labels),
            "max_length": note.max_length,
        }


@dataclass(frozen=True)
class Shelf:
    base: Base
    stacks: tuple[Stack, ...]
    adapters: dict[str, Served]
    lm_head: Any = None
    """Maps (B, D) to (B, V) next-token scores; None where the base has no language-model head."""
    bare: int = -1
    """The stack through which the base runs as it is."""

    def choose(self, names: str | Sequence[str] | None) -> list[Served]:
        """The adapters meant: one name, several, or all (None or "all"). Raises AdapterError for a name that is not there,
        RecipeError for none at all.
        """
        if names is None or (names == "all" and "all" not in self.adapters):
            return list(self.adapters.values())
        wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        if not wanted:
            raise RecipeError("adapters names none", hint="leave it out to ask all of them")
        for name in wanted:
            if name not in self.adapters:
                shown = name if len(name) <= 80 else name[:79] + "…"
                raise AdapterError(f"no adapter is named '{shown}'", hint=nearest(shown, self.adapters))
        return [self.adapters[name] for name in wanted]


def load_shelf(
    runs: Sequence[Path], *, model: str | None = None, precision: str = "fp32", device: str = "auto", say: Say
) -> Shelf:
    """Load every adapter of `runs` (run folders or adapter folders) and their one base.

    Raises UserError, before any weights are read, where two adapters stand on different bases.
    """
    found = _named_folders(runs, say)
    notes = {name: read_note(folder) for name, folder in found.items()}
    full = [name for name, note in notes.items() if note is not None and note.method == Full.name]
    if full:
        if len(found) > 1:
            raise AdapterError(
                f"'{full[0]}' is a fully fine-tuned model, which is its own base and shares none",
                file=found[full[0]],
                hint="serve it by itself: katei serve " + str(found[full[0]]),
            )
        base, stack, note = open_adapter(found[full[0]], model=model, precision=precision, device=device, say=say)
        stack.theta_NM.requires_grad_(False)
        return Shelf(base, (stack,), {full[0]: Served(full[0], 0, 0, note)})
    saved = {name: read_adapter(folder) for name, folder in found.items()}
    base, lm_head = _open_base(_one_base(saved, model), precision, device, say)
    stacks, adapters = _stacks(base, saved)
    if lm_head is None:
        return Shelf(base, tuple(stacks), adapters)
    return Shelf(base, (*stacks, HeadOnlyStack(base, 2, [0])), adapters, lm_head, len(stacks))


def _named_folders(runs: Sequence[Path], say: Say) -> dict[str, Path]:
    """Adapter folders by name: RUN/TRIAL for the trials of a run, the folder's own name for a lone adapter."""
    found: dict[str, Path] = {}
    for run in runs:
        trials = run / "trials"
        if trials.is_dir():
            folders = sorted(path for path in trials.iterdir() if path.is_dir() and not path.name.startswith("."))
            members = {f"{_own_name(run)}/{folder.name}": folder for folder in folders}
            members = _without_odd_ones(members, say) if len(members) > 1 else members
        else:
            folder = adapter_folder(run)
            parent = folder.absolute().parent
            name = f"{_own_name(parent.parent)}/" if parent.name == "trials" else ""
            members = {name + _own_name(folder): folder}
        if not members:
            raise RunError("has no adapters that can be served", file=run, hint="a run that `katei compare` finished")
        for name, folder in members.items():
            if name in found and found[name].resolve() != folder.resolve():
                raise RunError(
                    f"two adapters would be named '{name}': {found[name]} and {folder}",
                    file=run,
                    hint="rename one of the folders",
                )
            found[name] = folder
    return found


def _own_name(folder: Path) -> str:
    return folder.name or folder.absolute().name


def _without_odd_ones(members: dict[str, Path], say: Say) -> dict[str, Path]:
    """A run's trials but for those that cannot stand beside the others, which are named: full models, diverged trials."""
    kept = {}
    for name, folder in members.items():
        note = read_note(folder)
        if note is not None and note.method == Full.name:
            say(f"left out {name}: a fully fine-tuned model is its own base (katei serve {folder})")
            continue
        try:
            read_adapter(folder)
        except AdapterError as error:
            if "not numbers" not in error.message:
                raise
            say(f"left out {name}: it diverged")
            continue
        kept[name] = folder
    return kept


def _one_base(saved: dict[str, SavedAdapter], model: str | None) -> str:
    """The name of the base all of them stand on; `model` wins over what their files say. Raises AdapterError."""
    if model is not None:
        return model  # each adapter is compared with its weights when it is put on it
    first: tuple[str, str] | None = None
    chosen = ""
    for name, adapter in saved.items():
        if not adapter.note.base:
            raise AdapterError(
                "does not say which base it belongs to", file=adapter.folder, hint="--model the base it was trained on"
            )
        weights = adapter.note.fingerprint or fingerprint(resolve_base(adapter.note.base))
        if first is None:
            first, chosen = (name, weights), adapter.note.base
        elif weights != first[1]:
            raise AdapterError(
                f"'{name}' stands on another base ('{adapter.note.base}', weights {weights[:8]}) than "
                f"'{first[0]}' ('{chosen}', weights {first[1][:8]})",
                file=adapter.folder,
                hint="one server holds one base: serve them by themselves, on two ports (--port)",
            )
    return chosen


def _open_base(name: str, precision: str, device: str, say: Say) -> tuple[Base, Any]:
    """The base, and its language-model head where it has one."""
    try:
        loaded = load_causal_lm(name, precision=precision, device=device, say=say)
    except BaseError:
        loaded = load_base(name, precision=precision, device=device, say=say)
        say("this base has no language-model head: /generate is off")
        return Base(loaded.model, loaded.tokenizer, name=name, fingerprint=loaded.fingerprint), None
    backbone = loaded.model.base_model
    base = Base(backbone, loaded.tokenizer, name=name, fingerprint=loaded.fingerprint)
    return base, loaded.model.get_output_embeddings()


def _stacks(base: Base, saved: dict[str, SavedAdapter]) -> tuple[list[Stack], dict[str, Served]]:
    groups: dict[tuple[Method, int], list[str]] = {}
    for name, adapter in saved.items():
        groups.setdefault((adapter.method.saved_as(), len(adapter.note.labels)), []).append(name)
    stacks: list[Stack] = []
    placed: dict[str, Served] = {}
    for (method, classes), names in groups.items():
        facts = [TrialFacts(total_steps=10**6)] * len(names)
        stack = method.build(base, classes, [0] * len(names), facts)
        for n, name in enumerate(names):
            _load(stack, n, saved[name], base)
            placed[name] = Served(name, len(stacks), n, saved[name].note)
        for tensor in stack.tensors.values():
            tensor.requires_grad_(False)
            tensor.grad = None
        stack.grad_NM = torch.empty(0)
        stacks.append(stack)
    return stacks, {name: placed[name] for name in saved}


def _load(stack: Stack, n: int, saved: SavedAdapter, base: Base) -> None:
    own = saved.note.fingerprint
    if own and base.fingerprint and own != base.fingerprint:
        raise AdapterError(
            f"the adapter was trained on other weights than those of '{base.name}'",
            file=saved.folder,
            hint=f"its base was '{saved.note.base}'",
        )
    try:
        load_into_(stack, n, saved)
    except UserError as error:
        raise AdapterError(error.message, file=saved.folder, hint=error.hint) from None
