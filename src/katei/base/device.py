"""Which device and which precision a base is loaded in."""

from __future__ import annotations

import torch

from katei.core.errors import BaseError, nearest

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def available_devices() -> list[str]:
    """Names `pick_device` accepts here, best first; the CPU is always last."""
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*names, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the best available: CUDA, then MPS, then CPU. `cuda` means `cuda:0`. Raises BaseError."""
    available = available_devices()
    wanted = {"auto": available[0], "cuda": "cuda:0"}.get(name, name)
    if wanted in available:
        return torch.device(wanted)
    if wanted.split(":")[0] in ("cuda", "mps"):
        raise BaseError(f"device '{name}' is not available here", hint=f"available: auto, {', '.join(available)}")
    raise BaseError(f"no device '{name}'", hint=nearest(name, ["auto", *available]))


def pick_dtype(name: str = "fp32") -> torch.dtype:
    """The frozen base's number format; adapters and heads are float32 whatever it is. Raises BaseError."""
    if name not in PRECISIONS:
        raise BaseError(f"no precision '{name}' for a base", hint=nearest(name, PRECISIONS))
    return PRECISIONS[name]
