"""What a design can see before it runs, and what it would take after. Dimensions: S seeds · E rows.

*Minimum detectable difference*: the smallest true difference in accuracy that the test will call real in 8 of 10 studies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import numpy as np

from katei.core.errors import RecipeError
from katei.study.spread import Spread, t_quantile, z_quantile

POWER = 0.8
Z_POWER = 0.8416212335729143
MOST_ROWS = 1e9


@dataclass(frozen=True)
class Design:
    """What will be run, and what is assumed of the methods. With `folds`, `seeds` counts their repeats.

    `discordance`: share of rows only one of two methods gets right; without it, that of two methods of this `accuracy` whose
    mistakes fall half on the same rows: 2 · accuracy · (1 − accuracy) / 2. `seed_deviation`: of a method's accuracy over seeds.
    `lasting`: share of the discordance that is there with every seed.
    """

    rows: int
    seeds: int = 1
    accuracy: float = 0.9
    discordance: float | None = None
    seed_deviation: float = 0.0
    lasting: float = 0.5
    alpha: float = 0.05
    folds: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.seeds < 1:
            raise RecipeError(f"a design of {self.rows} rows and {self.seeds} seeds", hint="give 1 or more of both")
        for name in ("accuracy", "lasting", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(
                    f"{name} is {getattr(self, name)}, but it is a share", hint="give a number from 0 to 1"
                )
        if self.seeds == 1 and self.seed_deviation > 0:
            raise RecipeError(
                "one seed shows nothing of the noise of seeds", hint="seeds=2 or more, or seed_deviation=0"
            )

    @property
    def discordant(self) -> float:
        return self.accuracy * (1 - self.accuracy) if self.discordance is None else self.discordance


def mcnemar_power(difference: float, discordance: float, rows: int, alpha: float = 0.05) -> float:
    """Chance that the exact McNemar test sees `difference`; `discordance` is raised to it where it is smaller."""
    from scipy.stats import binom

    discordance = max(discordance, abs(difference))
    if discordance == 0:
        return 0.0
    k = np.arange(rows + 1)
    most = binom.ppf(alpha / 2, k, 0.5) - 1  # the largest count of the rarer kind that is still refused
    most = np.where(2 * binom.cdf(most + 1, k, 0.5) <= alpha, most + 1, most)
    share = (discordance + abs(difference)) / (2 * discordance)
    refused = np.where(most >= 0, binom.cdf(most, k, share) + binom.sf(k - most - 1, k, share), 0)
    return float((binom.pmf(k, rows, discordance) * refused).sum())


def minimum_detectable_difference(design: Design) -> float | None:
    """In accuracy, two methods on the same rows; None where not even a difference of 1 would be seen."""
    if design.folds:
        return _in_folds(design)
    if design.seeds == 1:
        return _smallest(lambda d: mcnemar_power(d, design.discordant, design.rows, design.alpha) >= POWER)
    S, E = design.seeds, design.rows
    dfs = (max(E - 1, 1), S - 1)
    t_rows, t_seeds = (float(t_quantile(1 - design.alpha, df)) for df in dfs)
    of_power = [float(t_quantile(2 * POWER - 1, df)) for df in dfs]

    def seen(d: float) -> bool:
        discordant = max(design.discordant, d * 1.001)
        of_a_row = discordant - d * d
        seeds, rest = 2 * design.seed_deviation**2 / S, of_a_row * (1 - design.lasting) / (S * E)
        rows = of_a_row * design.lasting / E + rest
        measured = t_rows**2 * rows + t_seeds**2 * (seeds + 2 / S * rest)  # as `spread.over_rows` measures them
        of_test = min(discordant / of_a_row, 2.0)  # it measures noise where the methods are equal
        beyond = of_power[0] ** 2 * rows + of_power[1] ** 2 * seeds
        return bool(d >= (measured * of_test) ** 0.5 + beyond**0.5)

    return _smallest(seen)


def _in_folds(design: Design) -> float | None:
    """By the corrected resampled t test, were all noise that of the rows: noise of training comes on top, and is less over repeats."""
    k, repeats, E = design.folds, design.seeds, design.rows
    inflation = max(
        1 / repeats + k / (k - 1), 1.0
    )  # of E independent rows' variance, as `spread.over_folds` measures it
    t = float(t_quantile(1 - design.alpha, k * repeats - 1))

    def seen(d: float) -> bool:
        discordant = max(design.discordant, d * 1.001)
        of_a_row = discordant - d * d
        of_test = min(discordant / of_a_row, 2.0)
        return bool(d >= (t**2 * inflation * of_test * of_a_row / E) ** 0.5 + Z_POWER * (of_a_row / E) ** 0.5)

    return _smallest(seen)


def unpaired_power(difference: float, accuracy: float, rows: int, alpha: float = 0.05) -> float:
    """Chance that a test of two counts sees accuracy against accuracy − difference, `rows` each; normal approximation."""
    from scipy.stats import norm

    p, q = accuracy, accuracy - difference
    pooled = (p + q) / 2
    null, true = ((2 * pooled * (1 - pooled)) / rows) ** 0.5, ((p * (1 - p) + q * (1 - q)) / rows) ** 0.5
    if true == 0:
        return 1.0 if difference else 0.0
    return float(norm.cdf((abs(difference) - float(z_quantile(1 - alpha)) * null) / true))


def minimum_detectable_unpaired(accuracy: float, rows: int, alpha: float = 0.05) -> float | None:
    """How far below `accuracy` another method must be, each with `rows` of its own."""
    return _smallest(lambda d: unpaired_power(d, accuracy, rows, alpha) >= POWER, accuracy)


@dataclass(frozen=True)
class Needed:
    """How much would tell two methods apart, were the difference seen the true one: one of the two, or both together."""

    rows: int | None
    seeds: int | None = None


def needed(spread: Spread, variance_per_row: float, rows: int, seeds: int, alpha: float = 0.05) -> Needed | None:
    """Rows (same seeds), else seeds and rows together, for the difference in `spread` to be seen with power 0.8.

    None where no difference was seen. `variance_per_row` is of one row's paired difference, used where `spread` has none.
    """
    difference = abs(float(spread.value))
    if difference < 1e-12:
        return None
    row_variance = max(float(spread.rows.variance), 1e-12 + variance_per_row / rows if spread.seeds is None else 0.0)
    wanted = (difference / (float(z_quantile(1 - alpha)) + Z_POWER)) ** 2
    if spread.seeds is None:
        return Needed(max(ceil(rows * row_variance / wanted), rows + 1))
    of_seeds = spread.seeds

    def enough(row_factor: float, new_seeds: int) -> bool:
        terms = (
            (row_variance / row_factor, rows * row_factor - 1),
            (float(of_seeds.variance) * seeds / new_seeds, new_seeds - 1.0),
        )
        return sum((float(t_quantile(1 - alpha, df)) + Z_POWER) ** 2 * v for v, df in terms) <= difference**2

    for new_seeds in (seeds, *(seeds + 2**i for i in range(14))):
        if enough(MOST_ROWS, new_seeds):
            factor = 1.0
            while not enough(factor, new_seeds):
                factor *= 1.02
            return Needed(ceil(rows * factor), new_seeds)
    return None


def rows_for_equivalence(variance_per_row: float, margin: float) -> int:
    """Rows on which two equally good methods would, in 8 of 10 studies, be shown equal to within the margin."""
    z_two_sided_power = float(z_quantile(POWER))
    return ceil(variance_per_row * ((float(z_quantile(0.95)) + z_two_sided_power) / margin) ** 2)


def _smallest(seen: Callable[[float], bool], most: float = 1.0) -> float | None:
    """The smallest d in (0, most] with seen(d), which stays true above it."""
    if not seen(most):
        return None
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high
