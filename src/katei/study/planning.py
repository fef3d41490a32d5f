"""From what a user types to plans: the base's shape, the rows, the trials; and what a study that does not fit can do instead."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from transformers import PreTrainedConfig

from katei.base.builtin import BUILTINS
from katei.base.device import PRECISIONS
from katei.base.load import load_config, load_tokenizer
from katei.core.errors import BaseError, RecipeError, RunError, nearest
from katei.core.machine import resident_bytes
from katei.data import load_dataset
from katei.engine.lockstep import Tokens, Trial
from katei.methods.full import Full
from katei.plan.devices import Device, find_device
from katei.plan.plan import NF4, Plan, Planner, Run, synthetic
from katei.plan.shapes import SHAPES, bundled
from katei.plan.time import calibrate
from katei.study.recipe import Recipe
from katei.study.report.words import speaker
from katei.study.run import encode

A = TypeVar("A")
B = TypeVar("B")
Words: TypeAlias = Callable[..., str]

ROWS = 200
"""Rows of a study that is planned by a number of tokens alone."""


@dataclass(frozen=True)
class Rows:
    """What is trained on, validated and tested on: places in `pool`."""

    pool: Tokens
    train: tuple[int, ...]
    valid: tuple[int, ...]
    test: tuple[int, ...]
    classes: int
    said: str
    """Where they come from, for the reader."""


def shape_of(model: str, say: Callable[[str], None]) -> PreTrainedConfig:
    """The base's config: of what is here, of a well-known name, or from the hub."""
    here = Path(model).expanduser().exists() or model in BUILTINS
    known = None if here else bundled(model)
    try:
        return known or load_config(model, say=say)
    except BaseError as error:
        names = [name.rsplit("/", 1)[-1] for name in SHAPES]
        close = get_close_matches(model.rsplit("/", 1)[-1], names, n=1)
        if here or not close:
            raise
        raise BaseError(
            error.message, hint=f"did you mean {close[0]}? Known without a download: {', '.join(names)}"
        ) from None


