"""Every method, by its name in flags and files: the only place where a method is a string."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from katei.core.errors import RecipeError, nearest
from katei.core.settings import build as build_settings
from katei.methods.adalora import AdaLoRA
from katei.methods.contract import Method
from katei.methods.full import Full
from katei.methods.head_only import HeadOnly
from katei.methods.ia3 import IA3
from katei.methods.llama_adapter import LLaMAAdapter
from katei.methods.lora import LoRA
from katei.methods.p_tuning import PTuning
from katei.methods.prefix_tuning import PrefixTuning
from katei.methods.prompt_tuning import PromptTuning

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (LoRA, AdaLoRA, PromptTuning, PTuning, IA3, LLaMAAdapter, PrefixTuning, HeadOnly, Full)
}

BOOK = ("lora", "adalora", "prompt-tuning", "p-tuning", "ia3", "llama-adapter")
"""What `--method all` means: the reference experiment's six."""

__all__ = [
    "BOOK",
    "IA3",
    "METHODS",
    "AdaLoRA",
    "Full",
    "HeadOnly",
    "LLaMAAdapter",
    "LoRA",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "build_method",
    "method_class",
]


def method_class(name: str) -> type[Method]:
    """The settings class of a method. Raises RecipeError that names the nearest."""
    if name not in METHODS:
        raise RecipeError(f"no method is named '{name}'", hint=nearest(name, METHODS))
    return METHODS[name]


def build_method(name: str, settings: Mapping[str, Any], *, where: str) -> Method:
    """The method `name` with these settings, checked. Raises RecipeError."""
    return build_settings(method_class(name), settings, where=where)
