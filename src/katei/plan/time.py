"""How long an epoch takes here: the engine's own operations counted on fake tensors, times what this machine was just measured at.

    seconds of a step = Σ products  2 m k n ÷ rate(m)   +   Σ the rest  bytes read and written ÷ bandwidth   +   calls × overhead

`rate(m)` is the rate of products with m rows of tokens on this model's own shapes, weights cold as they are in a step: few rows
are bound by reading the weights, many by arithmetic. The calibration takes about two seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from katei.base import ops
from katei.base.stream import passes
from katei.engine.lockstep import Lockstep, Tokens, score_rows

ROWS = (1, 8, 32, 128, 512, 1024)
"""Tokens at which products are timed."""


@dataclass(eq=False)
class Costs(TorchDispatchMode):
    """Counts what runs inside it."""

    products: dict[int, float] = field(default_factory=dict)
    """Operations of products with a weight matrix, by the number of their rows."""
    other_flops: float = 0.0
    """Of batched products: attention's and the adapters'."""
    bytes: float = 0.0
    """Read and written by everything else."""
    calls: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        self.calls += 1
        name = function.overloadpacket
        if name in _PRODUCTS:
            x, out = args[_PRODUCTS[name]], result
            rows = out.shape[0]
            self.products[rows] = self.products.get(rows, 0.0) + 2.0 * x.shape[0] * x.shape[1] * out.shape[1]
        elif name in flop_registry:
            self.other_flops += flop_registry[name](*args, **(kwargs or {}), out_val=result)
        else:
            moved = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in moved)
        return result


_PRODUCTS: dict[Any, int] = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1}
if ops.ONE_DNN:
    _PRODUCTS[torch.ops.mkldnn._linear_pointwise] = 0


@dataclass(frozen=True)
class Machine:
    """What the calibration measured."""

    rate: dict[int, float]
    """Operations per second of products, by rows."""
    batched_rate: float
    bandwidth: float
    """Bytes read and written per second by elementwise operations."""
    call_seconds: float

    def seconds(self, costs: Costs) -> float:
        products = sum(flops / self._rate(rows) for rows, flops in costs.products.items())
        rest = costs.other_flops / self.batched_rate + costs.bytes / self.bandwidth + costs.calls * self.call_seconds
        return products + rest

    def _rate(self, rows: int) -> float:
        """Between two measured numbers of rows the seconds of a product are taken as linear in them."""
        known = sorted(self.rate)
        if rows >= known[-1]:
            return self.rate[known[-1]]
        above = next(m for m in known if m >= rows)
        below = max((m for m in known if m <= rows), default=known[0])
        if above == below:
            return self.rate[above]
        share = (rows - below) / (above - below)
        seconds = (1 - share) * below / self.rate[below] + share * above / self.rate[above]
        return rows / seconds


def calibrate(width: int, mlp: int, *, seconds: float = 2.0) -> Machine:
    """Time products of this model's shapes, elementwise work and empty calls on the CPU."""
    weights = [torch.randn(mlp, width) for _ in range(max(2, math.ceil(64e6 / (4 * mlp * width))))]
    share = 0.7 * seconds / len(ROWS)
    rate = {}
    with torch.no_grad():
        for rows in ROWS:
            x = torch.randn(rows, width)
            turn = iter(range(10**9))

            def multiply(x: Tensor = x, turn: Any = turn) -> None:
                ops.product(x, weights[next(turn) % len(weights)])

            rate[rows] = 2.0 * rows * width * mlp / _seconds(multiply, share)
        a, b = torch.randn(64, 64, 64), torch.randn(64, 64, 64)
        batched = 2.0 * 64**4 / _seconds(lambda: torch.bmm(a, b), 0.1 * seconds)
        y, z = torch.randn(1024, mlp), torch.randn(1024, mlp)
        bandwidth = 3 * y.numel() * 4 / _seconds(lambda: y * z, 0.1 * seconds)
        tiny = torch.randn(8)
        call = _seconds(lambda: tiny + tiny, 0.1 * seconds)
    return Machine(rate, batched, bandwidth, call)


def _seconds(run: Callable[[], Any], budget: float) -> float:
    """The median time of `run`, repeated for `budget` seconds."""
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 3:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def epoch_seconds(engine: Lockstep, valid: Tokens | None, machine: Machine) -> float:
    """Of one epoch of every trial and the evaluation behind it. `engine` is over a fake base (`katei.plan.fake`).

    A typical and the heaviest step are run; the others cost what lies between them, by their tokens.
    """
    steps = max(state.trial.steps_per_epoch for state in engine.states)
    tokens = [_tokens(engine, step) for step in range(steps)]
    places = sorted(range(steps), key=tokens.__getitem__)
    typical, heaviest = places[steps // 2], places[-1]
    costs = {step: machine.seconds(_step_costs(engine, step)) for step in {typical, heaviest}}
    span = tokens[heaviest] - tokens[typical]
    slope = (costs[heaviest] - costs[typical]) / span if span else 0.0
    seconds = sum(max(0.0, costs[typical] + slope * (n - tokens[typical])) for n in tokens)
    if valid is not None:
        rows = [(state.stack, state.n, ids) for state in engine.states for ids in valid.ids]
        lengths = [len(ids) + engine.stacks[stack].virtual_tokens for stack, _, ids in rows]
        first = next(iter(passes(lengths, engine.token_budget)))
        counted = Costs()
        with counted:
            score_rows(
                engine.base,
                engine.stacks,
                [rows[i] for i in first],
                token_budget=engine.token_budget,
                entries=engine.entries,
                cache=engine.cache,
            )
        seconds += machine.seconds(counted) * sum(lengths) / sum(lengths[i] for i in first)
    return seconds


def _tokens(engine: Lockstep, step: int) -> int:
    """Of step `step` of the first epoch, all trials together."""
    total = 0
    with unset_fake_temporarily():
        for state in engine.states:
            if step < state.trial.steps_per_epoch:
                state.step = step
                more = engine.stacks[state.stack].virtual_tokens
                total += sum(len(engine.pool.ids[row]) + more for row in state.batch())
    return total


def _step_costs(engine: Lockstep, step: int) -> Costs:
    with unset_fake_temporarily():
        for state in engine.states:
            state.step = min(step, state.trial.steps_per_epoch - 1)
            state.batch()
    counted = Costs()
    with counted:
        engine.step()
    return counted
