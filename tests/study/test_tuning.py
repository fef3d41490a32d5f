"""Settings: the same number and learning rates for every method, its own first; chosen by validation loss alone."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from katei.core.errors import RecipeError
from katei.engine.lockstep import Epoch, Trial
from katei.engine.optimizer import Training
from katei.methods import METHODS
from katei.study.recipe import Recipe
from katei.study.tuning import chosen_of, draw_settings, kept_loss
from tests.helpers.models import settings
from tests.helpers.rows import EVERY_METHOD


def recipe(**more: Any) -> Recipe:
    return Recipe(model="gemma3-270m", data="poems", methods=EVERY_METHOD, tune=8, **more)


def test_every_method_gets_the_same_learning_rates_around_its_own() -> None:
    factors = []
    for name in EVERY_METHOD:
        own = METHODS[name].learning_rate
        drawn = draw_settings(recipe(), name)
        assert [s.number for s in drawn] == list(range(8))
        assert drawn[0].method == METHODS[name]()
        assert drawn[0].training.learning_rate == own
        factors.append([pytest.approx(s.training.learning_rate / own, rel=1e-6) for s in drawn])
        for s in drawn:
            assert own / 10.001 <= s.training.learning_rate <= 10.001 * own
            assert s.values["learning_rate"] == s.training.learning_rate
            assert {key: getattr(s.method, key) for key in METHODS[name].search} == {
                key: value for key, value in s.values.items() if key != "learning_rate"
            }
        for key, values in METHODS[name].search.items():
            tried = {getattr(s.method, key) for s in drawn[1:]}
            assert tried <= set(values)
            assert len(tried) > 1, f"{name}: {key} is searched"
    assert all([f.expected for f in row] == factors[0] for row in factors)
    rates = sorted(f.expected for f in factors[0][1:])
    assert max(b / a for a, b in itertools.pairwise(rates)) < 10**0.9, "spread over the two decades"


def test_settings_flow_from_the_recipes_seed() -> None:
    assert draw_settings(recipe(), "lora") == draw_settings(recipe(), "lora")
    assert draw_settings(recipe(), "lora") != draw_settings(recipe(seeds=(1,)), "lora")
    assert draw_settings(recipe(settings={"lora": {"rank": 3}}), "lora")[0].method.rank == 3  # type: ignore[attr-defined]


def test_without_optuna_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match="optuna") as caught:
        draw_settings(recipe(), "lora")
    assert caught.value.hint == "pip install 'katei[tune]'"


def test_tuning_chooses_the_epoch_and_keeps_to_what_the_recipe_says() -> None:
    assert recipe().resolved("ia3")[1].keep == "best"
    assert recipe().resolved("ia3")[1].patience == 3
    assert recipe(training={"patience": 0}).resolved("ia3")[1].patience == 0
    with pytest.raises(RecipeError, match="tuning chooses the epoch too"):
        recipe(training={"keep": "last"}).check()


@dataclass
class Tried:
    trial: Trial
    epochs: list[Epoch]
    finished: str | None
    best_epoch: int | None


def tried(*losses: float, keep: str = "best", finished: str = "done") -> Tried:
    trial = Trial("t", settings("ia3"), 0, Training(learning_rate=1.0, keep=keep), (0,))
    epochs = [Epoch(i, 0.0, loss, None, None) for i, loss in enumerate(losses, 1)]
    return Tried(trial, epochs, finished, losses.index(min(losses)) + 1)


def test_the_least_validation_loss_of_the_epoch_that_stays_is_chosen() -> None:
    a, b, wild = tried(0.5, 0.3, 0.6), tried(0.5, 0.4, 0.4), tried(0.1, finished="diverged")
    assert chosen_of([b, a, wild]) is a
    assert chosen_of([wild]) is wild
    last = tried(0.5, 0.3, 0.6, keep="last")
    assert kept_loss(last) == 0.6
    assert chosen_of([last, b]) is b
    again = tried(0.3)
    assert chosen_of([a, again]) is a, "the first of equals"
