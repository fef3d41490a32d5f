"""Plain `transformers` folders: a fine-tuned model, or an adapter merged into its base.

    merged W = base W with the adapter folded in, computed in float32        then the same rows through both, compared

Dimensions: C classes · D width · O outputs · I inputs · E rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from katei.base.packed import Base
from katei.base.quiet import forget_how_loaded, quiet
from katei.core.errors import AdapterError, CannotMerge
from katei.core.files import folder_atomic, write_json
from katei.engine.lockstep import score_rows
from katei.methods.contract import HEAD, Stack
from katei.methods.saved import AdapterNote, SavedAdapter

LARGEST_CHANGE = 1e-3
"""A merged model may move a probability by this much; beyond it the merge is refused."""


@dataclass(frozen=True)
class Agreement:
    """How a merged model answers beside its adapter, on the same rows."""

    rows: int
    labels: float
    """Share of rows with the same label."""
    max_probability_change: float
    mean_probability_change: float


def save_full(folder: Path, base: Base, stack: Stack, note: AdapterNote) -> None:
    """Write a fully fine-tuned base with its head as an `AutoModelForSequenceClassification` folder."""
    weights = {name: parameter.detach() for name, parameter in base.model.named_parameters()}
    _save_classifier(folder, base, weights, stack.tensors[HEAD][0].detach(), note)


def check_mergeable(saved: SavedAdapter, out: Path) -> None:
    """Raise, before any base is loaded, for a method without weights to merge into or a folder that is taken."""
    if not saved.method.merges:
        raise CannotMerge(
            f"{saved.method.name} has no weights to merge into: it changes what the layers read, not what they are",
            file=saved.folder,
            hint="`katei export RUN --format peft` keeps the adapter beside the base; LoRA, AdaLoRA and (IA)³ merge",
        )
    if out.exists():
        raise AdapterError("already exists", file=out, hint="--out a new folder")


def merge_adapter(
    saved: SavedAdapter, base: Base, out: Path, rows: Sequence[Sequence[int]], say: Callable[[str], None]
) -> Agreement:
    """Fold an adapter into its base's weights, write the plain model to `out`, and compare both on `rows` of token ids.

    Raises CannotMerge for a method without weights to merge into, and AdapterError (nothing is left at `out`) where the merged
    model moves a probability by more than `LARGEST_CHANGE`.
    """
    check_mergeable(saved, out)
    assert base.dtype == torch.float32, "a merge is computed in float32"
    stack = saved.stack(base)
    weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in base.model.named_parameters()}
    for site in base.sites:
        weights[f"{site}.weight"] = stack.merge(0, site, weights[f"{site}.weight"])
        if f"{site}.bias" in weights:
            weights[f"{site}.bias"] = stack.merge_bias(0, site, weights[f"{site}.bias"])
    before = score_rows(base, [stack], [(0, 0, ids) for ids in rows], token_budget=1024)
    with folder_atomic(out) as folder:
        _save_classifier(folder, base, weights, stack.tensors[HEAD][0].detach(), saved.note)
        say(f"comparing {len(rows)} rows")
        agreement = _agreement(before, _plain_probabilities(folder, rows))
        if agreement.max_probability_change > LARGEST_CHANGE:
            raise AdapterError(
                f"the merged model moves a probability by {agreement.max_probability_change:.2g}, "
                f"more than {LARGEST_CHANGE:g}; nothing was written",
                file=saved.folder,
                hint="use the adapter beside its base: `katei predict`, or `katei export --format peft`",
            )
        write_json(folder / "agreement.json", asdict(agreement))
    return agreement


def _save_classifier(
    folder: Path, base: Base, weights: Mapping[str, Tensor], head_CD: Tensor, note: AdapterNote
) -> None:
    config: Any = copy.deepcopy(base.config)
    config.num_labels = len(note.labels)
    config.id2label = dict(enumerate(note.labels))
    config.label2id = {label: i for i, label in enumerate(note.labels)}
    config._attn_implementation = None
    tokenizer = copy.deepcopy(base.tokenizer)
    if tokenizer.pad_token is None:  # the plain model pools the last token that is not padding, so it needs one
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    with quiet(), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    named = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in weights.items()} | {
        "score.weight": head_CD
    }
    expected = {name for name, _ in model.named_parameters()}
    assert set(named) == expected, f"{sorted(set(named) ^ expected)[:5]}"
    forget_how_loaded(tokenizer)
    with quiet():
        model.save_pretrained(folder, state_dict={name: tensor.cpu().contiguous() for name, tensor in named.items()})
        tokenizer.save_pretrained(folder)
    write_json(folder / "katei.json", asdict(note))


def _plain_probabilities(folder: Path, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """What `transformers` alone makes of the folder, a row at a time."""
    with quiet():
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.stack(
            [torch.softmax(model(input_ids=torch.tensor([list(ids)])).logits[0].double(), 0).numpy() for ids in rows]
        )


def _agreement(before_EC: NDArray[np.float64], after_EC: NDArray[np.float64]) -> Agreement:
    change = np.abs(before_EC - after_EC)
    same = float((before_EC.argmax(1) == after_EC.argmax(1)).mean())
    return Agreement(len(before_EC), same, float(change.max()), float(change.mean()))
