"""How far off is `katei plan`? Predicted against measured peaks on this machine's CPU, case by case.

    python -m benchmarks.plan_error [--quick] [--only PATTERN] [--shapes A,B] [--skip live|process] [--cases :63]

A case is a base's shape (random weights in a folder of their own), a method, a length profile, a batch size, a precision, a number of
trials, and whether layers are recomputed. Each is run in two fresh processes:

    live      the engine's training with a meter of this folder's own on every storage (`benchmarks.live`), which knows nothing of the
              planner's, beside the planner's live bytes
    process   `katei compare` on the same rows as files: the plan it made before loading anything, and the most resident memory it had,
              both as its run folder has them
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, SCRATCH, Figures, arguments, quantile, say

METHODS = ("lora", "adalora", "prompt-tuning", "p-tuning", "prefix-tuning", "ia3", "llama-adapter", "head", "full")
SHAPES = ("HuggingFaceTB/SmolLM2-360M", "llm-jp/llm-jp-3-440m", "Qwen/Qwen3-0.6B")
"""None of them was looked at while the planner was written: these were SmolLM2-135M, Gemma 3 270M and llm-jp-3-150m."""
LAYERS = 8
"""Of each shape, so that a case takes a minute here."""
PROFILES = ("short", "mixed", "long")
MANY = ("lora", "p-tuning", "ia3")
"""Methods, one per shape, of which 30 trials are trained together on rows of many lengths, as a tuned study does."""


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

    def lengths(self) -> list[int]:
        """Tokens of each training row, the same each time; validation and test rows are the same rows."""
        rng = random.Random(f"{self.shape}/{self.profile}")
        few, low, high = {"short": (9, 5, 25), "mixed": (6, 5, 200), "long": (3, 150, 300), "many": (24, 5, 25)}[
            self.profile
        ]
        return [rng.randint(low, high) for _ in range(few)]

    def texts(self) -> list[str]:
        """Digits: each is a token of the tokenizer beside these bases, which puts one more in front."""
        rng = random.Random(f"{self.shape}/{self.profile}/texts")
        return ["".join(rng.choice("0123456789") for _ in range(n - 1)) for n in self.lengths()]


def cases(shapes: Sequence[str], quick: bool) -> list[Case]:
    """Every method on every shape and profile, the other four drawn for each so that all their values occur."""
    rng = random.Random(4)
    found = []
    for shape in shapes:
        for method in METHODS:
            for profile in PROFILES:
                precision = "fp32" if method == "full" else rng.choice(("fp32", "fp32", "bf16"))  # bf16 is slow here
                trials = 1 if method == "full" or profile == "long" else rng.choice((1, 1, 3, 6))
                found.append(Case(shape, method, profile, rng.choice((1, 4)), precision, rng.random() < 0.3, trials))
    rng.shuffle(found)
    found += [Case(shape, method, "many", 1, "fp32", False, 30) for shape, method in zip(shapes, MANY, strict=False)]
    return found[:3] if quick else found


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
        assert config is not None
        config.num_hidden_layers = LAYERS
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:LAYERS]
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tiny_tokenizer(folder)
        model.save_pretrained(folder)
    return folder


def run_of(case: Case, folder: Path) -> Any:
    from katei.base.load import load_tokenizer
    from katei.engine.lockstep import Tokens, Trial
    from katei.engine.optimizer import Training
    from katei.methods import METHODS as ALL
    from katei.plan.plan import Run

    ids = load_tokenizer(str(folder))(case.texts())["input_ids"]
    assert [len(row) for row in ids] == case.lengths()
    rows = tuple(range(len(ids)))
    pool = Tokens(tuple(map(tuple, ids)), tuple(i % 3 for i in rows))
    method = ALL[case.method]()
    training = Training(learning_rate=1e-4, epochs=epochs(case), batch_size=case.batch_size)
    trials = tuple(Trial(f"{case.method}-{k}", method, k, training, rows, rows) for k in range(case.trials))
    return Run(trials, 3, pool, (), 1024, case.checkpointing)


def epochs(case: Case) -> int:
    return 2 if case.method == "adalora" else 1  # its ranks' schedule needs steps


def live(case: Case) -> dict[str, float]:
    """In a fresh process: the live bytes planned, and those of a real training."""
    from benchmarks.live import LiveBytes
    from katei.base.load import load_base, load_config
    from katei.base.packed import Base
    from katei.engine.lockstep import Lockstep
    from katei.plan.devices import find_device
    from katei.plan.plan import Planner

    folder = base_folder(case.shape)
    run = run_of(case, folder)
    with Planner(load_config(str(folder)), case.precision, find_device("cpu")) as planner:
        planned = planner.trace(run).live_peak_bytes
    base = Base(load_base(str(folder), precision=case.precision).model)
    weights = sum({t.data_ptr(): t.nbytes for t in base.frozen_tensors()}.values())
    with LiveBytes(base.frozen_tensors()) as meter:
        Lockstep(
            base,
            run.trials,
            run.classes,
            run.pool,
            token_budget=run.token_budget,
            checkpointing=run.checkpointing,
        ).run()
    return {"planned": planned, "measured": weights + meter.peak}


def process(case: Case) -> dict[str, float]:
    """In a fresh process: a whole study."""
    from katei import api

    folder = SCRATCH / "plan_error"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = [f"{text}\t{'abc'[i % 3]}" for i, text in enumerate(case.texts())]
    for split in ("train", "valid", "test"):
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    study = api.compare(
        folder,
        out=folder / "run",
        model=str(base_folder(case.shape)),
        methods=[case.method],
        seeds=case.trials,
        epochs=epochs(case),
        batch_size=case.batch_size,
        max_length=1000,
        precision=case.precision,
        checkpointing=case.checkpointing,
        references=["majority class"],
    )
    memory = study.environment["memory"]
    shutil.rmtree(folder)
    return {"planned": memory["planned_bytes"], "measured": memory["peak_bytes"]}


PARTS = {"live": live, "process": process}


def apart(case: Case, part: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.plan_error",
        "--part",
        json.dumps([asdict(case), part]),
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"plan_error: {case.name} failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part")
    parser.add_argument("--only", default="")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--skip", default="", choices=["", *PARTS])
    parser.add_argument("--cases", default=":", help="a slice, such as :63")
    options = parser.parse_args()
    if options.part:
        values, part = json.loads(options.part)
        print(json.dumps(PARTS[part](Case(**values))))
        return
    figures = Figures("plan", quick=options.quick)
    errors: dict[str, list[float]] = {part: [] for part in PARTS if part != options.skip}
    first, last = (int(n) if n else None for n in options.cases.split(":"))
    for case in cases(options.shapes.split(","), options.quick)[first:last]:
        if options.only not in case.name:
            continue
        base_folder(case.shape)
        said = []
        for part in errors:
            got = apart(case, part)
            error = got["planned"] / got["measured"] - 1
            errors[part].append(error)
            said.append(f"{part} {error:+.2%} of {got['measured'] / 2**20:,.0f} MiB")
            figures.add(f"{part} memory, planned ÷ measured - 1", "", [error], case=case.name)
        say(f"  {case.name}: {'; '.join(said)}")
    for part, values in errors.items():
        sizes = [abs(value) for value in values]
        exact = f"{sum(size == 0 for size in sizes)} of {len(sizes)} exact, " if part == "live" else ""
        mean, middle = sum(sizes) / len(sizes), quantile(sizes, 0.5)
        say(f"{part}: {exact}mean {mean:.2%}, median {middle:.2%}, worst {max(sizes):.2%}")


if __name__ == "__main__":
    main()
