"""How long an epoch takes on this machine: the engine's own operations, counted on shapes, at the rates just measured here.

    seconds of an operation = overhead + max( operations ÷ rate,  bytes read and written ÷ bandwidth ) + making its kernel, if new

A product's rate goes by its rows (tokens): few rows are bound by reading the weights, many by arithmetic, and both are measured on
this base's own shapes, with weights as cold as they are in a step. The overhead is that of a step of the engine on a tiny base, where
there is nothing else. oneDNN makes a kernel for every number of rows and shape of weights; few are kept (`ops.KERNELS_KEPT`), so that
each step and each pass of an evaluation is taken to make its own. The calibration takes about two seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModel, LlamaConfig, PreTrainedConfig

from katei.base import ops
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.base.stream import passes
from katei.engine.lockstep import Lockstep, Tokens, Trial, score_rows
from katei.engine.optimizer import Training
from katei.methods.lora import LoRA

ROWS = (4, 32, 128, 512, 1024)
"""Tokens at which products are timed."""

FIRST_ROWS = range(33, 43)
"""Tokens, not of `ROWS`, at which making a kernel is timed."""

_aten = torch.ops.aten
_ONE_DNN = torch.ops.mkldnn._linear_pointwise if ops.ONE_DNN else None
_PRODUCTS: dict[Any, int] = {_aten.mm: 0, _aten.addmm: 1, _ONE_DNN: 0}
"""Of two matrices: the place of the first among the arguments."""
_LOOKUPS = {_aten.embedding, _aten.index_select, _aten.index, _aten.gather}
"""They read no more than they give."""


@dataclass(frozen=True)
class Machine:
    """What the calibration measured."""

    rate: dict[int, float]
    """Operations per second of products, by rows."""
    batched_rate: float
    bandwidth: float
    """Bytes read and written per second by elementwise operations."""
    call_seconds: float
    """Of one operation, however small, with the engine's own time around it."""
    kernel_seconds: float = 0.0
    """What a product of rows and weights takes more when it is the first of its shape."""
    queued: bool = False
    """The device works while the host goes on (CUDA): of the two the slower one counts."""

    def product_seconds(self, rows: int, flops: float) -> float:
        """Between two measured numbers of rows the seconds are taken as linear in them."""
        known = sorted(self.rate)
        above = next((m for m in known if m >= rows), known[-1])
        below = max((m for m in known if m <= rows), default=known[0])
        if above == below:
            return flops / self.rate[above]
        share = (rows - below) / (above - below)
        per_flop = (1 - share) * below / self.rate[below] + share * above / self.rate[above]
        return flops * per_flop / rows


class Clock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what the operations inside it would take."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.machine = machine
        self.seconds = 0.0
        self.calls = 0
        self.kernels: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.calls += 1
            work = self._work(function.overloadpacket, args, kwargs or {}, result)
            call = self.machine.call_seconds
            self.seconds += max(call, work) if self.machine.queued else call + work
        return result

    def _work(self, name: Any, args: Any, kwargs: Any, result: Any) -> float:
        made = _bytes(result)
        moved = 2 * made if name in _LOOKUPS else made + _bytes((args, kwargs))
        seconds = moved / self.machine.bandwidth
        if name in _PRODUCTS:
            x = args[_PRODUCTS[name]]
            rows = x.shape[0]
            seconds = max(seconds, self.machine.product_seconds(rows, 2.0 * x.numel() * result.shape[-1]))
            if name is _ONE_DNN:
                seconds += self._kernel_seconds(x, args[1])
        elif name in flop_registry:
            flops = flop_registry[name](*args, **kwargs, out_val=result)
            seconds = max(seconds, flops / self.machine.batched_rate)
        return seconds

    def _kernel_seconds(self, x: Tensor, w: Tensor) -> float:
        kernel = (x.shape, w.shape, w.stride())
        if kernel in self.kernels:
            return 0.0
        self.kernels.add(kernel)
        return self.machine.kernel_seconds


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def calibrate(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, *, seconds: float = 2.0) -> Machine:
    """Time products of this base's shapes, elementwise work, and the engine's overhead, on `device`."""
    random = partial(torch.randn, dtype=dtype, device=device)
    shapes = _matrices(config)
    layers = max(2, math.ceil(64e6 / sum(o * i for o, i in shapes)))
    weights = [[random(o, i) for o, i in shapes] for _ in range(layers)]
    numbers = sum(o * i for o, i in shapes)
    mlp = max(o for o, _ in shapes)
    rate = {}
    with torch.no_grad():
        for rows in ROWS:
            x = {i: random(rows, i) for _, i in shapes}
            turn = iter(range(10**9))

            def multiply(x: dict[int, Tensor] = x, turn: Any = turn) -> None:
                for w in weights[next(turn) % layers]:
                    ops.product(x[w.shape[1]], w)

            rate[rows] = 2.0 * rows * numbers / _seconds(multiply, 0.12 * seconds, device)
        kernel = _first_seconds(weights[0], random) if ops.one_dnn(weights[0][0]) else 0.0
        wide = torch.float32 if device.type == "cpu" else dtype  # as short attention is computed there
        a, b = (torch.randn(36, 64, 64, dtype=wide, device=device) for _ in range(2))
        batched = 2.0 * 36 * 64**3 / _seconds(lambda: torch.bmm(a, b), 0.1 * seconds, device)
        y, z = random(1024, mlp), random(1024, mlp)
        bandwidth = 5 * y.nbytes / _seconds(lambda: F.silu(y) * z, 0.1 * seconds, device)
    return Machine(rate, batched, bandwidth, _overhead(0.2 * seconds, device), kernel, device.type == "cuda")


