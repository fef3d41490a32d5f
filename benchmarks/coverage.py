"""Do the intervals hold what they promise? Simulated studies with a known truth; writes the tables of docs/statistics.md.

    python -m benchmarks.coverage [--studies 4000] [--write]      about 1 minute on one core

Every function here draws many studies at once, so tests/study/test_statistics.py runs the same ones on fewer.
Dimensions: N studies · S seeds · E rows · C classes · J cells of k-fold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from katei.study import differences as d
from katei.study import intervals as of
from katei.study.power import Design, minimum_detectable_difference, minimum_detectable_unpaired
from katei.study.spread import over_folds, over_rows

DOCS = Path(__file__).parent.parent / "docs" / "statistics.md"
ROWS = (20, 54, 200)
ROUNDING = 1e-9


@dataclass(frozen=True)
class Line:
    """One simulated situation: how often the interval held the truth, and how wide it was on average."""

    method: str
    situation: str
    rows: int
    covered: float
    width: float


def line(method: str, situation: str, rows: int, interval: of.Interval, truth: Any, weight: Any = None) -> Line:
    low, high = (np.asarray(x, dtype=float) for x in interval)
    inside = (low - ROUNDING <= truth) & (truth <= high + ROUNDING)
    return Line(
        method,
        situation,
        rows,
        float(np.average(inside, weights=weight)),
        float(np.average(high - low, weights=weight)),
    )


# -------------------------------------------------------------------- one method, one test set


def accuracy(rows: int, truth: float) -> list[Line]:
    """Exact: every count with its probability."""
    k = np.arange(rows + 1)
    chance = binom.pmf(k, rows, truth)
    return [
        line(name, f"accuracy {truth:g}", rows, interval(k, rows), truth, chance)
        for name, interval in (("Clopper–Pearson", of.clopper_pearson), ("Wilson (unused)", of.wilson))
    ]


def scores(
    rng: np.random.Generator,
    N: int,
    S: int,
    positive_E: Any,
    truth: float,
    seeds: float,
    kind: str,
    shared: float = 0.5,
) -> tuple[Any, float]:
    """Scores N × S × E and the true area. `seeds`: deviation of the separation over seeds; `kind`: normal, unequal or tied."""
    wide = 1.5 if kind == "unequal" else 1.0
    both = 1 + wide**2
    separation = ndtri(truth) * (both + seeds**2) ** 0.5
    row = rng.standard_normal((N, 1, len(positive_E))) * shared**0.5
    own = rng.standard_normal((N, S, len(positive_E))) * (1 - shared) ** 0.5
    each = separation + seeds * rng.standard_normal((N, S, 1))
    score = (row + own) * np.where(positive_E, wide, 1) + np.where(positive_E, each, 0)
    if kind != "tied":
        return score, truth
    # a saturated model: three values only
    share = [np.diff(ndtr(np.array([-np.inf, -0.5, 0.5, np.inf]) * 2 + (0.5 - m) * separation)) for m in (0, 1)]
    cut = np.sign(score - separation / 2) * (np.abs(score - separation / 2) > 1)
    others, mine = share
    return cut, float(mine[2] * (others[0] + others[1]) + mine[1] * others[0] + 0.5 * (mine * others).sum())


def area(rng: np.random.Generator, N: int, rows: int, positives: int, truth: float, kind: str) -> Line:
    positive_E = np.arange(rows) < positives
    score, true_area = scores(rng, N, 1, positive_E, truth, 0.0, kind)
    value_S, influence_SE = of.auc(score, positive_E)
    spread = over_rows(value_S, influence_SE, positive_E.astype(int))
    interval = of.auc_interval(spread, [rows - positives, positives])
    return line(
        "AUC, DeLong in Newcombe's", f"area {true_area:.3f}, {positives} positive, {kind}", rows, interval, true_area
    )


def area_by_bootstrap(rng: np.random.Generator, N: int, rows: int, positives: int, truth: float) -> Line:
    positive_E = np.arange(rows) < positives
    score, _ = scores(rng, N, 1, positive_E, truth, 0.0, "normal")
    both = np.stack([-score, score], -1)[:, 0]
    found = [of.bootstrap_auc(p_EC, positive_E.astype(int), rng, draws=400) for p_EC in both]
    interval = of.Interval(*(np.array([float(f[i]) for f in found]) for i in (0, 1)))
    return line("AUC, bootstrap (unused)", f"area {truth:g}, {positives} positive, normal", rows, interval, truth)


def f1(rng: np.random.Generator, N: int, rows: int, share: tuple[float, ...], right: tuple[float, ...]) -> Line | None:
    """Answers drawn for fixed numbers of rows in each class."""
    C = len(share)
    class_rows = np.diff(np.round(np.cumsum([0, *share]) * rows)).astype(int)
    labels_E = np.repeat(np.arange(C), class_rows)
    chance_CC = np.array([[r if i == j else (1 - r) / (C - 1) for j in range(C)] for i, r in enumerate(right)])
    truth = _f1(chance_CC * (class_rows / rows)[:, None])
    cut_EC = np.cumsum(chance_CC, 1)[labels_E]
    prediction_SE = np.minimum((rng.random((N, 1, rows, 1)) > cut_EC).sum(-1), C - 1)
    spread = over_rows(*of.macro_f1(prediction_SE, labels_E))
    interval = of.f1_interval(spread, class_rows)
    if interval is None:
        return None
    return line("macro F1", f"{C} classes, smallest {class_rows.min()}, F1 {truth:.3f}", rows, interval, truth)


def _f1(table_CC: Any) -> float:
    return float(np.mean(2 * np.diag(table_CC) / (table_CC.sum(0) + table_CC.sum(1))))


WORLDS = {  # of the logit: deviation and mean; how far the model exaggerates it, and its noise
    "calibrated": (1.5, 0.0, 1.0, 0.0),
    "calibrated, easy": (4.0, 1.0, 1.0, 0.0),
    "too sure": (1.5, 0.0, 3.0, 0.5),
    "too sure, easy": (4.0, 1.0, 2.0, 0.5),
}


def probabilities(rng: np.random.Generator, shape: tuple[int, ...], world: str) -> tuple[Any, Any]:
    """Probabilities and whether the last class is true, of rows drawn in one of WORLDS."""
    deviation, mean, exaggeration, noise = WORLDS[world]
    logit = deviation * rng.standard_normal(shape) + mean
    label = rng.random(shape) < 1 / (1 + np.exp(-logit))
    p = 1 / (1 + np.exp(-exaggeration * logit - noise * rng.standard_normal(shape)))
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.stack([1 - p, p], -1), label.astype(int)


def losses(rng: np.random.Generator, N: int, rows: int, world: str) -> list[Line]:
    many, many_labels = probabilities(rng, (1, 300_000), world)
    p_NEC, label_NE = probabilities(rng, (N, rows), world)
    found = []
    for name, loss in (("log loss", of.log_loss), ("Brier", of.brier)):
        truth = loss(many, many_labels[0])[0].mean()
        # every study has labels of its own: swap the two columns where the label is 0, so that all labels are 1
        swapped = np.where(label_NE[..., None] == 1, p_NEC, p_NEC[..., ::-1])[:, None]
        interval = of.loss_interval(*loss(swapped, np.ones(rows, dtype=int)))
        found.append(line(name, world, rows, interval, truth))
    return found


def calibration(rng: np.random.Generator, N: int, rows: int, world: str) -> Line:
    many, many_labels = probabilities(rng, (300_000,), world)
    truth = of.calibration_error(many, many_labels)[0]
    drawn = [probabilities(rng, (rows,), world) for _ in range(N)]
    found = [of.calibration_interval(p, y, rng, draws=300) for p, y in drawn]
    interval = of.Interval(*(np.array([float(f[i]) for f in found]) for i in (0, 1)))
    return line("calibration error (a bound)", f"{world}, true {truth:.3f}", rows, interval, truth)


# -------------------------------------------------------------------- seeds × rows


@dataclass(frozen=True)
class World:
    """Deviations, on the probit scale, of how hard rows are and of how well seeds do; noise of one seed on one row is 1."""

    name: str
    rows: float
    seeds: float


NOISES = (
    World("row noise", 2, 0),
    World("both", 2, 0.25),
    World("seed noise", 0.3, 0.25),
    World("seeds differ widely", 0.3, 0.5),
    World("neither lasts", 0, 0),
)


def answers(
    rng: np.random.Generator, N: int, S: int, E: int, truth: tuple[float, ...], world: World, common: float = 0.7
) -> list[Any]:
    """Right answers N × S × E of methods of these true accuracies; `common`: of the rows' difficulty, the part all share."""
    scale = (1 + world.rows**2 + world.seeds**2) ** 0.5
    shared = rng.standard_normal((N, 1, E)) * common**0.5
    drawn = []
    for accuracy in truth:
        row = shared + rng.standard_normal((N, 1, E)) * (1 - common) ** 0.5
        latent = ndtri(accuracy) * scale + world.rows * row + world.seeds * rng.standard_normal((N, S, 1))
        drawn.append((latent + rng.standard_normal((N, S, E)) > 0).astype(float))
    return drawn


