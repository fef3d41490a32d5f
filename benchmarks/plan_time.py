"""How long does an epoch take, and how long did `katei plan` say it would? On real bases, on this machine's CPU, with nothing else running.

    python -m benchmarks.plan_time [--quick] [--own]

Three times over, each case is calibrated anew (two seconds), predicted, then trained for one epoch and its evaluation. And what
planning itself takes, in seconds and memory of all its processes: all methods of a 1.8 B base for an 8 GB card (`--own`: that alone).
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import torch

from benchmarks.measure import Figures, arguments, quantile, say
from katei.base.load import load_config, load_tokenizer
from katei.base.packed import Base
from katei.data import load_dataset
from katei.engine.lockstep import Lockstep, Tokens, Trial
from katei.engine.optimizer import Training
from katei.methods import METHODS
from katei.plan.devices import find_device
from katei.plan.plan import Planner, Run
from katei.plan.time import calibrate
from katei.study.run import open_base

BASES = (("smollm2", "poems-en"), ("gemma3-270m", "poems"))
CASES = (
    ("lora", 1, 1),
    ("lora", 6, 1),
    ("lora", 1, 8),
    ("adalora", 2, 2),
    ("prompt-tuning", 3, 1),
    ("p-tuning", 1, 1),
    ("prefix-tuning", 3, 1),
    ("ia3", 1, 1),
    ("llama-adapter", 2, 4),
    ("head", 1, 4),
)
"""Method, trials in lockstep, batch size."""
TRAIN, VALID = 24, 8
"""Rows."""
ROUNDS = 3
"""Of each case, whose error is their median: machines are noisy."""
BIG = "llm-jp/llm-jp-3-1.8b"


def rows_of(data: str, tokenizer: Any) -> tuple[Tokens, tuple[int, ...], tuple[int, ...]]:
    pool, places = Tokens((), ()), {}
    for name, most in (("train", TRAIN), ("valid", VALID)):
        split = load_dataset(data).splits[name]
        ids = tokenizer(list(split.texts[:most]))["input_ids"]
        places[name] = tuple(range(len(pool), len(pool) + len(ids)))
        pool += Tokens(tuple(map(tuple, ids)), split.labels[:most])
    return pool, places["train"], places["valid"]


def epoch(base: Base, run: Run) -> float:
    engine = Lockstep(base, run.trials, run.classes, run.pool, token_budget=run.token_budget)
    engine.fill_cache()
    started = time.perf_counter()
    while not all(state.epochs for state in engine.states):
        engine.tick()
    return time.perf_counter() - started


def own_cost(figures: Figures) -> None:
    """Proportional set sizes are added, so that what forked processes share counts once."""
    import psutil

    methods = ",".join(METHODS)
    command = [sys.executable, "-W", "ignore", "-m", "katei.cli", "plan", "--tokens", "60", "--model", BIG]
    command += ["--device", "rtx2070", "--method", methods]
    took, most = [], 0
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        took.append(time.perf_counter() - started)
    planning = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # once more: being looked at takes time
    whole = psutil.Process(planning.pid)
    while planning.poll() is None:
        with suppress(psutil.Error):
            most = max(most, sum(p.memory_full_info().pss for p in [whole, *whole.children(recursive=True)]))
        time.sleep(0.05)
    case = f"{BIG}, {len(METHODS)} methods, rtx2070"
    figures.add("planning itself", "s", took, case=case, bound=20)
    figures.add("planning itself, memory", "GiB", [most / 2**30], case=case, bound=1.5)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--own", action="store_true")
    options = parser.parse_args()
    figures = Figures("plan", quick=options.quick)
    if not options.quick:
        own_cost(figures)
    if options.own:
        return
    cpu, errors = find_device("cpu"), []
    for model, data in BASES[:1] if options.quick else BASES:
        config, tokenizer = load_config(model), load_tokenizer(model)
        base = open_base(model, "fp32", "cpu", lambda text: None, tokenizer)
        pool, train, valid = rows_of(data, tokenizer)
        for name, count, batch_size in CASES[:2] if options.quick else CASES:
            training = Training(learning_rate=1e-4, epochs=2, batch_size=batch_size)
            trials = tuple(Trial(f"{name}-{k}", METHODS[name](), k, training, train, valid) for k in range(count))
            run = Run(trials, 2, pool)
            found, took = [], []
            for _ in range(ROUNDS):
                machine = calibrate(config, torch.float32, torch.device("cpu"))
                with Planner(config, "fp32", cpu, 0, machine) as planner:
                    planned = planner.seconds(run)
                assert planned is not None
                took.append(epoch(base, run))
                found.append(planned / took[-1] - 1)
            case, note = f"{model}, {name}, {count} trials, batch {batch_size}", f"{quantile(took, 0.5):.3f} s"
            figures.add("seconds of an epoch, planned ÷ measured - 1", "", found, case=case, note=note)
            errors.append(found)
    for what, sizes in (
        ("cases", [abs(quantile(found, 0.5)) for found in errors]),
        ("epochs, each by itself", [abs(error) for found in errors for error in found]),
    ):
        within = sum(size <= 0.25 for size in sizes)
        say(f"{within} of {len(sizes)} {what}, within 25 %; median {quantile(sizes, 0.5):.0%}, worst {max(sizes):.0%}")


if __name__ == "__main__":
    main()
