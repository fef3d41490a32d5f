"""The lockstep engine: K trials, one frozen base, one packed stream.

    tick:  rows of every active trial's next batch  →  passes of at most `token_budget` tokens  →  gradients
           →  each trial: clip, AdamW at its own rate, its method's after_step
    a trial at the end of an epoch is evaluated on the validation rows, together with the others that are

All randomness is a function of (seed, what it is for, step or epoch, row), never of what ran before: so companions, passes and
restarts change no draw, and a checkpoint holds no generator.

Dimensions: K trials · B rows · C classes · T tokens.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from katei.base import ops
from katei.base.host import values
from katei.base.packed import Base, place_number
from katei.base.stream import PackedRow, passes
from katei.core import metrics
from katei.engine.cache import ActivationCache
from katei.engine.optimizer import AdamW, Training
from katei.methods.contract import Method, Stack, TrialFacts


@dataclass(frozen=True)
class Tokens:
    """Rows as the engine reads them."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, more: Tokens) -> Tokens:
        return Tokens(self.ids + more.ids, self.labels + more.labels)


@dataclass(frozen=True)
class Trial:
    """What one trial is: a method's settings, a seed, how to train, and on which rows."""

    name: str
    method: Method
    seed: int
    training: Training
    rows: tuple[int, ...]
    """Indices into the pool: the rows it is trained on."""
    valid: tuple[int, ...] = ()
    """Indices into the pool: the rows it is validated on after each epoch."""

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.rows) / (self.training.batch_size * self.training.accumulation))

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.training.epochs

    def order(self, epoch: int) -> list[int]:
        """The rows of epoch `epoch` (0-based) in the order they are trained on."""
        rng = torch.Generator().manual_seed(_mix(self.seed, "order", epoch))
        return [self.rows[i] for i in torch.randperm(len(self.rows), generator=rng).tolist()]


@dataclass(frozen=True)
class Epoch:
    """One line of the epoch table. Losses in nats per row; None without validation rows."""

    epoch: int
    train_loss: float
    valid_loss: float | None
    valid_roc_auc: float | None
    valid_accuracy: float | None


@dataclass
class TrialState:
    """Where one trial is."""

    trial: Trial
    stack: int
    n: int
    optimizer: AdamW
    nats: Tensor
    """Sum of this epoch's row losses so far; float64, 0-d, on the device."""
    step: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    finished: str | None = None
    """Why it takes no more steps: "done", "early", "racing" or "diverged"."""
    best_epoch: int | None = None
    best: dict[str, Tensor] | None = None
    best_nats_E: NDArray[np.float64] | None = None
    """Loss of each validation row after the best epoch."""
    current_order: tuple[int, list[int]] = (-1, [])

    def batch(self) -> list[int]:
        """Row indices of the next step."""
        epoch, place = divmod(self.step, self.trial.steps_per_epoch)
        if self.current_order[0] != epoch:
            self.current_order = (epoch, self.trial.order(epoch))
        size = self.trial.training.batch_size * self.trial.training.accumulation
        return self.current_order[1][place * size : (place + 1) * size]


@dataclass(frozen=True)
class _Work:
    """One row of one trial's step."""

    row: PackedRow
    label: int
    share: float
    """Of the step's mean loss."""
    state: TrialState


LOSS_SCALE = {torch.float16: 1024.0}
"""Keeps small gradients of a half-precision base from vanishing on their way down; taken back before clipping."""

Watch = Callable[["Lockstep", list[TrialState]], None]
"""Called after each tick with the trials that have just ended an epoch (often none)."""
Referee = Callable[[Sequence[TrialState]], Iterable[TrialState]]
"""Called with all trials after an epoch of some; names those that are to stop ("racing"). Must depend on nothing but them."""