def spread_of(right_SE: Any) -> Any:
    return over_rows(right_SE.mean(-1), right_SE - right_SE.mean(-1, keepdims=True))


def paired(a: Any, b: Any) -> tuple[Any, d.Discordance]:
    difference = a - b
    return spread_of(difference), d.Discordance((difference > 0).mean((-1, -2)), (difference < 0).mean((-1, -2)))


def seeds_and_rows(
    rng: np.random.Generator, N: int, S: int, E: int, truth: float, gap: float, world: World
) -> list[Line]:
    a, b = answers(rng, N, S, E, (truth, truth - gap), world)
    spread, discordance = paired(a, b)
    situation = f"{S} seeds, accuracy {truth:g}, {world.name}"
    return [
        line("accuracy over seeds", situation, E, of.share_interval(spread_of(a), E), truth),
        line("difference over seeds", f"{situation}, true {gap:g}", E, d.paired_interval(spread, discordance, E), gap),
    ]


def area_over_seeds(
    rng: np.random.Generator, N: int, S: int, rows: int, positives: int, truth: float, seeds: float
) -> Line:
    positive_E = np.arange(rows) < positives
    score, _ = scores(rng, N, S, positive_E, truth, seeds, "normal")
    spread = over_rows(*of.auc(score, positive_E), positive_E.astype(int))
    interval = of.auc_interval(spread, [rows - positives, positives])
    return line(
        "AUC over seeds", f"{S} seeds, area {truth:g}, {positives} positive, seeds {seeds:g}", rows, interval, truth
    )


