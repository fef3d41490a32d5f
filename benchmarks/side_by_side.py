"""Six methods in lockstep against peft + transformers.Trainer, one method after another: the same rows, order and beginnings.

    python -m benchmarks.side_by_side [--model smollm2] [--data poems-en] [--rows 24] [--pairs 3]

First checks that both sides reach the same validation losses, and refuses to time a wrong answer. Then, in turn, one epoch of
`--rows` training rows and an evaluation: theirs, ours, theirs, ours … Prints seconds, ratios and their medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time

from benchmarks.reference import train
from katei.base.load import load_base
from katei.base.packed import Base
from katei.data import load_dataset
from katei.engine.lockstep import Lockstep, Tokens, Trial
from katei.engine.optimizer import Training
from katei.methods import BOOK, METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="poems-en")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    loaded = load_base(options.model)
    backbone = copy.deepcopy(loaded.model)
    base = Base(loaded.model, loaded.tokenizer)
    dataset = load_dataset(options.data)
    assert dataset.valid is not None

    def tokens(texts: tuple[str, ...], labels: tuple[int, ...], rows: int) -> Tokens:
        return Tokens(tuple(tuple(base.tokenize(text)) for text in texts[:rows]), labels[:rows])

    rows = tokens(dataset.train.texts, dataset.train.labels, options.rows)
    valid = tokens(dataset.valid.texts, dataset.valid.labels, max(1, options.rows // 3))
    training = Training(learning_rate=1e-4, epochs=1, weight_decay=0.01)
    trials = [Trial(name, METHODS[name](), 0, training, tuple(range(len(rows)))) for name in BOOK]

    def fresh() -> Lockstep:
        return Lockstep(base, trials, 2, rows, valid)

    def theirs() -> tuple[float, dict[str, float]]:
        began = fresh()  # for its initial values
        seconds, losses = 0.0, {}
        for state in began.states:
            run = train(backbone, state.trial, began.stacks[state.stack], state.n, rows, valid, None)
            seconds += run.seconds
            losses[state.trial.name] = run.valid_losses[-1]
        return seconds, losses

    def ours() -> tuple[float, dict[str, float]]:
        engine = fresh()
        started = time.perf_counter()
        engine.run()
        seconds = time.perf_counter() - started
        return seconds, {s.trial.name: s.epochs[-1].valid_loss or 0.0 for s in engine.states}

    ratios = []
    print(
        f"{options.model}, {options.data}: {len(rows)} training and {len(valid)} validation rows, batch 1, six methods"
    )
    for pair in range(options.pairs):
        their_seconds, their_losses = theirs()
        our_seconds, our_losses = ours()
        for name in BOOK:
            if abs(our_losses[name] - their_losses[name]) > 1e-3 * max(1.0, their_losses[name]):
                sys.exit(
                    f"{name}: validation loss {our_losses[name]:.6f} here, {their_losses[name]:.6f} there: not timed"
                )
        ratios.append(their_seconds / our_seconds)
        print(
            f"pair {pair + 1}: theirs {their_seconds:.1f} s, ours {our_seconds:.1f} s, ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(json.dumps({"ratio_median": round(statistics.median(ratios), 2), "ratios": [round(r, 2) for r in ratios]}))


if __name__ == "__main__":
    main()
