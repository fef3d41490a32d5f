"""What a trial-row costs when hundreds of adapters train side by side: 6 methods × 8 settings × 10 cells against 6 × 5.

    python -m benchmarks.many_trials [--quick]

Both are one optimizer step of every trial, batch 1, of a tuned study in folds as `compare` plans it; the step after it is timed.
"""

from __future__ import annotations

import time
from dataclasses import replace

from benchmarks.measure import Figures, arguments
from benchmarks.sides import CLASSES, DATA, Sides
from katei.engine.lockstep import Lockstep, Tokens, Trial
from katei.study.recipe import Recipe
from katei.study.tuning import draw_settings


def many(settings: int, cells: int) -> list[Trial]:
    """Trials of every method in `settings` × `cells`, in the order a study has them."""
    recipe = Recipe(model="smollm2", data=DATA, tune=settings, training={"epochs": 10})
    trials = []
    for name in recipe.methods:
        for setting in draw_settings(recipe, name) if settings else draw_settings(replace(recipe, tune=0), name):
            for cell in range(cells):
                label = f"{name}-{setting.number}-{cell}"
                trials.append(Trial(label, setting.method, cell, setting.training, tuple(range(cell, cell + 20))))
    return trials


def seconds_per_row(sides: Sides, trials: list[Trial], pool: Tokens, steps: int) -> list[float]:
    engine = Lockstep(sides.base, trials, CLASSES, pool)
    engine.step()
    measured = []
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        measured.append((time.perf_counter() - started) / len(trials))
    return measured


def main() -> None:
    options = arguments(__doc__).parse_args()
    figures = Figures("many_trials", quick=options.quick)
    sides = Sides()
    pool, _, _ = sides.poems(40, 1, 1)
    sizes = ((0, 1, 1), (2, 1, 1)) if options.quick else ((0, 5, 5), (8, 10, 2))
    for settings, cells, steps in sizes:
        trials = many(settings, cells)
        per_row = seconds_per_row(sides, trials, pool, steps)
        figures.add("seconds per trial-row", "s", per_row, case=f"K = {len(trials)}", note=DATA)


if __name__ == "__main__":
    main()