# -------------------------------------------------------------------- differences on one test set


def tango_exact(rows: int, discordance: float, gap: float) -> Line:
    b, c, chance = _discordant(rows, discordance, gap)
    return line(
        "difference, Tango", f"discordance {discordance:g}, true {gap:g}", rows, d.tango(b, c, rows), gap, chance
    )


def mcnemar_rejects(rows: int, discordance: float, gap: float = 0.0, alpha: float = 0.05) -> float:
    b, c, chance = _discordant(rows, discordance, gap)
    p = np.minimum(1, 2 * binom.cdf(np.minimum(b, c), b + c, 0.5))
    return float(chance[p <= alpha].sum())


def _discordant(rows: int, discordance: float, gap: float) -> tuple[Any, Any, Any]:
    k, b = np.meshgrid(np.arange(rows + 1), np.arange(rows + 1), indexing="ij")
    k, b = k[b <= k], b[b <= k]
    share = (discordance + gap) / (2 * discordance)
    return b, k - b, binom.pmf(k, rows, discordance) * binom.pmf(b, k, share)


def newcombe_exact(rows: int, first: float, second: float) -> Line:
    i, j = np.meshgrid(np.arange(rows + 1), np.arange(rows + 1), indexing="ij")
    chance = binom.pmf(i, rows, first) * binom.pmf(j, rows, second)
    interval = d.unpaired_interval(i, rows, j, rows)
    return line("difference of counts, Newcombe", f"{first:g} and {second:g}", rows, interval, first - second, chance)


