"""The engine's own step on tensors without numbers: what it would hold, born and gone in the same order.

    config → Base on "meta" → Lockstep, the real one → its heaviest training step and evaluation pass → Trace

Nothing here knows how much a layer keeps: a change of the engine changes the trace. Where the engine reads numbers on the host it
asks `katei.base.host`, which answers for tensors on "meta" as a healthy run would; where it chooses between kernels it asks
`ops.device_kind`, which answers for the planned device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig

from katei.base import ops
from katei.base.device import pick_dtype
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.base.stream import PackedRow, passes
from katei.engine.lockstep import Lockstep, Tokens, Trial, score_rows
from katei.methods.contract import Method, Stack, TrialFacts, merged_weights
from katei.methods.full import Full
from katei.plan.meter import ADAPTERS, DEQUANTISED, GRADIENTS, MERGED, WEIGHTS, Meter

MOST_STEPS = 100_000
"""Of all trials together that are looked at for the heaviest; of a longer study an even choice."""


LOOKED_AT = 3
"""Steps that are run to find the heaviest."""


@dataclass(frozen=True)
class Trace:
    """What a run holds."""

    events: tuple[tuple[int, int], ...]
    """(serial, bytes) of each storage's birth, (serial, -1) of its end; weights first."""
    live_peak_bytes: int
    parts: dict[str, int]
    """Bytes by owner at that peak."""
    layers: tuple[int, ...]
    """Of these, what each layer made going forward: activations and attention."""
    where: str
    """The peak's place: train, evaluate, predict or merge."""
    trainable: int
    """Numbers trained by one trial of the first method."""
    total: int
    checkpointing: bool
    looked_up: frozenset[int]
    """Tokens that the embedding is asked for."""


@contextmanager
def without_numbers(*, cuda: bool = False) -> Iterator[None]:
    """Inside, what runs on "meta" takes the ways it takes on the CPU, or on a CUDA device."""
    with ops.planned("cuda" if cuda else "cpu"):
        yield


def base_of_shape(config: PreTrainedConfig, precision: str) -> Base:
    """A base without numbers; call it, and use it, inside `without_numbers`."""
    with quiet(), torch.device("meta"):
        model = AutoModel.from_config(
            copy.deepcopy(config), dtype=pick_dtype(precision)
        )  # it writes the type into its config
    return Base(model.eval().requires_grad_(False))


def trace_study(
    base: Base,
    trials: Sequence[Trial],
    classes: int,
    pool: Tokens,
    scored: Sequence[Sequence[int]] = (),
    *,
    token_budget: int,
    checkpointing: bool = False,
    nf4: bool = False,
) -> Trace:
    """Of the heaviest step and the heaviest evaluation passes of this study: of its trials' `valid` rows, and of those that are scored
    when all are trained, `scored[k]` by trial k. Call inside `without_numbers`.

    With `nf4` the base's matrices are counted as bitsandbytes stores them, and beside them the largest one in the type it is multiplied
    in: forward and backward dequantise one at a time. (The engine does not run on such a base yet.)
    """
    meter = Meter()
    meter.claim(base.frozen_tensors(), WEIGHTS, partial(nf4_bytes, _matrices(base)) if nf4 else None)
    dequantised = [torch.empty_like(max(_matrices(base), key=Tensor.numel))] if nf4 else []
    meter.claim(dequantised, DEQUANTISED)
    with meter:
        engine = Lockstep(base, trials, classes, pool, token_budget=token_budget, checkpointing=checkpointing)
        meter.claim([stack.theta_NM for stack in engine.stacks], ADAPTERS)
        meter.claim([stack.grad_NM for stack in engine.stacks], GRADIENTS)
        engine.fill_cache()
        for state in engine.states:
            if state.trial.valid and state.trial.training.keep == "best":
                state.best = engine.stacks[state.stack].snapshot(state.n)
        for step in heaviest_steps(engine):
            _go_to(engine, step)
            engine.step()
        trained = meter.peak
        for rows_of in ([trial.valid for trial in trials], scored):
            engine.cache.fill([pool.ids[row] for row in sorted({row for rows in rows_of for row in rows})])
            rows = [(row.stack, row.adapter, row.ids) for row in heaviest_pass(engine, rows_of)]
            if rows:
                score_rows(
                    base, engine.stacks, rows, token_budget=token_budget, entries=engine.entries, cache=engine.cache
                )
        where = "train" if meter.peak == trained else "evaluate"
        return _traced(meter, base, engine.stacks[0], where, _looked_up(engine), checkpointing=checkpointing)


