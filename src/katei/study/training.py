"""Planned trials through the lockstep, saved as they go, to scored and saved adapters.

group of Planned → Lockstep (RUN/state-*.safetensors) → of each race one is chosen → its rows scored, its adapter saved → Ended
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from katei.base.packed import Base
from katei.core.calibration import fit_temperature
from katei.core.files import folder_atomic
from katei.data import Dataset
from katei.engine.checkpoint import is_state_of, load_state, save_state
from katei.engine.lockstep import Lockstep, Tokens, TrialState, score_rows
from katei.methods.adalora import AdaLoRAStack
from katei.methods.contract import Stack
from katei.methods.full import Full
from katei.methods.saved import AdapterNote, load_into_, read_adapter, save_adapter
from katei.study.answered import load_answered, save_answered
from katei.study.design import StudyDesign
from katei.study.fit import Fit
from katei.study.racing import Races
from katei.study.recipe import Recipe
from katei.study.trials import Ended, Planned
from katei.study.tuning import chosen_of

SAVING_SHARE = 0.05
"""Of the time, at most, goes into saving the state: hundreds of adapters take seconds to write."""


class Watcher(Protocol):
    """Sees a study go by; the terminal's progress is one. `left`: trials that begin when these have ended."""

    def say(self, text: str) -> None: ...
    def begin(self, lockstep: Lockstep, left: int) -> None: ...
    def tick(self, lockstep: Lockstep, ended: list[TrialState]) -> None: ...
    def end(self) -> None: ...


class Quiet:
    """Watches without a word."""

    def say(self, text: str) -> None:
        pass

    def begin(self, lockstep: Lockstep, left: int) -> None:
        pass

    def tick(self, lockstep: Lockstep, ended: list[TrialState]) -> None:
        pass

    def end(self) -> None:
        pass


@dataclass
class Job:
    """What every group of a study has in common, and the time it has taken."""

    recipe: Recipe
    fit: Fit
    tokenizer: Any
    design: StudyDesign
    dataset: Dataset
    pool: Tokens
    out: Path
    identity: str
    overwrite: bool
    watcher: Watcher
    save_seconds: float
    seconds: dict[str, float] = field(default_factory=lambda: {"load": 0.0, "train": 0.0, "evaluate": 0.0})
    before: float = 0.0
    """Seconds of calls that were killed."""
    running: Lockstep | None = None

    @property
    def keeps_full(self) -> bool:
        """Whole models are written for the given split alone: those of every fold or setting would fill a disk."""
        return not self.recipe.folds and not self.recipe.tune


def train_group(group: Sequence[Planned], base: Base, job: Job, left: int) -> list[Ended]:
    """Train, or go on training, a group to its end. KeyboardInterrupt leaves the state saved and `job.running` set."""
    state_file = job.out / f"state-{group[0].trial.name}.safetensors"
    fingerprint = f"{job.identity}/{base.fingerprint}"
    if (answered := load_answered(state_file, group[0], fingerprint)) is not None:
        return [answered]
    races = Races({p.trial.name: p.race for p in group}) if job.recipe.tune and job.recipe.racing else None
    lockstep = Lockstep(
        base,
        [p.trial for p in group],
        len(job.dataset.label_names),
        job.pool,
        token_budget=job.fit.token_budget,
        checkpointing=job.recipe.checkpointing,
        referee=races,
    )
    job.running = lockstep
    if state_file.exists() and (not job.overwrite or is_state_of(state_file, fingerprint)):
        load_state(state_file, lockstep, fingerprint)
        job.before += sum(lockstep.seconds.values())
        job.watcher.say(
            f"going on from step {max(s.step for s in lockstep.states)} of {max(s.trial.total_steps for s in lockstep.states)}"
        )
    job.watcher.begin(lockstep, left)
    try:
        with _asked_to_stop() as asked:
            saver = _Saver(state_file, fingerprint, job.save_seconds)

            def watch(engine: Lockstep, ended: list[TrialState]) -> None:
                job.watcher.tick(engine, ended)
                stop = asked()
                saver.save(engine, now=stop)
                if stop:
                    raise KeyboardInterrupt

            lockstep.run(watch)
    finally:
        job.watcher.end()
    save_state(state_file, lockstep, fingerprint)  # the scoring below may be killed too
    evaluating = time.perf_counter()
    ended = _score(group, lockstep, base)
    _save_adapters(lockstep, ended, base, job)
    if isinstance(group[0].trial.method, Full) and not job.keeps_full:
        save_answered(state_file, ended[0], fingerprint)
    lockstep.seconds["evaluate"] += time.perf_counter() - evaluating
    for name, value in lockstep.seconds.items():
        job.seconds[name] += value
    job.running = None
    return ended


