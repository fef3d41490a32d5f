"""Racing: the rule, how often it errs, and that the engine keeps to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks import racing as simulated

from katei.engine.checkpoint import load_state, save_state
from katei.engine.lockstep import Lockstep, Trial
from katei.engine.optimizer import Training
from katei.study.racing import Races, beaten, crowd, losers
from katei.study.tuning import chosen_of
from tests.helpers.models import random_tokens, settings, tiny_base

BASE = tiny_base()
POOL = random_tokens(30)
RATES = (1e-4, 3e-3, 1e-2, 3e-2)


def stops(worse: float, gain: float, epoch: int, noise: float = 0.05) -> bool:
    """Does a setting that is worse by so much, and gained so much last, stop after `epoch` of 10?"""
    rng = np.random.default_rng(0)
    best_NE = np.stack([np.full(30, 0.3), 0.3 + worse + noise * rng.normal(size=30)])
    return bool(beaten(best_NE, best_NE.mean(1), np.array([0.0, gain]), epoch, 10)[1])


def test_a_setting_is_beaten_where_both_conditions_hold() -> None:
    assert stops(0.2, 0.0, 5)
    assert not stops(0.2, 0.09, 5), "the rate that is left would close the gap: 25/11 of the last epoch's"
    assert stops(0.2, 0.09, 8), "4/5 of it would not"
    assert not stops(0.2, 0.0, 5, noise=2.0), "thirty rows do not show that it is worse"
    assert not stops(0.2, 0.0, 1), "there was no gain to look at"
    assert not stops(0.2, 0.0, 10), "there is nothing left to save"
    assert not stops(0.0, 0.0, 5)


def test_as_many_go_on_as_there_is_training_left_and_one_more() -> None:
    mean_N = np.array([0.5, 0.1, 0.4, 0.2, 0.3, 0.7, 0.6, 0.8])
    still = np.ones(8, dtype=bool)

    def go_on(epoch: int, running_N: np.ndarray) -> list[int]:
        crowd_N = crowd(mean_N, running_N, epoch, 10)
        assert not (crowd_N & ~running_N).any(), "it names only those that run"
        return np.flatnonzero(running_N & ~crowd_N).tolist()

    assert [len(go_on(epoch, still)) for epoch in range(1, 10)] == [8, 7, 5, 4, 3, 3, 2, 2, 2]
    assert go_on(7, still) == [1, 3]
    ended = still.copy()
    ended[1] = False
    assert go_on(7, ended) == [3, 4], "one that has ended takes nobody's place"


def test_both_conditions_name_only_those_that_run_and_nobody_at_the_end() -> None:
    best_NE = 0.3 + np.arange(8)[:, None] * 0.2 + 0.05 * np.random.default_rng(0).normal(size=(8, 30))
    running = np.arange(8) % 2 == 0
    for epoch in range(1, 11):
        lost_N = losers(best_NE, best_NE.mean(1), np.zeros(8), running, epoch, 10)
        assert not (lost_N & ~running).any()
        assert lost_N.sum() == {1: 0, 10: 0}.get(epoch, 3)


@pytest.mark.parametrize("scenario", list(simulated.SCENARIOS))
def test_a_beaten_setting_is_the_winner_in_less_than_a_twentieth_of_races_at_next_to_no_cost(scenario: str) -> None:
    found = list(simulated.races(simulated.SCENARIOS[scenario], rows=43, count=300, seed=1, crowded=False))
    assert np.mean([r.stopped_winner for r in found]) <= {"jumping": 0.12}.get(scenario, 0.05)
    assert np.mean([r.cost for r in found]) < 0.005
    assert np.mean([r.saved for r in found]) > {"all alike": 0.05, "close": 0.25}.get(scenario, 0.45)


@pytest.mark.parametrize("scenario", list(simulated.SCENARIOS))
def test_the_crowd_costs_little_where_it_errs(scenario: str) -> None:
    found = list(simulated.races(simulated.SCENARIOS[scenario], rows=43, count=300, seed=1))
    assert np.mean([r.stopped_winner for r in found]) <= {"all alike": 0.25, "close": 0.2}.get(scenario, 0.12)
    assert np.mean([r.cost for r in found]) < 0.006
    assert np.mean([r.true_cost for r in found]) < 0.006
    assert np.mean([r.saved for r in found]) > 0.4


def test_without_a_level_the_rule_would_err_more() -> None:
    """The paired test is needed: a rule by means alone stops winners."""
    scenario, rng = simulated.SCENARIOS["close"], np.random.default_rng(2)
    both = [simulated.simulated_race(scenario, 43, rng) for _ in range(150)]
    careful, careless = ([simulated.race(*one, crowded=False, level=level) for one in both] for level in (None, np.inf))
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
    return Lockstep(BASE, trials(), 3, POOL, referee=Races(race_of))


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
