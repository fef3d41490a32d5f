"""How far a mean may be off: noise of seeds, of rows, of folds. Dimensions: S seeds · E rows · J cells (repeat × fold).

A score over seeds × rows is off for two reasons, and only one of them shrinks with more rows:

    score = truth + seeds' part + rows' part + rest        half² = t²(S−1) · v_seeds + t²(rows' df) · v_rows

Each variance keeps its own t quantile (Graybill & Wang 1980): five seeds are five however many rows they were scored on. The
rest, noise of one seed on one row, is in both measured variances; taken out in full it leaves too little where seeds are few,
so the share (S − 2) / S of it is taken out of the seeds'. A score that is no plain mean (area under a curve, F1) comes with its
*influence*: by how much a row moves it, times E. Row noise is then that of the influences, within strata (the classes for AUC,
which makes it DeLong's variance: DeLong, DeLong & Clarke-Pearson 1988).

Cells of (repeated) k-fold share their training rows, so their variance counts 1 / J + test rows / training rows times:
Nadeau & Bengio 2003; for repeats Bouckaert & Frank 2004.

Everything works along the last axes, so leading axes may hold many studies at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Term:
    """One source of noise: the variance it adds to the score, and its degrees of freedom."""

    variance: Floats
    df: Floats


@dataclass(frozen=True)
class Spread:
    """A score and its noise. `seeds` is None where folds already hold the noise of training."""

    value: Floats
    rows: Term
    seeds: Term | None = None

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self.rows,) if self.seeds is None else (self.rows, self.seeds)

    def half_width(self, level: ArrayLike = 0.95) -> Floats:
        total = sum((t_quantile(level, term.df) ** 2 * term.variance for term in self.terms), np.float64(0))
        return np.sqrt(total)

    def variance(self, level: ArrayLike = 0.95) -> Floats:
        """The variance of a normal score whose interval at `level` is as wide."""
        return np.asarray((self.half_width(level) / z_quantile(level)) ** 2)


def over_rows(value_S: ArrayLike, influence_SE: ArrayLike, strata_E: NDArray[np.intp] | None = None) -> Spread:
    """The spread of the mean of `value_S`, from how each row moves each seed's score; S may be 1."""
    value_S, influence_SE = np.asarray(value_S, dtype=np.float64), np.asarray(influence_SE, dtype=np.float64)
    S, E = influence_SE.shape[-2:]
    strata_E = np.zeros(E, dtype=np.intp) if strata_E is None else strata_E
    total, rest, over_df = (np.zeros(influence_SE.shape[:-2]) for _ in range(3))
    for stratum in np.unique(strata_E):
        part_Se = influence_SE[..., strata_E == stratum]
        n = part_Se.shape[-1]
        share, df = n / E**2, max(n - 1, 1)
        row_e = part_Se.mean(-2)
        rest_Se = part_Se - part_Se.mean(-1, keepdims=True) - row_e[..., None, :] + row_e.mean(-1)[..., None, None]
        variance = share * np.square(row_e - row_e.mean(-1, keepdims=True)).sum(-1) / df
        unexplained = share * np.square(rest_Se).sum((-1, -2)) / (df * max(S - 1, 1) * S)
        variance = np.maximum(variance, unexplained)
        total, rest, over_df = total + variance, rest + unexplained, over_df + variance**2 / df
    rows_df = np.where(over_df > 0, total**2 / np.where(over_df > 0, over_df, 1), E - 1)  # Satterthwaite, over strata
    rows = Term(total, rows_df)
    if S == 1:
        return Spread(value_S.mean(-1), rows)
    between = value_S.var(-1, ddof=1) / S
    return Spread(value_S.mean(-1), rows, Term(np.maximum(between - (S - 2) / S * rest, 0), np.asarray(S - 1.0)))


def over_folds(value_J: ArrayLike, test_to_train: float) -> Spread:
    """The spread of the mean over cells of k-fold; `test_to_train` is 1 / (k − 1)."""
    value_J = np.asarray(value_J, dtype=np.float64)
    J = value_J.shape[-1]
    return Spread(
        value_J.mean(-1), Term(value_J.var(-1, ddof=1) * (1 / J + test_to_train), np.asarray(float(max(J - 1, 1))))
    )


def z_quantile(level: ArrayLike) -> Floats:
    from scipy.special import ndtri

    return np.asarray(ndtri((1 + np.asarray(level)) / 2))


def t_quantile(level: ArrayLike, df: ArrayLike) -> Floats:
    from scipy.special import stdtrit

    quantile: Any = stdtrit(np.asarray(df), (1 + np.asarray(level)) / 2)
    return np.asarray(quantile)
