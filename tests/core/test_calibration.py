"""The temperature is the optimum a brute-force search finds, and it repairs probabilities that are wrong by a known one."""

from __future__ import annotations

import numpy as np
import pytest

from katei.core.calibration import COLDEST, HOTTEST, fit_temperature, with_temperature
from katei.core.metrics import cross_entropy


def rows(count: int, classes: int, sharpness: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from true probabilities, and these, too sharp (or too flat) by `sharpness`."""
    rng = np.random.default_rng(seed)
    logits_EC = rng.normal(size=(count, classes)) * 1.5
    true_EC = np.exp(logits_EC) / np.exp(logits_EC).sum(1, keepdims=True)
    labels = np.array([rng.choice(classes, p=p_C) for p_C in true_EC])
    sharp_EC = np.exp(logits_EC * sharpness)
    return sharp_EC / sharp_EC.sum(1, keepdims=True), labels


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_brute_force_optimum(classes: int, sharpness: float, seed: int) -> None:
    probability_EC, labels = rows(60, classes, sharpness, seed)
    fitted = fit_temperature(probability_EC, labels)
    grid = np.exp(np.linspace(np.log(COLDEST), np.log(HOTTEST), 20_001))

    def nats(temperature: float) -> float:  # written out another way than in the module
        power_EC = probability_EC ** (1 / temperature)
        return float(-np.log(power_EC[range(60), labels] / power_EC.sum(1)).mean())

    best = min(grid, key=nats)
    assert fitted == pytest.approx(best, rel=2e-3)
    assert nats(fitted) <= nats(best) + 1e-12
    assert nats(fitted) == pytest.approx(cross_entropy(with_temperature(probability_EC, fitted), labels), rel=1e-9)


def test_many_rows_give_back_the_temperature_that_spoilt_them() -> None:
    for sharpness in (0.5, 3.0):
        probability_EC, labels = rows(20_000, 3, sharpness, seed=7)
        assert fit_temperature(probability_EC, labels) == pytest.approx(sharpness, rel=0.05)


def test_no_label_changes_and_rows_sum_to_one() -> None:
    probability_EC, _ = rows(200, 4, 3.0, seed=1)
    probability_EC[0] = [1.0, 0.0, 0.0, 0.0]
    for temperature in (COLDEST, 0.7, 3.0, HOTTEST):
        scaled_EC = with_temperature(probability_EC, temperature)
        assert (scaled_EC.argmax(1) == probability_EC.argmax(1)).all()
        assert np.allclose(scaled_EC.sum(1), 1)
    assert with_temperature(probability_EC, 1.0).tobytes() == probability_EC.tobytes()


def test_rows_that_are_all_right_have_no_temperature_and_others_stay_within_the_bounds() -> None:
    right = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert fit_temperature(right, [0, 1]) is None
    assert fit_temperature(right, [1, 0]) == pytest.approx(HOTTEST)
    mixed = fit_temperature(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), [0, 1, 1])
    assert mixed is not None
    assert COLDEST < mixed <= HOTTEST


@pytest.mark.parametrize("bad", [[[0.5, 0.4]], [[np.nan, 1.0]], [[1.5, -0.5]], [[0.5, 0.5], [0.5, 0.5]]])
def test_what_is_no_probability_is_refused(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="rows of probabilities"):
        fit_temperature(np.array(bad), [0])
