"""Scores of one set of rows, and their intervals. Dimensions: E rows · C classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, rankdata

Floats = NDArray[np.float64]


def row_nats(probability_EC: Floats, labels: Sequence[int]) -> Floats:
    """−log of the probability of each row's own label: (E,)."""
    own_E: Floats = probability_EC[np.arange(len(labels)), np.asarray(labels)]
    return -np.log(np.clip(own_E, 1e-300, None))


def cross_entropy(probability_EC: Floats, labels: Sequence[int]) -> float:
    """Mean nats per row."""
    return float(row_nats(probability_EC, labels).mean())


def accuracy(probability_EC: Floats, labels: Sequence[int]) -> float:
    return float((probability_EC.argmax(1) == np.asarray(labels)).mean())


def roc_auc(probability_EC: Floats, labels: Sequence[int]) -> float | None:
    """Area under the ROC curve of the last class (binary), or the mean over classes of one against the rest.

    None where a class that is needed has no row, or every row, of these.
    """
    y = np.asarray(labels)
    classes = probability_EC.shape[1]
    if not np.isfinite(probability_EC).all():
        return None
    if classes == 2:
        return _area(probability_EC[:, 1], y == 1) if 0 < y.sum() < len(y) else None
    if any(not 0 < (y == c).sum() < len(y) for c in range(classes)):
        return None
    return float(np.mean([_area(probability_EC[:, c], y == c) for c in range(classes)]))


def _area(score_E: Floats, inside_E: NDArray[np.bool_]) -> float:
    """Mann and Whitney's statistic as a share of the pairs, ties by halves. (scikit-learn's is the same number, for 85 MB of import.)"""
    _, place_E, count = np.unique(score_E, return_inverse=True, return_counts=True)
    rank_E = (np.cumsum(count) - (count - 1) / 2)[place_E]
    inside = int(inside_E.sum())
    pairs = inside * (len(inside_E) - inside)
    return float((rank_E[inside_E].sum() - inside * (inside + 1) / 2) / pairs)


def wilson_interval(correct: int, rows: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share: holds its level on few rows, and at 0 or all correct. Wilson 1927."""
    interval = binomtest(correct, rows).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def roc_auc_interval(
    probability_EC: Floats, labels: Sequence[int], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of `roc_auc`: bootstrap percentiles over rows, drawn within each class. None where `roc_auc` is.

    At an area of exactly 1 (or 0) every draw gives the same, so the interval says nothing there; it is then widened to the bound
    at which a single reversed pair of rows would be expected: 3 / (smaller class · other rows) away, the rule of three on pairs.
    """
    point = roc_auc(probability_EC, labels)
    if point is None:
        return None
    y = np.asarray(labels)
    rng = np.random.default_rng(seed)
    classes = range(1, 2) if probability_EC.shape[1] == 2 else range(probability_EC.shape[1])
    areas = np.zeros(draws)
    for c in classes:
        inside, outside = probability_EC[y == c, c], probability_EC[y != c, c]
        a = rng.choice(inside, (draws, len(inside)))
        b = rng.choice(outside, (draws, len(outside)))
        ranks = rankdata(np.concatenate([a, b], axis=1), axis=1)
        areas += (ranks[:, : len(inside)].sum(1) - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside))
    areas /= len(classes)
    low, high = np.quantile(areas, [0.025, 0.975])
    fewest = np.bincount(y, minlength=probability_EC.shape[1]).min()
    one_pair = min(1.0, 3 / (fewest * (len(y) - fewest)))
    if point == 1.0:
        low = 1 - one_pair
    if point == 0.0:
        high = one_pair
    return float(min(low, point)), float(max(high, point))
