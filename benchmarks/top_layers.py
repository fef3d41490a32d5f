"""LLaMA-Adapter on the top 8 of 30 layers, 10 epochs, batch 1: one trial, and six seeds together. peft + Trainer ÷ katei.

    python -m benchmarks.top_layers [--quick]

Below the lowest trained layer every row's activations are the base's own: katei computes them once, Trainer in every epoch and
evaluation. Theirs is measured on one run per pair; for six seeds it is multiplied by 6.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.measure import Figures, arguments, pairs, ratios
from benchmarks.sides import DATA, Side, Sides, Task, check, check_gently
from katei.engine.lockstep import Trial
from katei.engine.optimizer import Training
from katei.methods import METHODS

SEEDS = 6


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", default=DATA)
    options = parser.parse_args()
    figures = Figures("top_layers", quick=options.quick)
    n, rows, valid = (1, 3, 1) if options.quick else (3, 24, 8)
    sides = Sides()
    train, held_out, _ = sides.poems(rows, valid, 1, options.data)
    training = Training(learning_rate=1e-4, epochs=10, weight_decay=1.0)
    method = METHODS["llama-adapter"]()
    trials = tuple(Trial(f"seed {seed}", method, seed, training, tuple(range(rows))) for seed in range(SEEDS))
    six = Task(trials, train, held_out)
    one = replace(six, trials=trials[:1])
    note = f"{options.data}, {rows}/{valid} rows, 10 epochs"

    def ours_both() -> Side:
        alone = sides.ours(one)
        together.append(sides.ours(six))
        check(alone, together[-1])
        return alone

    together: list[Side] = []
    short = replace(one, trials=tuple(replace(t, training=replace(training, epochs=1)) for t in one.trials))
    check_gently(sides.theirs, sides.ours, short)
    their_runs, our_runs = pairs(lambda: sides.theirs(one), ours_both, n, check)
    six_theirs = [side.times(SEEDS) for side in their_runs]
    figures.add("ratio, one trial", "×", ratios(their_runs, our_runs), note=note)
    figures.add(
        "ratio, six seeds", "×", ratios(six_theirs, together), note=f"{note}; theirs: one run a pair, × {SEEDS}"
    )
    figures.add("seconds", "s", [side.seconds for side in their_runs], case="theirs, one trial", note=note)
    figures.add("seconds", "s", [side.seconds for side in our_runs], case="ours, one trial", note=note)
    figures.add("seconds", "s", [side.seconds for side in together], case="ours, six seeds", note=note)


if __name__ == "__main__":
    main()
