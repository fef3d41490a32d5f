"""Is one method better than another, by how much? Intervals and tests of differences. Dimensions: S seeds · E rows.

same rows, one run       exact McNemar test (1947); Tango's score interval (1998)
same rows, seeds, folds  Tango's interval and the test that goes with it, at the effective rows of the paired differences
counts alone             Boschloo's exact test (1970) and Newcombe's interval (1998, method 10): unpaired
AUC, F1, losses          both methods' own intervals joined (MOVER: Newcombe 1998; Zou & Donner 2008), with the correlation
                         of their noise; the test is where that interval begins to hold 0
a family of them         Holm 1979
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from katei.study.intervals import Interval, bisect, wilson
from katei.study.spread import Floats, Spread, z_quantile

EXACT_CELLS = 250_000
"""Boschloo's test looks at every pair of counts: up to this many of them."""


class Discordance(NamedTuple):
    """Shares of rows (and seeds) that only the first, and only the second method got right."""

    first: Floats
    second: Floats


# -------------------------------------------------------------------- paired, accuracy


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact: were the rows on which the methods differ drawn with a fair coin?"""
    from scipy.stats import binom

    return float(min(1.0, 2 * binom.cdf(min(only_first, only_second), only_first + only_second, 0.5)))


def tango(first: ArrayLike, second: ArrayLike, rows: ArrayLike, level: ArrayLike = 0.95) -> Interval:
    """The differences that a score test of them does not refuse; `first`, `second` count (or share × rows) as in Discordance."""
    b, c, n = (np.asarray(x, dtype=np.float64) for x in (first, second, rows))
    z = z_quantile(level)
    seen = (b - c) / n

    def score(d: Floats) -> Floats:
        linear = -b - c + (2 * n - b + c) * d
        second_share = (np.sqrt(np.maximum(linear**2 + 8 * n * c * d * (1 - d), 0)) - linear) / (4 * n)
        return np.asarray((b - c - n * d) / np.sqrt(np.maximum(n * (2 * second_share + d * (1 - d)), 1e-12)))

    ones = np.ones(np.broadcast_shapes(b.shape, n.shape, z.shape))
    low = bisect(lambda d: score(d) > z, (-1 + 1e-9) * ones, seen * ones)
    return Interval(low, bisect(lambda d: score(d) > -z, seen * ones, (1 - 1e-9) * ones))


def effective_rows(
    spread: Spread, discordance: Discordance, rows: int, level: ArrayLike = 0.95, *, at_most: float = np.inf
) -> Floats:
    """How many independent rows would leave the paired difference as uncertain as seeds and rows (or folds) do."""
    b, c = discordance
    alone = (b + c - (b - c) ** 2) / rows
    ratio = np.where(alone > 1e-12, spread.variance(level) / np.where(alone > 1e-12, alone, 1), 1)
    return np.minimum(rows / np.maximum(np.where(ratio > 1e-12, ratio, 1), 1e-6), at_most)


def paired_interval(
    spread: Spread, discordance: Discordance, rows: int, level: ArrayLike = 0.95, *, at_most: float = np.inf
) -> Interval:
    effective = effective_rows(spread, discordance, rows, level, at_most=at_most)
    return tango(discordance.first * effective, discordance.second * effective, effective, level)


def paired_p(spread: Spread, discordance: Discordance, rows: int, *, at_most: float = np.inf) -> float:
    """The smallest level of error at which `paired_interval` leaves 0 out."""
    b, c = discordance
    if b == c:
        return 1.0

    def excludes(level: Floats) -> NDArray[np.bool_]:
        effective = effective_rows(spread, discordance, rows, level, at_most=at_most)
        return np.asarray(np.abs(b - c) * np.sqrt(effective / (b + c)) > z_quantile(level))

    return p_by_inversion(excludes)


# -------------------------------------------------------------------- unpaired, from counts


def unpaired_interval(
    correct_1: ArrayLike, rows_1: ArrayLike, correct_2: ArrayLike, rows_2: ArrayLike, level: ArrayLike = 0.95
) -> Interval:
    """Newcombe's square-and-add of two Wilson intervals."""
    p, q = np.asarray(correct_1) / np.asarray(rows_1), np.asarray(correct_2) / np.asarray(rows_2)
    return mover(p, wilson(correct_1, rows_1, level), q, wilson(correct_2, rows_2, level))


