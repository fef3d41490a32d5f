"""What a process on the CPU holds at its peak: the resident memory that a task manager shows.

    while loading   what was there before + the largest weight; where their type is another one: + the file, mapped, + the weights
    while running   what was there before + all live tensors - what no text needs of the embedding (a mapped file's page is read when it
                    is looked at) + SCRATCH_BYTES + HOLES of the short-lived ones
    zero-shot       what was there before + the language model, all of it, since each score looks at the whole head + SCRATCH_BYTES
                    + the scores that are made at once

What was there before (Python, torch, transformers, the tokenizer, the data) is measured, not guessed; and so is what looking at the
texts' tokens maps of an embedding whose file is here. The constants were fitted on
SmolLM2-135M and llm-jp-3-150m (`benchmarks/LOG.md`), and are judged on others (`benchmarks/plan_error.py`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig

from katei.base.folder import weight_files
from katei.base.quiet import quiet
from katei.core.errors import BaseError
from katei.core.machine import mapped_bytes

HOLES = 0.1
"""Of short-lived tensors, what malloc's heap keeps between them when passes differ in size: 0.0 to 0.3 were seen. None where freed
memory is returned (`katei.core.machine.return_freed_memory`, on where layers are recomputed)."""
SCRATCH_BYTES, SCRATCH_RETURNED = 140 << 20, 110 << 20
"""Kernels that oneDNN generates, the BLAS' and autograd's own buffers, libraries loaded late, the tables written at the end; less where
freed memory is returned."""
LOOKED_AT_BYTES = 256 << 10
"""Of a mapped file around each place that is read, where that cannot be measured: pages come in runs. 240 KiB were seen."""


@dataclass(frozen=True)
class WeightsFile:
    """What is read from the disk: its bytes, and whether loading converts them."""

    size: int
    numbers: int
    converts: bool
    embedding: int
    """Bytes of the embedding."""
    rows: int
    """Tokens that it knows."""
    place: tuple[Path, int] | None
    """Its file and where it begins there, if the base is on this machine."""

    def unread(self, tokens: Collection[int]) -> int:
        """Of the mapped embedding, if these are looked up."""
        if self.converts or len(tokens) >= self.rows:
            return 0
        read = self._mapped(tokens) if self.place else None
        return max(0, self.embedding - (len(tokens) * LOOKED_AT_BYTES if read is None else read))

    def _mapped(self, tokens: Collection[int]) -> int | None:
        assert self.place is not None
        file, start = self.place
        row = self.embedding // self.rows
        return mapped_bytes(
            file, start, self.embedding, [start + row * t + end for t in tokens for end in (0, row - 1)]
        )


def weights_file(config: PreTrainedConfig, dtype: torch.dtype) -> WeightsFile:
    """Of a backbone of this shape, in the type the config names (else `dtype`), to be loaded as `dtype`; a language-model head beside
    it in the file is not read.
    """
    named = getattr(config, "dtype", None) or dtype
    with quiet(), torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(config))
    size = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    return WeightsFile(
        size * named.itemsize,
        size,
        named != dtype,
        embedding.numel() * named.itemsize,
        len(embedding),
        _place(config, next(name for name, weight in model.named_parameters() if weight is embedding)),
    )


def _place(config: PreTrainedConfig, name: str) -> tuple[Path, int] | None:
    """The file of the base's own folder with the weight `name`, and where in the file that begins; None where there is none or it
    cannot be read, which is for loading to say.
    """
    folder = config.name_or_path  # empty where only a shape is known
    try:
        for file in weight_files(Path(folder)) if folder and Path(folder).is_dir() else ():
            begin, header = _header(file)
            for known, about in header.items():
                if known == name or known.endswith(f".{name}"):
                    return file, begin + int(about["data_offsets"][0])
    except (BaseError, OSError, ValueError, LookupError, TypeError):
        return None
    return None


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Of a safetensors file, and where the weights begin behind it (https://huggingface.co/docs/safetensors, Format)."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return 8 + length, dict(json.loads(opened.read(min(length, file.stat().st_size))))


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


def zero_shot_bytes(resident: int, file: WeightsFile, dtype: torch.dtype, config: PreTrainedConfig, judged: int) -> int:
    """While the language model scores `judged` tokens at once, when training's memory has been given back."""
    weights = file.numbers * dtype.itemsize
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize
    loading = file.size + weights + head if file.converts else 0
    scores = judged * config.vocab_size * torch.float32.itemsize
    return int(resident + max(loading, weights + head + SCRATCH_BYTES + scores))
