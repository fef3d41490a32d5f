"""Intervals and tests against other implementations, published figures, brute force, and studies whose truth is known.

The simulated studies are those of benchmarks/coverage.py, fewer of them; docs/statistics.md has the whole table.
"""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks import coverage as simulated
from scipy.stats import binom, boschloo_exact
from sklearn.metrics import brier_score_loss, f1_score, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from katei.core.errors import RecipeError
from katei.study import differences as d
from katei.study import intervals as of
from katei.study.comparison import Outcome, Rows
from katei.study.power import Design, mcnemar_power, minimum_detectable_difference, needed, rows_for_equivalence
from katei.study.spread import over_folds, over_rows
from katei.study.statistics import compare_outcomes
from katei.study.verdicts import verdict

LEAST = 0.93
"""No interval may hold the truth less often, in any situation simulated."""


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def held(line: simulated.Line, studies: int | None) -> None:
    """At least LEAST, less three standard errors of the simulation."""
    error = 0.0 if studies is None else 3 * (LEAST * (1 - LEAST) / studies) ** 0.5
    assert line.covered >= LEAST - error, line


# -------------------------------------------------------------------- other implementations and published figures


@pytest.mark.parametrize("correct", [0, 1, 30, 52, 54])
def test_share_intervals_equal_statsmodels(correct: int) -> None:
    assert of.wilson(correct, 54) == pytest.approx(proportion_confint(correct, 54, method="wilson"), abs=1e-9)
    assert of.clopper_pearson(correct, 54) == pytest.approx(proportion_confint(correct, 54, method="beta"), abs=1e-7)
    assert of.clopper_pearson(correct, 54, 0.8) == pytest.approx(
        proportion_confint(correct, 54, 0.2, method="beta"), abs=1e-7
    )


def test_unpaired_interval_equals_statsmodels() -> None:
    ours = d.unpaired_interval(52, 54, 44, 50)
    assert ours == pytest.approx(confint_proportions_2indep(52, 54, 44, 50, method="newcomb"), abs=1e-9)


def test_tango_is_the_published_interval() -> None:
    """Airway hyper-responsiveness before and after transplantation, in Fagerland, Lydersen & Laake 2014, table VII."""
    assert d.tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_inverts_the_constrained_score_test() -> None:
    """The limits by brute force: maximise the likelihood at each difference over a grid of shares."""
    b, c, n, limit = 5, 2, 40, d.tango(5, 2, 40).high
    second = np.linspace(1e-6, 0.5, 200_001)
    likelihood = (
        b * np.log(second + limit)
        + c * np.log(second)
        + (n - b - c) * np.log(np.maximum(1 - 2 * second - limit, 1e-12))
    )
    q = second[likelihood.argmax()]
    score = (b - c - n * limit) / np.sqrt(n * (2 * q + limit - limit**2))
    assert score == pytest.approx(-1.96, abs=1e-3)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 8), (3, 3), (0, 6), (30, 12)])
def test_mcnemar_equals_statsmodels(first: int, second: int) -> None:
    expected = statsmodels_mcnemar([[20, first], [second, 9]], exact=True).pvalue
    assert d.mcnemar(first, second) == pytest.approx(min(expected, 1.0))


def test_boschloo_is_scipys_and_many_rows_agree_with_it() -> None:
    for a, n, b, m in ((52, 54, 44, 54), (7, 20, 15, 25), (20, 20, 19, 30), (0, 10, 6, 10)):
        assert d.unpaired_p(a, n, b, m) == pytest.approx(boschloo_exact([[a, b], [n - a, m - b]]).pvalue, rel=1e-3)
    few, many = d.unpaired_p(430, 480, 400, 480), d.unpaired_p(448, 500, 417, 500)
    assert many == pytest.approx(few, rel=0.2)
    assert d.unpaired_p(54, 54, 54, 54) == 1.0


