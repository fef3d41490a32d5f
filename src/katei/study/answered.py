"""A trial that has answered its rows, and whose weights nobody keeps: a file in place of its state, gigabytes of a whole model.

Ended of full fine-tuning in a fold → save_answered → RUN/state-NAME.safetensors → load_answered → Ended
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from katei.core.files import write_atomic
from katei.engine.lockstep import Epoch
from katei.study.trials import Ended, Planned

COUNTED = ("finished", "best_epoch", "trainable", "total", "ranks", "chosen")


def save_answered(path: Path, ended: Ended, fingerprint: str) -> None:
    """In place of the trial's state."""
    note = {key: getattr(ended, key) for key in COUNTED}
    note |= {"fingerprint": fingerprint, "answered": True, "epochs": [asdict(epoch) for epoch in ended.epochs]}
    metadata = {"katei": json.dumps(note)}
    write_atomic(path, lambda temporary: save_file(ended.probabilities, temporary, metadata=metadata))


def load_answered(path: Path, planned: Planned, fingerprint: str) -> Ended | None:
    """None for a state to go on from, or of another run."""
    try:
        with safe_open(path, framework="np") as file:
            note = json.loads((file.metadata() or {}).get("katei", "{}"))
            if not note.get("answered") or note["fingerprint"] != fingerprint:
                return None
            there = file.keys()
            probabilities = {role: file.get_tensor(role) for role in ("valid", "test") if role in there}
    except (SafetensorError, OSError, ValueError):
        return None
    epochs = [Epoch(**epoch) for epoch in note["epochs"]]
    return Ended(planned, epochs, probabilities=probabilities, **{key: note[key] for key in COUNTED})
