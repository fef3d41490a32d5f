"""What fits, before anything is loaded: one answer per method, from the engine's own step.

    shape of the base, rows (or a number of tokens), method  →  fake run  →  live bytes by owner, where the peak falls
    live bytes in their order  →  the device's allocator (CUDA) or the process (CPU)  →  fits, and how much more would
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from katei.engine.lockstep import Tokens, Trial
from katei.engine.optimizer import Training
from katei.methods.contract import Method
from katei.plan.allocator import CachingAllocator
from katei.plan.devices import Device
from katei.plan.fake import Trace, fake_base, trace_study


@dataclass(frozen=True)
class Plan:
    """One method's run on one device."""

    method: str
    precision: str
    trainable: int
    total: int
    live_peak_bytes: int
    """Bytes of all tensors at once, at most."""
    device_bytes: int
    """What the device must have for them: segments, context and workspace (CUDA); the process (CPU)."""
    parts: dict[str, int]
    """Live bytes by owner at the peak."""
    where: str
    """The peak's place: train or evaluate."""
    fits: bool
    max_tokens: int
    """The longest text that fits, one row in a pass."""
    max_batch_size: int
    """Rows of the planned length in one pass."""
    max_trials: int
    """Trials in lockstep, each pass no larger than planned."""
    seconds_per_epoch: float | None


def synthetic(tokens: int, rows: int, vocabulary: int, classes: int) -> Tokens:
    """Rows of `tokens` tokens that have no beginning in common."""
    ids = tuple(tuple((17 * row + 31 * place + 1) % vocabulary for place in range(tokens)) for row in range(rows))
    return Tokens(ids, tuple(row % classes for row in range(rows)))


def same_method(method: Method, training: Training, trials: int, rows: int) -> tuple[Trial, ...]:
    """`trials` trials of one method, of different seeds."""
    return tuple(Trial(f"{method.name}-{seed}", method, seed, training, tuple(range(rows))) for seed in range(trials))


def device_bytes(trace: Trace, device: Device) -> int:
    """What `device` must have for this run."""
    allocator = CachingAllocator()
    for serial, size in trace.events:
        if size < 0:
            allocator.free(serial)
        else:
            allocator.allocate(serial, size)
    return allocator.reserved_peak + device.context_bytes + device.workspace_bytes


def trace_method(
    config: PreTrainedConfig,
    trials: Sequence[Trial],
    classes: int,
    train: Tokens,
    valid: Tokens | None,
    *,
    precision: str,
    token_budget: int,
    checkpointing: bool,
) -> Trace:
    with fake_base(config, precision) as base:
        return trace_study(
            base, trials, classes, train, valid, token_budget=token_budget, checkpointing=checkpointing
        )


_ = (replace, Any)
