"""How far off is `katei plan`? Predicted against measured peaks on this machine's CPU, case by case.

    python -m benchmarks.plan_error [--quick] [--only PATTERN]

A case is a base's shape (random weights in a folder of their own), a method, a length profile, a batch size, a precision, a number of
trials, and whether layers are recomputed. Each is planned in this process, then trained for an epoch in two fresh ones:

    live      with a meter of this folder's own on every storage (`benchmarks.live`), which knows nothing of the planner's
    process   without it: the most resident memory the process ever had

and, of the second, the seconds of the epoch against the predicted ones.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, SCRATCH, Figures, arguments, peak_bytes, quantile, say

METHODS = ("lora", "adalora", "prompt-tuning", "p-tuning", "prefix-tuning", "ia3", "llama-adapter", "head", "full")
SHAPES = ("HuggingFaceTB/SmolLM2-360M", "llm-jp/llm-jp-3-440m", "Qwen/Qwen3-0.6B")
"""None of them was looked at while the planner was written: these were SmolLM2-135M, Gemma 3 270M and llm-jp-3-150m."""
PROFILES = ("short", "mixed", "long")


@dataclass(frozen=True)
class Case:
    shape: str
    method: str
    profile: str
    batch_size: int
    precision: str
    checkpointing: bool
    trials: int

    @property
    def name(self) -> str:
        more = (", recomputed" if self.checkpointing else "") + (f", {self.trials} trials" if self.trials > 1 else "")
        what = f"{self.shape.split('/')[1]}, {self.method}, {self.profile}, batch {self.batch_size}, {self.precision}"
        return what + more

    def rows(self, vocabulary: int) -> tuple[list[list[int]], list[int]]:
        """Random ids: 12 to train on, the same each time."""
        rng = random.Random(f"{self.shape}/{self.profile}")
        bounds = {"short": (5, 25), "mixed": (5, 200), "long": (150, 300)}[self.profile]
        ids = [[rng.randrange(3, vocabulary) for _ in range(rng.randint(*bounds))] for _ in range(12)]
        return ids, [i % 3 for i in range(12)]


def cases(quick: bool) -> list[Case]:
    """Every method on every shape and profile, the other four drawn for each so that all their values occur."""
    rng = random.Random(4)
    found = []
    for shape in SHAPES:
        for method in METHODS:
            for profile in PROFILES:
                precision = "fp32" if method == "full" else rng.choice(("fp32", "fp32", "bf16"))
                trials = 1 if method == "full" else rng.choice((1, 1, 3, 8))
                found.append(Case(shape, method, profile, rng.choice((1, 4)), precision, rng.random() < 0.3, trials))
    return found[::27] if quick else found


# -------------------------------------------------------------------- one case


def base_folder(shape: str) -> Path:
    """Random weights of this shape on the disk, made once."""
    import torch
    from tests.helpers.tiny import tiny_tokenizer
    from transformers import AutoModelForCausalLM

    from katei.plan.shapes import bundled

    folder = SCRATCH / "bases" / hashlib.sha256(shape.encode()).hexdigest()[:8]
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        config = bundled(shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tiny_tokenizer(folder)
        model.save_pretrained(folder)
    return folder


def run_of(case: Case, vocabulary: int) -> Any:
    from katei.engine.lockstep import Tokens, Trial
    from katei.engine.optimizer import Training
    from katei.methods import METHODS as ALL
    from katei.plan.plan import Run

    ids, labels = case.rows(vocabulary)
    tokens = Tokens(tuple(map(tuple, ids)), tuple(labels))
    method = ALL[case.method]()
    epochs = 2 if case.method == "adalora" else 1
    training = Training(learning_rate=1e-4, epochs=epochs, batch_size=case.batch_size)
    trials = tuple(Trial(f"{case.method}-{k}", method, k, training, tuple(range(len(ids)))) for k in range(case.trials))
    return Run(trials, 3, tokens, tokens, 1024, case.checkpointing)


def train(case: Case, metered: bool) -> dict[str, float]:
    """In a fresh process: an epoch, as `katei train` does it."""
    import time

    from benchmarks.live import LiveBytes
    from katei.base.load import load_base
    from katei.base.packed import Base
    from katei.engine.lockstep import Lockstep

    resident = peak_bytes()
    loaded = load_base(str(base_folder(case.shape)), precision=case.precision)
    loaded_peak = peak_bytes()
    base = Base(loaded.model, loaded.tokenizer)
    run = run_of(case, base.vocabulary)
    weights = sum({t.data_ptr(): t.nbytes for t in base.frozen_tensors()}.values())
    meter = LiveBytes(base.frozen_tensors())

    def go() -> None:
        engine = Lockstep.on_split(
            base,
            run.trials,
            run.classes,
            run.train,
            run.valid,
            token_budget=run.token_budget,
            checkpointing=run.checkpointing,
        )
        engine.run()

    started = time.perf_counter()
    if metered:
        with meter:
            go()
    else:
        go()
    seconds = time.perf_counter() - started
    return {
        "live": weights + meter.peak,
        "process": peak_bytes(),
        "seconds": seconds,
        "resident": resident,
        "loaded": loaded_peak,
    }


def apart(case: Case, metered: bool) -> dict[str, float]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.plan_error",
        "--part",
        json.dumps([asdict(case), metered]),
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"plan_error: {case.name} failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if options.part:
        values, metered = json.loads(options.part)
        print(json.dumps(train(Case(**values), metered)))
        return
    from katei.base.load import load_config
    from katei.plan.devices import find_device
    from katei.plan.plan import Planner

    figures = Figures("plan", quick=options.quick)
    live_errors, process_errors = [], []
    for case in cases(options.quick):
        if options.only not in case.name:
            continue
        base_folder(case.shape)
        live = apart(case, True)
        process = apart(case, False)
        config = load_config(str(base_folder(case.shape)))
        with Planner(config, case.precision, find_device("cpu"), int(process["resident"])) as planner:
            trace = planner.trace(run_of(case, int(config.vocab_size)))
        live_error = trace.live_peak_bytes / live["live"] - 1
        process_error = planner.need(trace) / process["process"] - 1
        live_errors.append(abs(live_error))
        process_errors.append(abs(process_error))
        say(
            f"  {case.name}: live {trace.live_peak_bytes:,} of {live['live']:,.0f} ({live_error:+.2%}); process {process_error:+.1%} "
            f"of {process['process'] / 2**20:,.0f} MiB, {trace.where}"
        )
        figures.add("live bytes, predicted ÷ measured - 1", "", [live_error], case=case.name)
        figures.add("process memory, predicted ÷ measured - 1", "", [process_error], case=case.name)
    exact = sum(error == 0 for error in live_errors)
    say(f"{exact} of {len(live_errors)} exact to the byte, worst {max(live_errors):.2%}")
    mean = sum(process_errors) / len(process_errors)
    say(f"process memory: mean {mean:.1%}, median {quantile(process_errors, 0.5):.1%}, worst {max(process_errors):.1%}")


if __name__ == "__main__":
    main()
