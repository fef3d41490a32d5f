"""Scores of one set of rows (their intervals: `katei.study.intervals`). Dimensions: E rows · C classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
