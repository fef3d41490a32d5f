"""Batch 8, rows of mixed lengths, one LoRA trial, one epoch: peft + Trainer, padded to the longest of each batch ÷ katei, packed.

    python -m benchmarks.batches           the first 128 of the 800 rows, three pairs
    python -m benchmarks.batches --full    all 800 rows, one pair

Lengths are log-normal (median 40 tokens, 8 to 200), each row poems laid end to end.
"""

from __future__ import annotations

from benchmarks.measure import Figures, arguments, pairs, ratios
from benchmarks.sides import DATA, Sides, Task, check, check_gently, mixed_lengths
from katei.engine.lockstep import Tokens, Trial
from katei.engine.optimizer import Training
from katei.methods import METHODS

ROWS, BATCH = 800, 8


def batches_task(sides: Sides, rows: int, valid: int) -> Task:
    poems, _, _ = sides.poems(162, 1, 1, DATA)
    ids = mixed_lengths(poems.ids, ROWS + valid)
    labels = tuple(i % 2 for i in range(ROWS + valid))
    train = Tokens(tuple(map(tuple, ids[:rows])), labels[:rows])
    training = Training(learning_rate=1e-4, epochs=1, batch_size=BATCH, weight_decay=0.01)
    trial = Trial("lora", METHODS["lora"](), 0, training, tuple(range(rows)))
    return Task((trial,), train, Tokens(tuple(map(tuple, ids[ROWS:])), labels[ROWS:]))


def padding(task: Task) -> float:
    """Tokens with padding ÷ tokens, in the order of training."""
    lengths = [len(task.train.ids[i]) for i in task.trials[0].order(0)]
    padded = sum(BATCH * max(lengths[i : i + BATCH]) for i in range(0, len(lengths), BATCH))
    return padded / sum(lengths)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="all 800 rows, one pair")
    options = parser.parse_args()
    figures = Figures("batches", quick=options.quick)
    n, rows, valid = (1, 16, 8) if options.quick else (3, 128, 16)
    if options.full:
        n, rows = 1, ROWS
    sides = Sides()
    check_gently(sides.theirs, sides.ours, batches_task(sides, 16, 8))
    task = batches_task(sides, rows, valid)
    their_runs, our_runs = pairs(lambda: sides.theirs(task), lambda: sides.ours(task), n, check)
    note = f"first {rows} of {ROWS} rows, {valid} validation rows, {padding(task):.2f} × as many tokens when padded"
    which = ", full" if options.full else ""
    figures.add(f"ratio{which}", "×", ratios(their_runs, our_runs), note=note)
    figures.add(f"seconds{which}", "s", [side.seconds for side in their_runs], case="theirs", note=note)
    figures.add(f"seconds{which}", "s", [side.seconds for side in our_runs], case="ours", note=note)


if __name__ == "__main__":
    main()
