"""Racing: a setting that can no longer win is not trained to its end.

Settings of one method in one cell race. After an epoch a setting stops if, against the leader (least validation loss so far),

    (a) its losses on the validation rows are worse by a one-sided paired t test, at LEVEL spent over the looks, and
    (b) were its last epoch's gain made in every epoch left, it would still not reach what the leader has now.

(b) is optimistic, since the rate falls to zero and gains shrink; (a) keeps a race open that few rows cannot decide. How often
the setting that would have won is stopped, and what that costs, is simulated in benchmarks/racing.py (docs/compare.md).

Dimensions: N settings · E validation rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from katei.engine.lockstep import TrialState

LEVEL = 0.05
FIRST_LOOK = 2
"""A gain needs two epochs."""

Floats = NDArray[np.float64]


def losers(
    best_NE: Floats, now_N: Floats, gain_N: Floats, epoch: int, epochs: int, level: float = LEVEL
) -> NDArray[np.bool_]:
    """Which settings stop after `epoch` of `epochs`, from each one's row losses at its best, its mean loss now and its last gain."""
    from scipy.stats import t as student

    N, E = best_NE.shape
    looks = epochs - FIRST_LOOK
    if E < 2 or epoch < FIRST_LOOK or epoch >= epochs:
        return np.zeros(N, dtype=bool)
    mean_N = best_NE.mean(1)
    leader = int(mean_N.argmin())
    worse_NE = best_NE - best_NE[leader]
    error_N = worse_NE.std(1, ddof=1) / E**0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        refuted = worse_NE.mean(1) / error_N > student.ppf(1 - level / looks, E - 1)
    hoped_N = now_N - np.maximum(gain_N, 0) * (epochs - epoch)
    return np.asarray(refuted & (hoped_N > mean_N[leader]))


class Races:
    """The engine's referee. `race_of` maps a trial's name to its race."""

    def __init__(self, race_of: Mapping[str, object], level: float = LEVEL):
        self.race_of, self.level = race_of, level

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
        if not race or epoch < FIRST_LOOK:
            return []
        best_NE = np.stack([s.best_nats_E for s in race if s.best_nats_E is not None])
        # the loss of an epoch that has ended is finite: a trial whose is not has diverged, and waits for nobody
        loss = [[e.valid_loss if e.valid_loss is not None else np.inf for e in s.epochs] for s in race]
        now_N = np.array([values[-1] for values in loss])
        gain_N = np.array([values[-2] - values[-1] if len(values) > 1 else 0.0 for values in loss])
        gain_N = np.where(np.isfinite(gain_N), gain_N, 0.0)
        found_N = losers(best_NE, now_N, gain_N, epoch, race[0].trial.training.epochs, self.level)
        return [s for s, lost in zip(race, found_N, strict=True) if lost and s.finished is None]
