"""AdaLoRA's budget: each trial has its own, it survives a skipped step, and final ranks stay final."""

from __future__ import annotations

import math

import pytest
import torch

from katei.core.errors import RecipeError
from katei.engine.lockstep import Lockstep, Trial
from katei.engine.optimizer import Training
from katei.methods.adalora import AdaLoRAStack, Budget
from katei.methods.contract import TrialFacts
from tests.helpers.models import perturb_, random_tokens, settings, tiny_base

BASE = tiny_base()
TOKENS = random_tokens(12)


def trial(name: str, epochs: int = 2, **more: object) -> Trial:
    return Trial(name, settings("adalora", **more), 0, Training(learning_rate=1e-2, epochs=epochs), tuple(range(12)))


def the_stack(engine: Lockstep) -> AdaLoRAStack:
    (stack,) = engine.stacks
    assert isinstance(stack, AdaLoRAStack)
    return stack


@pytest.mark.parametrize("target", [0.5, 1.0, 2.5, 3.875])
def test_the_ranks_left_sum_to_the_target(target: float) -> None:
    engine = Lockstep.on_split(BASE, [trial("a", target_rank=target)], 3, TOKENS, None)
    perturb_(engine.stacks[0], size=0.1)
    engine.run()
    ranks = the_stack(engine).ranks(0)
    assert len(ranks) == 8  # q and v of four layers
    assert sum(ranks.values()) == int(8 * target)


def test_trials_of_other_lengths_keep_their_own_schedule() -> None:
    engine = Lockstep.on_split(BASE, [trial("short", 1), trial("long", 3)], 3, TOKENS, None)
    perturb_(engine.stacks[0], size=0.1)
    stack = the_stack(engine)
    left = []
    while any(state.finished is None for state in engine.states):
        engine.tick()
        left.append([sum(stack.ranks(n).values()) for n in (0, 1)])
    for n, budget in enumerate(stack.budgets):
        steps = (12, 36)[n]
        expected = [16 + math.floor(16 * (1 - (step + 1) / steps) ** 3 + 1e-9) for step in range(steps)]
        assert [counts[n] for counts in left[:steps]] == expected
        assert budget.target == 16


def test_in_the_last_share_of_the_steps_the_ranks_stand_still() -> None:
    engine = Lockstep.on_split(BASE, [trial("a", final=0.5, warmup=0.25)], 3, TOKENS, None)
    perturb_(engine.stacks[0], size=0.1)
    stack, masks = the_stack(engine), []
    for _ in range(24):
        engine.tick()
        masks.append((stack.theta_NM[0, : stack.triplets] != 0).clone())
    assert all(mask.all() for mask in masks[:6])
    assert not torch.equal(masks[6], masks[11])
    assert all(torch.equal(masks[11], mask) for mask in masks[12:])
    assert int(masks[-1].sum()) == 16


def test_a_skipped_step_leaves_the_scores_as_they_were() -> None:
    """A gradient that overflowed says nothing of importance; once in the running means, its NaN would never leave and prune all."""
    engine = Lockstep.on_split(BASE, [trial("a"), trial("b")], 3, TOKENS, None)
    perturb_(engine.stacks[0], size=0.1)
    stack = the_stack(engine)
    engine.tick()
    before = {name: buffer.clone() for name, buffer in stack.buffers().items()}
    numbers = stack.theta_NM.clone()
    stack.grad_NM.fill_(1e-3)
    stack.grad_NM[0, -1] = torch.inf
    for state in engine.states:
        state.optimizer.step_(state.step, state.trial.total_steps)
        stack.after_step(state.n, 1)
    for name in ("sensitivity_Q", "uncertainty_Q"):
        assert torch.equal(stack.buffers()[name][0], before[name][0])
        assert not torch.equal(stack.buffers()[name][1], before[name][1])
    assert torch.equal(stack.theta_NM[0, stack.triplets :], numbers[0, stack.triplets :])
    assert sum(stack.ranks(0).values()) > 16


@pytest.mark.parametrize(
    ("more", "steps"), [({"target_rank": 0.1}, 100), ({}, 0)], ids=["less than one rank in all", "no steps"]
)
def test_a_budget_that_could_not_move_is_refused(more: dict[str, float], steps: int) -> None:
    with pytest.raises(RecipeError, match="could prune nothing") as refused:
        settings("adalora", **more).build(BASE, 2, [0], [TrialFacts(steps)])
    assert refused.value.hint


def test_a_single_step_prunes_all_there_is_to_prune() -> None:
    stack = settings("adalora", warmup=0.6, final=0.39).build(BASE, 2, [0], [TrialFacts(1)])
    assert isinstance(stack, AdaLoRAStack)
    assert stack.budgets[0] == Budget(32, 16, 0, 1, 1)
    assert stack.budgets[0].at(1) == 16


@pytest.mark.parametrize("target", [4.0, 5.0, 0.0, -1.0])
def test_a_target_at_or_over_the_rank_is_refused(target: float) -> None:
    with pytest.raises(RecipeError, match="target_rank"):
        settings("adalora", target_rank=target)
