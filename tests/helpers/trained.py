"""Finished studies and adapters for tests of what comes after training, and peft's answer to the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from katei import api
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.base.stream import PackedRow
from katei.methods.contract import Stack
from katei.ship.adapters import open_adapter
from tests.helpers.rows import EVERY_METHOD, data_folder, some_texts
from tests.helpers.tiny import tiny_base_folder

TEXTS = [text for text, _ in some_texts(5, seed=3)] + ["朝", "the iron gate " * 6]
"""Rows of different lengths, from one token to about forty."""


@dataclass(frozen=True)
class Trained:
    run: Path
    base: Path
    data: Path

    def trial(self, name: str) -> Path:
        return self.run / "trials" / name


def train_study(
    folder: Path, architecture: str = "llama", methods: tuple[str, ...] = EVERY_METHOD, base: Path | None = None
) -> Trained:
    """A run of every method on a tiny base: learning rates high enough that every tensor has moved far."""
    base = base or tiny_base_folder(folder, architecture)
    data = data_folder(folder / "data", labels=("暖かい", "cold"))
    recipe = folder / "recipe.toml"
    recipe.write_text(
        "[training]\nepochs = 2\nbatch_size = 3\nlearning_rate = 0.1\n[lora]\ndropout = 0.1\n[llama-adapter]\nlayers = 2\n"
        "[full]\nlearning_rate = 0.001\n",
        encoding="utf-8",
    )
    api.compare(data, out=folder / "run", model=str(base), methods=methods, recipe=recipe, references=[])
    return Trained(folder / "run", base, data)


def katei_logits(adapter: Path, texts: list[str], model: Path | None = None) -> NDArray[np.float64]:
    """All rows in one packed pass."""
    base, stack, note = open_adapter(adapter, model=str(model) if model else None, say=lambda text: None)
    return stack_logits(base, stack, [base.tokenize(text, note.max_length) for text in texts])


def stack_logits(base: Base, stack: Stack, rows: list[list[int]]) -> NDArray[np.float64]:
    stream = base.stream([PackedRow(0, 0, ids) for ids in rows], [stack])
    with torch.no_grad(), base.running(stream, [stack]):
        pooled_BD = base.pooled(stream, [stack])
        scores_BC = torch.cat([stack.scores(pooled_BD[p.first : p.last], p) for p in stream.parts])
    return stream.unsort(scores_BC).double().numpy()


def plain_classifier(base: Path, classes: int = 2) -> Any:
    """What a user of peft starts from."""
    from transformers import AutoModelForSequenceClassification

    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes, dtype=torch.float32).eval()


def row_by_row(model: Any, base: Path, texts: list[str]) -> NDArray[np.float64]:
    """The reference's logits at batch 1, where peft's prompt methods are right too."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return np.stack([model(**tokenizer(text, return_tensors="pt")).logits[0].double().numpy() for text in texts])