def area_difference(
    rng: np.random.Generator, N: int, S: int, rows: int, positives: int, truth: tuple[float, float], seeds: float = 0.0
) -> Line:
    """Two methods whose scores of a row have the correlation 0.5."""
    positive_E = np.arange(rows) < positives
    strata_E = positive_E.astype(int)
    shared = rng.standard_normal((N, 1, rows)) * 0.5**0.5
    measured, intervals = [], []
    for accuracy in truth:
        separation = ndtri(accuracy) * (2 + seeds**2) ** 0.5 + seeds * rng.standard_normal((N, S, 1))
        own = rng.standard_normal((N, 1, rows)) * 0.5 + rng.standard_normal((N, S, rows)) * 0.5
        value_S, influence_SE = of.auc(shared + own + np.where(positive_E, separation, 0), positive_E)
        measured.append((value_S, influence_SE))
        intervals.append(of.auc_interval(over_rows(value_S, influence_SE, strata_E), [rows - positives, positives]))
    (value_a, influence_a), (value_b, influence_b) = measured
    spread_a, spread_b = (over_rows(v, i, strata_E) for v, i in measured)
    spread = over_rows(value_a - value_b, influence_a - influence_b, strata_E)
    interval = d.joined_interval(spread_a, intervals[0], spread_b, intervals[1], spread)
    name = "difference of AUC" if S == 1 else f"difference of AUC, {S} seeds"
    return line(name, f"{truth[0]:g} and {truth[1]:g}, {positives} positive", rows, interval, truth[0] - truth[1])


# -------------------------------------------------------------------- repeated k-fold


def cross_validated(
    rng: np.random.Generator, N: int, rows: int, positive_share: float, separation: float, k: int, repeats: int
) -> list[Line]:
    """Two classifiers of equal worth, nearest centroids on 8 features of their own each, trained in every fold."""
    positives = max(k, round(rows * positive_share))
    y = (np.arange(rows) < positives).astype(float)
    features = [
        rng.standard_normal((N, rows, 8)) + separation * (y - 0.5)[None, :, None] / 8**0.5 for _ in range(2)
    ]  # fmt: skip
    right = np.zeros((2, N, repeats, rows))
    cells = np.zeros((2, N, repeats * k))
    for repeat in range(repeats):
        fold_NE = np.concatenate(
            [rng.permuted(np.tile(np.arange(n) % k, (N, 1)), axis=1) for n in (positives, rows - positives)], axis=1
        )
        fold_NE[:, positives:] = (fold_NE[:, positives:] + positives) % k
        for fold in range(k):
            train_NE = fold_NE != fold
            for method, x_NED in enumerate(features):
                above, below = (
                    np.einsum("ne,ned->nd", train_NE * c, x_NED) / (train_NE * c).sum(1)[:, None] for c in (y, 1 - y)
                )
                direction = above - below
                middle = ((above + below) / 2 * direction).sum(1)[:, None] - np.log(positives / (rows - positives))
                said = np.einsum("ned,nd->ne", x_NED, direction) > middle
                good = said == (y > 0)
                right[method, :, repeat] = np.where(train_NE, right[method, :, repeat], good)
                cells[method, :, repeat * k + fold] = (good * ~train_NE).sum(1) / (~train_NE).sum(1)
    truth = float(cells.mean())
    spread = over_folds(cells[0], 1 / (k - 1))
    difference = right[0] - right[1]
    discordance = d.Discordance((difference > 0).mean((-1, -2)), (difference < 0).mean((-1, -2)))
    between = d.paired_interval(over_folds(cells[0] - cells[1], 1 / (k - 1)), discordance, rows, at_most=rows)
    situation = f"{k} folds × {repeats}, {positives} positive, accuracy {truth:.3f}"
    return [
        line("accuracy over folds", situation, rows, of.share_interval(spread, rows, at_most=rows), truth),
        line("difference over folds", f"{situation}, true 0", rows, between, 0.0),
    ]


