"""A plan's bytes in the four parts a reader looks at."""

from __future__ import annotations

from collections.abc import Mapping

from katei.plan.meter import (
    ADAPTERS,
    ATTENTION,
    BACKWARD,
    DEQUANTISED,
    GRADIENTS,
    LAYERS,
    MOMENTS,
    SCORES,
    STREAM,
    WEIGHTS,
)

PARTS: dict[str, tuple[str, ...]] = {
    "weights": (WEIGHTS, DEQUANTISED),
    "adapters": (ADAPTERS, GRADIENTS, MOMENTS),
    "activations": (LAYERS, ATTENTION, SCORES, BACKWARD, STREAM),
    "rest": (),
}
"""Whose bytes each holds; the last takes what no other does, and what the device or the process adds."""


def four_parts(parts: Mapping[str, int], device_bytes: int) -> dict[str, int]:
    """`parts` by owner, as a plan has them, of a run that takes `device_bytes` in all."""
    found = {name: sum(parts.get(owner, 0) for owner in owners) for name, owners in PARTS.items()}
    found["rest"] = max(0, device_bytes - sum(found.values()))
    return found
