"""Temperature scaling: one number that makes probabilities mean what they say. Guo et al. 2017, https://arxiv.org/abs/1706.04599.

    q_c ∝ p_c ^ (1 / T)        T: the least mean −log q of the right class over rows that were not trained on

The order of a row's classes stays, so no label changes. In b = 1 / T the loss is convex: log Σ exp(b · log p) − b · log p_right.

Dimensions: E rows · C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

COLDEST, HOTTEST = 0.05, 20.0
"""Bounds of the temperature. Rows that are all classified right have no optimum (the colder the better)."""
SMALLEST = 1e-300
"""Stands for a probability of 0, whose logarithm is infinite."""


def fit_temperature(probability_EC: Floats, labels: Sequence[int]) -> float | None:
    """The temperature under which `labels` are the likeliest; None where that is the coldest one, at which every answer sounds certain.

    The rows must not have been trained on: validation rows, or out-of-fold predictions. Raises ValueError for no rows, or for
    numbers that are not probabilities.
    """
    from scipy.optimize import minimize_scalar

    _check(probability_EC)
    if not len(labels) or len(labels) != len(probability_EC):
        raise ValueError(f"{len(probability_EC)} rows of probabilities and {len(labels)} labels")
    log_EC = np.log(np.maximum(probability_EC, SMALLEST))
    own_E = log_EC[np.arange(len(labels)), np.asarray(labels)]

    def nats(log_b: float) -> float:
        b = np.exp(log_b)
        high_E = log_EC.max(1)
        log_sum_E = b * high_E + np.log(np.exp(b * (log_EC - high_E[:, None])).sum(1))
        return float((log_sum_E - b * own_E).mean())

    # convex in b, so it has one valley in log b too
    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    found = minimize_scalar(nats, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    best = min((float(found.x), low, high), key=nats)
    return None if high - best < 1e-3 else float(np.exp(-best))


def with_temperature(probability_EC: Floats, temperature: float) -> Floats:
    """The calibrated probabilities. At 1 the very same numbers."""
    if temperature == 1.0:
        return probability_EC
    log_EC = np.log(np.maximum(probability_EC, SMALLEST)) / temperature
    power_EC: Floats = np.exp(log_EC - log_EC.max(1, keepdims=True))
    scaled: Floats = power_EC / power_EC.sum(1, keepdims=True)
    return scaled


def _check(probability_EC: Floats) -> None:
    good = probability_EC.ndim == 2 and np.isfinite(probability_EC).all() and (probability_EC >= 0).all()
    if not good or not np.allclose(probability_EC.sum(1), 1, atol=1e-6):
        raise ValueError("these are not rows of probabilities")
