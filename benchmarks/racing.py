"""The racing rule's errors, by simulation: how often it stops the setting that would have won, and what that costs.

    python -m benchmarks.racing [--quick]        no base, a minute

A race is 8 settings of 10 epochs on E validation rows. A setting's mean loss falls from log 2 towards a level of its own at a
speed of its own, as the falling learning rate lets it, and may rise again (overfitting). Rows differ in how hard they are (all
settings alike), in how a setting does on them (for good), and from epoch to epoch. Scenarios differ in how far levels and speeds lie apart;
`crossing` makes slow settings the better ones, the case that a rule which looks at early losses gets wrong; in `jumping` a setting's
loss leaps from epoch to epoch, as with batches of one row, the less the lower the rate. Each race is replayed without the crowd
(condition c) as well.

Dimensions: N settings · T epochs · E rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Figures, arguments
from katei.study.racing import beaten, crowd

Floats = NDArray[np.float64]
SETTINGS, EPOCHS = 8, 10


@dataclass(frozen=True)
class Scenario:
    """`levels`: spread of the losses that settings fall to. `speeds`: epochs to get 63 % there, from … to."""

    levels: float
    speeds: tuple[float, float]
    crossing: float = 0.0
    """Correlation of slow with good."""
    overfitting: float = 0.2
    own: float = 0.4
    """Of a setting on a row, for good."""
    epoch: float = 0.3
    """Of a setting on a row, in one epoch."""
    jumps: float = 0.0
    """Of a setting on all rows, in the first epoch."""


SCENARIOS = {
    "close": Scenario(0.05, (1.0, 3.0)),
    "usual": Scenario(0.25, (0.7, 6.0)),
    "far": Scenario(0.5, (0.5, 12.0)),
    "crossing": Scenario(0.25, (0.7, 8.0), crossing=0.8),
    "jumping": Scenario(0.25, (0.7, 6.0), jumps=0.2),
    "all alike": Scenario(0.0, (2.0, 2.0), overfitting=0.0),
}


def simulated_race(scenario: Scenario, rows: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Measured losses (N, T, E), and the true mean losses (N, T)."""
    slow_N, good_N = rng.normal(size=(2, SETTINGS))
    good_N = scenario.crossing * slow_N + (1 - scenario.crossing**2) ** 0.5 * good_N
    level_N = np.maximum(0.35 - scenario.levels * good_N, 0.02)
    low, high = np.log(scenario.speeds)
    speed_N = np.exp(low + (high - low) / (1 + np.exp(-1.7 * slow_N)))
    t = np.arange(1, EPOCHS + 1)
    trained_T = EPOCHS / 2 * (1 - (1 - t / EPOCHS) ** 2)  # under a rate that falls to zero
    true_NT = level_N[:, None] + (math.log(2) - level_N[:, None]) * np.exp(-trained_T / speed_N[:, None])
    overfit_N = scenario.overfitting * np.abs(rng.normal(size=SETTINGS))
    true_NT = true_NT + overfit_N[:, None] * np.maximum(trained_T - 2 * speed_N[:, None], 0) / EPOCHS
    rate_T = 1 - (t - 0.5) / EPOCHS
    true_NT = true_NT * np.exp(scenario.jumps * rate_T * rng.normal(size=true_NT.shape))
    row_E = np.exp(rng.normal(0, 0.8, rows))
    own_NE = rng.normal(0, scenario.own, (SETTINGS, 1, rows)) + rng.normal(0, scenario.epoch, (SETTINGS, EPOCHS, rows))
    factor = row_E / row_E.mean() * np.exp(own_NE - (scenario.own**2 + scenario.epoch**2) / 2)
    return true_NT[:, :, None] * factor, true_NT


@dataclass(frozen=True)
class Raced:
    """One race with the rule and without."""

    stopped_winner: bool
    cost: float
    """Validation loss of what is chosen with the rule, less that without."""
    true_cost: float
    """The same in the true loss of what is chosen."""
    saved: float
    """Share of the epochs not trained."""


def race(nats_NTE: Floats, true_NT: Floats, *, crowded: bool = True, level: float | None = None) -> Raced:
    """Replay the rule over losses that are known to the end."""
    mean_NT = nats_NTE.mean(2)
    every = np.arange(SETTINGS)
    full = np.unravel_index(mean_NT.argmin(), mean_NT.shape)
    running_N, ended_N = np.ones(SETTINGS, dtype=bool), np.full(SETTINGS, EPOCHS)
    for epoch in range(1, EPOCHS):
        seen_NT = np.where(np.arange(EPOCHS) < np.minimum(ended_N, epoch)[:, None], mean_NT, np.inf)
        best_NE = nats_NTE[every, seen_NT.argmin(1)]
        now_N, gain_N = mean_NT[:, epoch - 1], mean_NT[:, max(epoch - 2, 0)] - mean_NT[:, epoch - 1]
        lost_N = running_N & beaten(best_NE, now_N, gain_N, epoch, EPOCHS, level)
        if crowded:
            lost_N |= crowd(best_NE.mean(1), running_N & ~lost_N, epoch, EPOCHS)
        running_N &= ~lost_N
        ended_N[lost_N] = epoch
    seen_NT = np.where(np.arange(EPOCHS) < ended_N[:, None], mean_NT, np.inf)
    chosen = np.unravel_index(seen_NT.argmin(), seen_NT.shape)
    return Raced(
        bool(ended_N[full[0]] < EPOCHS and full[1] >= ended_N[full[0]]),
        float(mean_NT[chosen] - mean_NT[full]),
        float(true_NT[chosen] - true_NT[full]),
        float(1 - ended_N.sum() / (SETTINGS * EPOCHS)),
    )


def races(scenario: Scenario, rows: int, count: int, seed: int = 0, *, crowded: bool = True) -> Iterator[Raced]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield race(*simulated_race(scenario, rows, rng), crowded=crowded)


def main() -> None:
    options = arguments(__doc__).parse_args()
    figures = Figures("racing", quick=options.quick)
    for name, scenario in SCENARIOS.items():
        for rows in (20, 43, 200):
            for crowded in (False, True):
                found = list(races(scenario, rows, 50 if options.quick else 2000, crowded=crowded))
                case = f"{name}, {rows} rows, {'the whole rule' if crowded else 'beaten alone'}"
                figures.add("winner stopped", "share", [float(np.mean([r.stopped_winner for r in found]))], case=case)
                figures.add("cost in validation loss", "nats", [float(np.mean([r.cost for r in found]))], case=case)
                figures.add("cost in true loss", "nats", [float(np.mean([r.true_cost for r in found]))], case=case)
                figures.add("epochs saved", "share", [float(np.mean([r.saved for r in found]))], case=case)


if __name__ == "__main__":
    main()