def unpaired_p(correct_1: int, rows_1: int, correct_2: int, rows_2: int) -> float:
    """Boschloo's exact test; on very many rows the score test, which then agrees with it.

    `scipy.stats.boschloo_exact` is the same test, 0.1 s to seconds a pair; here its tails are made once for all pairs.
    """
    from scipy.stats import norm

    if (rows_1 + 1) * (rows_2 + 1) <= EXACT_CELLS:
        chance_1, chance_2 = _chances(rows_1), _chances(rows_2)
        one_sided = []
        for tail in _fisher_tails(rows_1, rows_2):
            as_extreme = tail <= tail[correct_1, correct_2] * (1 + 1e-9)
            one_sided.append(float(((chance_1 @ as_extreme) * chance_2).sum(1).max()))
        return min(1.0, 2 * min(one_sided))
    pooled = (correct_1 + correct_2) / (rows_1 + rows_2)
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / rows_1 + 1 / rows_2))
    return 1.0 if deviation == 0 else float(2 * norm.sf(abs(correct_1 / rows_1 - correct_2 / rows_2) / deviation))


@lru_cache(maxsize=4)
def _chances(rows: int) -> Floats:
    """Of every count, at 1,001 shares from 0 to 1."""
    from scipy.stats import binom

    return np.asarray(binom.pmf(np.arange(rows + 1), rows, np.linspace(0, 1, 1001)[:, None]))


@lru_cache(maxsize=4)
def _fisher_tails(rows_1: int, rows_2: int) -> tuple[Floats, Floats]:
    """Fisher's two one-sided p-values of every pair of counts."""
    from scipy.stats import hypergeom

    i, j = np.meshgrid(np.arange(rows_1 + 1), np.arange(rows_2 + 1), indexing="ij")
    of_first = hypergeom(rows_1 + rows_2, i + j, rows_1)
    return of_first.cdf(i), of_first.sf(i - 1)


# -------------------------------------------------------------------- any two scores


def mover(
    first: ArrayLike,
    first_interval: Interval,
    second: ArrayLike,
    second_interval: Interval,
    correlation: ArrayLike = 0.0,
) -> Interval:
    """The interval of first − second from both intervals and the correlation of their errors."""
    p, q, r = np.asarray(first), np.asarray(second), np.asarray(correlation)
    (low_1, high_1), (low_2, high_2) = first_interval, second_interval

    def joined(a: Floats, b: Floats) -> Floats:
        return np.sqrt(np.maximum(a * a - 2 * r * a * b + b * b, 0))

    return Interval(p - q - joined(p - low_1, high_2 - q), p - q + joined(high_1 - p, q - low_2))


def joined_interval(
    first: Spread,
    first_interval: Interval,
    second: Spread,
    second_interval: Interval,
    difference: Spread,
    level: ArrayLike = 0.95,
) -> Interval:
    """`mover` with the correlation of the noise, and no shorter than t on the paired difference."""
    a, b, d = (spread.half_width(level) for spread in (first, second, difference))
    found = a * b > 1e-12
    correlation = np.where(found, np.clip((a * a + b * b - d * d) / np.where(found, 2 * a * b, 1), -1, 1), 0.0)
    low, high = mover(first.value, first_interval, second.value, second_interval, correlation)
    return Interval(np.minimum(low, difference.value - d), np.maximum(high, difference.value + d))


def p_by_inversion(excludes: Callable[[Floats], NDArray[np.bool_]]) -> float:
    """The smallest error level 1 − `level` at which an interval leaves 0 out, to a relative 1e-3; `excludes` takes many levels."""
    low, high = 1e-9, 1 - 1e-9
    for _ in range(3):
        error = np.geomspace(low, high, 60)
        out = np.broadcast_to(excludes(1 - error), error.shape)
        if not out.any():
            return 1.0
        first = int(np.argmax(out))
        if first == 0:
            return float(low)
        low, high = float(error[first - 1]), float(error[first])
    return high


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    adjusted, most = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        most = max(most, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = most
    return adjusted


def equivalent(interval: Interval, margin: float) -> bool:
    """Is every difference that the data allow smaller than the margin?"""
    return bool(-margin < interval.low and interval.high < margin)