class Lockstep:
    """Trains `trials` together over `base`, on rows of one `pool`: whatever the folds, what the base makes of a row is computed once.

    Raises nothing of its own: a trial whose loss stops being finite is marked "diverged" and takes no more steps.
    """

    def __init__(
        self,
        base: Base,
        trials: Sequence[Trial],
        classes: int,
        pool: Tokens,
        *,
        token_budget: int = 1024,
        checkpointing: bool = False,
        cache: bool = True,
        referee: Referee | None = None,
    ):
        self.base, self.pool, self.classes = base, pool, classes
        self.token_budget, self.checkpointing, self.referee = token_budget, checkpointing, referee
        self.stacks: list[Stack] = []
        self.states: list[TrialState] = []
        self.trained_rows = 0
        self.cache_filled = False
        self.seconds = {"train": 0.0, "evaluate": 0.0}
        members: dict[Method, list[Trial]] = {}
        for trial in trials:
            members.setdefault(trial.method, []).append(trial)
        placed: dict[str, tuple[int, int]] = {}
        for s, (method, group) in enumerate(members.items()):
            facts = [TrialFacts(trial.total_steps) for trial in group]
            self.stacks.append(method.build(base, classes, [_mix(trial.seed, "init") for trial in group], facts))
            placed |= {trial.name: (s, n) for n, trial in enumerate(group)}
        # where each stack's rows join the stream: below it they are the base's own, computed once and kept
        self.entries = [stack.lowest_layer if cache else 0 for stack in self.stacks]
        self.cache = ActivationCache(base, self.entries, token_budget=token_budget)
        assert len(placed) == len(trials), "trial names are unique"
        # a stack's tensors view rows of one buffer, on purpose: their gradients are strided like them
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        for trial in trials:
            s, n = placed[trial.name]
            nats = torch.zeros((), dtype=torch.float64, device=base.device)
            self.states.append(TrialState(trial, s, n, AdamW(self.stacks[s], n, trial.training), nats))

    @classmethod
    def on_split(
        cls, base: Base, trials: Sequence[Trial], classes: int, train: Tokens, valid: Tokens | None, **how: Any
    ) -> Lockstep:
        """For rows that come as two tables: the trials' rows are `train`'s, and each is validated on all of `valid`."""
        if valid is None:
            return cls(base, trials, classes, train, **how)
        rows = tuple(range(len(train), len(train) + len(valid)))
        return cls(base, [replace(trial, valid=rows) for trial in trials], classes, train + valid, **how)

    # ---------------------------------------------------------------- training

    def run(self, watch: Watch | None = None) -> None:
        """Until every trial has finished."""
        while any(state.finished is None for state in self.states):
            ended = self.tick()
            if watch is not None:
                watch(self, ended)

    def tick(self) -> list[TrialState]:
        """One optimizer step of every active trial, and the evaluation of those that ended an epoch with it; returns these."""
        ended = self.step()
        if ended:
            started = time.perf_counter()
            self._end_epoch(ended)
            self.seconds["evaluate"] += time.perf_counter() - started
        return ended

    def step(self) -> list[TrialState]:
        """One optimizer step of every active trial; returns those whose epoch is over."""
        started = time.perf_counter()
        self.fill_cache()
        active = [state for state in self.states if state.finished is None]
        batches = [state.batch() for state in active]
        self._gradients(active, batches)
        for state, batch in zip(active, batches, strict=True):
            if state.finished is not None:
                continue
            state.optimizer.step_(state.step, state.trial.total_steps)
            state.step += 1
            self.stacks[state.stack].after_step(state.n, state.step)
            self.trained_rows += len(batch)
        self.seconds["train"] += time.perf_counter() - started
        return [s for s in active if s.finished is None and s.step % s.trial.steps_per_epoch == 0]

    def fill_cache(self) -> None:
        """Compute what the rows bring to the layers where they join, once."""
        if not self.cache_filled:
            used = sorted({row for state in self.states for row in (*state.trial.rows, *state.trial.valid)})
            self.cache.fill([self.pool.ids[row] for row in used])
            self.cache_filled = True

    def _gradients(self, active: list[TrialState], batches: list[list[int]]) -> None:
        """Fill every stack's gradients with those of the active trials' mean losses and penalties."""
        for stack in self.stacks:
            stack.zero_grad_()
        work = []
        for state, batch in zip(active, batches, strict=True):
            for place, row in enumerate(batch):
                noise = _mix(state.trial.seed, "noise", state.step, place)
                packed = PackedRow(state.stack, state.n, self.pool.ids[row], noise)
                work.append(_Work(packed, self.pool.labels[row], 1.0 / len(batch), state))
        scale = LOSS_SCALE.get(self.base.dtype, 1.0)
        losses = self._passes(work, scale)
        while diverged := self._diverged(losses):
            for state in diverged:
                state.finished = "diverged"
            work = [item for item in work if item.state.finished is None]
            for stack in self.stacks:
                stack.zero_grad_()
            losses = self._passes(work, scale)
        for nats_B, items in losses:
            for value, item in zip(nats_B.double().unbind(), items, strict=True):
                item.state.nats += value
        if scale != 1.0 or ops.device_kind(self.base.embedding.weight) != "cpu":  # where trials share products
            sound = [torch.isfinite(stack.grad_NM).all() for stack in self.stacks]
            for s in np.flatnonzero(values(torch.stack(sound), healthy=True) == 0).tolist():
                self._one_by_one(s, work, scale)
        if scale != 1.0:
            for stack in self.stacks:
                stack.grad_NM.div_(scale)
        for s, stack in enumerate(self.stacks):
            penalty_N = stack.penalty_N()
            mine = [state.n for state in active if state.stack == s and state.finished is None]
            if penalty_N is not None and mine:
                penalty_N[mine].sum().backward()  # type: ignore[no-untyped-call]

    def _passes(self, work: list[_Work], scale: float) -> list[tuple[Tensor, list[_Work]]]:
        """Add the gradients of `work` in passes of at most `token_budget` tokens. Returns each pass' row losses, in nats."""
        lengths = [len(item.row.ids) + self.stacks[item.row.stack].virtual_tokens for item in work]
        return [self._backward([work[i] for i in chosen], scale) for chosen in passes(lengths, self.token_budget)]

    @staticmethod
    def _diverged(losses: list[tuple[Tensor, list[_Work]]]) -> list[TrialState]:
        """Trials with a loss that is not finite: their rows may have spoilt their companions' gradients (0 · NaN in a shared
        product), so these are done again without them. The one place of a step where the host waits for the device.
        """
        if not losses:
            return []
        finite = values(torch.isfinite(torch.cat([nats_B for nats_B, _ in losses])), healthy=True).tolist()
        items = [item for _, inside in losses for item in inside]
        return list({id(i.state): i.state for i, good in zip(items, finite, strict=True) if not good}.values())

    def _one_by_one(self, s: int, work: list[_Work], scale: float) -> None:
        """Stack s's gradients again, in passes of one trial each: an infinite gradient of one trial leaves NaN (0 · ∞) in the
        products it shares with its companions. A trial whose own gradient overflows goes without the loss scale; if it still
        overflows, its step is skipped (`AdamW.step_`).
        """
        stack = self.stacks[s]
        grad_NM = torch.zeros_like(stack.grad_NM)
        for n in sorted({item.state.n for item in work if item.row.stack == s}):
            mine = [i for i in work if i.row.stack == s and i.state.n == n and i.state.finished is None]
            for own_scale in dict.fromkeys((scale, 1.0)):
                stack.zero_grad_()
                self._passes(mine, own_scale)
                if values(torch.isfinite(stack.grad_NM[n]).all(), healthy=True):
                    break
            grad_NM[n] = stack.grad_NM[n] * (scale / own_scale)
        stack.grad_NM.copy_(grad_NM)

    def _backward(self, work: list[_Work], scale: float) -> tuple[Tensor, list[_Work]]:
        """One pass forward and back. Returns the row losses, in nats, and whose they are."""
        with _touched(self.stacks, [item.row for item in work]) as rows:
            return self._backward_of(rows, work, scale)

    def _backward_of(self, rows: Sequence[PackedRow], work: list[_Work], scale: float) -> tuple[Tensor, list[_Work]]:
        stream = self.base.stream(rows, self.stacks, self.entries)
        joining = self.cache.joining(stream)
        ordered = [work[i] for i in stream.order]
        labels_B = torch.tensor([item.label for item in ordered]).to(self.base.device)
        share_B = torch.tensor([item.share for item in ordered]).to(self.base.device)
        with self.base.running(stream, self.stacks):
            pooled_BD = self.base.pooled(stream, self.stacks, joining=joining, checkpointing=self.checkpointing)
            scores = [self.stacks[p.stack].scores(pooled_BD[p.first : p.last], p) for p in stream.parts]
            nats_B = F.cross_entropy(torch.cat(scores), labels_B, reduction="none")
            (nats_B * share_B).sum().mul(scale).backward()  # type: ignore[no-untyped-call]
        return nats_B.detach(), ordered

    def _end_epoch(self, ended: list[TrialState]) -> None:
        probabilities = self.probabilities([(state, state.trial.valid) for state in ended])
        for state, probability_EC in zip(ended, probabilities, strict=True):
            trial, training = state.trial, state.trial.training
            train_loss = float(state.nats) / len(trial.rows)
            state.nats.zero_()
            nats_E = valid_loss = valid_auc = valid_accuracy = None
            if trial.valid and np.isfinite(probability_EC).all():
                labels = [self.pool.labels[row] for row in trial.valid]
                nats_E = metrics.row_nats(probability_EC, labels)
                valid_loss = float(nats_E.mean())
                valid_auc = metrics.roc_auc(probability_EC, labels)
                valid_accuracy = metrics.accuracy(probability_EC, labels)
            number = len(state.epochs) + 1
            state.epochs.append(Epoch(number, train_loss, valid_loss, valid_auc, valid_accuracy))
            if not math.isfinite(train_loss) or (trial.valid and valid_loss is None):
                state.finished = "diverged"
                continue
            if valid_loss is not None:
                best_loss = math.inf if state.best_epoch is None else state.epochs[state.best_epoch - 1].valid_loss
                assert best_loss is not None
                if valid_loss < best_loss:
                    state.best_epoch, state.best_nats_E = number, nats_E
                    if training.keep == "best":
                        state.best = self.stacks[state.stack].snapshot(state.n)
            if number == training.epochs:
                state.finished = "done"
            elif training.patience and state.best_epoch is not None and number - state.best_epoch >= training.patience:
                state.finished = "early"
        if self.referee is not None:
            for state in self.referee(self.states):
                assert state.finished is None, "only a running trial can be stopped"
                state.finished = "racing"
        for state in self.states:
            if state.finished in ("done", "early", "racing") and state.best is not None:
                self.stacks[state.stack].restore_(state.n, state.best)
                state.best = None

    # ---------------------------------------------------------------- evaluation

    def probabilities(self, jobs: Sequence[tuple[TrialState, Sequence[int]]]) -> list[NDArray[np.float64]]:
        """Class probabilities of each job's rows of the pool, (rows, C), in its order: trials side by side in shared passes."""
        rows = [(state.stack, state.n, self.pool.ids[row]) for state, wanted in jobs for row in wanted]
        self.fill_cache()  # first, also after a restart: what a row shares a pass with decides its last bits
        self.cache.fill([ids for _, _, ids in rows])
        scores = score_rows(
            self.base, self.stacks, rows, token_budget=self.token_budget, entries=self.entries, cache=self.cache
        )
        out, start = [], 0
        for _, wanted in jobs:
            out.append(scores[start : start + len(wanted)])
            start += len(wanted)
        return out


