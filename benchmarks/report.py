"""The table of the README and the pictures, from the newest rows of this machine.

python -m benchmarks.report [--quick]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from benchmarks.measure import RESULTS, SCRATCH, TARGETS, Row, Target, arguments, read_rows, say

THEIRS, OURS, BOUND, SOFT = "#c7673b", "#2f6f9f", "#777777", "#9cc3de"


def table(rows: list[Row]) -> str:
    """One line per target and case, in Markdown: p50, and p20 to p80 where there are several runs."""
    lines = ["| what | must reach | aim | measured | runs |", "|---|---|---|---|---|"]
    for target in TARGETS:
        found = [row for row in rows if (row.benchmark, row.metric) == (target.benchmark, target.metric)]
        sign = "≤" if target.at_most else "≥"
        aim = "" if target.aim is None else f"{target.aim:g}"
        for row in found:
            what = f"{target.what}, {row.case}" if row.case else target.what
            lines.append(f"| {what} | {sign} {target.must:g} | {aim} | {_measured(row, target)} | {row.runs} |")
        if not found:
            lines.append(f"| {target.what} | {sign} {target.must:g} | {aim} | not measured | |")
    for row in rows:
        if row.metric.endswith("ratio, full"):
            lines.append(f"| {row.benchmark}, {row.note} | | | {row.p50:.2f} | {row.runs} |")
    return "\n".join(lines)


def _measured(row: Row, target: Target) -> str:
    reached = row.p50 <= target.must if target.at_most else row.p50 >= target.must
    low, middle, high = (f"{round(value, 2) + 0.0:.2f}" for value in (row.p20, row.p50, row.p80))  # no -0.00
    spread = f" ({low} – {high})" if row.runs > 1 else ""
    return f"{'' if reached else '**not reached** '}{middle}{spread}"


# -------------------------------------------------------------------- pictures


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Each picture whose rows are there."""
    plt.rcParams.update(
        {
            "svg.hashsalt": "katei",  # the same rows, the same bytes
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": "#e5e5e5",
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )
    drawn = []
    for name, picture in {"book": book, "step": step, "memory": memory}.items():
        mine = [row for row in rows if row.benchmark == name]
        if not mine:
            continue
        figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
        picture(axes, mine)
        file = folder / f"{name}.svg"
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
        drawn.append(file)
    return drawn


def by_case(rows: list[Row], metric: str) -> dict[str, Row]:
    return {row.case: row for row in rows if row.metric == metric}


def by_count(rows: list[Row], metric: str) -> tuple[list[int], list[Row]]:
    found = sorted(
        (int(case.removeprefix("K=")), row) for case, row in by_case(rows, metric).items() if case[:2] == "K="
    )
    return [k for k, _ in found], [row for _, row in found]


def book(axes: Any, rows: list[Row]) -> None:
    """Time per method."""
    cases = by_case(rows, "seconds per training row")
    methods = [case.removeprefix("theirs, ") for case in cases if case.startswith("theirs, ")]
    together = cases["ours together"].p50
    alone = {method: cases[f"ours alone, {method}"].p50 for method in methods if f"ours alone, {method}" in cases}
    bars = {
        "peft + Trainer": ([cases[f"theirs, {m}"].p50 for m in methods], THEIRS),
        "katei, alone (a third of those rows)": ([alone.get(m, 0.0) for m in methods], SOFT),
        "katei, a sixth of six in lockstep": ([together] * len(methods), OURS),
    }
    for i, (label, (heights, colour)) in enumerate(bars.items()):
        drawn = axes.bar([x + (i - 1) * 0.27 for x in range(len(methods))], heights, 0.25, label=label, color=colour)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(range(len(methods)), methods)
    axes.set_ylabel("seconds per training row,\nevaluation included")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)
    axes.set_title(f"Time per method: {cases['ours together'].note}, batch 1", fontsize=10, loc="left")
    axes.legend(ncols=3, fontsize=8, loc="upper left")


def step(axes: Any, rows: list[Row]) -> None:
    """Cost against K."""
    counts, costs = by_count(rows, "seconds per trial-row")
    middle = [row.p50 for row in costs]
    axes.plot(counts, middle, "o-", color=OURS, label="training step, LoRA r = 1, AdamW included (p20 – p80)")
    axes.fill_between(counts, [row.p20 for row in costs], [row.p80 for row in costs], color=SOFT, alpha=0.5, lw=0)
    for k, value in zip(counts, middle, strict=True):
        axes.annotate(f"{value:.3f}", (k, value), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8)
    rate = by_case(rows, "roofline")[""].p50
    axes.axhline(costs[0].bound, color=BOUND, ls="--", label=f"all frozen products at the measured {rate:.0f} GFLOP/s")
    _counts_axis(axes, counts)
    axes.set_ylim(0, max(middle) * 1.2)
    axes.set_ylabel("seconds per trial-row")
    axes.set_title(
        f"Cost of a training step against the number of trials, {costs[0].note} a row", fontsize=10, loc="left"
    )
    axes.legend(fontsize=8)


def memory(axes: Any, rows: list[Row]) -> None:
    """Memory against K."""
    for metric, label, colour in (
        ("peak of the process", "peak of the process", OURS),
        ("live tensors", "live tensors at the peak, the base left out", SOFT),
    ):
        counts, found = by_count(rows, metric)
        axes.plot(counts, [row.p50 for row in found], "o-", color=colour, label=label)
    counts, batch = by_count(rows, "live tensors, one trial of K rows")
    _, trained = by_count(rows, "adapters, gradients, moments")
    needed = [b.p50 + t.p50 - trained[0].p50 for b, t in zip(batch, trained, strict=True)]
    axes.plot(
        counts, needed, "--", color=BOUND, label="the same rows as one trial's batch, + adapters, gradients, moments"
    )
    theirs = by_case(rows, "peak of the process").get("theirs, one LoRA run")
    if theirs is not None:
        axes.axhline(theirs.p50, color=THEIRS, ls=":", label="peak of the process, peft + Trainer, one LoRA run")
    axes.set_xlabel("trials together, K")
    axes.set_ylabel("MiB")
    axes.set_ylim(0)
    axes.set_title("Memory against the number of trials, LoRA r = 1, a row of 28 tokens each", fontsize=10, loc="left")
    axes.legend(fontsize=8)


def _counts_axis(axes: Any, counts: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(k) for k in counts])
    axes.minorticks_off()
    axes.set_xlabel("trials together, K (log scale)")


def main() -> None:
    options = arguments(__doc__).parse_args()
    folder = SCRATCH if options.quick else RESULTS
    rows = read_rows(folder)
    if not rows:
        raise SystemExit(f"no rows of this machine in {folder}: run `make bench` first")
    say(table(rows))
    say("\n" + "\n".join(str(file) for file in draw(rows, folder)))


if __name__ == "__main__":
    main()
