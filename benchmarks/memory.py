"""How much memory a whole process holds at its peak, and what each further trial adds.

    python -m benchmarks.memory [--quick]

Six trials of the book's comparison together ÷ peft + Trainer's one LoRA run: each a fresh process that loads the base as its users
do, takes ten training steps on the longest rows of the data (those with the most activations) and evaluates all validation rows.

Then K LoRA trials, one row of 28 tokens each, counted to the byte: the peak of live tensors (the base left out) beside that of
one trial with K rows a step, which has the same activations. What K trials hold beyond that and beyond their adapters, gradients
and two moments (4 numbers of 4 bytes for each trained one) is the remainder; it should be nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.measure import ROOT, Figures, arguments, peak_bytes, say

if TYPE_CHECKING:
    from katei.engine.lockstep import Tokens

MIB = 2**20
MODEL, DATA = "smollm2", "poems-en"
STEPS = 10
"""Of the six trials and of theirs. After 54 steps the peaks are 3 % (ours) and 1 % (theirs) higher."""
CURVE_STEPS = 2
"""Of the K trials; one gives the same live bytes."""


def part(name: str) -> Any:
    """Run one part of this file in a process of its own; what it prints last is its answer."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--part", name]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"memory: {' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


# -------------------------------------------------------------------- parts, each in a fresh process


def longest_rows(tokenizer: Any) -> tuple[Tokens, Tokens]:
    """The longest training rows, one for each step, and all validation rows."""
    from katei.data import load_dataset
    from katei.engine.lockstep import Tokens

    dataset = load_dataset(DATA)
    assert dataset.valid is not None
    train, valid = (
        Tokens(tuple(tuple(row) for row in tokenizer(list(split.texts))["input_ids"]), split.labels)
        for split in (dataset.train, dataset.valid)
    )
    longest = sorted(range(len(train)), key=lambda i: len(train.ids[i]))[-STEPS:]
    return Tokens(tuple(train.ids[i] for i in longest), tuple(train.labels[i] for i in longest)), valid


def ours() -> dict[str, float]:
    from benchmarks.book import book_trials
    from katei.base.load import load_base
    from katei.base.packed import Base
    from katei.engine.lockstep import Lockstep

    loaded = load_base(MODEL)
    base = Base(loaded.model, loaded.tokenizer)
    after_loading = peak_bytes()
    train, valid = longest_rows(loaded.tokenizer)
    Lockstep.on_split(base, book_trials(STEPS, 1), 2, train, valid).run()
    return {"loaded": after_loading, "peak": peak_bytes()}


def theirs() -> dict[str, float]:
    import torch
    from peft import get_peft_model
    from tests.helpers.peft_reference import peft_config
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from benchmarks.book import book_trials
    from benchmarks.reference import fit
    from katei.base.load import resolve_base

    path = resolve_base(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)
    classifier.config.pad_token_id = 0
    after_loading = peak_bytes()
    trial = next(trial for trial in book_trials(STEPS, 1) if trial.name == "lora")
    model = get_peft_model(classifier, peft_config(trial.method, trial.total_steps))
    fit(model, trial, *longest_rows(tokenizer), None)
    return {"loaded": after_loading, "peak": peak_bytes()}


def same() -> dict[str, float]:
    """The same losses?"""
    from benchmarks.book import book_task
    from benchmarks.sides import Sides, check_gently

    sides = Sides()
    check_gently(sides.theirs, sides.ours, book_task(sides, (2, 1, 1), epochs=1))
    return {}


def process(trials: int) -> dict[str, float]:
    """The peak of a process that trains `trials` LoRA trials for a few steps."""
    from benchmarks.step import lora_task
    from katei.base.load import load_base
    from katei.base.packed import Base
    from katei.engine.lockstep import Lockstep

    base = Base(load_base(MODEL).model)
    task = lora_task(base, trials)
    engine = Lockstep.on_split(base, task.trials, 2, task.train, None)
    for _ in range(CURVE_STEPS):
        engine.tick()
    return {"peak": peak_bytes()}


def live(counts: list[int]) -> list[dict[str, float]]:
    """Peaks of live tensors: K trials of one row, one trial of K rows."""
    from benchmarks.live import LiveBytes
    from benchmarks.step import lora_task
    from katei.base.load import load_base
    from katei.base.packed import Base
    from katei.engine.lockstep import Lockstep

    base = Base(load_base(MODEL).model)

    def peak(trials: int, rows: int) -> tuple[int, int]:
        task = lora_task(base, trials, rows=max(counts), batch_size=rows)
        with LiveBytes() as meter:
            engine = Lockstep.on_split(base, task.trials, 2, task.train, None)
            engine.tick()
        return meter.peak, 16 * trials * engine.stacks[0].numbers

    peak(1, 1)  # what the base keeps from its first step on is nobody's extra
    found = []
    for k in counts:
        (together, trained), (batch, _) = peak(k, 1), peak(1, k)
        found.append({"k": k, "together": together, "batch": batch, "trained": trained})
    return found


# -------------------------------------------------------------------- the figures


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", help="for this file's own use")
    options = parser.parse_args()
    counts = [1, 6] if options.quick else [1, 2, 6, 12, 30, 60, 100]
    if options.part:
        name, _, value = options.part.partition(":")
        calls = {
            "ours": ours,
            "theirs": theirs,
            "same": same,
            "process": lambda: process(int(value)),
            "live": lambda: live([int(k) for k in value.split(",")]),
        }
        print(json.dumps(calls[name]()))
        return
    figures = Figures("memory", quick=options.quick)
    n = 1 if options.quick else 3
    say("  the same losses?")
    part("same")
    runs = [(part("theirs"), part("ours")) for _ in range(n)]
    note = f"{STEPS} steps on the longest rows of {DATA}, then all validation rows"
    figures.add("ratio", "", [o["peak"] / t["peak"] for t, o in runs], note="ours ÷ theirs")
    for case, which in (("theirs, one LoRA run", 0), ("ours, six together", 1)):
        figures.add("peak of the process", "MiB", [pair[which]["peak"] / MIB for pair in runs], case=case, note=note)
        figures.add("peak while loading", "MiB", [pair[which]["loaded"] / MIB for pair in runs], case=case)

    curve = part(f"live:{','.join(map(str, counts))}")
    for point in curve:
        case = f"K={point['k']}"
        figures.add("live tensors", "MiB", [point["together"] / MIB], case=case, note="the base left out")
        figures.add("live tensors, one trial of K rows", "MiB", [point["batch"] / MIB], case=case)
        figures.add("adapters, gradients, moments", "MiB", [point["trained"] / MIB], case=case)
        figures.add("peak of the process", "MiB", [part(f"process:{point['k']}")["peak"] / MIB], case=case)
    alone = curve[0]["trained"]
    for point in curve[1:]:
        extra = point["together"] - point["batch"] - (point["trained"] - alone)
        remainder = extra / MIB / (point["k"] - 1)
        figures.add("remainder per further trial", "MiB", [remainder], case=f"K={point['k']}", bound=0.0)
    figures.add("remainder", "MiB", [remainder], note=f"per further trial, K={counts[-1]}", bound=0.0)


if __name__ == "__main__":
    main()
