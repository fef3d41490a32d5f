"""How a figure is taken and kept: alternating pairs, quantiles, one dated row per figure, and what each has to reach.

    benchmarks/results/DATE-MACHINE.csv    one row per figure, written as it is measured
    benchmarks/scratch/                    the same for --quick, and what a long run has done so far; git ignores it

Imports nothing slow: `startup` and the memory benchmark's parent process use it.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, TypeVar

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SCRATCH = Path(__file__).parent / "scratch"


@dataclass(frozen=True)
class Row:
    """One figure. Times in seconds, memory in MiB, ratios theirs ÷ ours unless the metric says otherwise."""

    date: str
    commit: str
    machine: str
    versions: str
    benchmark: str
    metric: str
    case: str
    unit: str
    p20: float
    p50: float
    p80: float
    runs: int
    bound: float | None
    """What the hardware or the other side allows, where there is such a figure."""
    note: str


@dataclass(frozen=True)
class Target:
    """What the figure `metric` of `benchmark` has to reach."""

    benchmark: str
    metric: str
    what: str
    must: float
    aim: float | None
    at_most: bool = False


TARGETS = (
    Target("book", "ratio", "six methods, batch 1, evaluated each epoch: peft + Trainer ÷ katei", 2.7, 3.3),
    Target("folds", "ratio", "5 folds × 6 methods = 30 trials: peft + Trainer ÷ katei", 3.0, 3.6),
    Target("batches", "ratio", "batch 8, mixed lengths, one LoRA trial: peft + Trainer ÷ katei", 1.5, 2.0),
    Target("top_layers", "ratio, one trial", "LLaMA-Adapter, top 8 layers, 10 epochs, one trial", 2.3, 3.0),
    Target("top_layers", "ratio, six seeds", "LLaMA-Adapter, top 8 layers, 10 epochs, six seeds", 5.0, 7.0),
    Target("step", "share of the roofline", "training step, K = 30: share of the GEMM roofline", 0.8, 0.9),
    Target("step", "share of the roofline, all products", "the same, counting every frozen product", 0.8, 0.9),
    Target("step", "K=30 ÷ K=1", "seconds per trial-row, K = 30 ÷ K = 1", 0.4, 0.36, at_most=True),
    Target("memory", "ratio", "peak memory, six trials ÷ peft + Trainer's one LoRA run", 1.15, 1.0, at_most=True),
    # "~ 0": eight bytes a trial, its running loss, are 0.00001
    Target(
        "memory", "remainder", "MiB per further trial beyond adapter, gradients, moments, activations", 0.001, 0, True
    ),
    Target("predict", "ratio", "predict, rows/s: katei ÷ transformers.pipeline at its best batch size", 2.0, 4.0),
    Target("startup", "katei --help", "`katei --help`, seconds", 0.3, None, at_most=True),
    Target("startup", "import katei", "`import katei`, seconds beyond bare Python", 0.1, None, at_most=True),
)


# -------------------------------------------------------------------- the machine


def cpu() -> str:
    """The processor's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), name)
    return f"{name}, {cores()} core{'s' if cores() > 1 else ''}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu()}, {memory:.0f} GiB"


def slug() -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in cpu().lower()).split())


def versions() -> str:
    packages = " ".join(f"{name} {version(name)}" for name in ("katei", "torch", "transformers", "peft"))
    return f"python {platform.python_version()} {packages}"


TIMED = ("src", "recipes", "constraints.txt", "benchmarks", ":!benchmarks/results", ":!benchmarks/*.md")


def commit() -> str:
    """Short hash of the last commit that changed what is timed or what times it, with + where tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *TIMED)
    return git("log", "-1", "--format=%h", "--", *TIMED) + ("+" if changed else "")


def peak_bytes() -> int:
    """The most memory this process has held. (On Linux `ru_maxrss` is handed down by the process that started this one.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -------------------------------------------------------------------- figures


def say(text: str) -> None:
    print(text, flush=True)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Figures:
    """Writes one benchmark's rows, each as soon as it is there."""

    def __init__(self, benchmark: str, *, quick: bool = False):
        self.benchmark = benchmark
        folder = SCRATCH if quick else RESULTS
        folder.mkdir(exist_ok=True)
        self.file = folder / f"{datetime.now():%Y-%m-%d}-{slug()}.csv"
        self.about = (commit(), machine(), versions())

    def add(
        self,
        metric: str,
        unit: str,
        values: Sequence[float],
        *,
        case: str = "",
        bound: float | None = None,
        note: str = "",
    ) -> None:
        date = datetime.now().isoformat(timespec="seconds")
        p20, p50, p80 = (float(f"{quantile(values, share):.5g}") for share in (0.2, 0.5, 0.8))
        bound = None if bound is None else float(f"{bound:.5g}")
        row = Row(date, *self.about, self.benchmark, metric, case, unit, p20, p50, p80, len(values), bound, note)
        new = not self.file.exists()
        with self.file.open("a", newline="", encoding="utf-8") as sink:
            writer = csv.DictWriter(sink, [field.name for field in fields(Row)], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(asdict(row))
        spread = f" ({p20:g} – {p80:g}, {len(values)} runs)" if len(values) > 1 else ""
        ceiling = "" if bound is None else f", bound {bound:g}"
        say(f"  {' · '.join(filter(None, (self.benchmark, metric, case)))}: {p50:g} {unit}{spread}{ceiling}")


def read_rows(folder: Path) -> list[Row]:
    """The newest row of each figure in `folder`, from this machine."""
    newest: dict[tuple[str, str, str], Row] = {}
    for file in sorted(folder.glob(f"*-{slug()}.csv")):
        with file.open(newline="", encoding="utf-8") as source:
            for line in csv.DictReader(source):
                numbers = {name: float(line[name]) for name in ("p20", "p50", "p80")}
                bound = float(line["bound"]) if line["bound"] else None
                row = Row(**{**line, **numbers, "runs": int(line["runs"]), "bound": bound})  # type: ignore[arg-type]
                newest[row.benchmark, row.metric, row.case] = row
    return list(newest.values())


class Timed(Protocol):
    @property
    def seconds(self) -> float: ...


Theirs = TypeVar("Theirs", bound=Timed)
Ours = TypeVar("Ours", bound=Timed)


def pairs(
    theirs: Callable[[], Theirs], ours: Callable[[], Ours], n: int, check: Callable[[Theirs, Ours], None]
) -> tuple[list[Theirs], list[Ours]]:
    """Theirs, ours, theirs, ours …: n times each. `check` ends the program where the two do not agree."""
    their_runs, our_runs = [], []
    for number in range(1, n + 1):
        their_run, our_run = theirs(), ours()
        check(their_run, our_run)
        their_runs.append(their_run)
        our_runs.append(our_run)
        ratio = their_run.seconds / our_run.seconds
        say(
            f"  pair {number} of {n}: theirs {their_run.seconds:.2f} s, ours {our_run.seconds:.2f} s, ratio {ratio:.2f}"
        )
    return their_runs, our_runs


def ratios(theirs: Sequence[Timed], ours: Sequence[Timed]) -> list[float]:
    return [t.seconds / o.seconds for t, o in zip(theirs, ours, strict=True)]


def arguments(about: str | None) -> argparse.ArgumentParser:
    """--quick, which every benchmark has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rows, once: does it run? Kept apart in scratch/")
    return parser
