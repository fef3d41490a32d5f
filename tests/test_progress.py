"""What a person sees of a study: a line a trial while they are few, a line a method when they are many, and how many are running."""

from __future__ import annotations

import io

from rich.console import Console

from katei.engine.lockstep import Lockstep, Trial
from katei.engine.optimizer import Training
from katei.progress import SHOWN, TerminalWatcher
from tests.helpers.models import random_tokens, settings, tiny_base

BASE, POOL = tiny_base(), random_tokens(12)


def shown(count: int, *, terminal: bool) -> list[str]:
    """The screens, or lines, of `count` trials of two methods and two epochs; the first one's validation loss is made the best."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, height=60)
    trials = [
        Trial(
            f"t{i}",
            settings(("ia3", "head")[i % 2]),
            i,
            Training(learning_rate=1e-2, epochs=2, batch_size=4),
            tuple(range(8)),
            (8, 9, 10),
        )
        for i in range(count)
    ]
    engine, watcher = Lockstep(BASE, trials, 3, POOL), TerminalWatcher(console)
    watcher.begin(engine, left=7)
    screens = []

    def watch(lockstep: Lockstep, ended: list) -> None:  # type: ignore[type-arg]
        if ended:
            ended[0].finished = ended[0].finished or "racing"
        watcher.tick(lockstep, ended)
        if terminal:
            plain = Console(file=io.StringIO(), width=120)
            plain.print(watcher._view(lockstep))
            screens.append(plain.file.getvalue())  # type: ignore[attr-defined]

    engine.run(watch)
    watcher.end()
    return screens if terminal else console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_few_trials_have_a_line_each() -> None:
    lines = shown(3, terminal=False)
    assert sum(line.startswith("epoch 1/2  t") for line in lines) == 3
    assert sum(line.startswith("epoch 2/2  t") for line in lines) == 2, "one was stopped"
    assert any("trials: 2 running, 1 stopped, 0 done, 7 left; 24 rows" in line and "at most" in line for line in lines)
    assert "trials: 0 running, 1 stopped, 2 done, 7 left" in lines[-1]
    assert "t1 " in shown(3, terminal=True)[-1]


def test_many_trials_have_a_line_a_method_and_the_best_so_far() -> None:
    count = SHOWN + 2
    lines = shown(count, terminal=False)
    first = next(line for line in lines if line.startswith("epoch 1/2"))
    assert f"{count} trials; least valid loss" in first
    assert not any(line.startswith("epoch 1/2  t") for line in lines)
    screen = shown(count, terminal=True)[-1]
    assert [line.split()[0] for line in screen.splitlines()[:3]] == ["method", "ia3", "head"]
    ia3 = screen.splitlines()[1].split()
    assert ia3[1:4] == ["0", "1", str(count // 2 - 1)], "running, stopped, done"
    assert ia3[-1].startswith("t")
