"""From what a user types to plans: the base's shape, the rows, the trials; and what a study that does not fit can do instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from katei.base.builtin import BUILTINS
from katei.base.load import load_config, load_tokenizer
from katei.core.errors import BaseError
from katei.data import load_dataset
from katei.engine.lockstep import Tokens, Trial
from katei.methods.full import Full
from katei.plan.devices import find_device
from katei.plan.plan import Plan, Planner, Run, synthetic
from katei.plan.process import resident_bytes
from katei.plan.shapes import bundled
from katei.study.recipe import Recipe
from katei.study.run import encode

ROWS = 200
"""Rows of a study that is planned by a number of tokens alone."""


@dataclass(frozen=True)
class Rows:
    """What is trained on and validated."""

    train: Tokens
    valid: Tokens | None
    classes: int
    said: str
    """Where they come from, for the reader."""


def shape_of(model: str, say: Callable[[str], None]) -> PreTrainedConfig:
    """The base's config: of what is here, of a well-known name, or from the hub."""
    here = Path(model).expanduser().exists() or model in BUILTINS
    known = None if here else bundled(model)
    return known or load_config(model, say=say)


def rows_of(recipe: Recipe, config: PreTrainedConfig, tokens: int | None, classes: int) -> Rows:
    """The data's own rows, or rows of `tokens` tokens each."""
    if tokens is not None:
        train = synthetic(tokens, ROWS, config.vocab_size, classes)
        return Rows(train, synthetic(tokens, ROWS // 4, config.vocab_size, classes), classes, f"{tokens} tokens a row")
    dataset = load_dataset(recipe.data, text=recipe.text, label=recipe.label)
    try:
        tokenizer = load_tokenizer(recipe.model)
    except BaseError as error:
        raise BaseError(
            f"the data cannot be counted in tokens without the tokenizer of {recipe.model} ({error.message})",
            hint="--tokens N instead of the data: the longest text's number of tokens",
        ) from error
    split = {
        name: encode(tokenizer, split, recipe.max_length, config.vocab_size) for name, split in dataset.splits.items()
    }
    longest = max(len(ids) for ids in split["train"].ids)
    said = f"{recipe.data}, {len(split['train'])} rows, {longest} tokens at most"
    return Rows(split["train"], split.get("valid"), len(dataset.label_names), said)


def trials_of(recipe: Recipe, name: str, rows: int) -> tuple[Trial, ...]:
    method, training = recipe.resolved(name)
    seeds = recipe.seeds[:1] if isinstance(method, Full) else recipe.seeds
    return tuple(Trial(f"{name}-{seed}", method, seed, training, tuple(range(rows))) for seed in seeds)


def plan_methods(
    recipe: Recipe,
    device: str,
    *,
    precisions: Sequence[str],
    tokens: int | None,
    classes: int = 2,
    checkpointing: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every method alone, in every precision, on one device."""
    where = find_device(device)
    config = shape_of(recipe.model, say)
    rows = rows_of(recipe, config, tokens, classes)
    plans: list[Plan] = []
    for precision in precisions:
        with Planner(config, precision, where, resident_bytes()) as planner:
            for name in recipe.methods:
                if name == Full.name and precision != "fp32":
                    continue
                run = Run(
                    trials_of(recipe, name, len(rows.train)),
                    rows.classes,
                    rows.train,
                    rows.valid,
                    recipe.token_budget,
                    checkpointing,
                )
                plans.append(planner.plan(run))
    return {
        "model": recipe.model,
        "device": where.name,
        "capacity_bytes": where.capacity_bytes,
        "usable_bytes": where.usable_bytes,
        "rows": rows.said,
        "plans": [asdict(plan) for plan in plans],
    }
