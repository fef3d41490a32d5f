"""Where things stand in the plots: numbers → per cent of a frame, x from the left, y from the top. The page draws them as SVG.

A frame is stretched to whatever width there is, so that text stays text of its own size, on a phone too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from katei.study.intervals import wilson

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """A range of numbers along one side of a frame."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Per cent of the way, kept inside the frame."""
        span = self.high - self.low
        return round(min(max(100 * (value - self.low) / span, 0.0), 100.0), 2)

    def up(self, value: float) -> float:
        """The same from the top."""
        return round(100 - self.at(value), 2)

    def label(self, value: float) -> str:
        """With as many digits as every tick needs."""
        digits = next(d for d in range(10) if all(math.isclose(round(t, d), t, abs_tol=1e-9) for t in self.ticks))
        return f"{value:,.{digits}f}"


def axis(low: float, high: float, *, most: int = 5) -> Axis:
    """A range that begins and ends at round numbers: 1, 2 or 5 times a power of ten apart."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) + 0.0 for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


UNIT = Axis(0.0, 1.0, (0.0, 0.5, 1.0))


def polyline(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """For SVG's `points`."""
    return " ".join(f"{x.at(a):g},{y.up(b):g}" for a, b in points)


# -------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Band:
    """Many curves as one: their median and their middle half, epoch by epoch."""

    median: tuple[tuple[float, float], ...]
    low: tuple[tuple[float, float], ...]
    high: tuple[tuple[float, float], ...]
    curves: int


def band(curves: Sequence[dict[int, float]]) -> Band:
    """Of curves by epoch; one that ended early counts as long as it went."""
    epochs = sorted({epoch for curve in curves for epoch in curve})
    found = [np.quantile([curve[e] for curve in curves if e in curve], [0.25, 0.5, 0.75]) for e in epochs]
    low, median, high = (
        tuple((float(e), float(values[q])) for e, values in zip(epochs, found, strict=True)) for q in range(3)
    )
    return Band(median, low, high, len(curves))


# -------------------------------------------------------------------- ROC and calibration


def thinned(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """No more points than a small plot can show, both ends among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i)] for i in np.linspace(0, len(points) - 1, most)]


def roc_curve(probability_EC: Floats, labels_E: NDArray[np.intp]) -> list[tuple[float, float]]:
    """(wrongly called so, found) from (0, 0) to (1, 1): of the last of two classes, or the mean of one against the rest."""
    classes = probability_EC.shape[1]
    if classes == 2:
        return _one_curve(probability_EC[:, 1], labels_E == 1)
    grid = np.linspace(0, 1, 101)
    curves = [np.array(_one_curve(probability_EC[:, c], labels_E == c)) for c in range(classes)]
    found = np.mean([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves], axis=0)
    return [(0.0, 0.0), *zip(grid.tolist(), found.tolist(), strict=True)]


def _one_curve(score_E: Floats, positive_E: NDArray[np.bool_]) -> list[tuple[float, float]]:
    from sklearn.metrics import roc_curve as library_curve

    wrongly, found, _ = library_curve(positive_E, score_E)
    return list(zip(wrongly.tolist(), found.tolist(), strict=True))


@dataclass(frozen=True)
class Bin:
    """Answers given with about the same confidence."""

    confidence: float
    right: float
    low: float
    high: float
    rows: int


def calibration_bins(probability_SEC: Floats, labels_E: NDArray[np.intp], bins: int = 10) -> list[Bin]:
    """The bins of `calibration_error`, those that hold an answer; all seeds together, but a row counts once for the interval's width."""
    seeds, rows_E = len(probability_SEC), len(labels_E)
    confidence_E = probability_SEC.max(-1).reshape(seeds * rows_E)
    right_E = (probability_SEC.argmax(-1) == labels_E).reshape(seeds * rows_E)
    bin_E = np.minimum((confidence_E * bins).astype(int), bins - 1)
    found = []
    for k in np.unique(bin_E):
        inside = bin_E == k
        rows, right = int(inside.sum()), int(right_E[inside].sum())
        bounds = wilson(right / seeds, rows / seeds)
        mean = float(confidence_E[inside].mean())
        found.append(Bin(mean, right / rows, float(bounds.low), float(bounds.high), rows))
    return found
