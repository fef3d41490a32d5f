"""Intervals of one method's score, right on few rows and at the ceiling. Dimensions: S seeds · E rows · C classes.

An interval "score ± t · standard error" has no width where every row is right, and says nothing there. So the shape of each
interval comes from a model of the score that knows its ceiling, and the data say only how much noise there is in comparison:
*effective rows*. Close to the ceiling the data say little about that too, so the ratio is drawn towards 1 there.

    accuracy         Clopper & Pearson 1934; over seeds or folds at the effective rows (Korn & Graubard 1998)
    ROC AUC          DeLong's variance in Newcombe's score interval (2006, method 5)
    macro F1         the same, variance from influences (Takahashi et al. 2022)
    log loss, Brier  t, with two rows added, one right and one wrong, as Agresti & Coull (1998) add rows to a share
    calibration      bootstrap of the distance between binned gaps: a bound, since the plain bootstrap never covers a true 0

docs/statistics.md has the share of simulated studies in which each of them covers the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from katei.study.spread import Floats, Spread, over_rows, t_quantile, z_quantile

PRIOR_ROWS = 2.0
"""How many wrong (or right) rows the belief that rows are independent is worth."""


class Interval(NamedTuple):
    low: Floats
    high: Floats


# -------------------------------------------------------------------- shares


def wilson(correct: ArrayLike, rows: ArrayLike, level: ArrayLike = 0.95) -> Interval:
    """Wilson's score interval; `rows` may be any positive number."""
    n, z = np.asarray(rows, dtype=np.float64), z_quantile(level)
    p = np.asarray(correct) / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return Interval(np.clip((middle - half) / scale, 0, p), np.clip((middle + half) / scale, p, 1))


def clopper_pearson(correct: ArrayLike, rows: ArrayLike, level: ArrayLike = 0.95) -> Interval:
    """The exact interval: never covers less than `level`, most often more; both may be any numbers, correct ≤ rows."""
    from scipy.special import betaincinv

    k, n = np.asarray(correct, dtype=np.float64), np.asarray(rows, dtype=np.float64)
    tail, least = (1 - np.asarray(level)) / 2, 1e-9
    low = np.where(k > least, betaincinv(np.maximum(k, least), n - k + 1, tail), 0.0)
    high = np.where(n - k > least, betaincinv(k + 1, np.maximum(n - k, least), 1 - tail), 1.0)
    return Interval(low, high)


def drawn_to_one(ratio: ArrayLike, evidence: ArrayLike) -> Floats:
    """A ratio of variances, as much as the data can say of it; never under what they do say."""
    ratio, evidence = np.asarray(ratio, dtype=np.float64), np.asarray(evidence, dtype=np.float64)
    return np.asarray(np.maximum(ratio, (evidence * ratio + PRIOR_ROWS) / (evidence + PRIOR_ROWS)))


def share_interval(spread: Spread, rows: ArrayLike, level: ArrayLike = 0.95, *, at_most: float = np.inf) -> Interval:
    """Clopper–Pearson at as many independent rows as would be as noisy as the spread is (Korn & Graubard 1998).

    `at_most`: folds that agree by chance are no evidence of more rows than there are.
    """
    p, rows = np.clip(spread.value, 0, 1), np.asarray(rows, dtype=np.float64)
    alone = p * (1 - p) / rows
    ratio = np.where(alone > 0, spread.variance(level) / np.where(alone > 0, alone, 1), 0)
    effective = np.minimum(rows / drawn_to_one(ratio, rows * np.minimum(p, 1 - p)), at_most)
    return clopper_pearson(p * effective, effective, level)


# -------------------------------------------------------------------- area under the ROC curve


