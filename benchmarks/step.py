"""What one training step costs, K trials together, against the best the processor can do with products of this model's shapes.

    python -m benchmarks.step [--quick]
    python -m benchmarks.step --profile     where a step of 30 trials spends its time

K LoRA trials (r = 1 on q and v), one row of 28 random tokens each, AdamW included. In every round each K takes steps and the
roofline is measured again: the fastest of several ways to multiply a tall float32 matrix by one of the model's own.

    work, all      4 · numbers of the linear weights · tokens: forward, and back to each layer's inputs
    work, needed   without what no loss depends on: in the last layer only pooled tokens need q, o and the MLP, and nothing
                   below the lowest adapter needs a gradient (inputs of q, k and v in layer 0)
    share          work ÷ (seconds × rate)
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Figures, arguments, quantile, say
from benchmarks.sides import CLASSES, Sides, Task, check_gently
from katei.base.packed import Base
from katei.engine.lockstep import Lockstep, Tokens, Trial
from katei.engine.optimizer import Training
from katei.methods import METHODS

TOKENS = 28
ROWS = 64
TALL = (840, 1680)
"""Rows of the roofline's products: 30 and 60 trials' tokens."""


def lora_task(base: Base, trials: int, *, rows: int = ROWS, batch_size: int = 1, epochs: int = 100_000) -> Task:
    """`trials` LoRA trials of their own seeds on random rows of 28 tokens."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(100, base.vocabulary, (rows + 4, TOKENS), generator=rng).tolist()
    labels = tuple(i % CLASSES for i in range(rows + 4))
    training = Training(learning_rate=1e-4, epochs=epochs, batch_size=batch_size, weight_decay=0.01)
    method = METHODS["lora"](rank=1)  # type: ignore[call-arg]
    made = tuple(Trial(f"lora {seed}", method, seed, training, tuple(range(rows))) for seed in range(trials))
    whole = tuple(map(tuple, ids))
    return Task(made, Tokens(whole[:rows], labels[:rows]), Tokens(whole[rows:], labels[rows:]))


def work(base: Base, lowest: int = 0) -> tuple[float, float]:
    """Floating-point operations of one row's frozen products, (all, needed), for LoRA on q and v from layer `lowest` on."""
    every = needed = 0.0
    for site in base.sites.values():
        forward = 2.0 * site.inputs * site.outputs * TOKENS
        every += 2 * forward
        pooled_only = site.layer == base.depth - 1 and site.leaf not in ("k_proj", "v_proj")
        share = 1 / TOKENS if pooled_only else 1.0
        has_backward = site.layer > lowest or (site.layer == lowest and site.leaf not in ("q_proj", "k_proj", "v_proj"))
        needed += forward * share * (1 + has_backward)
    return every, needed