def trace_prediction(base: Base, method: Method, classes: int, pool: Tokens, token_budget: int) -> Trace:
    """Of one adapter's heaviest pass over `pool`. Call inside `without_numbers`."""
    meter = Meter()
    meter.claim(base.frozen_tensors(), WEIGHTS)
    with meter:
        stack = _adapter(base, method, classes, meter)
        rows = [PackedRow(0, 0, ids) for ids in pool.ids]
        heaviest = _heaviest_of(base, [stack], None, rows, token_budget)
        score_rows(base, [stack], [(0, 0, row.ids) for row in heaviest], token_budget=token_budget)
        return _traced(meter, base, stack, "predict", _tokens(pool))


def trace_merge(base: Base, method: Method, classes: int) -> Trace:
    """Of a merge that is checked: the base, its weights with the adapter in them, and the merged model read again. `base` is fp32.
    Call inside `without_numbers`.
    """
    meter = Meter()
    meter.claim(base.frozen_tensors(), WEIGHTS)
    with meter:
        stack = _adapter(base, method, classes, meter)
        merged = merged_weights(base, stack)
        meter.claim(merged.values(), MERGED)
        meter.claim(base.frozen_tensors(), WEIGHTS)  # those that a merge leaves as they are
        again = [torch.empty_like(weight) for weight in base.model.parameters()]
        meter.claim(again, MERGED)
        return _traced(meter, base, stack, "merge", frozenset())


def _adapter(base: Base, method: Method, classes: int, meter: Meter) -> Stack:
    stack = method.build(base, classes, [0], [TrialFacts(1)])
    meter.claim([stack.theta_NM], ADAPTERS)
    meter.claim([stack.grad_NM], GRADIENTS)
    return stack


def _traced(
    meter: Meter, base: Base, stack: Stack, where: str, looked_up: frozenset[int], *, checkpointing: bool = False
) -> Trace:
    return Trace(
        events=tuple(meter.events),
        live_peak_bytes=meter.peak,
        parts={owner: size for owner, size in meter.at_peak.items() if size},
        layers=tuple(meter.layers_at_peak[layer] for layer in range(base.depth)),
        where=where,
        trainable=stack.trainable,
        total=stack.total(base),
        checkpointing=checkpointing,
        looked_up=looked_up,
    )


