"""What fits, before anything is loaded: one answer per method, from the engine's own step.

    shape of the base, rows (or a number of tokens), method  →  fake run  →  live bytes by owner, and where the peak falls
    live bytes in their order  →  the device's allocator (CUDA) or the process (CPU)  →  fits, and how much more would

`Planner.plan` answers for the run as asked. How much longer, wider or more would fit is searched on the same layers, fewer of them
(a base's layers are alike, so bytes are linear in their number), and what is found is run once more in full.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedConfig

from katei.base.device import pick_dtype
from katei.base.packed import Base
from katei.engine.lockstep import Lockstep, Tokens, Trial
from katei.methods.full import Full
from katei.methods.head_only import HeadOnly
from katei.methods.llama_adapter import LLaMAAdapter
from katei.plan.allocator import CachingAllocator
from katei.plan.devices import Device
from katei.plan.fake import Trace, base_of_shape, trace_merge, trace_prediction, trace_study, without_numbers
from katei.plan.meter import ADAPTERS, GRADIENTS, MOMENTS, WEIGHTS
from katei.plan.process import HOLES, WeightsFile, process_bytes, weights_file, zero_shot_bytes
from katei.plan.time import Machine, epoch_seconds

NF4 = "nf4"
"""A base of 4-bit weights, planned for alone: the engine has none yet."""
LASTING = (ADAPTERS, GRADIENTS, MOMENTS)

MOST_TOKENS, MOST_ROWS = 2**17, 2**12
"""Where the search for the largest that fits ends: of a text, if the base itself sets no end, and of rows in a pass."""
START = 64
"""First try of that search behind 1."""
Shape = Callable[[int], tuple[int, int]]
"""(rows, tokens of each) of the n-th try."""


@dataclass(frozen=True)
class Plan:
    """One run on one device."""

    method: str
    precision: str
    checkpointing: bool
    trainable: int
    total: int
    live_peak_bytes: int
    """Bytes of all tensors at once, at most."""
    device_bytes: int
    """What the device must have for them: segments, context and workspace (CUDA); the process (CPU)."""
    parts: dict[str, int]
    """Live bytes by owner at the peak."""
    layers: tuple[int, ...]
    """Of these, what each layer made going forward."""
    where: str
    """The peak's place: train or evaluate."""
    fits: bool
    max_tokens: int
    """The longest text that fits, alone in its pass."""
    max_batch_size: int
    """Rows of the planned length in one pass; the search ends at 4,096."""
    max_trials: int
    """Trials in lockstep, no pass larger than planned."""
    seconds_per_epoch: float | None
    """Of all its trials, on this machine; None for another one."""
    predict_bytes: int | None
    """What the device must have for `katei predict` on these rows with one adapter; None for an nf4 base."""
    merge_bytes: int | None
    """What it must have for a checked `katei merge`, which is computed in fp32; None where nothing can be merged."""

    @property
    def other_bytes(self) -> int:
        """Beside the live tensors: what the device's allocator, context or process add."""
        return self.device_bytes - self.live_peak_bytes


@dataclass(frozen=True)
class Run:
    """What is asked: trials of one method (or several) on rows of `pool`."""

    trials: tuple[Trial, ...]
    classes: int
    pool: Tokens
    scored: tuple[tuple[int, ...], ...] = ()
    """Rows that each trial scores when all is trained."""
    token_budget: int = 1024
    checkpointing: bool = False

    @property
    def longest(self) -> int:
        return max(len(ids) for ids in self.pool.ids)

    def with_rows(self, rows: int, tokens: int, vocabulary: int) -> Run:
        """One trial of the first method with one batch of `rows` rows of `tokens` tokens, all in one pass."""
        first = self.trials[0]
        training = replace(first.training, batch_size=rows, accumulation=1, epochs=1)
        trial = replace(first, training=training, rows=tuple(range(rows)), valid=())
        pool = synthetic(tokens, rows, vocabulary, self.classes)
        return replace(self, trials=(trial,), pool=pool, scored=(), token_budget=10**9)


