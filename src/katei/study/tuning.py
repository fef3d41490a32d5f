"""Fair tuning: every method gets the same number of settings, all trained in lockstep, chosen by validation loss alone.

    recipe, method → draw_settings → N settings; number 0 is the recipe's own
    trials of one cell and method → chosen_of → the one with the least validation loss

Settings are points of a low-discrepancy sequence (optuna's QMCSampler): the learning rate log-uniform over two decades around
the method's own, at the same places for every method, and the values of the method's own settings (`Method.search`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from katei.core.errors import RecipeError
from katei.engine.lockstep import Epoch, Trial
from katei.engine.optimizer import Training
from katei.methods import build_method
from katei.methods.contract import Method
from katei.study.recipe import Recipe

DECADES = 1.0
"""Of the learning rate, up and down from the method's own."""


@dataclass(frozen=True)
class Setting:
    """One of the N: what it is called, and what it sets."""

    number: int | None  # None where nothing is tuned
    method: Method
    training: Training
    values: Mapping[str, Any]


def searched(recipe: Recipe, name: str) -> dict[str, list[Any]]:
    """[low, high] of the learning rate, and the values of each other setting."""
    method, training = recipe.resolved(name)
    rate, factor = training.learning_rate, 10**DECADES
    return {"learning_rate": [rate / factor, rate * factor], **{key: list(v) for key, v in method.search.items()}}


def draw_settings(recipe: Recipe, name: str) -> list[Setting]:
    """The settings of method `name`. Raises RecipeError without optuna."""
    method, training = recipe.resolved(name)
    if not recipe.tune:
        return [Setting(None, method, training, {})]
    space = searched(recipe, name)
    own = {"learning_rate": training.learning_rate, **{key: getattr(method, key) for key in method.search}}
    settings = [Setting(0, method, training, own)]
    for number, point in enumerate(_points(space, recipe.tune - 1, recipe.seeds[0]), 1):
        others = {key: value for key, value in point.items() if key != "learning_rate"}
        settings.append(
            Setting(
                number,
                build_method(name, {**method.settings(), **others}, where=f"[{name}]"),
                replace(training, learning_rate=point["learning_rate"]),
                point,
            )
        )
    return settings


def _points(space: Mapping[str, Sequence[Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` points of a scrambled Halton sequence; the first dimension is the learning rate, whatever the others are."""
    try:
        import optuna
    except ImportError:
        raise RecipeError(
            "--tune draws its settings with optuna, which is not installed", hint="pip install 'katei[tune]'"
        ) from None
    from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState as State
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    low, high = space["learning_rate"]
    # a choice is drawn by its place: the sampler's sequence knows numbers alone. Names are numbered, for it goes by their order.
    names = {f"{i} {key}": key for i, key in enumerate(space)}
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(low, high, log=True)
        if key == "learning_rate"
        else IntDistribution(0, len(space[key]) - 1)
        for name, key in names.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(
            qmc_type="halton",
            scramble=True,
            seed=seed,
            warn_asynchronous_seeding=False,
            warn_independent_sampling=False,
        )
    study = optuna.create_study(sampler=sampler)
    known = {name: (low * high) ** 0.5 if space[key] == space["learning_rate"] else 0 for name, key in names.items()}
    # the sampler takes its space from the first trial that has ended
    study.add_trial(create_trial(state=State.COMPLETE, params=known, distributions=distributions, value=0.0))
    points = []
    for _ in range(count):
        drawn = study.ask(distributions).params
        points.append({k: drawn[n] if k == "learning_rate" else space[k][drawn[n]] for n, k in names.items()})
    return points


class Trained(Protocol):
    """What can be chosen among: a trial of the engine, or what it came to."""

    epochs: list[Epoch]
    finished: str | None
    best_epoch: int | None

    @property
    def trial(self) -> Trial: ...


T = TypeVar("T", bound=Trained)


def kept_loss(state: Trained) -> float | None:
    """Validation loss of the epoch whose adapter stays; None where it has none."""
    if not state.epochs or (state.trial.training.keep == "best" and state.best_epoch is None):
        return None
    epoch = state.best_epoch if state.trial.training.keep == "best" else len(state.epochs)
    assert epoch is not None
    return state.epochs[epoch - 1].valid_loss


def chosen_of(states: Sequence[T]) -> T:
    """The setting whose validation loss is least, the first of equals; one that diverged only where all did."""

    def order(state: T) -> tuple[bool, float]:
        loss = kept_loss(state)
        return state.finished == "diverged", float("inf") if loss is None else loss

    return min(states, key=order)