# -------------------------------------------------------------------- families and power


def family_error(rng: np.random.Generator, N: int, methods: int, rows: int, accuracy: float) -> float:
    """Chance that any pair of equally good methods is called different, by exact McNemar and Holm."""
    drawn = np.stack(answers(rng, N, 1, rows, (accuracy,) * methods, NOISES[0]))[:, :, 0]
    found = []
    for i in range(methods):
        for j in range(i):
            b, c = ((drawn[i] - drawn[j]) > 0).sum(-1), ((drawn[i] - drawn[j]) < 0).sum(-1)
            found.append(np.minimum(1, 2 * binom.cdf(np.minimum(b, c), b + c, 0.5)))
    smallest = np.min(found, axis=0)
    return float((smallest * len(found) < 0.05).mean())  # Holm refuses something just when its first step does


def unpaired_rejects(rng: np.random.Generator, N: int, rows: int, first: float, second: float) -> float:
    """Share of studies in which Boschloo's test sees a difference; each pair of counts is tested once."""
    pairs, times = np.unique(rng.binomial(rows, [first, second], (N, 2)), axis=0, return_counts=True)
    seen = [d.unpaired_p(int(i), rows, int(j), rows) < 0.05 for i, j in pairs]
    return float(np.average(seen, weights=times))


def seeds_power(rng: np.random.Generator, N: int, S: int, E: int, accuracy: float, world: World) -> tuple[float, float]:
    """The detectable difference of a design whose noise is known, and how often it is seen."""
    gap: float | None = 0.0
    for _ in range(4):  # how noisy the worse method is depends on how much worse it is
        assert gap is not None
        first, second = answers(rng, 2000, 2, 400, (accuracy, accuracy - gap), world)
        unlike = first - second
        discordance = float((unlike != 0).mean())
        product = (unlike[:, 0] * unlike[:, 1]).mean() - gap**2
        deviation = 0.0
        if world.seeds:
            seeds = ndtri([accuracy, accuracy - gap]) * (1 + world.rows**2 + world.seeds**2) ** 0.5
            each = ndtr(
                (seeds + world.seeds * rng.standard_normal((20_000, 1))[:, [0, 0]]) / (1 + world.rows**2) ** 0.5
            )
            deviation = float(each.var(0).mean() ** 0.5)
        lasting = float(np.clip(product / (discordance - gap**2), 0, 1))
        gap = minimum_detectable_difference(Design(E, S, accuracy, discordance, deviation, lasting))
    assert gap is not None
    spread, discordant = paired(*answers(rng, N, S, E, (accuracy, accuracy - gap), world))
    interval = d.paired_interval(spread, discordant, E)
    return gap, float((interval.low > 0).mean())


def folds_power(
    rng: np.random.Generator, N: int, rows: int, k: int, repeats: int, accuracy: float, lasting: float
) -> tuple[float, float]:
    """The detectable difference of repeated k-fold, and how often it is seen where it is there.

    `lasting`: share of rows on which the methods' answers are the same in every repeat.
    """
    design = Design(rows, repeats, folds=k, accuracy=accuracy)
    gap = minimum_detectable_difference(design)
    assert gap is not None
    discordant = max(design.discordant, gap)
    chances = [(discordant + gap) / 2, (discordant - gap) / 2]

    def draw(*shape: int) -> Any:
        u = rng.random(shape)
        return np.where(u < chances[0], 1.0, np.where(u < sum(chances), -1.0, 0.0))

    stays = rng.random((N, 1, rows)) < lasting
    difference = np.where(stays, draw(N, 1, rows), draw(N, repeats, rows))
    fold_NSE = rng.permuted(np.broadcast_to(np.arange(rows) % k, (N, repeats, rows)), axis=-1)
    cells = [(difference * (fold_NSE == f)).sum(-1) / (fold_NSE == f).sum(-1) for f in range(k)]
    spread = over_folds(np.stack(cells, -1).reshape(N, -1), 1 / (k - 1))
    discordance = d.Discordance((difference > 0).mean((-1, -2)), (difference < 0).mean((-1, -2)))
    return gap, float((d.paired_interval(spread, discordance, rows, at_most=rows).low > 0).mean())


