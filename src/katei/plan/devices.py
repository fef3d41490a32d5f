"""What a device has: a consumer card by its name, "8GB", this machine, or its CPU.

Capacities are what the card's driver shows (`nvidia-smi`, MiB), not the number on the box; of them the driver and the display
keep a little, and a CUDA context of torch takes `CONTEXT_BYTES` before the first tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from katei.base.device import pick_device
from katei.core.errors import BaseError, nearest
from katei.core.machine import container_limit_bytes

MIB, GIB = 1 << 20, 1 << 30

CONTEXT_BYTES = 430 * MIB
"""A CUDA context with lazily loaded kernels: 426 MiB on an RTX 6000 Ada (unslothai/unsloth-zoo pull 1053), about 400 MiB
(pytorch/pytorch issue 109888), 274 MiB with a single kernel (pull 86509). Not measured by us."""
WORKSPACE_BYTES = 8 * MIB + 128 * 1024
"""cuBLAS' workspace, in the caching allocator: 8,519,680 bytes (":4096:2:16:8", torch's default before Hopper)."""
HOPPER_WORKSPACE_BYTES = 32 * MIB
"""From compute capability 9.0 on (pytorch/pytorch pull 120925 and NVIDIA's advice for cublasSetWorkspace)."""


@dataclass(frozen=True)
class Device:
    """`capacity_bytes` is all it has; what a run may take is `usable_bytes`."""

    name: str
    kind: str
    """cuda or cpu."""
    capacity_bytes: int
    usable_bytes: int
    context_bytes: int = 0
    workspace_bytes: int = 0
    bf16: bool = True
    """Its cores multiply bf16 (from Ampere on); without, fp16 with a loss scale is the half precision to take."""
    here: torch.device | None = None
    """The device itself, if it is this machine's."""


_CARDS: dict[str, tuple[int, float]] = {
    # name: (MiB that nvidia-smi shows, compute capability)
    "gtx1060": (6144, 6.1),
    "gtx1070": (8192, 6.1),
    "gtx1080": (8192, 6.1),
    "gtx1080ti": (11264, 6.1),
    "gtx1650": (4096, 7.5),
    "gtx1660": (6144, 7.5),
    "gtx1660ti": (6144, 7.5),
    "gtx1660super": (6144, 7.5),
    "rtx2060": (6144, 7.5),
    "rtx2060super": (8192, 7.5),
    "rtx2060-12gb": (12288, 7.5),
    "rtx2070": (8192, 7.5),
    "rtx2070super": (8192, 7.5),
    "rtx2080": (8192, 7.5),
    "rtx2080super": (8192, 7.5),
    "rtx2080ti": (11264, 7.5),
    "rtx3050": (8192, 8.6),
    "rtx3060": (12288, 8.6),
    "rtx3060ti": (8192, 8.6),
    "rtx3070": (8192, 8.6),
    "rtx3070ti": (8192, 8.6),
    "rtx3080": (10240, 8.6),
    "rtx3080-12gb": (12288, 8.6),
    "rtx3080ti": (12288, 8.6),
    "rtx3090": (24576, 8.6),
    "rtx3090ti": (24564, 8.6),
    "rtx4050laptop": (6141, 8.9),
    "rtx4060": (8188, 8.9),
    "rtx4060ti": (8188, 8.9),
    "rtx4060ti-16gb": (16380, 8.9),
    "rtx4070": (12282, 8.9),
    "rtx4070super": (12282, 8.9),
    "rtx4070ti": (12282, 8.9),
    "rtx4070tisuper": (16376, 8.9),
    "rtx4080": (16376, 8.9),
    "rtx4080super": (16376, 8.9),
    "rtx4090": (24564, 8.9),
    "rtx5060": (8151, 12.0),
    "rtx5060ti": (8151, 12.0),
    "rtx5060ti-16gb": (16311, 12.0),
    "rtx5070": (12227, 12.0),
    "rtx5070ti": (16303, 12.0),
    "rtx5080": (16303, 12.0),
    "rtx5090": (32607, 12.0),
    "t4": (15360, 7.5),
    "v100": (16384, 7.0),
    "p100": (16384, 6.0),
    "l4": (23034, 8.9),
    "a10": (23028, 8.6),
    "a100": (40960, 8.0),
    "a100-80gb": (81920, 8.0),
    "h100": (81559, 9.0),
}
RESERVED_SHARE = 0.04
"""Of a card's memory that a desktop's display, browser and driver hold. On a card without a screen it is spare room."""


def cards() -> list[str]:
    return list(_CARDS)


def find_device(name: str) -> Device:
    """A card's name in any spelling, a size such as "8GB", "cpu", or "auto": the best that this machine has. Raises BaseError."""
    key = re.sub(r"[\s_]|nvidia|geforce", "", name.lower())
    if key in ("auto", "cpu", "mps"):
        return this_device(pick_device(key))
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)(gb|gib|g|mb|mib)", key):
        unit = MIB if size[2].startswith("m") else GIB
        return _cuda(f"a {name} GPU", int(float(size[1]) * unit), 8.0)
    short = key.replace("-", "")
    for known, (mib, capability) in _CARDS.items():
        if short in (known.replace("-", ""), known.replace("-", "").removeprefix("rtx").removeprefix("gtx")):
            return _cuda(known, mib * MIB, capability)
    raise BaseError(
        f"no device '{name}' is known", hint=f"{nearest(key, [*_CARDS, 'auto', 'cpu'])}; or its memory: 8GB"
    )


def _cuda(name: str, capacity: int, capability: float) -> Device:
    return Device(
        name=name,
        kind="cuda",
        capacity_bytes=capacity,
        usable_bytes=int(capacity * (1 - RESERVED_SHARE)),
        context_bytes=CONTEXT_BYTES,
        workspace_bytes=HOPPER_WORKSPACE_BYTES if capability >= 9 else WORKSPACE_BYTES,
        bf16=capability >= 8.0,
    )


def this_device(device: torch.device) -> Device:
    """A device of this machine, and what it has free now."""
    if (
        device.type != "cuda"
    ):  # mps shares the system's memory; its allocator is not modelled, so it is planned as the CPU is
        return replace(_cpu(), name=device.type, here=device)
    properties = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    found = _cuda(properties.name, properties.total_memory, properties.major + properties.minor / 10)
    # what is free is measured behind our own context
    return replace(found, usable_bytes=free + torch.cuda.memory_reserved(device), context_bytes=0, here=device)


def _cpu() -> Device:
    import psutil

    memory = psutil.virtual_memory()
    limit = min(memory.total, container_limit_bytes() or memory.total)
    own = psutil.Process().memory_info().rss  # a plan counts what this process holds already
    return Device("cpu", "cpu", limit, min(memory.available + own, limit))
