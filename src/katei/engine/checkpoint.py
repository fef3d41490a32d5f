"""The state of a lockstep run in one safetensors file: tensors as they are, the rest as JSON in its header.

All randomness is a function of seeds and counters (see `lockstep`), so this is everything: numbers, moments, the method's own
buffers, the best epoch's copy, counters and the epoch table. Read back, the run goes on to the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from katei.core.errors import RunError
from katei.core.files import write_atomic
from katei.engine.lockstep import Epoch, Lockstep, TrialState


def save_state(path: Path, lockstep: Lockstep, fingerprint: str) -> None:
    """Write the state whole or not at all. `fingerprint` names the recipe, data and base it belongs to."""
    tensors: dict[str, Tensor] = {}
    counters = {}
    for state in lockstep.states:
        name = state.trial.name
        for key, value in lockstep.stacks[state.stack].current(state.n).items():
            tensors[f"{name}/now/{key}"] = value
        for key, value in state.optimizer.state().items():
            tensors[f"{name}/adamw/{key}"] = value
        for key, value in (state.best or {}).items():
            tensors[f"{name}/best/{key}"] = value
        tensors[f"{name}/nats"] = state.nats.reshape(1)
        if state.best_nats_E is not None:
            tensors[f"{name}/best_nats"] = torch.from_numpy(state.best_nats_E)
        counters[name] = {
            "step": state.step,
            "epochs": [asdict(epoch) for epoch in state.epochs],
            "finished": state.finished,
            "best_epoch": state.best_epoch,
        }
    note = {
        "fingerprint": fingerprint,
        "trials": counters,
        "seconds": lockstep.seconds,
        "trained_rows": lockstep.trained_rows,
    }
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomic(path, lambda temporary: save_file(contiguous, temporary, metadata={"katei": json.dumps(note)}))


def is_state_of(path: Path, fingerprint: str) -> bool:
    """Whether the file is whole and of the run that `fingerprint` names."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool(json.loads((file.metadata() or {}).get("katei", "{}")).get("fingerprint") == fingerprint)
    except (SafetensorError, OSError, ValueError):
        return False


def load_state(path: Path, lockstep: Lockstep, fingerprint: str) -> None:
    """Bring `lockstep`, freshly built, to where the file's run was. Raises RunError for another run's file."""
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("katei", "{}"))
            if note.get("fingerprint") != fingerprint:
                raise RunError(
                    "belongs to other data, another base or another recipe", file=path, hint="--overwrite starts again"
                )
            keys = file.keys()
            for state in lockstep.states:  # one trial's tensors at a time: all of them again would be much memory
                name = state.trial.name
                own = [key for key in keys if key.startswith(f"{name}/")]
                tensors = {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in own}
                _restore(state, lockstep, tensors, note["trials"][name])
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"the state of this run cannot be read: {error}", file=path, hint="--overwrite starts again"
        ) from None
    lockstep.seconds = note["seconds"]
    lockstep.trained_rows = note["trained_rows"]


def _restore(state: TrialState, lockstep: Lockstep, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
    def below(part: str) -> dict[str, Tensor]:
        prefix = f"{part}/"
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    lockstep.stacks[state.stack].restore_(state.n, below("now"))
    state.optimizer.load_state_(below("adamw"))
    state.best = below("best") or None
    state.nats.copy_(tensors["nats"][0])
    best_nats_E = tensors.get("best_nats")
    state.best_nats_E = None if best_nats_E is None else best_nats_E.numpy()
    state.step = counters["step"]
    state.epochs = [Epoch(**epoch) for epoch in counters["epochs"]]
    state.finished = counters["finished"]
    state.best_epoch = counters["best_epoch"]
