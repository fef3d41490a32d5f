"""Which learning rate should be each method's default? Chosen by validation loss; test rows are never read.

    python benchmarks/tune_defaults.py [--model gemma3-270m] [--data poems] [--epochs 3]

Trains every method at several rates in lockstep and prints one line per trial; docs/methods.md holds the table this printed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from katei.base.load import load_base
from katei.base.packed import Base
from katei.data import load_dataset
from katei.engine.lockstep import Lockstep, Tokens, Trial
from katei.engine.optimizer import Training
from katei.methods import METHODS, PromptTuning
from katei.methods.contract import Method

GRID: list[tuple[Method, tuple[float, ...]]] = [
    (METHODS["lora"](), (1e-4, 3e-4, 1e-3, 3e-3)),
    (METHODS["adalora"](), (3e-4, 1e-3, 3e-3, 1e-2)),
    (METHODS["prompt-tuning"](), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    (PromptTuning(init="vocabulary"), (1e-2, 3e-2, 1e-1)),
    (METHODS["p-tuning"](), (3e-4, 1e-3, 3e-3)),
    (METHODS["ia3"](), (1e-3, 3e-3, 1e-2, 3e-2)),
    (METHODS["llama-adapter"](), (1e-3, 3e-3, 1e-2, 3e-2)),
    (METHODS["prefix-tuning"](), (1e-3, 1e-2, 1e-1)),
    (METHODS["head"](), (1e-4, 1e-3, 1e-2)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--data", default="poems")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    loaded = load_base(options.model)
    base = Base(loaded.model, loaded.tokenizer)
    dataset = load_dataset(options.data)
    assert dataset.valid is not None

    def tokens(split) -> Tokens:
        return Tokens(tuple(tuple(base.tokenize(text, 64)) for text in split.texts), split.labels)

    train, valid = tokens(dataset.train), tokens(dataset.valid)
    training = Training(learning_rate=1.0, epochs=options.epochs, weight_decay=0.01)
    trials = []
    for method, rates in GRID:
        if method.name not in options.methods.split(","):
            continue
        label = f"{method.name} (vocabulary)" if method == PromptTuning(init="vocabulary") else method.name
        for rate in rates:
            for seed in range(options.seeds):
                trials.append(
                    Trial(
                        f"{label} {rate:g} seed {seed}",
                        method,
                        seed,
                        replace(training, learning_rate=rate),
                        tuple(range(len(train))),
                    )
                )
    lockstep = Lockstep.on_split(base, trials, len(dataset.label_names), train, valid)
    print(f"{options.model}, {options.data}: {len(train)} train, {len(valid)} valid rows, {options.epochs} epochs")
    print(
        "| method, rate | train loss | valid loss | valid ROC AUC | valid accuracy | best epoch |\n|---|---|---|---|---|---|",
        flush=True,
    )
    lockstep.run(
        lambda engine, ended: (
            print(f"epoch {ended[0].epochs[-1].epoch}", file=sys.stderr, flush=True) if ended else None
        )
    )
    for state in lockstep.states:
        last = state.epochs[-1]
        print(
            f"| {state.trial.name} | {last.train_loss:.3f} | {last.valid_loss:.3f} | {last.valid_roc_auc:.3f} "
            f"| {last.valid_accuracy:.3f} | {state.best_epoch} |"
        )


if __name__ == "__main__":
    main()
