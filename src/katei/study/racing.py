"""Racing: a setting that can no longer win, or that too many others lead, is not trained to its end.

Settings of one method in one cell race. The leader is the one with the least validation loss so far. After an epoch a setting stops if
it is beaten:

    (a) its losses on the validation rows are worse than the leader's by a one-sided paired t test, at LEVEL spent over the looks, and
    (b) were it to gain as much as in its last epoch for as much learning rate, it would still not reach what the leader has now,

or if it is in the crowd:

    (c) of N settings no more than ⌈N · (1 − epoch/epochs)²⌉ + 1 go on, those with the least loss so far.

The learning rate falls linearly to zero, so behind an epoch (1 − epoch/epochs)² of the training is left. (b) is optimistic, since gains
shrink faster than the rate; (a) keeps a race open that few rows cannot decide; (c) is successive halving in small steps (Jamieson and
Talwalkar 2016, https://arxiv.org/abs/1502.07943): where settings are alike it stops the later winner now and then, which costs little
just there. How often, and what it costs, is simulated in benchmarks/racing.py (docs/compare.md).

Dimensions: N settings · E validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from katei.engine.lockstep import TrialState

LEVEL = 0.5
"""Of all looks together, the later ones the larger part; (b) must hold as well, so far fewer winners are stopped than that."""
FIRST_LOOK = 2
"""A gain needs two epochs."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def losers(best_NE: Floats, now_N: Floats, gain_N: Floats, running_N: Bools, epoch: int, epochs: int) -> Bools:
    """Which settings stop after `epoch` of `epochs`, from each one's row losses at its best, its mean loss now and its last gain."""
    if epoch >= epochs:
        return np.zeros_like(running_N)
    beaten_N = running_N & beaten(best_NE, now_N, gain_N, epoch, epochs)
    return beaten_N | crowd(best_NE.mean(1), running_N & ~beaten_N, epoch, epochs)


def beaten(
    best_NE: Floats, now_N: Floats, gain_N: Floats, epoch: int, epochs: int, level: float | None = None
) -> Bools:
    """(a) and (b)."""
    from scipy.special import stdtrit

    N, E = best_NE.shape
    if E < 2 or not FIRST_LOOK <= epoch < epochs:
        return np.zeros(N, dtype=bool)
    mean_N = best_NE.mean(1)
    leader = int(mean_N.argmin())
    worse_NE = best_NE - best_NE[leader]
    error_N = worse_NE.std(1, ddof=1) / E**0.5
    looks = range(FIRST_LOOK, epochs)
    spent = (LEVEL if level is None else level) * (epoch - 1) / sum(look - 1 for look in looks)
    with np.errstate(divide="ignore", invalid="ignore"):
        refuted_N = worse_NE.mean(1) / error_N > stdtrit(E - 1, 1 - min(spent, 0.5))
    left = epochs - epoch
    in_last_epochs = left**2 / (2 * left + 1)  # what is left of the learning rate, in units of the last epoch's
    hoped_N = now_N - np.maximum(gain_N, 0) * in_last_epochs
    return np.asarray(refuted_N & (hoped_N > mean_N[leader]))


def crowd(mean_N: Floats, running_N: Bools, epoch: int, epochs: int) -> Bools:
    """(c), from each one's least mean loss."""
    room = math.ceil(len(mean_N) * (1 - epoch / epochs) ** 2) + 1
    ranked = [n for n in np.argsort(mean_N, kind="stable") if running_N[n]]
    crowd_N = np.zeros_like(running_N)
    crowd_N[ranked[room:]] = True
    return crowd_N


class Races:
    """The engine's referee. `race_of` maps a trial's name to its race."""

    def __init__(self, race_of: Mapping[str, object]):
        self.race_of = race_of

    def __call__(self, states: Sequence[TrialState]) -> Iterable[TrialState]:
        races: dict[object, list[TrialState]] = {}
        for state in states:
            if state.trial.name in self.race_of:
                races.setdefault(self.race_of[state.trial.name], []).append(state)
        stopped = []
        for race in races.values():
            running = [s for s in race if s.finished is None]
            # they have as many steps an epoch, so those still running have run equally many
            if running and len(running[0].epochs) * running[0].trial.steps_per_epoch == running[0].step:
                stopped += self._stopped([s for s in race if s.best_nats_E is not None], len(running[0].epochs))
        return stopped

    def _stopped(self, race: Sequence[TrialState], epoch: int) -> list[TrialState]:
        if not race or epoch < 1:
            return []
        best_NE = np.stack([s.best_nats_E for s in race if s.best_nats_E is not None])
        # the loss of an epoch that has ended is finite: a trial whose is not has diverged, and waits for nobody
        loss = [[e.valid_loss if e.valid_loss is not None else np.inf for e in s.epochs] for s in race]
        now_N = np.array([values[-1] for values in loss])
        gain_N = np.array([values[-2] - values[-1] if len(values) > 1 else 0.0 for values in loss])
        gain_N = np.where(np.isfinite(gain_N), gain_N, 0.0)
        running_N = np.array([s.finished is None for s in race])
        lost_N = losers(best_NE, now_N, gain_N, running_N, epoch, race[0].trial.training.epochs)
        return [s for s, lost in zip(race, lost_N, strict=True) if lost]
