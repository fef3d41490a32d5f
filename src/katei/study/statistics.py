"""Methods compared on the same rows: every score with its interval, every difference with its test, and what it would take.

    outcomes, rows → compare_outcomes → Comparison      counts → compare_counts → Comparison      verdicts.py puts it in words

Dimensions: S seeds (or repeats of k-fold) · E rows · C classes. How each number is made stands in spread.py (noise),
intervals.py and differences.py; how well they hold, in docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from katei.core.errors import RecipeError, nearest
from katei.study import differences as tests
from katei.study import intervals as of
from katei.study.comparison import (
    ALPHA,
    COMMONEST,
    Comparison,
    Counts,
    Difference,
    Estimate,
    Labels,
    Outcome,
    Rows,
    Scores,
)
from katei.study.intervals import Interval
from katei.study.power import (
    Design,
    minimum_detectable_difference,
    minimum_detectable_unpaired,
    needed,
    rows_for_equivalence,
)
from katei.study.spread import Floats, Spread, Term, over_folds, over_rows

# -------------------------------------------------------------------- the metrics


@dataclass(frozen=True)
class _Measured:
    """One metric of one method: its values and influences over seeds × rows, or its values over cells of k-fold."""

    spread: Spread
    value_S: Floats  # over cells, where there are folds
    influence_SE: Floats | None
    strata_E: Labels | None


Metric = Callable[[Outcome, Labels], tuple[Floats, Floats]]


def _accuracy(outcome: Outcome, labels_E: Labels) -> tuple[Floats, Floats]:
    correct_SE = (outcome.prediction_SE == labels_E).astype(np.float64)
    return correct_SE.mean(-1), correct_SE - correct_SE.mean(-1, keepdims=True)


def _roc_auc(outcome: Outcome, labels_E: Labels) -> tuple[Floats, Floats]:
    assert outcome.probability_SEC is not None
    return of.macro_auc(outcome.probability_SEC, labels_E)


def _macro_f1(outcome: Outcome, labels_E: Labels) -> tuple[Floats, Floats]:
    return of.macro_f1(outcome.prediction_SE, labels_E)


def _mean_loss(loss: Callable[[Floats, Labels], tuple[Floats, Floats]]) -> Metric:
    def metric(outcome: Outcome, labels_E: Labels) -> tuple[Floats, Floats]:
        assert outcome.probability_SEC is not None
        row_SE, _ = loss(outcome.probability_SEC, labels_E)
        return row_SE.mean(-1), row_SE - row_SE.mean(-1, keepdims=True)

    return metric


_METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "roc_auc": _roc_auc,
    "macro_f1": _macro_f1,
    "log_loss": _mean_loss(of.log_loss),
    "brier": _mean_loss(of.brier),
}
COMPARED = ("accuracy", "roc_auc")


def _defined(metric: str, labels_E: Labels, classes: int) -> bool:
    """AUC needs a row of every class, and a row of another."""
    return metric != "roc_auc" or len(np.unique(labels_E)) == classes >= 2


def _measure(metric: str, outcome: Outcome, rows: Rows) -> _Measured | None:
    """None where the metric is not defined on these rows."""
    classes = len(rows.label_names)
    if rows.fold_SE is None:
        if not _defined(metric, rows.labels_E, classes):
            return None
        value_S, influence_SE = _METRICS[metric](outcome, rows.labels_E)
        strata_E = rows.labels_E if metric == "roc_auc" else None
        return _Measured(over_rows(value_S, influence_SE, strata_E), value_S, influence_SE, strata_E)
    cells = []
    for s, fold in _cells(rows.fold_SE):
        inside = rows.fold_SE[s] == fold
        if not _defined(metric, rows.labels_E[inside], classes):
            return None
        part = Outcome(
            outcome.method,
            outcome.prediction_SE[s : s + 1, inside],
            None if outcome.probability_SEC is None else outcome.probability_SEC[s : s + 1, inside],
        )
        cells.append(float(_METRICS[metric](part, rows.labels_E[inside])[0][0]))
    value_J = np.array(cells)
    return _Measured(over_folds(value_J, _test_to_train(rows.fold_SE)), value_J, None, None)


def _cells(fold_SE: Labels) -> list[tuple[int, int]]:
    return [(s, int(fold)) for s in range(len(fold_SE)) for fold in np.unique(fold_SE[s])]


def _test_to_train(fold_SE: Labels) -> float:
    return 1 / (len(np.unique(fold_SE[0])) - 1)


def _minus(first: _Measured, second: _Measured, rows: Rows) -> Spread:
    """The spread of the paired difference."""
    if rows.fold_SE is not None:
        return over_folds(first.value_S - second.value_S, _test_to_train(rows.fold_SE))
    assert first.influence_SE is not None
    assert second.influence_SE is not None
    influence_SE = first.influence_SE - second.influence_SE
    return over_rows(first.value_S - second.value_S, influence_SE, first.strata_E)


def _interval(metric: str, measured: _Measured, outcome: Outcome, rows: Rows, level: Any = 0.95) -> Interval | None:
    spread, labels_E = measured.spread, rows.labels_E
    if metric == "accuracy":
        if rows.fold_SE is None and len(measured.value_S) == 1:
            return of.clopper_pearson(spread.value * len(labels_E), len(labels_E), level)
        most = np.inf if rows.fold_SE is None else len(labels_E)
        return of.share_interval(spread, len(labels_E), level, at_most=most)
    if metric == "roc_auc":
        return of.auc_interval(spread, rows.class_rows, level)
    if metric == "macro_f1":
        return of.f1_interval(spread, rows.class_rows, level)
    assert outcome.probability_SEC is not None
    by_rows = of.loss_interval(
        *{"log_loss": of.log_loss, "brier": of.brier}[metric](outcome.probability_SEC, labels_E), level
    )
    if rows.fold_SE is None:
        return by_rows
    half = spread.half_width(level)
    return Interval(
        np.maximum(np.minimum(by_rows.low, spread.value - half), 0), np.maximum(by_rows.high, spread.value + half)
    )


# -------------------------------------------------------------------- comparisons


def compare_outcomes(
    outcomes: Sequence[Outcome], rows: Rows, *, margin: float = 0.05, references: Sequence[str] = (), seed: int = 0
) -> Comparison:
    """Every score, and every pair of methods on the same rows (and seeds, and folds).

    Methods among themselves are one family of tests, methods against `references` another; two references are not compared.
    """
    _check(margin, references, [o.method for o in outcomes])
    E = len(rows.labels_E)
    S = len(outcomes[0].prediction_SE)
    names = [
        m for m in _METRICS if m in ("accuracy", "macro_f1") or all(o.probability_SEC is not None for o in outcomes)
    ]
    measured = {m: {o.method: _measure(m, o, rows) for o in outcomes} for m in names}
    scored = []
    for outcome in outcomes:
        estimates = {}
        for metric in names:
            found = measured[metric][outcome.method]
            if found is not None:
                interval = _interval(metric, found, outcome, rows)
                estimates[metric] = Estimate(float(found.spread.value), interval and _floats(interval))
        if outcome.probability_SEC is not None and S == 1:
            rng = np.random.default_rng(seed)
            value, _ = of.calibration_error(outcome.probability_SEC[0], rows.labels_E)
            interval = of.calibration_interval(outcome.probability_SEC[0], rows.labels_E, rng)
            estimates["calibration_error"] = Estimate(value, _floats(interval))
        scored.append(Scores(outcome.method, E, estimates))
    ranked = _ranked(scored)
    by_name = {o.method: o for o in outcomes}
    order = [by_name[s.method] for s in ranked]
    pairs_of = [
        [(a, b) for a, b in combinations(order, 2) if (a.method in references) + (b.method in references) == family]
        for family in (0, 1)
    ]
    alpha = ALPHA / max(len(pairs_of[0]), 1)
    found_differences: list[Difference] = []
    for metric in (m for m in COMPARED if m in names):
        for family in pairs_of:
            pairs = [
                _difference(metric, a, b, measured[metric], rows, ALPHA / len(family))
                for a, b in family
                if measured[metric][a.method] is not None
            ]
            found_differences += _with_holm(pairs)
    commonest = int(np.bincount(rows.labels_E).argmax())
    constant = Outcome(COMMONEST, np.full((S, E), commonest))
    constant_measured = {**measured["accuracy"], COMMONEST: _measure("accuracy", constant, rows)}
    against = [_difference("accuracy", o, constant, constant_measured, rows, ALPHA / len(order)) for o in order]
    kind = "folds" if rows.fold_SE is not None else "rows" if S == 1 else "seeds"
    accuracies = found_differences[: len(pairs_of[0])]
    discordance = float(np.median([d.row_variance for d in accuracies])) if accuracies else None
    detectable = None
    if kind == "rows" and discordance is not None:
        detectable = minimum_detectable_difference(Design(E, discordance=min(discordance, 1.0), alpha=alpha))
    return Comparison(
        kind=kind,
        rows=E,
        seeds=S,
        folds=0 if rows.fold_SE is None else len(np.unique(rows.fold_SE[0])),
        methods=tuple(ranked),
        differences=tuple(found_differences),
        commonest=(rows.label_names[commonest], float((rows.labels_E == commonest).mean())),
        against_commonest=tuple(_with_holm(against)),
        margin=margin,
        references=tuple(references),
        detectable=detectable,
        rows_for_equivalence=_for_equivalence(accuracies, margin),
    )


def _difference(
    metric: str, a: Outcome, b: Outcome, measured: dict[str, _Measured | None], rows: Rows, alpha: float
) -> Difference:
    first, second = measured[a.method], measured[b.method]
    assert first is not None
    assert second is not None
    spread, E = _minus(first, second, rows), len(rows.labels_E)
    S = len(a.prediction_SE)
    right_a, right_b = a.prediction_SE == rows.labels_E, b.prediction_SE == rows.labels_E
    only_a, only_b = (right_a & ~right_b).mean(), (right_b & ~right_a).mean()
    row_variance = float(max(only_a + only_b - (only_a - only_b) ** 2, 2 / (E + 2)))
    if metric == "accuracy":
        discordance = tests.Discordance(np.asarray(only_a), np.asarray(only_b))
        if rows.fold_SE is None and S == 1:
            interval = tests.tango(only_a * E, only_b * E, E)
            p, test = tests.mcnemar(round(only_a * E), round(only_b * E)), "exact McNemar"
        else:
            most = np.inf if rows.fold_SE is None else E
            interval = tests.paired_interval(spread, discordance, E, at_most=most)
            p = tests.paired_p(spread, discordance, E, at_most=most)
            test = "seeds and rows" if rows.fold_SE is None else "corrected resampled t"
    else:

        def joined(level: Any) -> Interval:
            parts = [_interval(metric, m, o, rows, level) for m, o in ((first, a), (second, b))]
            assert parts[0] is not None
            assert parts[1] is not None
            low, high = tests.joined_interval(first.spread, parts[0], second.spread, parts[1], spread, level)
            return Interval(np.maximum(low, -1), np.minimum(high, 1))

        def excludes(level: Floats) -> NDArray[np.bool_]:
            found = joined(level)
            return np.asarray((found.low > 0) | (found.high < 0))

        interval, p, test = joined(0.95), tests.p_by_inversion(excludes), "joined intervals"
    more = needed(spread, row_variance, E, S, alpha) if metric == "accuracy" else None
    return Difference(
        metric, a.method, b.method, float(spread.value), _floats(interval), p, p, test, row_variance, more
    )


def compare_counts(counts: Sequence[Counts], *, margin: float = 0.05, references: Sequence[str] = ()) -> Comparison:
    """Methods of which only the number of right answers is known: compared as if each had rows of its own."""
    _check(margin, references, [c.method for c in counts])
    scored = [
        Scores(
            c.method, c.rows, {"accuracy": Estimate(c.correct / c.rows, _floats(of.clopper_pearson(c.correct, c.rows)))}
        )
        for c in counts
    ]
    ranked = _ranked(scored)
    by_name = {c.method: c for c in counts}
    order = [by_name[s.method] for s in ranked]
    pair_count = len(order) * (len(order) - 1) // 2
    alpha = ALPHA / max(pair_count, 1)
    pairs = [_count_difference(a, b, alpha) for a, b in combinations(order, 2)]
    rows = min(c.rows for c in counts)
    return Comparison(
        kind="counts",
        rows=rows,
        seeds=1,
        folds=0,
        methods=tuple(ranked),
        differences=tuple(_with_holm(pairs)),
        commonest=None,
        against_commonest=(),
        margin=margin,
        references=tuple(references),
        detectable=minimum_detectable_unpaired(ranked[0].accuracy, rows, alpha) if pairs else None,
        rows_for_equivalence=_for_equivalence(pairs, margin),
    )


def _count_difference(a: Counts, b: Counts, alpha: float) -> Difference:
    p, q = a.correct / a.rows, b.correct / b.rows
    smoothed = [(c.correct + 1) / (c.rows + 2) for c in (a, b)]
    variance = sum(s * (1 - s) for s in smoothed)
    rows = min(a.rows, b.rows)
    spread = Spread(np.asarray(p - q), Term(np.asarray(variance / rows), np.asarray(rows - 1.0)))
    interval = _floats(tests.unpaired_interval(a.correct, a.rows, b.correct, b.rows))
    chance = tests.unpaired_p(a.correct, a.rows, b.correct, b.rows)
    test = "Boschloo, unpaired"
    more = needed(spread, variance, rows, 1, alpha)
    return Difference("accuracy", a.method, b.method, p - q, interval, chance, chance, test, variance, more)


def _for_equivalence(pairs: Sequence[Difference], margin: float) -> int | None:
    """For the best two."""
    return rows_for_equivalence(pairs[0].row_variance, margin) if pairs else None


def _ranked(scored: Sequence[Scores]) -> list[Scores]:
    return sorted(scored, key=lambda s: -s.accuracy)


def _with_holm(pairs: Sequence[Difference]) -> list[Difference]:
    adjusted = tests.holm([d.p for d in pairs])
    return [replace(d, p_adjusted=p) for d, p in zip(pairs, adjusted, strict=True)]


def _floats(interval: Interval) -> tuple[float, float]:
    return float(interval.low), float(interval.high)


def _check(margin: float, references: Sequence[str], methods: Sequence[str]) -> None:
    if not 0 < margin < 1:
        raise RecipeError(f"the margin is {margin}, but it is a difference in accuracy", hint="--margin 0.05")
    for name in references:
        if name not in methods:
            raise RecipeError(f"no method '{name}' to refer to", hint=nearest(name, methods))