def rows_of(recipe: Recipe, config: PreTrainedConfig, tokens: int | None, classes: int, words: Words) -> Rows:
    """The data's own rows, or rows of `tokens` tokens each."""
    if tokens is not None:
        pool = synthetic(tokens, ROWS + ROWS // 4, config.vocab_size, classes)
        every = tuple(range(len(pool)))
        return Rows(pool, every[:ROWS], every[ROWS:], (), classes, words("plan_rows_alike", tokens=tokens))
    dataset = load_dataset(recipe.data, text=recipe.text, label=recipe.label)
    try:
        tokenizer = load_tokenizer(recipe.model)
    except BaseError as error:
        raise BaseError(
            f"the data cannot be counted in tokens without the tokenizer of {recipe.model} ({error.message})",
            hint="--tokens N instead of the data: the longest text's number of tokens",
        ) from error
    pool, places = Tokens((), ()), {}
    for name, split in dataset.splits.items():
        places[name] = tuple(range(len(pool), len(pool) + len(split.texts)))
        pool += encode(tokenizer, split, recipe.max_length, config.vocab_size)
    longest = max(map(len, pool.ids))
    said = words("plan_rows_of", data=recipe.data, rows=len(places["train"]), tokens=longest)
    valid, test = places.get("valid", ()), places.get("test", ())
    return Rows(pool, places["train"], valid, test, len(dataset.label_names), said)


def run_of(recipe: Recipe, name: str, rows: Rows) -> Run:
    """Method `name` by itself, with all its seeds."""
    method, training = recipe.resolved(name)
    seeds = recipe.seeds[:1] if isinstance(method, Full) else recipe.seeds
    trials = tuple(Trial(f"{name}-{seed}", method, seed, training, rows.train, rows.valid) for seed in seeds)
    scored = (rows.test,) * len(trials)
    return Run(trials, rows.classes, rows.pool, scored, recipe.token_budget, recipe.checkpointing)


def in_processes(work: Callable[[Sequence[A]], list[B]], items: Sequence[A]) -> list[B]:
    """`work` on all items, in order, dealt out to the cores to and fro (the next ones take about as long as each other) by forking
    where that is possible: only shapes are computed, so there are no threads of torch's that a fork could lose.
    """
    count = min(len(items), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if count < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return work(items)
    results: dict[int, B] = {}
    dealt = [[i for i in range(len(items)) if i % (2 * count) in (k, 2 * count - 1 - k)] for k in range(count)]
    fork = multiprocessing.get_context("fork")
    ends = []
    for mine in dealt:
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=_send, args=(there, work, [items[i] for i in mine]))
        process.start()
        there.close()
        ends.append((here, process))
    for mine, (here, process) in zip(dealt, ends, strict=True):
        try:
            answer = here.recv()
        except EOFError:
            answer = RunError("a process that planned was killed", hint="plan fewer methods at once")
        process.join()
        if isinstance(answer, BaseException):
            raise answer
        results |= zip(mine, answer, strict=True)
    return [results[i] for i in range(len(items))]


def _send(there: Any, work: Callable[[Sequence[A]], list[B]], items: Sequence[A]) -> None:
    torch.set_num_threads(1)
    try:
        there.send(work(items))
    except BaseException as error:
        there.send(error)


def plan_methods(
    recipe: Recipe,
    device: str,
    *,
    precisions: Sequence[str],
    tokens: int | None,
    classes: int = 2,
    lang: str = "en",
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every method alone, in every precision, on one device. Notes and rows are told in `lang`."""
    words = speaker(lang)
    for precision in precisions:
        if precision not in (*PRECISIONS, NF4):
            raise RecipeError(f"no precision '{precision}'", hint=nearest(precision, [*PRECISIONS, NF4]))
    where = find_device(device)
    config = shape_of(recipe.model, say)
    if tokens is not None:
        _check_tokens(tokens, classes, config)
    rows = rows_of(recipe, config, tokens, classes, words)
    asked = [
        (precision, name)
        for precision in dict.fromkeys(precisions)
        for name in recipe.methods
        if name != Full.name or precision == "fp32"
    ]
    machines = {
        precision: calibrate(config, PRECISIONS[precision], where.here) if where.here and precision != NF4 else None
        for precision in precisions
    }
    resident = resident_bytes()

    def plan_some(some: Sequence[tuple[str, str]]) -> list[Plan]:
        plans = []
        for precision, inside in groupby(some, key=lambda pair: pair[0]):
            with Planner(config, precision, where, resident, machines[precision]) as planner:
                plans += [planner.plan(run_of(recipe, name, rows)) for _, name in inside]
        return plans

    plans = in_processes(plan_some, asked)
    return {
        "model": recipe.model,
        "device": where.name,
        "capacity_bytes": where.capacity_bytes,
        "usable_bytes": where.usable_bytes,
        "rows": rows.said,
        "plans": [asdict(plan) for plan in plans],
        "notes": [_afterwards(plans, where, words), *_notes(recipe, where, precisions, words)],
    }


def _check_tokens(tokens: int, classes: int, config: PreTrainedConfig) -> None:
    if tokens < 1:
        raise RecipeError(f"tokens is {tokens}, but it counts the longest text's tokens", hint="--tokens 200")
    if classes < 2:
        raise RecipeError(f"classes is {classes}, but there are at least two", hint="--classes 2")
    most = getattr(config, "max_position_embeddings", None)
    if most and tokens > most:
        raise RecipeError(f"tokens is {tokens:,}, and this base reads {most:,} at most", hint=f"--tokens {most}")


def _afterwards(plans: Sequence[Plan], where: Device, words: Words) -> str:
    """What using the adapters takes, at most."""
    said = []
    for what, sizes in (
        ("plan_predicting", [plan.predict_bytes for plan in plans]),
        ("plan_merging", [plan.merge_bytes for plan in plans]),
    ):
        most = max((size for size in sizes if size is not None), default=None)
        if most is not None:
            fits = "" if most <= where.usable_bytes else words("plan_not_that")
            said.append(words(what, gib=f"{most / 2**30:.2f}") + fits)
    return words("plan_afterwards", said="; ".join(said))


def _notes(recipe: Recipe, where: Device, precisions: Sequence[str], words: Words) -> list[str]:
    notes = []
    if Full.name in recipe.methods and set(precisions) != {"fp32"}:
        notes.append(words("plan_full_fp32"))
    if NF4 in precisions:
        notes.append(words("plan_nf4"))
    if "bf16" in precisions and not where.bf16:
        notes.append(words("plan_no_bf16", device=where.name))
    if "fp16" in precisions and where.kind == "cpu":
        notes.append(words("plan_fp16_cpu"))
    if where.kind == "cuda" and where.here is None:
        notes.append(words("plan_cuda"))
    return notes
