"""The two sides of a comparison: the same task through peft + Trainer and through katei, and whether they agree.

A `Task` is trials and rows. Theirs trains one trial after another (loading and building left out of its seconds); ours trains
all together (building the adapters and filling the cache included). What both came to is compared each time: a wrong answer
is not timed.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.measure import say
from katei.base.load import load_base
from katei.base.packed import Base
from katei.data import load_dataset
from katei.engine.lockstep import Lockstep, Tokens, Trial

MODEL = "smollm2"
DATA = "poems-en"
CLASSES = 2

TOLERANCE = 1e-4
"""Largest relative difference of a validation loss, and ten times that of a test probability. Measured: 3e-6 after 100 steps."""
GENTLE_TOLERANCE = {"p-tuning": 1e-3}
LOOSER = {"adalora": 1e-2, "p-tuning": math.inf}
"""At the book's learning rate. AdaLoRA's prunings are choices, which rounding may tip. P-tuning amplifies rounding: its vectors
begin near zero, in front of a layer that normalises them, so peft's own float32 gradient is 3e-5 off (ours 7e-5), and after 8 steps
peft's own float32 validation loss is 3 % from its float64 one (ours 4 %). So it is compared in a `gentle` task alone."""


@dataclass(frozen=True)
class Task:
    """What both sides do. A valid split is scored after each epoch, a test split once at the end."""

    trials: tuple[Trial, ...]
    train: Tokens
    valid: Tokens
    test: Tokens | None = None


@dataclass
class Side:
    """What one side came to, by trial."""

    seconds: float = 0.0
    seconds_of: dict[str, float] = field(default_factory=dict)
    valid_losses: dict[str, list[float]] = field(default_factory=dict)
    test_probabilities: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def times(self, factor: float) -> Side:
        """Seconds extrapolated to `factor` times as many runs of the same size."""
        return replace(self, seconds=self.seconds * factor)


class Sides:
    """One base for both: theirs gets the untouched model, ours its own copy."""

    def __init__(self, model: str = MODEL, precision: str = "fp32"):
        loaded = load_base(model, precision=precision)
        self.path = loaded.path
        self.backbone: PreTrainedModel = copy.deepcopy(loaded.model)
        self.base = Base(loaded.model, loaded.tokenizer, name=model, fingerprint=loaded.fingerprint)

    def poems(self, train: int, valid: int, test: int, data: str = DATA) -> tuple[Tokens, Tokens, Tokens]:
        """The first rows of each split."""
        dataset = load_dataset(data)
        assert dataset.valid is not None
        assert dataset.test is not None
        splits = ((dataset.train, train), (dataset.valid, valid), (dataset.test, test))
        return tuple(  # type: ignore[return-value]
            Tokens(tuple(tuple(self.base.tokenize(text)) for text in split.texts[:rows]), split.labels[:rows])
            for split, rows in splits
        )

    def lockstep(self, task: Task) -> Lockstep:
        pool = task.train + task.valid + (task.test or Tokens((), ()))
        valid = tuple(range(len(task.train), len(task.train) + len(task.valid)))
        classes = max(CLASSES, *(label + 1 for label in pool.labels))
        return Lockstep(self.base, [replace(trial, valid=valid) for trial in task.trials], classes, pool)

    def theirs(self, task: Task, only: Sequence[str] | None = None) -> Side:
        """Each trial by itself with peft + Trainer (or `only` those named), beginning where ours does."""
        from benchmarks.reference import train  # peft and Trainer, which our own side does without

        side = Side()
        beginning = self.lockstep(task)
        for state in beginning.states:
            name = state.trial.name
            if only is not None and name not in only:
                continue
            stack = beginning.stacks[state.stack]
            run = train(self.backbone, state.trial, stack, state.n, task.train, task.valid, task.test)
            side.seconds += run.seconds
            side.seconds_of[name] = run.seconds
            side.valid_losses[name] = run.valid_losses
            if run.test_probabilities is not None:
                side.test_probabilities[name] = run.test_probabilities
        return side

    def ours(self, task: Task) -> Side:
        """All trials together."""
        started = time.perf_counter()
        engine = self.lockstep(task)
        engine.run()
        tested = range(len(task.train) + len(task.valid), len(engine.pool))
        test = engine.probabilities([(state, tested) for state in engine.states]) if task.test else []
        seconds = time.perf_counter() - started
        names = [state.trial.name for state in engine.states]
        losses = [[float(epoch.valid_loss or "nan") for epoch in state.epochs] for state in engine.states]
        return Side(seconds, {}, dict(zip(names, losses, strict=True)), dict(zip(names, test, strict=False)))


def gentle(task: Task) -> Task:
    """At a tenth of the learning rates, where rounding is not amplified and every method can be compared."""
    slower = [replace(t.training, learning_rate=t.training.learning_rate / 10) for t in task.trials]
    return replace(task, trials=tuple(replace(t, training=s) for t, s in zip(task.trials, slower, strict=True)))


def check(theirs: Side, ours: Side, looser: Mapping[str, float] = LOOSER) -> None:
    """End the program, saying what differs, unless ours came to what theirs did."""
    for name, losses in theirs.valid_losses.items():
        tolerance = next((value for method, value in looser.items() if name.startswith(method)), TOLERANCE)
        mine, difference = ours.valid_losses[name], loss_difference(theirs, ours, name)
        if not difference <= tolerance:
            sys.exit(f"{name}: validation losses {mine} here, {losses} there, {difference:.1e} apart: not timed")
        if name in theirs.test_probabilities:
            change = float(np.abs(theirs.test_probabilities[name] - ours.test_probabilities[name]).max())
            if not change <= 10 * tolerance:
                sys.exit(f"{name}: test probabilities differ by {change:.1e}: not timed")


def check_gently(theirs: Callable[[Task], Side], ours: Callable[[Task], Side], task: Task) -> None:
    """The same losses, before anything is timed? (Warms both sides up as well.)"""
    slow = gentle(task)
    their_side, our_side = theirs(slow), ours(slow)
    check(their_side, our_side, GENTLE_TOLERANCE)
    worst = max(loss_difference(their_side, our_side, name) for name in their_side.valid_losses)
    say(f"  the same losses on both sides, to {worst:.0e}")


def loss_difference(theirs: Side, ours: Side, name: str) -> float:
    """The largest relative one of a trial's validation losses."""
    both = zip(ours.valid_losses[name], theirs.valid_losses[name], strict=True)
    return max(abs(a - b) / b for a, b in both)


def mixed_lengths(
    rows: Sequence[Sequence[int]], count: int, *, shortest: int = 8, longest: int = 200
) -> list[list[int]]:
    """`count` rows of tokens whose lengths are log-normal (median 40), made of `rows` laid end to end; the same each time."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        length = min(longest, max(shortest, round(rng.lognormvariate(math.log(40), 0.8))))
        row: list[int] = []
        while len(row) < length:
            row.extend(rng.choice(rows))
        made.append(row[:length])
    return made