def _matrices(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's products."""
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or width // heads)
    own, shared = heads * size, int(getattr(config, "num_key_value_heads", None) or heads) * size
    mlp = int(getattr(config, "intermediate_size", None) or 4 * width)
    return [(own, width), (shared, width), (shared, width), (width, own), (mlp, width), (mlp, width), (width, mlp)]


def _first_seconds(weights: Sequence[Tensor], random: Callable[[int, int], Tensor]) -> float:
    """What the first product of so many rows takes more than the second; the median over numbers of rows and shapes of weights."""
    more = []
    for rows in FIRST_ROWS:
        for w in {w.shape: w for w in weights}.values():
            x = random(rows, w.shape[1])
            times = [time.perf_counter()]
            for _ in range(2):
                ops.product(x, w)
                times.append(time.perf_counter())
            more.append((times[1] - times[0]) - (times[2] - times[1]))
    return max(0.0, float(np.median(more)))


def _overhead(budget: float, device: torch.device) -> float:
    """Seconds per operation of an engine's step with next to no work in it."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    with quiet():
        model = AutoModel.from_config(LlamaConfig(**shape, num_hidden_layers=4, vocab_size=32))
    rows = Tokens(((1, 2, 3),), (0,))
    trial = Trial("overhead", LoRA(), 0, Training(learning_rate=1e-3, epochs=100_000), (0,))
    engine = Lockstep(Base(model.to(device).eval().requires_grad_(False)), [trial], 2, rows)
    with Clock(Machine({1: math.inf}, math.inf, math.inf, 0.0)) as counted:
        engine.step()
    return float(_seconds(engine.step, budget, device) / counted.calls)


def _seconds(run: Callable[[], Any], budget: float, device: torch.device) -> float:
    """The median of the times of `run`, repeated for `budget` seconds."""
    wait: Callable[[], None] = getattr(torch, device.type).synchronize
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 3:
        wait()
        started = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def epoch_seconds(engine: Lockstep, machine: Machine) -> float:
    """Of one epoch of every trial and the evaluation behind it. `engine` is over a base without numbers (`katei.plan.fake`).

    Three steps are run, of few, of middling and of many tokens; the others cost what lies between them.
    """
    steps = max(state.trial.steps_per_epoch for state in engine.states)
    tokens = [_go_to(engine, step) for step in range(steps)]
    places = sorted(range(steps), key=tokens.__getitem__)
    known = {tokens[step]: step for step in (places[0], places[steps // 2], places[-1])}
    seconds = {}
    for count, step in known.items():
        _go_to(engine, step)
        with Clock(machine) as clock:
            engine.step()
        seconds[count] = clock.seconds
    counts = sorted(seconds)
    total = sum(_between(n, counts, [seconds[count] for count in counts]) for n in tokens)
    rows = [(state.stack, state.n, engine.pool.ids[row]) for state in engine.states for row in state.trial.valid]
    if rows:
        lengths = [len(ids) + engine.stacks[stack].virtual_tokens for stack, _, ids in rows]
        first = next(iter(passes(lengths, engine.token_budget)))
        with Clock(machine) as clock:
            score_rows(
                engine.base,
                engine.stacks,
                [rows[i] for i in first],
                token_budget=engine.token_budget,
                entries=engine.entries,
                cache=engine.cache,
            )
        total += clock.seconds * sum(lengths) / sum(lengths[i] for i in first)
    return total


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear between the known places."""
    return float(np.interp(x, xs, ys))


def _go_to(engine: Lockstep, step: int) -> int:
    """Every trial stands before step `step` of its first epoch; returns that step's tokens, of all trials together."""
    total = 0
    for state in engine.states:
        state.step = min(step, state.trial.steps_per_epoch - 1)
        if step < state.trial.steps_per_epoch:
            more = engine.stacks[state.stack].virtual_tokens
            total += sum(len(engine.pool.ids[row]) + more for row in state.batch())
    return total
