"""An adapter for other tools: its own files are peft's already, so exporting is copying what peft reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from katei.core.errors import AdapterError
from katei.core.files import folder_atomic
from katei.methods.saved import read_adapter


def export_peft(folder: Path, out: Path) -> None:
    """Copy the adapter to `out` for `PeftModel.from_pretrained`. Raises AdapterError for what peft has no format for.

    LLaMA-Adapter's head goes along as head.safetensors: peft's file has no place for it, so it is loaded by hand
    (docs/methods.md shows the three lines).
    """
    saved = read_adapter(folder)
    if saved.method.peft_type is None:
        raise AdapterError(
            f"peft has no format for the method '{saved.method.name}'",
            file=folder,
            hint="`katei merge` writes a plain transformers model of it",
        )
    if out.exists():
        raise AdapterError("already exists", file=out, hint="--out a new folder")
    with folder_atomic(out) as temporary:
        for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "katei.json"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, temporary / name)