def nf4_bytes(matrices: Sequence[Tensor], weight: Tensor) -> int:
    """Half a byte a number and a float32 scale for each block of 64 (bitsandbytes' defaults: no double quantisation); what is no
    matrix of a layer stays as it is.
    """
    if any(weight is matrix for matrix in matrices):
        return -(-weight.numel() // 2) + 4 * -(-weight.numel() // 64)
    return weight.nbytes


def _matrices(base: Base) -> list[Tensor]:
    """What bitsandbytes quantises: the layers' linear weights, not the embedding."""
    embedding = base.model.get_input_embeddings().weight
    return [weight for weight in base.model.parameters() if weight.dim() == 2 and weight is not embedding]


def _looked_up(engine: Lockstep) -> frozenset[int]:
    if any(isinstance(state.trial.method, Full) for state in engine.states):
        return frozenset(range(engine.base.vocabulary))  # it is copied whole
    return _tokens(engine.pool)


def _tokens(pool: Tokens) -> frozenset[int]:
    return frozenset(token for ids in pool.ids for token in ids)


def heaviest_steps(engine: Lockstep) -> list[int]:
    """The steps whose heaviest pass holds most, by `_weight`, which is rough: so the first few, all different."""
    steps = max(state.trial.total_steps for state in engine.states)
    stride = -(-steps * len(engine.states) // MOST_STEPS)
    found: dict[tuple[int, ...], tuple[int, list[PackedRow]]] = {}
    for step in range(0, steps, stride):
        _go_to(engine, step)
        rows = [
            PackedRow(state.stack, state.n, engine.pool.ids[row])
            for state in engine.states
            if step < state.trial.total_steps
            for row in state.batch()
        ]
        for one in passes(_lengths(engine.stacks, rows), engine.token_budget):
            inside = [rows[i] for i in one]
            found.setdefault(tuple(_lengths(engine.stacks, inside)), (step, inside))
    inside_of = {lengths: inside for lengths, (_, inside) in found.items()}
    heaviest = _heaviest(engine.base, engine.stacks, engine.entries, inside_of)
    return list(dict.fromkeys(found[one][0] for one in heaviest))


def heaviest_pass(engine: Lockstep, rows_of: Sequence[Sequence[int]]) -> list[PackedRow]:
    """The evaluation pass that holds most, of all trials side by side on their rows; empty without rows."""
    rows = [
        PackedRow(state.stack, state.n, engine.pool.ids[row])
        for state, rows in zip(engine.states, rows_of, strict=False)
        for row in rows
    ]
    return _heaviest_of(engine.base, engine.stacks, engine.entries, rows, engine.token_budget)


def _heaviest_of(
    base: Base, stacks: Sequence[Stack], entries: Sequence[int] | None, rows: Sequence[PackedRow], token_budget: int
) -> list[PackedRow]:
    found = {}
    for one in passes(_lengths(stacks, rows), token_budget):
        inside = [rows[i] for i in one]
        found[tuple(_lengths(stacks, inside))] = inside
    return found[_heaviest(base, stacks, entries, found)[0]] if found else []


def _lengths(stacks: Sequence[Stack], rows: Sequence[PackedRow]) -> list[int]:
    return [len(row.ids) + stacks[row.stack].virtual_tokens for row in rows]


def _heaviest(
    base: Base,
    stacks: Sequence[Stack],
    entries: Sequence[int] | None,
    found: dict[tuple[int, ...], list[PackedRow]],
) -> list[tuple[int, ...]]:
    """Of passes by their lengths the few that hold most: by tokens first, these by the buckets they make."""
    many = sorted(found, key=lambda one: sum(one) * 1000 + sum(n * n for n in one), reverse=True)[: 10 * LOOKED_AT]
    return sorted(many, key=lambda one: _weight(base, stacks, entries, found[one]), reverse=True)[:LOOKED_AT]


def _weight(base: Base, stacks: Sequence[Stack], entries: Sequence[int] | None, rows: Sequence[PackedRow]) -> float:
    """Roughly what a layer keeps of a pass, in numbers: of each token, and of each padded row of its attention."""
    q, kv = base.heads * base.head_size, 2 * base.kv_heads * base.head_size
    mlp = getattr(base.config, "intermediate_size", 4 * base.width)
    phase = base.stream(rows, stacks, entries).phases[-1]
    kept = phase.tokens * (3.0 * base.width + 2 * mlp + q + kv)
    for bucket in phase.buckets:
        padded, keys = bucket.rows * bucket.longest, bucket.prefix_tokens + bucket.trunk + bucket.longest
        kept += padded * q
        if bucket.gather_T is not None:
            kept += padded * q + bucket.rows * keys * kv
        if keys <= ops.SHORT and bucket.rows * base.heads >= 32:
            kept += padded * base.heads * keys
    return kept


def _go_to(engine: Lockstep, step: int) -> None:
    """Every trial stands before its step `step`."""
    for state in engine.states:
        state.step = min(step, state.trial.total_steps - 1)
