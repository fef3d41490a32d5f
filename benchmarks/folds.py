"""Cross-validation: 5 folds × 6 methods = 30 trials. peft + Trainer, one after another ÷ katei, all 30 in one lockstep.

    python -m benchmarks.folds [--quick]

Theirs is measured on six runs per pair, one fold of every method (another fold in each pair), and multiplied by 5: their 30 runs
share nothing, so five folds take five times as long. One epoch, evaluated at its end; both sides score the same rows.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from benchmarks.book import book_task
from benchmarks.measure import Figures, arguments, pairs, ratios
from benchmarks.sides import DATA, Side, Sides, Task, check, check_gently

FOLDS = 5


def folds_task(sides: Sides, rows: int, valid: int, data: str) -> Task:
    """The recipe's methods once per fold: fold f leaves out every fifth row from f on."""
    whole = book_task(sides, (rows, valid, valid), epochs=1, data=data)
    trials = tuple(
        replace(trial, name=f"{trial.name}, fold {fold}", rows=tuple(i for i in range(rows) if i % FOLDS != fold))
        for fold in range(FOLDS)
        for trial in whole.trials
    )
    return replace(whole, trials=trials, test=None)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", default=DATA)
    options = parser.parse_args()
    figures = Figures("folds", quick=options.quick)
    n, rows, valid = (1, 3, 2) if options.quick else (3, 20, 8)
    sides = Sides()
    task = folds_task(sides, rows, valid, options.data)
    measured = itertools.cycle(range(FOLDS))

    small = folds_task(sides, FOLDS, 1, options.data)
    check_gently(sides.theirs, sides.ours, replace(small, trials=small.trials[: len(small.trials) // FOLDS]))

    def theirs() -> Side:
        fold = next(measured)
        return sides.theirs(task, [t.name for t in task.trials if t.name.endswith(f"fold {fold}")]).times(FOLDS)

    their_runs, our_runs = pairs(theirs, lambda: sides.ours(task), n, check)
    note = (
        f"{options.data}, {rows - rows // FOLDS}/{valid} rows, 1 epoch; "
        f"theirs: {6 * n} runs measured, 6 a pair, × {FOLDS}"
    )
    figures.add("ratio", "×", ratios(their_runs, our_runs), note=note)
    figures.add("seconds", "s", [side.seconds for side in their_runs], case="theirs, extrapolated", note=note)
    figures.add("seconds", "s", [side.seconds for side in our_runs], case="ours", note=note)


if __name__ == "__main__":
    main()
