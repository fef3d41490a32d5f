"""A/A: two copies of one method that differ in nothing but their seed, compared as `katei compare` compares two methods.

    python -m benchmarks.aa_study [--method lora] [--draws 20] [--epochs 3] [--quick]

Each draw is another stratified choice of rows (train 4 : test 1) out of all rows of the data, and two other seeds. All copies
of all draws train in one lockstep. A difference claimed (p < 0.05) in more than one of twenty draws would be one too many. Goes on
where it was cut off.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from benchmarks.measure import SCRATCH, Figures, arguments, say
from katei.data import load_dataset
from katei.engine.checkpoint import load_state, save_state
from katei.engine.lockstep import Lockstep, Tokens, Trial, TrialState
from katei.study.comparison import Difference, Outcome, Rows
from katei.study.recipe import Recipe
from katei.study.run import encode, open_base
from katei.study.statistics import compare_outcomes

MODEL = "gemma3-270m"
DATA = "poems-en"
SAVE_SECONDS = 60.0


def drawn(labels: tuple[int, ...], draw: int, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(train, test) of one draw: `rows` of all rows, a fifth of them test."""
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(labels))
    label_E = np.asarray(labels)
    train_rows = round(0.8 * rows)
    train, test = train_test_split(
        everything, train_size=train_rows, test_size=rows - train_rows, stratify=label_E, random_state=draw
    )
    return tuple(train.tolist()), tuple(test.tolist())


def run(engine: Lockstep, file: Path, name: str) -> None:
    """To the end, from where the file has it."""
    if file.exists():
        load_state(file, engine, name)
        say(f"  going on from step {max(state.step for state in engine.states)}")
    saved = time.monotonic()

    def watch(lockstep: Lockstep, ended: list[TrialState]) -> None:
        nonlocal saved
        if ended or time.monotonic() - saved > SAVE_SECONDS:
            save_state(file, lockstep, name)
            saved = time.monotonic()
        for state in ended:
            say(f"  {state.trial.name}: epoch {len(state.epochs)}, train loss {state.epochs[-1].train_loss:.3f}")

    engine.run(watch)


def compare_copies(engine: Lockstep, tests: list[tuple[int, ...]], labels: tuple[int, ...]) -> list[Difference]:
    """Of each draw's two copies, which stand side by side."""
    jobs = [(state, tests[i // 2]) for i, state in enumerate(engine.states)]
    answers = engine.probabilities(jobs)
    found = []
    for draw, test in enumerate(tests):
        copies = answers[2 * draw : 2 * draw + 2]
        outcomes = [Outcome(f"copy {c}", p_EC.argmax(1)[None], p_EC[None]) for c, p_EC in enumerate(copies)]
        rows = Rows(np.array([labels[row] for row in test]), tuple(map(str, sorted(set(labels)))))
        found.append(compare_outcomes(outcomes, rows).of("accuracy")[0])
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=270, help="of each draw, train and test together")
    options = parser.parse_args()
    draws, epochs, rows = (2, 1, 20) if options.quick else (options.draws, options.epochs, options.rows)
    figures = Figures("aa_study", quick=options.quick)
    dataset = load_dataset(options.data)
    base = open_base(options.model, "fp32", "auto", say)
    pool = Tokens((), ())
    for split in dataset.splits.values():
        pool += encode(base.tokenizer, split, 200, base.vocabulary)
    method, training = Recipe(model=options.model, data=options.data, methods=(options.method,)).resolved(
        options.method
    )
    training = replace(training, epochs=epochs)
    parts = [drawn(pool.labels, draw, min(rows, len(pool))) for draw in range(draws)]
    trials = [
        Trial(f"draw {draw}, copy {copy}", method, 2 * draw + copy, training, parts[draw][0])
        for draw in range(draws)
        for copy in range(2)
    ]
    engine = Lockstep(base, trials, len(dataset.label_names), pool)
    name = json.dumps([vars(options), dataset.sha256, base.fingerprint])
    SCRATCH.mkdir(exist_ok=True)
    file = SCRATCH / f"aa-{options.method}-{options.data}{'-quick' if options.quick else ''}.safetensors"
    run(engine, file, name)
    found = compare_copies(engine, [test for _, test in parts], pool.labels)
    claimed = [d.p < 0.05 for d in found]
    note = (
        f"{options.model}, {options.data}, {len(parts[0][0])} train and {len(parts[0][1])} test rows, {epochs} epochs"
    )
    case = f"{options.method}, {draws} draws"
    figures.add(
        "differences claimed", "draws", [float(sum(claimed))], case=case, bound=float(draws // 20 or 1), note=note
    )
    figures.add("difference in accuracy", "", [d.value for d in found], case=case, note=note)
    figures.add("p", "", [d.p for d in found], case=case, note=note)
    target = file.with_suffix(".json")
    target.write_text(json.dumps([asdict(d) for d in found], indent=1), encoding="utf-8")
    say(f"  every draw in {target}")
    file.unlink()


if __name__ == "__main__":
    main()
