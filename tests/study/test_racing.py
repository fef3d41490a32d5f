"""Racing: the rule, how often it errs, and that the engine keeps to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks import racing as simulated

from katei.engine.checkpoint import load_state, save_state
from katei.engine.lockstep import Lockstep, Trial
from katei.engine.optimizer import Training
from katei.study.racing import Races, losers
from katei.study.tuning import chosen_of
from tests.helpers.models import random_tokens, settings, tiny_base

BASE = tiny_base()
POOL = random_tokens(30)
RATES = (1e-4, 3e-3, 1e-2, 3e-2)


def stops(worse: float, gain: float, epoch: int, noise: float = 0.05) -> bool:
    """Does a setting that is worse by so much, and gained so much last, stop after `epoch` of 10?"""
    rng = np.random.default_rng(0)
    best_NE = np.stack([np.full(30, 0.3), 0.3 + worse + noise * rng.normal(size=30)])
    return bool(losers(best_NE, best_NE.mean(1), np.array([0.0, gain]), epoch, 10)[1])


def test_a_setting_stops_where_both_conditions_hold() -> None:
    assert stops(0.2, 0.0, 5)
    assert not stops(0.2, 0.05, 5), "five epochs like the last would close the gap"
    assert stops(0.2, 0.05, 8), "two would not"
    assert not stops(0.2, 0.0, 5, noise=2.0), "thirty rows do not show that it is worse"
    assert not stops(0.2, 0.0, 1), "there was no gain to look at"
    assert not stops(0.2, 0.0, 10), "there is nothing left to save"
    assert not stops(0.0, 0.0, 5)


@pytest.mark.parametrize("scenario", list(simulated.SCENARIOS))
def test_the_winner_is_stopped_in_less_than_a_twentieth_of_races_at_next_to_no_cost(scenario: str) -> None:
    found = list(simulated.races(simulated.SCENARIOS[scenario], rows=43, count=150, seed=1))
    assert np.mean([r.stopped_winner for r in found]) <= 0.05
    assert np.mean([r.cost for r in found]) < 0.005
    assert np.mean([r.saved for r in found]) > {"all alike": 0.0, "close": 0.1}.get(scenario, 0.3)


def test_without_a_level_the_rule_would_err_more() -> None:
    """The paired test is needed: a rule by means alone stops winners."""
    scenario, rng = simulated.SCENARIOS["close"], np.random.default_rng(2)
    both = [simulated.simulated_race(scenario, 43, rng) for _ in range(150)]
    careful, careless = ([simulated.race(*one, level=level) for one in both] for level in (None, 7.9))
    assert np.mean([r.stopped_winner for r in careless]) > 2 * np.mean([r.stopped_winner for r in careful]) + 0.02


def trials(epochs: int = 6) -> list[Trial]:
    """Two cells, four learning rates each."""
    found = []
    for cell, (rows, valid) in enumerate(((range(14), range(14, 26)), (range(10, 24), (*range(10), 28, 29)))):
        for rate in RATES:
            training = Training(learning_rate=rate, epochs=epochs, batch_size=2, keep="best")
            found.append(Trial(f"{cell}/{rate}", settings("ia3"), cell, training, tuple(rows), tuple(valid)))
    return found


def raced() -> Lockstep:
    race_of = {trial.name: trial.name.split("/")[0] for trial in trials()}
    return Lockstep(BASE, trials(), 3, POOL, referee=Races(race_of, level=0.5))


def test_stopped_settings_take_no_more_steps_and_leave_the_others_as_they_are() -> None:
    with_races, without = raced(), Lockstep(BASE, trials(), 3, POOL)
    with_races.run()
    without.run()
    stopped = [s for s in with_races.states if s.finished == "racing"]
    assert stopped
    assert all(len(s.epochs) < 6 for s in stopped)
    for a, b in zip(with_races.states, without.states, strict=True):
        for mine, other in zip(a.epochs, b.epochs, strict=False):
            assert mine.valid_loss == pytest.approx(other.valid_loss, rel=1e-3)
    for cell in range(2):
        mine, others = (
            [s for s in engine.states if s.trial.name.startswith(f"{cell}/")] for engine in (with_races, without)
        )
        best = chosen_of(mine)
        assert best.finished == "done"
        assert best.trial == chosen_of(others).trial
        losses = [min(e.valid_loss for e in s.epochs if e.valid_loss is not None) for s in mine]
        assert min(losses) == losses[mine.index(best)]


@pytest.mark.parametrize("ticks", [7, 14, 15, 30])
def test_a_race_goes_on_after_a_restart_to_the_same_bytes(ticks: int, tmp_path: Path) -> None:
    whole, begun, resumed = raced(), raced(), raced()
    whole.run()
    for _ in range(ticks):
        begun.tick()
    save_state(tmp_path / "state.safetensors", begun, "me")
    load_state(tmp_path / "state.safetensors", resumed, "me")
    resumed.run()
    assert [s.finished for s in resumed.states] == [s.finished for s in whole.states]
    assert [s.epochs for s in resumed.states] == [s.epochs for s in whole.states]
    assert whole.stacks[0].theta_NM.equal(resumed.stacks[0].theta_NM)
