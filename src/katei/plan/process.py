"""What a process on the CPU holds at its peak: the resident memory that a task manager shows.

    while loading   what was there before + the largest weight; where their type is another one: + the file, mapped, + the weights
    while running   what was there before + all live tensors - the embedding's rows no text has (a mapped file's page is read when it
                    is looked at) + SCRATCH_BYTES + HOLES of the short-lived ones

What was there before (Python, torch, transformers, the tokenizer, the data) is measured, not guessed. The constants were fitted on
SmolLM2-135M and llm-jp-3-150m (`benchmarks/LOG.md`), and are judged on others (`benchmarks/plan_error.py`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModel, PreTrainedConfig

from katei.base.quiet import quiet

HOLES = 0.1
"""Of short-lived tensors, what malloc's heap keeps between them when passes differ in size: 0.0 to 0.3 were seen. None where freed
memory is returned (`katei.core.machine.return_freed_memory`, on where layers are recomputed)."""
SCRATCH_BYTES, SCRATCH_RETURNED = 140 << 20, 110 << 20
"""Kernels that oneDNN generates, the BLAS' and autograd's own buffers, libraries loaded late, the tables written at the end; less where
freed memory is returned."""
LOOKED_AT_BYTES = 256 << 10
"""Of a mapped file around each place that is read: pages come in runs. 240 KiB were seen."""


@dataclass(frozen=True)
class WeightsFile:
    """What is read from the disk: its bytes, and whether loading converts them."""

    size: int
    converts: bool
    embedding: int
    """Bytes of the embedding."""

    def unread(self, tokens: int) -> int:
        """Of the mapped embedding, if `tokens` different ones are looked up."""
        return 0 if self.converts else max(0, self.embedding - tokens * LOOKED_AT_BYTES)


def weights_file(config: PreTrainedConfig, dtype: torch.dtype) -> WeightsFile:
    """Of a backbone of this shape, in the type the config names (else `dtype`), to be loaded as `dtype`; a language-model head beside
    it in the file is not read.
    """
    named = getattr(config, "dtype", None) or dtype
    with quiet(), torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(config))
    size = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    return WeightsFile(size * named.itemsize, named != dtype, embedding * named.itemsize)


def process_bytes(
    resident: int, file: WeightsFile, weights: int, lasting: int, live_peak: int, *, returned: bool = False
) -> int:
    """`lasting` are the live bytes beside the weights that stay from step to step: adapters, gradients, moments. `returned`: freed
    memory goes back to the system at once.
    """
    loading = file.size + weights if file.converts else file.embedding
    holes = 0 if returned else int(HOLES * (live_peak - weights - lasting))
    running = live_peak + holes + (SCRATCH_RETURNED if returned else SCRATCH_BYTES)
    return resident + max(loading, running)