@dataclass
class Planner:
    """Plans runs over one base's shape, inside `with`."""

    config: PreTrainedConfig
    precision: str
    device: Device
    resident_bytes: int = 0
    """Of this process before the base is loaded (CPU)."""
    machine: Machine | None = None
    """Rates of this machine, where it is the one that is planned for."""
    traces: dict[Run, Trace] = field(default_factory=dict)
    bases: dict[int, Base] = field(default_factory=dict)
    """Without numbers, by how many of the base's layers they have."""

    def __enter__(self) -> Planner:
        self._inside = ExitStack()
        self._inside.enter_context(without_numbers(cuda=self.device.kind == "cuda"))
        return self

    def __exit__(self, *about: object) -> None:
        self.bases.clear()
        self._inside.close()

    def base(self, layers: int, run: Run | None = None) -> Base:
        """The base without numbers that `run` runs over; full fine-tuning makes its weights trainable, so it has one of its own."""
        own = run is not None and any(isinstance(trial.method, Full) for trial in run.trials)
        if not own and layers in self.bases:
            return self.bases[layers]
        made = base_of_shape(_with_layers(self.config, layers), computed_in(self.precision, self.device))
        if not own:
            self.bases[layers] = made
        return made

    @cached_property
    def base_fp32(self) -> Base:
        return self.base(self.depth) if self.precision == "fp32" else base_of_shape(self.config, "fp32")

    @cached_property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @cached_property
    def positions(self) -> int:
        """Tokens the base can tell apart by place."""
        return int(getattr(self.config, "max_position_embeddings", None) or MOST_TOKENS)

    @cached_property
    def depth(self) -> int:
        return int(self.config.num_hidden_layers)

    @cached_property
    def file(self) -> WeightsFile:
        return weights_file(self.config, pick_dtype(computed_in(self.precision, self.device)))

    def plan(self, run: Run) -> Plan:
        trace = self.trace(run)
        need = self.need(trace)
        own = sum(trace.parts.get(part, 0) for part in LASTING)
        per_trial = max(1, own // len(run.trials))
        room = self.device.usable_bytes - need
        return Plan(
            method=run.trials[0].method.name,
            precision=self.precision,
            checkpointing=run.checkpointing,
            trainable=trace.trainable,
            total=trace.total,
            live_peak_bytes=trace.live_peak_bytes,
            device_bytes=need,
            parts=trace.parts,
            layers=trace.layers,
            where=trace.where,
            fits=room >= 0,
            max_tokens=self.longest_text(run),
            max_batch_size=self.most(run, lambda n: (n, run.longest), MOST_ROWS),
            max_trials=max(0, len(run.trials) + room // per_trial) if room >= 0 else 0,
            seconds_per_epoch=self.seconds(run),
            predict_bytes=self.prediction(run),
            merge_bytes=self.merge(run),
        )

    def prediction(self, run: Run) -> int | None:
        if self.precision == NF4:
            return None
        trained = run.trials[0].method
        method = HeadOnly() if isinstance(trained, Full) else trained.saved_as()  # a whole model is its own base
        return self.need(trace_prediction(self.base(self.depth), method, run.classes, run.pool, run.token_budget))

    def merge(self, run: Run) -> int | None:
        method = run.trials[0].method
        if not method.merges or isinstance(method, Full):
            return None
        trace = trace_merge(self.base_fp32, method, run.classes)
        if self.device.kind == "cuda":
            return self.need(trace)
        file = weights_file(self.config, torch.float32)
        # whole weights come and go, which malloc maps one by one: no holes
        return process_bytes(self.resident_bytes, file, trace.parts[WEIGHTS], 0, trace.live_peak_bytes, returned=True)

    def zero_shot(self, judged: int) -> int:
        """What scoring with the whole language model takes, `judged` tokens at once; 0 on CUDA, where it is not planned."""
        if self.device.kind == "cuda":
            return 0
        return zero_shot_bytes(self.resident_bytes, self.file, pick_dtype(self.precision), self.config, judged)

    def seconds(self, run: Run) -> float | None:
        """Of an epoch of all trials; None for a device that is not here to be timed."""
        if self.machine is None:
            return None
        base = self.base(self.depth, run)
        options = {"token_budget": run.token_budget, "checkpointing": run.checkpointing}
        engine = Lockstep(base, run.trials, run.classes, run.pool, **options)  # type: ignore[arg-type]
        engine.fill_cache()
        return epoch_seconds(engine, self.machine)

    def longest_text(self, run: Run) -> int:
        """Tokens of the longest text that fits, alone in its pass."""
        return self.most(run, lambda n: (1, n), self.positions)

    def need(self, trace: Trace) -> int:
        """What the device must have."""
        if self.device.kind == "cuda":
            allocator = CachingAllocator()
            for serial, size in trace.events:
                if size < 0:
                    allocator.free(serial)
                else:
                    allocator.allocate(serial, size)
            return allocator.reserved_peak + self.device.context_bytes + self.device.workspace_bytes
        lasting = sum(trace.parts.get(part, 0) for part in LASTING)
        unread = self.file.unread(trace.looked_up)
        weights, live = trace.parts[WEIGHTS] - unread, trace.live_peak_bytes - unread
        return process_bytes(self.resident_bytes, self.file, weights, lasting, live, returned=trace.checkpointing)

    def trace(self, run: Run) -> Trace:
        if run not in self.traces:
            self.traces[run] = self._trace(self.depth, run)
        return self.traces[run]

    def _trace(self, layers: int, run: Run) -> Trace:
        return trace_study(
            self.base(layers, run),
            run.trials,
            run.classes,
            run.pool,
            run.scored,
            token_budget=run.token_budget,
            checkpointing=run.checkpointing,
            nf4=self.precision == NF4,
        )

    def most(self, run: Run, shape: Shape, end: int) -> int:
        """The largest n up to `end` whose `shape(n)` = (rows, tokens) in one pass fits, to 1 %; 0 if 1 does not.

        Live bytes grow as a parabola in n (attention), piece by piece: each try is where the one through the nearest three tries
        meets the limit, between what fits and what does not.
        """
        limit = self.live_limit(run)
        tried = {1: self._estimate(run, shape(1))}
        if tried[1] > limit:
            return 0
        low, high, guess = 1, end + 1, min(START, end)
        while True:
            tried[guess] = self._estimate(run, shape(guess))
            if tried[guess] <= limit:
                low = guess
            else:
                high = guess
            step = max(1, low // 100)
            if low == end:
                return low
            if high <= end:
                slope = (tried[high] - tried[low]) / (high - low)
                if high - low <= step or tried[low] + step * slope > limit:
                    return low
            near = sorted(tried, key=lambda n: abs(tried[n] - limit))[:3]
            guess = min(max(_meets(near, [tried[n] for n in near], limit), low + step), high - 1)

    def live_limit(self, run: Run) -> int:
        """Live bytes at which the device is full, if what the device adds to them grows as they do."""
        trace = self.trace(run)
        fixed = self.device.context_bytes + self.device.workspace_bytes
        if self.device.kind == "cuda":
            return int((self.device.usable_bytes - fixed) * trace.live_peak_bytes / (self.need(trace) - fixed))
        holes = 0.0 if trace.checkpointing else HOLES
        return trace.live_peak_bytes + int((self.device.usable_bytes - self.need(trace)) / (1 + holes))

    def _estimate(self, run: Run, shape: tuple[int, int]) -> int:
        """Live bytes of one pass, from two shallow bases: they are linear in the number of layers."""
        one = run.with_rows(*shape, self.vocabulary)
        method = run.trials[0].method
        shallow = 2
        if isinstance(method, LLaMAAdapter) and method.layers < self.depth:  # the layers below those keep nothing
            shallow = method.layers + 1
        if shallow + 1 >= self.depth:
            return self._trace(self.depth, one).live_peak_bytes
        less, more = (self._trace(layers, one).live_peak_bytes for layers in (shallow, shallow + 1))
        return less + (self.depth - shallow) * (more - less)


def computed_in(precision: str, device: Device) -> str:
    """The type that is multiplied in: of an nf4 base the half precision that the device has."""
    if precision == NF4:
        return "bf16" if device.bf16 else "fp16"
    return precision


def _meets(places: Sequence[int], heights: Sequence[int], limit: int) -> int:
    """Where the parabola (line) through two or three points reaches `limit`, a little below."""
    degree = min(2, len(places) - 1)
    curve = np.polynomial.Polynomial.fit(places, heights, degree) - limit
    roots = [z.real for z in map(complex, curve.roots()) if abs(z.imag) < 1e-9 and z.real > 0]
    if not roots:
        return max(places) + 1
    return int(0.998 * min(roots, key=lambda root: abs(root - max(places))))


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    if layers == config.num_hidden_layers:
        return config
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[-layers:]
    return shallow


def synthetic(tokens: int, rows: int, vocabulary: int, classes: int) -> Tokens:
    """Rows of `tokens` tokens that have no beginning in common."""
    ids = tuple(tuple((17 * row + 31 * place + 1) % vocabulary for place in range(tokens)) for row in range(rows))
    return Tokens(ids, tuple(row % classes for row in range(rows)))