def score_rows(
    base: Base,
    stacks: Sequence[Stack],
    rows: Sequence[tuple[int, int, Sequence[int]]],
    *,
    token_budget: int,
    entries: Sequence[int] | None = None,
    cache: ActivationCache | None = None,
) -> NDArray[np.float64]:
    """Class probabilities, (rows, C), of `(stack, adapter, ids)` rows in the order given.

    With `cache`, rows of stack s join at layer `entries[s]` with what the cache holds.
    """
    packed = [PackedRow(stack, n, ids) for stack, n, ids in rows]
    lengths = [len(row.ids) + stacks[row.stack].virtual_tokens for row in packed]
    result = np.empty((len(rows), stacks[0].classes))
    for chosen in passes(lengths, token_budget):
        with _touched(stacks, [packed[i] for i in chosen]) as inside:
            result[chosen] = _scored(base, stacks, inside, entries, cache)
    return result


def _scored(
    base: Base,
    stacks: Sequence[Stack],
    rows: Sequence[PackedRow],
    entries: Sequence[int] | None,
    cache: ActivationCache | None,
) -> NDArray[np.float64]:
    """Of one pass; a function of its own, that nothing of it is held while the next is laid out."""
    stream = base.stream(rows, stacks, entries if cache else None)
    joining = cache.joining(stream) if cache else None
    with torch.no_grad(), base.running(stream, stacks):
        pooled_BD = base.pooled(stream, stacks, joining=joining)
        scores_BC = torch.cat([stacks[p.stack].scores(pooled_BD[p.first : p.last], p) for p in stream.parts])
    return values(torch.softmax(stream.unsort(scores_BC).double(), 1), healthy=0.5)


MANY_ADAPTERS = 8
"""Stacks of more are narrowed to the adapters that a pass touches, where these lie within half of it."""


@contextmanager
def _touched(stacks: Sequence[Stack], rows: Sequence[PackedRow]) -> Iterator[list[PackedRow]]:
    """The rows as they count in stacks that are, inside, no larger than the pass needs them."""
    offset = [0] * len(stacks)
    with ExitStack() as narrowed:
        for s, stack in enumerate(stacks):
            mine = {row.adapter for row in rows if row.stack == s} if stack.adapters > MANY_ADAPTERS else set()
            if mine and 2 * (max(mine) + 1 - min(mine)) <= stack.adapters:
                offset[s] = min(mine)
                narrowed.enter_context(stack.narrowed(min(mine), max(mine) + 1))
        yield [replace(row, adapter=row.adapter - offset[row.stack]) if offset[row.stack] else row for row in rows]


def _mix(seed: int, purpose: str, *numbers: Any) -> int:
    """A seed for one purpose; equal on every machine."""
    return place_number(f"{seed}/{purpose}/{'/'.join(map(str, numbers))}")