# -------------------------------------------------------------------- the tables


def every_line(N: int) -> Iterator[Line]:
    rng = np.random.default_rng(0)
    for rows in ROWS:
        for truth in (0.5, 0.75, 0.9, 0.95, 0.98, 0.995):
            yield from accuracy(rows, truth)
    for rows, positives in AREAS:
        for truth in (0.5, 0.7, 0.9, 0.98, 0.995):
            for kind in ("normal", "unequal", "tied"):
                yield area(rng, N, rows, positives, truth, kind)
    for rows, positives in AREAS[:3]:
        for truth in (0.7, 0.9, 0.98):
            yield area_by_bootstrap(rng, N // 8, rows, positives, truth)
    for rows in ROWS:
        for share, right in F1S:
            found = f1(rng, N, rows, share, right)
            if found is not None:
                yield found
        for world in WORLDS:
            yield from losses(rng, N, rows, world)
        for world in WORLDS:
            yield calibration(rng, N // 8, rows, world)
    for S in (2, 3, 5, 10):
        for E in ROWS:
            for truth, gap in ((0.75, 0.0), (0.95, 0.0), (0.9, 0.1)):
                for noise in NOISES:
                    yield from seeds_and_rows(rng, 2 * N, S, E, truth, gap, noise)
    for rows, positives in AREAS:
        for S, truth, seeds in ((3, 0.9, 0.3), (5, 0.9, 0.3), (5, 0.98, 0.3), (5, 0.9, 0.0)):
            yield area_over_seeds(rng, N // 4, S, rows, positives, truth, seeds)
    for rows in ROWS:
        for discordance, gap in TANGOS:
            yield tango_exact(rows, discordance, gap)
        for first, second in ((0.75, 0.75), (0.9, 0.9), (0.95, 0.85), (0.98, 0.98), (0.995, 0.9)):
            yield newcombe_exact(rows, first, second)
    for rows, positives in AREAS:
        for pair in ((0.7, 0.7), (0.9, 0.9), (0.98, 0.98), (0.9, 0.7), (0.995, 0.9)):
            yield area_difference(rng, N, 1, rows, positives, pair)
        yield area_difference(rng, N // 4, 5, rows, positives, (0.9, 0.9), 0.3)
    for rows in ROWS:
        for share in (0.5, 0.3):
            for separation in (0.0, 1.5, 3.5):
                for repeats in (1, 2, 4):
                    yield from cross_validated(rng, N // (2 if rows < 200 else 4), rows, share, separation, 5, repeats)


AREAS = ((20, 10), (20, 5), (54, 16), (54, 6), (200, 100), (200, 20))
F1S = (
    ((0.5, 0.5), (0.7, 0.7)),
    ((0.5, 0.5), (0.95, 0.95)),
    ((0.5, 0.5), (0.99, 0.99)),
    ((0.7, 0.3), (0.98, 0.85)),
    ((0.9, 0.1), (0.97, 0.6)),
    ((0.25,) * 4, (0.8,) * 4),
    ((0.1,) * 10, (0.8,) * 10),
)
TANGOS = (
    (0.05, 0.0),
    (0.05, 0.05),
    (0.1, 0.0),
    (0.1, 0.05),
    (0.2, 0.0),
    (0.2, 0.1),
    (0.2, 0.2),
    (0.4, 0.0),
    (0.4, 0.2),
)


def summary(lines: list[Line]) -> str:
    """One line a method and number of rows: the least, the mean and the largest coverage over its situations."""
    out = ["| interval | rows | situations | least | mean | most | mean width |", "|---|---|---|---|---|---|---|"]
    for method in dict.fromkeys(x.method for x in lines):
        for rows in ROWS:
            own = [x for x in lines if x.method == method and x.rows == rows]
            if own:
                shares = [x.covered for x in own]
                out.append(
                    f"| {method} | {rows} | {len(own)} | {min(shares):.3f} | {np.mean(shares):.3f} | {max(shares):.3f} "
                    f"| {np.mean([x.width for x in own]):.2f} |"
                )
    return "\n".join(out)


def full(lines: list[Line]) -> str:
    out = ["| interval | situation | 20 rows | 54 rows | 200 rows |", "|---|---|---|---|---|"]
    kept: dict[tuple[str, str], dict[int, float]] = {}
    for x in lines:
        kept.setdefault((x.method, x.situation), {})[x.rows] = x.covered
    for (method, situation), by_rows in kept.items():
        cells = " | ".join(f"{by_rows[r]:.3f}" if r in by_rows else "" for r in ROWS)
        out.append(f"| {method} | {situation} | {cells} |")
    return "\n".join(out)


def tests_table(N: int) -> str:
    rng = np.random.default_rng(1)
    out = ["| test | situation | said different |", "|---|---|---|"]
    for rows in ROWS:
        worst = max(mcnemar_rejects(rows, x) for x in (0.05, 0.1, 0.2, 0.4))
        out.append(
            f"| exact McNemar, equal methods | {rows} rows, discordance 0.05 to 0.4, the largest | {worst:.3f} |"
        )
        worst = max(unpaired_rejects(rng, N, rows, p, p) for p in (0.75, 0.9, 0.98))
        out.append(f"| Boschloo, equal methods | {rows} rows each, accuracy 0.75 to 0.98, the largest | {worst:.3f} |")
        worst = max(family_error(rng, N, 6, rows, p) for p in (0.75, 0.95))
        out.append(
            f"| Holm, any of 15 pairs of 6 equal methods | {rows} rows, accuracy 0.75 and 0.95, the larger | {worst:.3f} |"
        )
    out += ["", "| design | smallest difference it should see in 80 % | seen in |", "|---|---|---|"]
    for rows in ROWS:
        for discordance in (0.1, 0.3):
            gap = minimum_detectable_difference(Design(rows, discordance=discordance))
            assert gap is not None
            seen = mcnemar_rejects(rows, max(discordance, gap), gap)
            out.append(f"| {rows} rows, one run, discordance {discordance} | {gap:.3f} | {seen:.3f} |")
        gap = minimum_detectable_unpaired(0.95, rows)
        assert gap is not None
        out.append(
            f"| counts of {rows} rows, the better 0.95 | {gap:.3f} | {unpaired_rejects(rng, N, rows, 0.95, 0.95 - gap):.3f} |"
        )
        for S, world in ((5, NOISES[1]), (5, NOISES[2]), (10, NOISES[0])):
            gap, seen = seeds_power(rng, N // 2, S, rows, 0.85, world)
            out.append(f"| {rows} rows × {S} seeds, accuracy 0.85, {world.name} | {gap:.3f} | {seen:.3f} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/statistics.md")
    options = parser.parse_args()
    lines = list(every_line(options.studies))
    parts: dict[str, Callable[[], str]] = {
        "summary": lambda: summary(lines),
        "tests": lambda: tests_table(options.studies),
        "full": lambda: full(lines),
    }
    for name, part in parts.items():
        table = part()
        print(f"## {name}\n\n{table}\n", flush=True)
        if options.write:
            before, rest = DOCS.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
            after = rest.split(f"<!-- end {name} -->")[1]
            new = f"{before}<!-- {name} -->\n{table}\n<!-- end {name} -->{after}"
            DOCS.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
