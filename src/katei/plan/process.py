"""What a process on the CPU holds at its peak: the resident memory that `ru_maxrss` and a task manager show.

    while loading   what was there before + the weights' file, mapped + where its type is another one: the weights, and the largest
                    tensor once more in the file's type
    while running   what was there before + weights + SCRATCH_BYTES + all other live tensors + HOLES of the short-lived ones

What was there before (Python, torch, transformers, the data) is measured, not guessed. The two constants were fitted on SmolLM2-135M,
Gemma 3 270M and llm-jp-3-150m (`benchmarks/LOG.md`), and are judged on others (`benchmarks/plan_error.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from katei.base.quiet import quiet

HOLES = 0.2
"""Of short-lived tensors, what malloc's heap keeps between them when passes differ in size: 0.0 to 0.4 were seen."""
SCRATCH_BYTES = 110 << 20
"""The tokenizer, kernels that oneDNN generates, the BLAS' and autograd's own buffers, libraries loaded late."""


@dataclass(frozen=True)
class WeightsFile:
    """What lies on the disk: its bytes, its largest tensor's, and whether loading converts them."""

    size: int
    largest: int
    converts: bool


def weights_file(config: PreTrainedConfig, dtype: torch.dtype) -> WeightsFile:
    """Of a causal LM of this shape, in the type the config names (else `dtype`), to be loaded as `dtype`."""
    named = getattr(config, "dtype", None) or dtype
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = [parameter.numel() * named.itemsize for parameter in model.parameters()]  # tied ones come once
    return WeightsFile(sum(sizes), max(sizes), named != dtype)


def process_bytes(resident: int, file: WeightsFile, weights: int, lasting: int, live_peak: int) -> int:
    """`lasting` are the live bytes beside the weights that stay from step to step: adapters, gradients, moments."""
    loading = file.size + (weights + file.largest if file.converts else 0)
    running = live_peak + int(HOLES * (live_peak - weights - lasting)) + SCRATCH_BYTES
    return resident + max(loading, running)


def resident_bytes() -> int:
    """Of this process, now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
