"""What a process on the CPU holds at its peak: the resident memory that a task manager shows.

    while loading   what was there before + the largest weight; where their type is another one: + the file, mapped, + the weights
    while running   what was there before + all live tensors - the embedding's rows no text has (a mapped file's page is read when it
                    is looked at) + SCRATCH_BYTES + HOLES of the short-lived ones

What was there before (Python, torch, transformers, the tokenizer, the data) is measured, not guessed. The constants were fitted on
SmolLM2-135M and llm-jp-3-150m (`benchmarks/LOG.md`), and are judged on others (`benchmarks/plan_error.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from katei.base.quiet import quiet

HOLES = 0.1
"""Of short-lived tensors, what malloc's heap keeps between them when passes differ in size: 0.0 to 0.3 were seen. None where layers are
recomputed: then `katei.core.machine.return_freed_memory` is on."""
SCRATCH_BYTES = 140 << 20
"""Kernels that oneDNN generates, the BLAS' and autograd's own buffers, libraries loaded late, the tables written at the end."""
LOOKED_AT_BYTES = 256 << 10
"""Of a mapped file around each place that is read: pages come in runs. 240 KiB were seen."""


@dataclass(frozen=True)
class WeightsFile:
    """What lies on the disk: its bytes, and whether loading converts them."""

    size: int
    converts: bool
    embedding: int
    """Bytes of the embedding."""

    def unread(self, tokens: int) -> int:
        """Of the mapped embedding, if `tokens` different ones are looked up."""
        return 0 if self.converts else max(0, self.embedding - tokens * LOOKED_AT_BYTES)


def weights_file(config: PreTrainedConfig, dtype: torch.dtype) -> WeightsFile:
    """Of a causal LM of this shape, in the type the config names (else `dtype`), to be loaded as `dtype`."""
    named = getattr(config, "dtype", None) or dtype
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in model.parameters())  # tied ones come once
    embedding = model.get_input_embeddings().weight.numel()
    return WeightsFile(size * named.itemsize, named != dtype, embedding * named.itemsize)


def process_bytes(resident: int, file: WeightsFile, weights: int, lasting: int, live_peak: int, *, holes: float) -> int:
    """`lasting` are the live bytes beside the weights that stay from step to step: adapters, gradients, moments."""
    loading = file.size + weights if file.converts else file.embedding
    running = live_peak + int(holes * (live_peak - weights - lasting)) + SCRATCH_BYTES
    return resident + max(loading, running)


def resident_bytes() -> int:
    """Of this process, now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
