"""Scores of one set of rows with their intervals, against statsmodels and against known truth; and what is said of trials."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom
from statsmodels.stats.proportion import proportion_confint

from katei.study import results


def scored(correct: int, rows: int) -> results.TestScores:
    """Half of the rows of each class; the first `correct` answered rightly."""
    labels = [i % 2 for i in range(rows)]
    answered = [label if i < correct else 1 - label for i, label in enumerate(labels)]
    return results.test_scores(np.array([[0.9, 0.1] if a == 0 else [0.1, 0.9] for a in answered]), labels)


@pytest.mark.parametrize(("correct", "rows"), [(0, 5), (5, 5), (44, 54), (52, 54), (1, 1)])
def test_the_accuracy_interval_is_the_exact_one(correct: int, rows: int) -> None:
    found = scored(correct, rows)
    assert found.accuracy == pytest.approx(correct / rows)
    assert found.accuracy_interval == pytest.approx(proportion_confint(correct, rows, method="beta"), nan_ok=True)


@pytest.mark.parametrize("share", [0.55, 0.8, 0.95])
def test_the_accuracy_interval_covers_the_truth(share: float) -> None:
    """Over all outcomes of 54 rows: never less than 95 %, where the textbook interval falls to 76 %."""
    chances = binom(54, share).pmf(np.arange(55))
    intervals = [scored(k, 54).accuracy_interval for k in range(55)]
    assert chances[[low <= share <= high for low, high in intervals]].sum() >= 0.95


def test_the_area_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(1.2 / 2))  # two normals 1.2 apart
    covered = 0
    for _ in range(300):
        p = 1 / (1 + np.exp(-np.concatenate([rng.normal(0, 1, 38), rng.normal(1.2, 1, 16)])))
        found = results.test_scores(np.stack([1 - p, p], 1), [0] * 38 + [1] * 16)
        assert found.roc_auc_interval is not None
        assert found.roc_auc_interval[0] <= found.roc_auc <= found.roc_auc_interval[1]  # type: ignore[operator]
        covered += found.roc_auc_interval[0] <= truth <= found.roc_auc_interval[1]
    assert 0.92 <= covered / 300 <= 0.985, covered / 300


@pytest.mark.parametrize(("few", "many"), [(1, 1), (1, 2), (2, 2), (16, 38)])
def test_an_area_at_its_edge_has_an_interval_within_bounds(few: int, many: int) -> None:
    last = np.array([0.9] * few + [0.1] * many)
    found = results.test_scores(np.stack([1 - last, last], 1), [1] * few + [0] * many)
    assert found.roc_auc == 1.0
    assert found.roc_auc_interval is not None
    assert found.roc_auc_interval[1] == 1.0
    assert 0 <= found.roc_auc_interval[0] < (0.97 if few == 16 else 0.8)


def test_without_a_row_of_each_class_there_is_no_area() -> None:
    found = results.test_scores(np.full((3, 2), 0.5), [1, 1, 1])
    assert (found.roc_auc, found.roc_auc_interval) == (None, None)