class _Saver:
    """Saves the state every so often."""

    def __init__(self, file: Path, fingerprint: str, every: float):
        self.file, self.fingerprint, self.every = file, fingerprint, every
        self.saved_at, self.took = time.monotonic(), 0.0

    def save(self, lockstep: Lockstep, *, now: bool) -> None:
        wait = max(self.every, self.took / SAVING_SHARE) if self.every else 0.0
        started = time.monotonic()
        if now or started - self.saved_at >= wait:
            save_state(self.file, lockstep, self.fingerprint)
            self.saved_at = time.monotonic()
            self.took = self.saved_at - started


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is a question answered after the step; a second one interrupts at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def ended_of(planned: Planned, state: TrialState, lockstep: Lockstep) -> Ended:
    """What the trial has come to so far, unscored."""
    stack = lockstep.stacks[state.stack]
    ranks = stack.ranks(state.n) if isinstance(stack, AdaLoRAStack) else None
    total = stack.total(lockstep.base)
    return Ended(planned, state.epochs, state.finished, state.best_epoch, stack.trainable, total, ranks)


def _score(group: Sequence[Planned], lockstep: Lockstep, base: Base) -> list[Ended]:
    """Of each race the best answers its cell's valid and test rows."""
    ended = [ended_of(planned, state, lockstep) for planned, state in zip(group, lockstep.states, strict=True)]
    races: dict[object, list[Ended]] = {}
    for one in ended:
        races.setdefault(one.planned.race, []).append(one)
    for race in races.values():
        chosen_of(race).chosen = True
    chosen = [(one, state) for one, state in zip(ended, lockstep.states, strict=True) if one.chosen]
    for role in ("valid", "test"):
        rows = [getattr(one.planned.cell, role) for one, _ in chosen]
        if any(rows):
            jobs = [(state, wanted) for (_, state), wanted in zip(chosen, rows, strict=True)]
            for (one, _), probability_EC in zip(chosen, lockstep.probabilities(jobs), strict=True):
                one.probabilities[role] = probability_EC
    return ended


def _temperature(one: Ended, job: Job) -> float | None:
    """Of the validation rows, which chose the epoch but trained nothing."""
    valid_EC = one.probabilities.get("valid")
    if valid_EC is None or not len(valid_EC) or not np.isfinite(valid_EC).all():
        return None
    return fit_temperature(valid_EC, [job.pool.labels[row] for row in one.trial.valid])


def _save_adapters(lockstep: Lockstep, ended: Sequence[Ended], base: Base, job: Job) -> None:
    """Write each chosen adapter, read it back from the disk, and check that it scores rows to the same bits."""
    from katei.ship.models import save_full

    budget = job.fit.token_budget
    for one, state in zip(ended, lockstep.states, strict=True):
        planned, trial = one.planned, one.trial
        if not one.chosen or planned.share < 1 or (isinstance(trial.method, Full) and not job.keeps_full):
            continue
        note = AdapterNote(
            name=trial.name,
            method=trial.method.name,
            settings=trial.method.settings(),
            labels=job.dataset.label_names,
            base=job.recipe.model,
            fingerprint=base.fingerprint,
            max_length=job.recipe.max_length,
            text_column=job.dataset.text_column,
            training={
                **asdict(trial.training),
                "seed": trial.seed,
                "rows": len(trial.rows),
                "epochs_run": len(one.epochs),
            },
            temperature=_temperature(one, job),
        )
        with folder_atomic(job.out / "trials" / trial.name) as folder:
            stack = lockstep.stacks[state.stack]
            if isinstance(trial.method, Full):
                save_full(folder, base, stack, note)
                continue
            save_adapter(
                folder, stack, state.n, trial.method, note, str(base.model.config._name_or_path or job.recipe.model)
            )
            saved = read_adapter(folder, diverged=state.finished == "diverged")
            rows = [job.pool.ids[row] for row in (planned.cell.test or trial.rows)[:4]]
            before = _scored_alone(base, stack, state.n, rows, budget)
            if trial.method.saved_as() == trial.method:
                load_into_(stack, state.n, saved)
                after = _scored_alone(base, stack, state.n, rows, budget)
            else:  # read as another method
                read_as = trial.method.saved_as().build(base, stack.classes, [0], [])
                load_into_(read_as, 0, saved)
                after = _scored_alone(base, read_as, 0, rows, budget)
            if before.tobytes() != after.tobytes() and state.finished != "diverged":
                raise AssertionError(
                    f"{trial.name}: the saved adapter scores rows differently by {np.abs(before - after).max():.2e}"
                )


def _scored_alone(
    base: Base, stack: Stack, n: int, rows: Sequence[Sequence[int]], token_budget: int
) -> NDArray[np.float64]:
    """By adapter n without its companions, on which the last bits of a batched product depend."""
    with stack.narrowed(n, n + 1):
        return score_rows(base, [stack], [(0, 0, row) for row in rows], token_budget=token_budget)
