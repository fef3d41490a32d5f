"""Kernel launches per trained row: what a small base on a GPU waits for. Counted on a CPU, in the ways that a GPU's tensors take.

    python -m benchmarks.launches [--quick]

Ours is one step of the tuned grid, 5 folds × (six methods and the head) × 8 settings: as on a CPU (adapter by adapter), and as on a GPU
(adapters together). Theirs is peft + Trainer, one row more of each method: forward, backward, AdamW, schedule, logging. Calls that
only make a view launch nothing and are left out. A count is no time: none of this has been timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import Figures, arguments
from benchmarks.sides import DATA, MODEL, Sides, Task
from katei.base import ops
from katei.data import load_dataset
from katei.engine.lockstep import Lockstep, Tokens, Trial
from katei.methods import BOOK
from katei.study.design import design_study
from katei.study.recipe import Recipe
from katei.study.run import encode
from katei.study.trials import planned_trials

VIEWS = (
    "alias as_strided detach expand lift_fresh permute select slice split split_with_sizes squeeze t transpose unbind "
    "unflatten unfold unsqueeze view"
)


class Launches(TorchDispatchMode):
    """Counts the calls inside that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += f.overloadpacket.__name__ not in VIEWS.split()
        return f(*args, **(kwargs or {}))


def launches(work: Callable[[], object]) -> int:
    with Launches() as counter:
        work()
    return counter.count


def ours(sides: Sides, folds: int, tune: int, kind: str) -> float:
    """Of the grid's second step, per row."""
    recipe = Recipe(data=DATA, model=MODEL, methods=BOOK, folds=folds, tune=tune)
    dataset = load_dataset(DATA)
    design = design_study(recipe, {n: split.labels for n, split in dataset.splits.items()}, dataset.label_names)
    pool = Tokens((), ())
    for split in dataset.splits.values():
        pool += encode(sides.base.tokenizer, split, recipe.max_length, sides.base.vocabulary)
    trials = [planned.trial for planned in planned_trials(recipe, design)]
    with ops.planned(kind):
        engine = Lockstep(sides.base, trials, len(dataset.label_names), pool, token_budget=100_000)
        engine.step()
        return launches(engine.step) / len(trials)


def theirs(sides: Sides, name: str) -> float:
    """Of one row more."""
    method, training = Recipe(data=DATA, model=MODEL, methods=BOOK).resolved(name)
    split = load_dataset(DATA).train
    ids = tuple(tuple(sides.base.tokenize(text)) for text in split.texts[:6])
    found = []
    for rows in (2, 6):
        one = replace(training, epochs=1, patience=0, keep="last")
        trial = Trial(name, method, 0, one, tuple(range(rows)))
        task = Task((trial,), Tokens(ids[:rows], split.labels[:rows]), Tokens(ids[:1], split.labels[:1]))
        found.append(launches(lambda task=task: sides.theirs(task)))
    return (found[1] - found[0]) / 4


def main() -> None:
    options = arguments(__doc__).parse_args()
    figures = Figures("launches", quick=options.quick)
    sides = Sides(MODEL)
    folds, tune = (2, 2) if options.quick else (5, 8)
    each = [theirs(sides, name) for name in BOOK]
    for name, count in zip(BOOK, each, strict=True):
        figures.add("launches per trained row", "1", [count], case=f"theirs, {name}")
    for kind in ("cpu", "cuda"):
        count = ours(sides, folds, tune, kind)
        case = f"ours, {folds} folds × 6 methods and the head × {tune} settings, the way of {kind}"
        figures.add("launches per trained row", "1", [count], case=case)
        figures.add("ratio", "×", [sum(each) / len(each) / count], case=case, note="mean of the six methods ÷ ours")


if __name__ == "__main__":
    main()