def test_holm_equals_statsmodels() -> None:
    p = [0.04, 0.001, 0.5, 0.012, 0.013, 0.9]
    assert d.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def answers(rows: int = 60, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    labels = rng().integers(0, classes, rows)
    logit = rng().standard_normal((rows, classes)).round(1)
    logit[np.arange(rows), labels] += 1
    p = np.exp(logit)
    return p / p.sum(1, keepdims=True), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_equal_sklearns(classes: int) -> None:
    p, y = answers(classes=classes)
    area = roc_auc_score(y, p[:, 1]) if classes == 2 else roc_auc_score(y, p, multi_class="ovr")
    assert of.macro_auc(p[None], y)[0] == pytest.approx(area)
    assert of.macro_f1(p.argmax(1)[None], y)[0] == pytest.approx(f1_score(y, p.argmax(1), average="macro"))
    assert of.log_loss(p[None], y)[0].mean() == pytest.approx(sklearn_log_loss(y, p))
    if classes == 2:
        assert of.brier(p[None], y)[0].mean() == pytest.approx(2 * brier_score_loss(y, p[:, 1]))


def test_delong_variance_equals_its_definition() -> None:
    """Sums over pairs, as in the paper."""
    p, y = answers(40)
    inside, outside = p[y == 1, 1], p[y == 0, 1]
    psi = (inside[:, None] > outside[None]) + 0.5 * (inside[:, None] == outside[None])
    expected = psi.mean(1).var(ddof=1) / len(inside) + psi.mean(0).var(ddof=1) / len(outside)
    spread = over_rows(*of.macro_auc(p[None], y), y)
    assert spread.value == pytest.approx(psi.mean())
    assert spread.rows.variance == pytest.approx(expected)


@pytest.mark.parametrize("metric", [of.macro_auc, lambda p, y: of.macro_f1(p.argmax(-1), y)], ids=["auc", "f1"])
def test_influences_are_what_leaving_a_row_out_does(metric) -> None:  # type: ignore[no-untyped-def]
    p, y = answers(300)
    whole, influence = metric(p[None], y)
    for i in (0, 7, 120):
        without = metric(np.delete(p, i, 0)[None], np.delete(y, i))[0]
        assert 299 * (whole - without)[0] == pytest.approx(influence[0, i], abs=0.03)
    assert influence.sum() == pytest.approx(0, abs=1e-9)


def test_corrected_variance_of_folds_is_the_published_formula() -> None:
    cells = np.array([0.8, 0.9, 0.7, 0.85, 0.75])
    spread = over_folds(cells, 1 / 4)
    assert spread.rows.variance == pytest.approx(cells.var(ddof=1) * (1 / 5 + 1 / 4))
    assert spread.half_width() == pytest.approx(2.776445 * spread.rows.variance**0.5, rel=1e-6)


def test_bootstrap_of_the_area_agrees_where_rows_are_many_and_depends_on_its_generator_alone() -> None:
    p, y = answers(400)
    ours = of.auc_interval(over_rows(*of.macro_auc(p[None], y), y), np.bincount(y))
    drawn = of.bootstrap_auc(p, y, rng())
    assert drawn == of.bootstrap_auc(p, y, rng())
    assert ours == pytest.approx(tuple(map(float, drawn)), abs=0.008)


# -------------------------------------------------------------------- at the ceiling


def test_intervals_have_a_width_where_every_row_is_right() -> None:
    y = np.array([0] * 38 + [1] * 16)
    right = over_rows(np.ones(3), np.zeros((3, 54)))
    assert of.share_interval(right, 54).low == pytest.approx(0.9340, abs=1e-3)
    assert 0.85 < of.auc_interval(over_rows(np.ones(1), np.zeros((1, 54)), y), [38, 16]).low < 0.95
    assert d.tango(0, 0, 54).high == pytest.approx(0.0664, abs=1e-3)
    perfect = np.stack([1.0 - y, y.astype(float)], -1)
    assert of.loss_interval(*of.brier(perfect[None], y)).high > 0.05
    assert of.calibration_interval(perfect, y, rng()).high > 0.02


def test_f1_of_a_class_with_few_rows_has_no_interval() -> None:
    spread = over_rows(np.array([0.9]), np.zeros((1, 54)))
    assert of.f1_interval(spread, [50, 4]) is None
    assert of.f1_interval(spread, [9, 9, 9, 9, 9, 9]) is None
    assert of.f1_interval(spread, [40, 14]) is not None


def test_effective_rows_fall_with_the_noise_of_seeds() -> None:
    quiet = np.tile(rng().random(54) < 0.8, (5, 1)).astype(float)
    noisy = quiet.copy()
    noisy[0] = 0.0
    widths = [float(i.high - i.low) for i in (of.share_interval(simulated.spread_of(x), 54) for x in (quiet, noisy))]
    assert widths[1] > 2 * widths[0]


# -------------------------------------------------------------------- coverage, with known truth


@pytest.mark.parametrize("rows", simulated.ROWS)
def test_coverage_of_counts_is_exact(rows: int) -> None:
    for truth in (0.5, 0.75, 0.9, 0.95, 0.98, 0.995):
        assert simulated.accuracy(rows, truth)[0].covered >= 0.95
    for discordance, gap in simulated.TANGOS:
        held(simulated.tango_exact(rows, discordance, gap), None)
    for pair in ((0.75, 0.75), (0.9, 0.9), (0.95, 0.85), (0.98, 0.98)):
        held(simulated.newcombe_exact(rows, *pair), None)


def test_wilson_falls_under_the_bound_near_the_ceiling() -> None:
    """Why it is not used."""
    assert simulated.accuracy(20, 0.995)[1].covered < 0.91


@pytest.mark.parametrize("kind", ["normal", "unequal", "tied"])
@pytest.mark.parametrize(("rows", "positives"), simulated.AREAS)
def test_coverage_of_the_area(rows: int, positives: int, kind: str) -> None:
    for truth in (0.7, 0.9, 0.98):
        held(simulated.area(rng(), 500, rows, positives, truth, kind), 500)


def test_the_bootstrap_of_the_area_does_not_cover_near_the_ceiling() -> None:
    assert simulated.area_by_bootstrap(rng(), 100, 20, 5, 0.98).covered < 0.7


@pytest.mark.parametrize("rows", simulated.ROWS)
def test_coverage_of_f1_and_losses(rows: int) -> None:
    for share, right in simulated.F1S:
        line = simulated.f1(rng(), 800, rows, share, right)
        if line is not None:
            held(line, 800)
    for world in simulated.WORLDS:
        for line in simulated.losses(rng(), 800, rows, world):
            held(line, 800)
        held(simulated.calibration(rng(), 60, rows, world), 60)


@pytest.mark.parametrize("rows", simulated.ROWS)
@pytest.mark.parametrize("world", simulated.NOISES, ids=lambda w: w.name)
def test_coverage_over_seeds_and_rows(rows: int, world: simulated.World) -> None:
    for seeds in (3, 5):
        for truth, gap in ((0.75, 0.0), (0.95, 0.0), (0.9, 0.1)):
            for line in simulated.seeds_and_rows(rng(), 200, seeds, rows, truth, gap, world):
                held(line, 200)


def test_coverage_of_areas_over_seeds_and_of_their_differences() -> None:
    for rows, positives in ((20, 5), (54, 16), (200, 20)):
        held(simulated.area_over_seeds(rng(), 150, 5, rows, positives, 0.9, 0.3), 150)
        for pair in ((0.9, 0.9), (0.98, 0.98), (0.9, 0.7)):
            held(simulated.area_difference(rng(), 400, 1, rows, positives, pair), 400)
        held(simulated.area_difference(rng(), 150, 5, rows, positives, (0.9, 0.9), 0.3), 150)


@pytest.mark.parametrize("rows", [20, 54])
def test_coverage_over_folds(rows: int) -> None:
    for separation in (1.5, 3.5):
        for repeats in (1, 3):
            for line in simulated.cross_validated(rng(), 200, rows, 0.3, separation, 5, repeats):
                held(line, 200)


# -------------------------------------------------------------------- tests: false alarms and power


@pytest.mark.parametrize("rows", simulated.ROWS)
def test_equal_methods_are_called_different_in_at_most_5_of_100(rows: int) -> None:
    for discordance in (0.05, 0.1, 0.2, 0.4):
        assert simulated.mcnemar_rejects(rows, discordance) <= 0.05
    assert simulated.family_error(rng(), 1000, 6, rows, 0.8) <= 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5
    if rows < 200:  # there it takes 10 s
        assert simulated.unpaired_rejects(rng(), 400, rows, 0.9, 0.9) <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


@pytest.mark.parametrize("rows", simulated.ROWS)
@pytest.mark.parametrize("discordance", [0.1, 0.3])
def test_one_run_has_the_power_that_was_planned(rows: int, discordance: float) -> None:
    """Against the whole distribution of the two counts, which `mcnemar_power` does not look at."""
    gap = minimum_detectable_difference(Design(rows, discordance=discordance))
    assert gap is not None
    assert simulated.mcnemar_rejects(rows, max(discordance, gap), gap) == pytest.approx(0.8, abs=1e-3)
    assert mcnemar_power(gap / 2, discordance, rows) < 0.5


@pytest.mark.parametrize("rows", simulated.ROWS)
def test_seeds_have_about_the_power_that_was_planned(rows: int) -> None:
    for seeds, world in ((5, simulated.NOISES[1]), (10, simulated.NOISES[0]), (10, simulated.NOISES[2])):
        _, seen = simulated.seeds_power(rng(), 300, seeds, rows, 0.85, world)
        assert seen == pytest.approx(0.8, abs=0.12)


@pytest.mark.parametrize(("rows", "k", "repeats", "lasting"), [(54, 5, 1, 1.0), (216, 5, 2, 0.6), (216, 10, 3, 0.8)])
def test_folds_have_about_the_power_that_was_planned(rows: int, k: int, repeats: int, lasting: float) -> None:
    _, seen = simulated.folds_power(rng(), 400, rows, k, repeats, 0.9, lasting)
    assert seen == pytest.approx(0.8, abs=0.12)


def test_a_study_too_small_detects_nothing_and_a_wrong_design_is_refused() -> None:
    assert minimum_detectable_difference(Design(3)) is None
    with pytest.raises(RecipeError, match="accuracy is 90"):
        Design(54, accuracy=90)
    with pytest.raises(RecipeError, match="one seed shows nothing"):
        Design(54, seed_deviation=0.1)


def test_the_rows_said_to_be_needed_are() -> None:
    """Discordance 0.1, difference 0.04, seen on 100 rows: with the rows asked for, the power is 0.8."""
    paired = np.array([1.0] * 7 + [-1.0] * 3 + [0.0] * 90)
    more = needed(over_rows(np.array([0.04]), (paired - 0.04)[None]), 0.1, 100, 1)
    assert more is not None
    assert more.rows is not None
    assert mcnemar_power(0.04, 0.1, more.rows) == pytest.approx(0.8, abs=0.04)
    assert needed(over_rows(np.array([0.0]), paired[None]), 0.1, 100, 1) is None


def test_where_seeds_dominate_more_rows_alone_are_not_offered() -> None:
    unlike = np.repeat([[0.3], [0.0], [0.02]], 200, 1) + rng().normal(0, 0.1, (3, 200))
    more = needed(over_rows(unlike.mean(1), unlike - unlike.mean(1, keepdims=True)), 0.1, 200, 3)
    assert more is not None
    assert more.seeds is not None
    assert more.seeds > 3


def test_rows_for_equivalence_are_about_enough() -> None:
    rows = rows_for_equivalence(0.1, 0.05)
    b, c, chance = simulated._discordant(rows, 0.1, 0.0)
    likely = chance > 1e-7
    low, high = d.tango(b[likely], c[likely], rows)
    assert chance[likely][(low > -0.05) & (high < 0.05)].sum() == pytest.approx(0.8, abs=0.05)


# -------------------------------------------------------------------- comparisons and their words


def outcomes(*right: float, rows: int = 200, seeds: int = 1, random: int = 0) -> tuple[list[Outcome], Rows]:
    draw = np.random.default_rng(random)
    y = (np.arange(rows) % 3 == 0).astype(int)
    found = []
    for i, share in enumerate(right):
        correct = draw.random((seeds, rows)) < share
        found.append(Outcome(f"m{i}", np.where(correct, y, 1 - y)))
    return found, Rows(y, ("no", "yes"))


def test_p_values_agree_with_the_intervals_of_seeds_and_rows() -> None:
    for random in range(6):
        comparison = compare_outcomes(*outcomes(0.9, 0.85, 0.8, seeds=4, random=random))
        for difference in comparison.of("accuracy"):
            low, high = difference.interval
            assert (difference.p < 0.05) == (low > 0 or high < 0)
            assert low <= difference.value <= high


def test_the_order_of_methods_does_not_matter() -> None:
    found, rows = outcomes(0.9, 0.7, 0.8)
    a, b = (compare_outcomes(x, rows).as_json() for x in (found, found[::-1]))
    assert a == b


def test_a_clear_winner_is_named_and_the_rest_left_open() -> None:
    comparison = compare_outcomes(*outcomes(0.97, 0.7, 0.7))
    said = verdict(comparison)
    assert said.startswith("m0 is better than every other method: ")
    assert "Were the" in said
    assert verdict(comparison, "ja").startswith("m0 は ")
    assert "より良いと言えます" in verdict(comparison, "ja")


def test_equal_methods_are_not_ranked_and_many_rows_show_them_equal() -> None:
    assert "cannot be told apart on 40 rows" in verdict(compare_outcomes(*outcomes(0.9, 0.9, rows=40)))
    same, rows = outcomes(0.9, 0.9, rows=3000)
    said = verdict(compare_outcomes(same, rows))
    assert "Equal to within ±0.05: " in said
    assert "Were the" not in said
    assert "Equal" not in verdict(compare_outcomes(same, rows, margin=0.005))
    assert "同等" in verdict(compare_outcomes(same, rows), "ja")


def test_a_method_that_does_not_beat_its_references_is_named() -> None:
    found, rows = outcomes(0.97, 0.6, 0.75)
    said = verdict(compare_outcomes(found, rows, references=["m2"]))
    assert "Not shown to beat m2 or always answering 'no' (0.665): m1." in said
    with pytest.raises(RecipeError, match="no method 'm9'"):
        compare_outcomes(found, rows, references=["m9"])
    with pytest.raises(RecipeError, match="the margin is 0"):
        compare_outcomes(found, rows, margin=0)


def test_exact_and_simulated_power_use_the_same_refusals() -> None:
    """A guard of the oracle itself: the table of refusals of `mcnemar_power` at 20 rows."""
    refused = [(k, m) for k in range(21) for m in range(k // 2 + 1) if 2 * binom.cdf(m, k, 0.5) <= 0.05]
    assert min(k for k, _ in refused) == 6
    assert mcnemar_power(0.0, 0.3, 20) == pytest.approx(simulated.mcnemar_rejects(20, 0.3), abs=1e-9)
