"""The engine's own step on tensors without numbers: what it would hold, born and gone in the same order.

    config → Base of fake tensors → Lockstep, the real one → its heaviest training step and evaluation pass → Trace

Nothing here knows how much a layer keeps: a change of the engine changes the trace. Where the engine reads numbers on the host it
asks `katei.base.host`, which answers for fake tensors as a healthy run would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModel, PreTrainedConfig

from katei.base import ops
from katei.base.device import pick_dtype
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.base.stream import passes
from katei.engine.lockstep import Lockstep, Tokens, Trial, score_rows
from katei.plan.meter import ADAPTERS, GRADIENTS, WEIGHTS, Meter

MOST_STEPS = 100_000
"""Of all trials together that are looked at for the heaviest; of a longer study an even choice."""


@dataclass(frozen=True)
class Trace:
    """What a run holds."""

    events: tuple[tuple[int, int], ...]
    """(serial, bytes) of each storage's birth, (serial, -1) of its end; weights first."""
    live_peak_bytes: int
    parts: dict[str, int]
    """Bytes by owner at that peak."""
    where: str
    """The peak's place: train or evaluate."""
    trainable: int
    """Numbers trained by one trial of the first method."""
    total: int


@contextmanager
def fake_base(config: PreTrainedConfig, precision: str, *, cuda: bool = False) -> Iterator[Base]:
    """A base of this shape without numbers; everything done with it happens inside.

    A CPU build of torch has no fake CUDA tensors, so with `cuda` the tensors are the CPU's and the engine takes the way it takes
    on CUDA (`ops.planned_kind`).
    """
    with FakeTensorMode(allow_non_fake_inputs=True), quiet(), ops.planned("cuda" if cuda else "cpu"):
        model = AutoModel.from_config(config, dtype=pick_dtype(precision)).eval().requires_grad_(False)
        yield Base(model)


def trace_study(
    base: Base,
    trials: Sequence[Trial],
    classes: int,
    train: Tokens,
    valid: Tokens | None,
    *,
    token_budget: int,
    checkpointing: bool = False,
) -> Trace:
    """Of the heaviest step and the heaviest evaluation pass of this study. Call inside `fake_base`."""
    meter = Meter()
    meter.claim([*base.model.parameters(), *base.model.buffers()], WEIGHTS)
    with meter:
        engine = Lockstep(base, trials, classes, train, valid, token_budget=token_budget, checkpointing=checkpointing)
        meter.claim([stack.theta_NM for stack in engine.stacks], ADAPTERS)
        meter.claim([stack.grad_NM for stack in engine.stacks], GRADIENTS)
        engine.fill_cache()
        step = heaviest_step(engine)
        for state in engine.states:
            state.step = min(step, state.trial.total_steps - 1)
        engine.step()
        trained = meter.peak
        if valid is not None:
            score_rows(
                base,
                engine.stacks,
                heaviest_pass(engine, valid),
                token_budget=token_budget,
                entries=engine.entries,
                cache=engine.cache,
            )
        where = "train" if meter.peak == trained else "evaluate"
        stack = engine.stacks[0]
        return Trace(
            events=tuple(meter.events),
            live_peak_bytes=meter.peak,
            parts={owner: size for owner, size in meter.at_peak.items() if size},
            where=where,
            trainable=stack.trainable,
            total=stack.total(base),
        )


def heaviest_step(engine: Lockstep) -> int:
    """The step with the pass that holds most, by `_weight`."""
    steps = max(state.trial.total_steps for state in engine.states)
    stride = -(-steps * len(engine.states) // MOST_STEPS)
    best, heaviest = 0, -1.0
    before = [state.step for state in engine.states]
    with unset_fake_temporarily():
        for step in range(0, steps, stride):
            lengths: list[int] = []
            for state in engine.states:
                if step < state.trial.total_steps:
                    state.step = step
                    more = engine.stacks[state.stack].virtual_tokens
                    lengths += [len(engine.train.ids[row]) + more for row in state.batch()]
            weight = max(_weight(engine.base, [lengths[i] for i in one]) for one in passes(lengths, engine.token_budget))
            if weight > heaviest:
                best, heaviest = step, weight
        for state, place in zip(engine.states, before, strict=True):
            state.step = min(best, state.trial.total_steps - 1)
            state.batch()  # its order is drawn here, where there are numbers
            state.step = place
    return best


def heaviest_pass(engine: Lockstep, tokens: Tokens) -> list[tuple[int, int, Sequence[int]]]:
    """The rows of the evaluation pass that holds most, of all trials side by side."""
    rows = [(state.stack, state.n, ids) for state in engine.states for ids in tokens.ids]
    lengths = [len(ids) + engine.stacks[stack].virtual_tokens for stack, _, ids in rows]
    chosen = max(passes(lengths, engine.token_budget), key=lambda one: _weight(engine.base, [lengths[i] for i in one]))
    return [rows[i] for i in chosen]


def _weight(base: Base, lengths: Sequence[int]) -> float:
    """Of a pass, roughly what it keeps: so many numbers a token, and the attention's where that is kept."""
    mlp = getattr(base.config, "intermediate_size", 4 * base.width)
    of_token = 4 * base.width + 2 * mlp + 3 * base.heads * base.head_size
    return of_token * sum(lengths) + base.heads * sum(length * length for length in lengths)
