"""What a person sees of a running study: a live table on a terminal, a line per epoch elsewhere. All of it on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from katei.engine.lockstep import Lockstep, TrialState


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


SHOWN = 12
"""Trials that have a line of their own; of more, each method has one."""


class TerminalWatcher:
    """Shows a study on `console`. The lockstep's losses are read at most four times a second."""

    def __init__(self, console: Console):
        self.console = console
        self.live: Live | None = None
        self.began = 0.0
        self.rows_before = 0
        self.drawn = 0.0
        self.left = 0

    def say(self, text: str) -> None:
        style = "yellow" if text.startswith("warning") else "dim"
        self.console.print(Text(text, style=style), soft_wrap=True)

    def begin(self, lockstep: Lockstep, left: int) -> None:
        self.began, self.rows_before, self.drawn, self.left = time.monotonic(), lockstep.trained_rows, 0.0, left
        trials = len(lockstep.states)
        self.say(
            f"training {trials} trial{'s' * (trials > 1)} in lockstep over {lockstep.base.name}, "
            f"{max(len(state.trial.rows) for state in lockstep.states)} rows, on {lockstep.base.device}"
        )
        if self.console.is_terminal:
            self.live = Live(self._view(lockstep), console=self.console, auto_refresh=False, transient=True)
            self.live.start()

    def tick(self, lockstep: Lockstep, ended: list[TrialState]) -> None:
        if self.live is not None:
            if ended or time.monotonic() - self.drawn > 0.25:
                self.drawn = time.monotonic()
                self.live.update(self._view(lockstep), refresh=True)
            return
        if len(lockstep.states) <= SHOWN:
            for state in ended:
                self.console.print(Text(_epoch_line(state)), soft_wrap=True)
        elif ended:
            self.console.print(Text(_best_line(ended)), soft_wrap=True)
        if ended:
            self.console.print(Text(self._pace(lockstep), style="dim"), soft_wrap=True)

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _pace(self, lockstep: Lockstep) -> str:
        spent = time.monotonic() - self.began
        rows = lockstep.trained_rows - self.rows_before
        left = sum(
            (s.trial.total_steps - s.step) * len(s.trial.rows) / s.trial.steps_per_epoch
            for s in lockstep.states
            if s.finished is None
        )
        rate = rows / spent if spent else 0.0
        ahead = f", at most {duration(left / rate)} left" if rate and left else ""
        return f"{self._counts(lockstep)}{rows} rows in {duration(spent)}, {rate:.1f} rows/s{ahead}"

    def _counts(self, lockstep: Lockstep) -> str:
        """Trials running, stopped and left, where there are several."""
        if len(lockstep.states) + self.left == 1:
            return ""
        running = sum(state.finished is None for state in lockstep.states)
        stopped = sum(state.finished in ("early", "racing", "diverged") for state in lockstep.states)
        done = len(lockstep.states) - running - stopped
        return f"trials: {running} running, {stopped} stopped, {done} done, {self.left} left; "

    def _view(self, lockstep: Lockstep) -> Group:
        table = self._trials(lockstep) if len(lockstep.states) <= SHOWN else _methods(lockstep)
        return Group(table, Text(self._pace(lockstep), style="dim"))

    def _trials(self, lockstep: Lockstep) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("trial", "epoch", "train loss", "valid loss", "ROC AUC", "accuracy"):
            table.add_column(name, justify="left" if name == "trial" else "right")
        for state in lockstep.states[: max(4, self.console.height - 6)]:
            trial = state.trial
            last = state.epochs[-1] if state.epochs else None
            within = state.step - len(state.epochs) * trial.steps_per_epoch
            trained = within * trial.training.batch_size * trial.training.accumulation
            running = float(state.nats) / trained if trained else (last.train_loss if last else None)
            done = state.step / trial.steps_per_epoch
            table.add_row(
                trial.name,
                state.finished or f"{done:.1f}/{trial.training.epochs}",
                number(running),
                number(last.valid_loss if last else None),
                number(last.valid_roc_auc if last else None),
                number(last.valid_accuracy if last else None),
            )
        return table


def _epoch_line(state: TrialState) -> str:
    epoch = state.epochs[-1]
    return (
        f"epoch {epoch.epoch}/{state.trial.training.epochs}  {state.trial.name:<16}"
        f" train loss {number(epoch.train_loss)}  valid loss {number(epoch.valid_loss)}"
        f"  ROC AUC {number(epoch.valid_roc_auc)}  accuracy {number(epoch.valid_accuracy)}"
    )


def _best(states: list[TrialState]) -> tuple[str, float | None]:
    """The trial with the least validation loss of any epoch, and that."""
    losses = {s.trial.name: s.epochs[s.best_epoch - 1].valid_loss for s in states if s.best_epoch is not None}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    name = min(known, key=lambda name: known[name], default=None)
    return ("–", None) if name is None else (name, known[name])


def _best_line(ended: list[TrialState]) -> str:
    name, loss = _best(ended)
    epochs = f"epoch {max(len(s.epochs) for s in ended)}/{max(s.trial.training.epochs for s in ended)}"
    return f"{epochs}  {len(ended)} trials; least valid loss {number(loss)}, {name}"


def _methods(lockstep: Lockstep) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("method", "running", "stopped", "done", "epoch", "best valid loss", "of trial"):
        table.add_column(name, justify="left" if name in ("method", "of trial") else "right")
    groups: dict[str, list[TrialState]] = {}
    for state in lockstep.states:
        groups.setdefault(state.trial.method.name, []).append(state)
    for name, states in groups.items():
        running = sum(s.finished is None for s in states)
        done = sum(s.finished == "done" for s in states)
        epoch = max(s.step / s.trial.steps_per_epoch for s in states)
        best, loss = _best(states)
        counts = (str(running), str(len(states) - running - done), str(done))
        table.add_row(name, *counts, f"{epoch:.1f}/{states[0].trial.training.epochs}", number(loss), best)
    return table


class RowsWatcher:
    """Shows how rows are going by, once it takes a while: one line that is drawn anew on a terminal, a line now and then elsewhere."""

    AT_LEAST = 3.0
    """Seconds before there is anything to show."""
    EVERY = 0.25, 30.0
    """Seconds between two lines, on a terminal and elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self.began = self.shown = time.monotonic()
        self.rows_before: int | None = None
        self.live: Live | None = None

    def __enter__(self) -> RowsWatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def tick(self, done: int, rows: int) -> None:
        """`done` of `rows` are answered; `rows` is 0 where nobody knows."""
        now = time.monotonic()
        if self.rows_before is None:  # the rate is of this call's rows: an interrupted one may have done others
            self.rows_before, self.began = (done, now) if rows else (0, self.began)
        terminal = self.console.is_terminal
        if now - self.began < self.AT_LEAST or now - self.shown < self.EVERY[not terminal]:
            return
        self.shown = now
        line = Text(self._line(done, rows, now), style="dim")
        if not terminal:
            self.console.print(line, soft_wrap=True)
            return
        if self.live is None:
            self.live = Live(line, console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        self.live.update(line, refresh=True)

    def _line(self, done: int, rows: int, now: float) -> str:
        rate = (done - (self.rows_before or 0)) / max(now - self.began, 1e-9)
        if not rows:
            return f"{done:,} rows, {rate:,.1f} rows/s"
        left = f", {duration((rows - done) / rate)} left" if rate else ""
        return f"{done:,} of {rows:,} rows, {rate:,.1f} rows/s{left}"
