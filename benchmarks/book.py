"""The book's comparison: six methods, batch 1, evaluated each epoch, tested at the end. peft + Trainer ÷ katei, wall time.

    python -m benchmarks.book             2 epochs of 36 of the rows, three pairs; and each of our methods alone
    python -m benchmarks.book --full      the real thing once: 10 epochs, all rows; goes on where it was cut off

Settings are those of recipes/book.toml. Theirs trains one method after another, ours all six in lockstep.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from benchmarks.measure import ROOT, SCRATCH, Figures, arguments, commit, pairs, ratios
from benchmarks.sides import DATA, Side, Sides, Task, check, check_gently, loss_difference
from katei.engine.lockstep import Trial
from katei.study.recipe import load_recipe


def book_trials(rows: int, epochs: int) -> tuple[Trial, ...]:
    """The recipe's six, each on `rows` rows; `epochs` are the whole schedule."""
    recipe = load_recipe(ROOT / "recipes" / "book.toml", {})
    chosen = {name: recipe.resolved(name) for name in recipe.methods}
    return tuple(
        Trial(name, method, 0, replace(training, epochs=epochs), tuple(range(rows)))
        for name, (method, training) in chosen.items()
    )


def book_task(sides: Sides, rows: tuple[int, int, int], *, epochs: int, data: str = DATA) -> Task:
    """The six trials on the first `rows` of each split."""
    return Task(book_trials(rows[0], epochs), *sides.poems(*rows, data=data))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="10 epochs, all rows, one pair: about an hour on 2 cores")
    parser.add_argument("--data", default=DATA)
    options = parser.parse_args()
    figures = Figures("book", quick=options.quick)
    sides = Sides()
    if options.full:
        full(figures, sides, options.data)
        return
    n, rows = (1, (4, 2, 2)) if options.quick else (3, (36, 12, 12))
    check_gently(sides.theirs, sides.ours, book_task(sides, (3, 1, 1), epochs=2, data=options.data))

    task = book_task(sides, rows, epochs=2, data=options.data)
    note = f"{options.data}, {'/'.join(map(str, rows))} rows, 2 epochs"
    their_runs, our_runs = pairs(lambda: sides.theirs(task), lambda: sides.ours(task), n, check)
    figures.add("ratio", "×", ratios(their_runs, our_runs), case=options.data, note=note)
    if options.data != DATA:
        return
    for trial in task.trials:
        apart = [loss_difference(t, o, trial.name) for t, o in zip(their_runs, our_runs, strict=True)]
        figures.add("relative difference of validation losses", "", apart, case=trial.name, note=note)
    trained = 2 * rows[0]
    figures.add("seconds", "s", [side.seconds for side in their_runs], case="theirs", note=note)
    figures.add("seconds", "s", [side.seconds for side in our_runs], case="ours, six together", note=note)
    add_seconds_per_row(figures, their_runs, our_runs, trained, note)

    alone_rows = tuple(max(1, count // 3) for count in rows)
    alone = book_task(sides, alone_rows, epochs=2, data=options.data)  # type: ignore[arg-type]
    for trial in alone.trials:
        seconds = sides.ours(replace(alone, trials=(trial,))).seconds
        case = f"ours alone, {trial.name}"
        about = f"{options.data}, {'/'.join(map(str, alone_rows))} rows, 2 epochs"
        figures.add("seconds per training row", "s", [seconds / (2 * alone_rows[0])], case=case, note=about)


def add_seconds_per_row(figures: Figures, theirs: list[Side], ours: list[Side], trained: int, note: str) -> None:
    """Evaluation included: all seconds of a run ÷ the rows it trained on."""
    for name in theirs[0].seconds_of:
        values = [side.seconds_of[name] / trained for side in theirs]
        figures.add("seconds per training row", "s", values, case=f"theirs, {name}", note=note)
    together = [side.seconds / (trained * len(theirs[0].seconds_of)) for side in ours]
    figures.add("seconds per training row", "s", together, case="ours together", note=note)


def full(figures: Figures, sides: Sides, data: str) -> None:
    """One pair of all rows and epochs. Each part is kept as it comes, so that a run that is cut off loses one method at most."""
    task = book_task(sides, (162, 54, 54), epochs=10, data=data)
    file = SCRATCH / f"book-full-{data}-{commit()}.json"
    SCRATCH.mkdir(exist_ok=True)
    done: dict[str, Side] = _read(file)
    note = f"{data}, 162/54/54 rows, 10 epochs"
    if "ours" not in done:
        done["ours"] = sides.ours(task)
        _write(file, done)
        figures.add("seconds, full", "s", [done["ours"].seconds], case="ours, six together", note=note)
    theirs = Side()
    for trial in task.trials:
        if trial.name not in done:
            done[trial.name] = sides.theirs(task, [trial.name])
            _write(file, done)
            figures.add("seconds, full", "s", [done[trial.name].seconds], case=f"theirs, {trial.name}", note=note)
        one = done[trial.name]
        apart = loss_difference(one, done["ours"], trial.name)
        figures.add("relative difference of validation losses, full", "", [apart], case=trial.name, note=note)
        check(one, done["ours"])
        theirs.seconds += one.seconds
    figures.add("seconds, full", "s", [theirs.seconds], case="theirs, six one after another", note=note)
    figures.add("ratio, full", "×", ratios([theirs], [done["ours"]]), case=data, note=note)


def _read(file: Path) -> dict[str, Side]:
    done = {name: Side(**side) for name, side in json.loads(file.read_text()).items()} if file.exists() else {}
    for side in done.values():
        side.test_probabilities = {name: np.array(values) for name, values in side.test_probabilities.items()}
    return done


def _write(file: Path, done: dict[str, Side]) -> None:
    file.write_text(
        json.dumps({name: asdict(side) for name, side in done.items()}, default=lambda array: array.tolist())
    )


if __name__ == "__main__":
    main()
