"""Scores against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from katei.core import metrics


def draw(rows: int, classes: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    y = [*range(classes), *range(classes), *rng.integers(0, classes, rows - 2 * classes).tolist()]
    p = rng.dirichlet(np.ones(classes), rows)
    return p, y


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_are_scikit_learns(classes: int) -> None:
    p, y = draw(60, classes, classes)
    expected = roc_auc_score(y, p[:, 1]) if classes == 2 else roc_auc_score(y, p, multi_class="ovr", average="macro")
    assert metrics.roc_auc(p, y) == pytest.approx(expected)
    assert metrics.cross_entropy(p, y) == pytest.approx(log_loss(y, p))
    assert metrics.accuracy(p, y) == pytest.approx(np.mean(p.argmax(1) == y))


def test_no_area_without_both_classes() -> None:
    p = np.full((4, 2), 0.5)
    assert metrics.roc_auc(p, [1, 1, 1, 1]) is None
    assert metrics.roc_auc(np.full((4, 3), 1 / 3), [0, 1, 1, 0]) is None
    assert metrics.roc_auc(np.full((2, 2), math.nan), [0, 1]) is None


@pytest.mark.parametrize("classes", [2, 4])
def test_ties_count_half(classes: int) -> None:
    p, y = draw(50, classes, 7)
    p = np.round(p, 1) / np.round(p, 1).sum(1, keepdims=True)
    own = [roc_auc_score(np.array(y) == c, p[:, c]) for c in (range(classes) if classes > 2 else [1])]
    assert metrics.roc_auc(p, y) == pytest.approx(np.mean(own))