def ways() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """How a (T, I) times an (O, I) matrix can be multiplied here."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "F.linear": F.linear,
        "x @ wᵀ, w stored transposed": lambda x, w: x @ w,
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["oneDNN"] = lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return found


def roofline(base: Base) -> tuple[float, str]:
    """The highest rate of any way and shape, in operations per second, and which it was."""
    shapes = sorted({(site.outputs, site.inputs) for site in base.sites.values() if site.layer == 0})
    best = (0.0, "")
    with torch.no_grad():
        for tall in TALL:
            for outputs, inputs in shapes:
                x, w = torch.randn(tall, inputs), torch.randn(outputs, inputs)
                for name, multiply in ways().items():
                    second = torch.randn(inputs, outputs) if name.startswith("x @") else w
                    multiply(x, second)
                    seconds = []
                    for _ in range(5):
                        started = time.perf_counter()
                        multiply(x, second)
                        seconds.append(time.perf_counter() - started)
                    rate = 2.0 * tall * inputs * outputs / min(seconds)
                    best = max(best, (rate, f"{name}, ({tall}, {inputs}) × ({inputs}, {outputs})"))
    return best


GROUPS = {
    "frozen products": ("mkldnn::_linear_pointwise",),
    "attention": ("_ShortAttention", "_ShortAttentionBackward"),
    "gate and up": ("_Gated", "_GatedBackward"),
    "norms": ("_RmsNorm", "_RmsNormBackward"),
    "LoRA": ("_LowRank", "_LowRankBackward"),
    "rotation": ("_Rotate", "_RotateBackward"),
}
"""Where a step's time goes, by the profiler's names; what happens inside a name is its own."""


def profile(figures: Figures, base: Base, engine: Lockstep, trials: int) -> None:
    """Shares of one step's time, and the frozen products' rate against the roofline, each a median of five."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    shares: dict[str, list[float]] = {name: [] for name in (*GROUPS, "calls around the products")}
    rates = []
    _, needed = work(base)
    for _ in range(5):
        best, _ = roofline(base)
        with watch(activities=[ProfilerActivity.CPU]) as watched:
            engine.tick()
        events = {event.key: event for event in watched.key_averages()}
        whole = sum(event.self_cpu_time_total for event in events.values())
        for name, keys in GROUPS.items():
            shares[name].append(sum(events[key].cpu_time_total for key in keys if key in events) / whole)
        product_us = sum(events[key].cpu_time_total for key in GROUPS["frozen products"])
        rates.append(trials * needed / (product_us * 1e-6) / best)
        around = ("_FrozenLinear", "_FrozenLinearBackward")
        shares["calls around the products"].append(sum(events[key].self_cpu_time_total for key in around) / whole)
    for name, values in shares.items():
        figures.add("share of the step's time", "", values, case=name, note=f"K={trials}, profiled")
    figures.add("rate of the frozen products ÷ roofline", "", rates, bound=1.0, note=f"K={trials}, profiled")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--profile", action="store_true", help="where a step of 30 trials spends its time")
    options = parser.parse_args()
    figures = Figures("step", quick=options.quick)
    if options.profile:
        sides = Sides()
        engine = sides.lockstep(lora_task(sides.base, 30))
        for _ in range(3):
            engine.tick()
        profile(figures, sides.base, engine, 30)
        return
    counts, rounds = ((1, 6, 30), 2) if options.quick else ((1, 2, 6, 12, 30, 100), 7)
    sides = Sides()
    check_gently(lambda task: sides.theirs(task, ["lora 0"]), sides.ours, lora_task(sides.base, 6, rows=4, epochs=1))

    engines: dict[int, Lockstep] = {k: sides.lockstep(lora_task(sides.base, k)) for k in counts}
    for engine in engines.values():
        engine.tick()
    seconds: dict[int, list[float]] = {k: [] for k in counts}
    rates: list[float] = []
    for number in range(rounds):
        rate, how = roofline(sides.base)
        rates.append(rate)
        for k, engine in engines.items():
            ticks = max(1, 6 // k)
            started = time.perf_counter()
            for _ in range(ticks):
                engine.tick()
            seconds[k].append((time.perf_counter() - started) / (ticks * k))
        costs = "  ".join(f"K={k} {seconds[k][-1]:.4f}" for k in counts)
        say(f"  round {number + 1} of {rounds}: {costs} s a trial-row; {rate / 1e9:.0f} GFLOP/s ({how})")

    every, needed = work(sides.base)
    rate = quantile(rates, 0.5)
    figures.add("roofline", "GFLOP/s", [r / 1e9 for r in rates], note=how)
    for k in counts:
        figures.add(
            "seconds per trial-row", "s", seconds[k], case=f"K={k}", bound=every / rate, note=f"{TOKENS} tokens"
        )
    last = 30
    for metric, operations in (("share of the roofline", needed), ("share of the roofline, all products", every)):
        shares = [operations / (s * r) for s, r in zip(seconds[last], rates, strict=True)]
        figures.add(metric, "", shares, bound=1.0, note=f"K={last}, {operations / 1e9:.2f} GFLOP a trial-row")
    figures.add("K=30 ÷ K=1", "", [a / b for a, b in zip(seconds[last], seconds[1], strict=True)])


if __name__ == "__main__":
    main()