def auc(score_SE: ArrayLike, positive_E: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """The area of each seed, and how each row moves it (DeLong's placements). Both classes need a row."""
    from scipy.stats import rankdata

    score_SE = np.asarray(score_SE, dtype=np.float64)
    inside, outside = score_SE[..., positive_E], score_SE[..., ~positive_E]
    m, n = inside.shape[-1], outside.shape[-1]
    ranks = rankdata(np.concatenate([inside, outside], -1), axis=-1)
    above = (ranks[..., :m] - rankdata(inside, axis=-1)) / n  # share of the others each positive row beats
    below = 1 - (ranks[..., m:] - rankdata(outside, axis=-1)) / m
    area = above.mean(-1)
    influence = np.empty_like(score_SE)
    influence[..., positive_E] = (above - area[..., None]) * (m + n) / m
    influence[..., ~positive_E] = (below - area[..., None]) * (m + n) / n
    return area, influence


def macro_auc(probability_SEC: ArrayLike, labels_E: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """The area for the last of two classes, or the mean over classes of one against the rest; and the influences."""
    probability_SEC = np.asarray(probability_SEC, dtype=np.float64)
    classes = probability_SEC.shape[-1]
    wanted = [1] if classes == 2 else list(range(classes))
    parts = [auc(probability_SEC[..., c], labels_E == c) for c in wanted]
    return np.mean([area for area, _ in parts], axis=0), np.mean([influence for _, influence in parts], axis=0)


def auc_interval(spread: Spread, class_rows: ArrayLike, level: ArrayLike = 0.95) -> Interval:
    """The areas θ with |area − θ| ≤ z · √(ratio · V(θ)): V of Newcombe's method 5, ratio that of the measured noise to it."""
    class_rows = np.asarray(class_rows, dtype=np.float64)
    m = class_rows[:1] if len(class_rows) == 2 else class_rows
    n = class_rows.sum() - m
    area = spread.value
    inner = np.clip(area, (0.5 / (m * n)).min(), 1 - (0.5 / (m * n)).min())
    evidence = np.minimum(m, n).mean() * np.minimum(2 * np.minimum(area, 1 - area), 1)
    ratio = spread.variance(level) / _auc_variance(inner, m, n)
    ratio = np.maximum((evidence * ratio + PRIOR_ROWS) / (evidence + PRIOR_ROWS), 0.3)
    z = z_quantile(level)

    def too_far(theta: Floats) -> NDArray[np.bool_]:
        return np.asarray(np.abs(area - theta) > z * np.sqrt(ratio * _auc_variance(theta, m, n)))

    ones = np.ones(np.broadcast_shapes(np.shape(area), np.shape(level)))
    return Interval(bisect(too_far, 0 * ones, area * ones), bisect(lambda x: ~too_far(x), area * ones, ones))


def _auc_variance(theta: Floats, m: Floats, n: Floats) -> Floats:
    """Newcombe 2006, method 5: Hanley & McNeil's variance with both class sizes put at their mean, over classes."""
    theta = np.asarray(theta)[..., None]
    mean = (m + n) / 2
    inside = theta * (1 - theta) * (2 * mean - 1 - (3 * mean - 3) / ((2 - theta) * (1 + theta))) / (m * n)
    return np.asarray(np.maximum(inside, 0).mean(-1))


def bisect(left: Callable[[Floats], NDArray[np.bool_]], low: Floats, high: Floats) -> Floats:
    """Where `left` turns from true to false."""
    for _ in range(32):
        middle = (low + high) / 2
        go = left(middle)
        low, high = np.where(go, middle, low), np.where(go, high, middle)
    return (low + high) / 2


def bootstrap_auc(
    probability_EC: ArrayLike,
    labels_E: NDArray[np.intp],
    rng: np.random.Generator,
    *,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentiles over rows drawn within each class: for comparison only, it is too short near the ceiling."""
    probability_EC = np.asarray(probability_EC, dtype=np.float64)
    within = [np.flatnonzero(labels_E == c) for c in np.unique(labels_E)]
    picked = np.concatenate([rng.choice(rows, (draws, len(rows))) for rows in within], axis=1)
    ordered = np.concatenate([labels_E[rows] for rows in within])
    areas, _ = macro_auc(probability_EC[picked], ordered)
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return Interval(np.asarray(low), np.asarray(high))


# -------------------------------------------------------------------- macro F1


def macro_f1(prediction_SE: NDArray[np.intp], labels_E: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Mean F1 over the classes that have a label or a prediction, and how each row moves it."""
    E = len(labels_E)
    total, present = np.zeros(prediction_SE.shape[:-1]), np.zeros(prediction_SE.shape[:-1])
    influence = np.zeros(prediction_SE.shape)
    for c in range(int(max(labels_E.max(), prediction_SE.max())) + 1):
        said, is_c = prediction_SE == c, labels_E == c
        both = said.sum(-1) + is_c.sum()
        f1 = 2 * (said & is_c).sum(-1) / np.maximum(both, 1)
        total, present = total + f1, present + (both > 0)
        weight = E / np.maximum(both, 1)
        influence += weight[..., None] * (2.0 * (said & is_c) - f1[..., None] * (said + is_c.astype(float)))
    return total / present, influence / present[..., None]


def f1_interval(spread: Spread, class_rows: ArrayLike, level: ArrayLike = 0.95) -> Interval | None:
    """None under 5 rows in a class or under 10 for each class on average: no interval tried covers there."""
    class_rows = np.asarray(class_rows, dtype=np.float64)
    if class_rows.min() < 5 or class_rows.sum() < 10 * len(class_rows):
        return None
    return share_interval(spread, len(class_rows) ** 2 / (1 / class_rows).sum(), level)


# -------------------------------------------------------------------- losses


def log_loss(probability_SEC: ArrayLike, labels_E: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Nats of each row, and of one row answered rightly and one wrongly as this method does on average."""
    return _losses(
        np.asarray(probability_SEC, dtype=np.float64), labels_E, lambda p, own: -np.log(np.maximum(own, 1e-15))
    )


def brier(probability_SEC: ArrayLike, labels_E: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Squared distance of the probabilities from the truth, 0 to 2 (Brier 1950); as `log_loss`."""
    return _losses(
        np.asarray(probability_SEC, dtype=np.float64), labels_E, lambda p, own: np.square(p).sum(-1) - 2 * own + 1
    )


def _losses(
    p_SEC: Floats, labels_E: NDArray[np.intp], loss: Callable[[Floats, Floats], Floats]
) -> tuple[Floats, Floats]:
    own = np.take_along_axis(p_SEC, np.broadcast_to(labels_E[:, None], (*p_SEC.shape[:-1], 1)), -1)[..., 0]
    ranked = np.sort(p_SEC, axis=-1)
    added = np.stack([loss(p_SEC, ranked[..., -1]).mean(-1), loss(p_SEC, ranked[..., -2]).mean(-1)], -1)
    return loss(p_SEC, own), added


def loss_interval(row_SE: ArrayLike, added_S2: ArrayLike, level: ArrayLike = 0.95) -> Interval:
    """t over seeds × rows with the two rows added to every seed."""
    row_SE = np.asarray(row_SE)
    more = np.concatenate([row_SE, np.asarray(added_S2)], -1)
    spread = over_rows(more.mean(-1), more - more.mean(-1, keepdims=True))
    value, half = row_SE.mean((-1, -2)), spread.half_width(level)
    return Interval(np.clip(spread.value - half, 0, value), np.maximum(spread.value + half, value))


def calibration_error(probability_EC: ArrayLike, labels_E: NDArray[np.intp], bins: int = 10) -> tuple[float, Floats]:
    """Expected calibration error of the answered class (Guo et al. 2017), and each row's gap, in its bin's column."""
    probability_EC = np.asarray(probability_EC, dtype=np.float64)
    confidence = probability_EC.max(-1)
    gap_EK = np.zeros((len(labels_E), bins))
    column = np.minimum((confidence * bins).astype(int), bins - 1)
    gap_EK[np.arange(len(labels_E)), column] = confidence - (probability_EC.argmax(-1) == labels_E)
    return float(np.abs(gap_EK.mean(0)).sum()), gap_EK


def calibration_interval(
    probability_EC: ArrayLike,
    labels_E: NDArray[np.intp],
    rng: np.random.Generator,
    *,
    draws: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Calibration error ± a quantile of how far resampled binned gaps lie from the measured ones, bin by bin.

    |error − truth| is at most that distance, so this bounds; two rows are added at the mean confidence, one right, one wrong.
    """
    value, gap_EK = calibration_error(probability_EC, labels_E)
    E, bins = gap_EK.shape
    mean = float(np.asarray(probability_EC).max(-1).mean())
    added = np.zeros((2, bins))
    added[:, min(int(mean * bins), bins - 1)] = mean - 1, mean
    more = np.vstack([gap_EK, added])
    weights = rng.multinomial(E, np.full(E + 2, 1 / (E + 2)), draws) / E
    distance = np.abs(weights @ more - more.mean(0)).sum(1)
    half = float(np.quantile(distance, level) * t_quantile(level, E - 1) / z_quantile(level))
    return Interval(np.asarray(max(value - half, 0.0)), np.asarray(min(value + half, 1.0)))
