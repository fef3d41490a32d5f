"""Scores against scikit-learn and statsmodels, and intervals against known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import log_loss, roc_auc_score
from statsmodels.stats.proportion import proportion_confint

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
    assert metrics.roc_auc_interval(p, [1, 1, 1, 1]) is None
    assert metrics.roc_auc(np.full((4, 3), 1 / 3), [0, 1, 1, 0]) is None
    assert metrics.roc_auc(np.full((2, 2), math.nan), [0, 1]) is None


@pytest.mark.parametrize(("correct", "rows"), [(0, 5), (5, 5), (44, 54), (52, 54), (1, 1)])
def test_wilson_is_statsmodels(correct: int, rows: int) -> None:
    assert metrics.wilson_interval(correct, rows) == pytest.approx(proportion_confint(correct, rows, method="wilson"))


def test_the_area_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(1.2 / 2))  # two normals 1.2 apart
    covered = 0
    for i in range(300):
        scores = np.concatenate([rng.normal(0, 1, 38), rng.normal(1.2, 1, 16)])
        p = 1 / (1 + np.exp(-scores))
        interval = metrics.roc_auc_interval(np.stack([1 - p, p], 1), [0] * 38 + [1] * 16, draws=400, seed=i)
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert 0.90 <= covered / 300 <= 0.985, covered / 300


def test_a_perfect_area_still_has_an_interval() -> None:
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7]])
    low, high = metrics.roc_auc_interval(p, [0, 0, 1, 1])  # type: ignore[misc]
    assert low < 0.5
    assert high == 1.0


@pytest.mark.parametrize(("few", "many"), [(1, 1), (1, 2), (2, 2), (16, 38)])
@pytest.mark.parametrize("right", [True, False])
def test_an_area_at_its_edge_has_an_interval_within_bounds(few: int, many: int, right: bool) -> None:
    """One or two rows of a class: the rule of three on pairs would leave [0, 1]."""
    last = np.array([0.9] * few + [0.1] * many)
    p = np.stack([1 - last, last], 1)
    y = [1] * few + [0] * many
    interval = metrics.roc_auc_interval(p, y if right else [1 - label for label in y])
    assert interval is not None
    low, high = interval
    width = min(1.0, 3 / (few * many))
    assert (low, high) == pytest.approx((1 - width, 1.0) if right else (0.0, width))


@pytest.mark.parametrize("classes", [2, 4])
def test_ties_count_half_and_the_interval_holds_the_area(classes: int) -> None:
    p, y = draw(50, classes, 7)
    p = np.round(p, 1) / np.round(p, 1).sum(1, keepdims=True)
    own = [roc_auc_score(np.array(y) == c, p[:, c]) for c in (range(classes) if classes > 2 else [1])]
    area, interval = metrics.roc_auc(p, y), metrics.roc_auc_interval(p, y)
    assert area == pytest.approx(np.mean(own))
    assert interval is not None
    assert interval[0] < area < interval[1]  # type: ignore[operator]
    assert interval == metrics.roc_auc_interval(p, y), "one seed, one interval"


@pytest.mark.parametrize("share", [0.55, 0.8, 0.95])
def test_the_accuracy_interval_covers_the_truth(share: float) -> None:
    """Exactly, over all outcomes of 54 rows: near 95 %, where the textbook interval falls to 93 % and 76 %."""
    chances = binom(54, share).pmf(np.arange(55))
    holds = [low <= share <= high for low, high in (metrics.wilson_interval(k, 54) for k in range(55))]
    assert 0.93 <= chances[holds].sum() <= 0.98
