"""The engine's own rules: order, schedule, dropout, epochs, stopping, the best epoch, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from katei.base import ops
from katei.base.stream import PackedRow
from katei.core.errors import RecipeError, RunError
from katei.engine.checkpoint import load_state, save_state
from katei.engine.lockstep import Lockstep, Trial
from katei.engine.optimizer import Training
from katei.methods.contract import HEAD, TrialFacts
from tests.helpers.models import STACKED, perturb_, random_tokens, settings, tiny_base

BASE = tiny_base()
TOKENS = random_tokens(10)
VALID = random_tokens(6, seed=4)


def trial(name: str = "lora", seed: int = 0, **training: object) -> Trial:
    values = {"learning_rate": 1e-2, "epochs": 3, **training}
    return Trial(f"{name}-{seed}", settings(name), seed, Training(**values), tuple(range(10)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 7), (0.3, 10), (0.1, 1), (0.5, 33)])
def test_the_schedule_is_the_librarys(warmup: float, steps: int) -> None:
    training = Training(learning_rate=0.02, warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    schedule = get_linear_schedule_with_warmup(optimizer, -(-int(warmup * steps * 1000) // 1000), steps)
    for step in range(steps):
        assert training.rate(step, steps) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_every_row_comes_once_an_epoch_in_an_order_of_the_seeds_own() -> None:
    one, other = trial(seed=0), trial(seed=1)
    assert sorted(one.order(0)) == list(range(10))
    assert one.order(0) == one.order(0)
    assert len({tuple(t.order(e)) for t in (one, other) for e in range(3)}) == 6


def test_accumulated_batches_are_one_big_batch() -> None:
    small = Lockstep.on_split(BASE, [trial(batch_size=2, accumulation=3)], 3, TOKENS, None)
    big = Lockstep.on_split(BASE, [trial(batch_size=6)], 3, TOKENS, None)
    small.run()
    big.run()
    assert small.states[0].step == big.states[0].step == 3 * 2
    torch.testing.assert_close(small.stacks[0].theta_NM, big.stacks[0].theta_NM)


def test_early_stopping_stops_and_the_best_epoch_stays() -> None:
    engine = Lockstep.on_split(BASE, [trial(learning_rate=0.05, epochs=12, patience=2, keep="best")], 3, TOKENS, VALID)
    seen: dict[int, torch.Tensor] = {}

    def watch(lockstep: Lockstep, ended: list[object]) -> None:
        state = lockstep.states[0]
        if ended and state.finished is None:
            seen[len(state.epochs)] = lockstep.stacks[0].theta_NM[0].clone()

    engine.run(watch)  # type: ignore[arg-type]
    state = engine.states[0]
    losses = [epoch.valid_loss for epoch in state.epochs]
    assert state.finished == "early"
    assert len(losses) == state.best_epoch + 2  # type: ignore[operator]
    assert losses[state.best_epoch - 1] == min(losses)  # type: ignore[operator, type-var]
    assert torch.equal(engine.stacks[0].theta_NM[0], seen[state.best_epoch])  # type: ignore[index]


def test_dropout_depends_on_row_step_and_place_and_keeps_the_mean() -> None:
    stack = settings("lora").build(BASE, 3, [0, 1], [TrialFacts(1)] * 2)
    rows = [PackedRow(0, 0, TOKENS.ids[0], noise=11), PackedRow(0, 1, TOKENS.ids[1], noise=12)]
    together = BASE.stream(rows, [stack]).parts[0].keep_TI(5, 64, 0.25)
    alone = BASE.stream(rows[1:], [stack]).parts[0].keep_TI(5, 64, 0.25)
    elsewhere = BASE.stream(rows[1:], [stack]).parts[0].keep_TI(6, 64, 0.25)
    assert together is not None
    assert alone is not None
    assert elsewhere is not None
    assert torch.equal(together[len(TOKENS.ids[0]) :], alone)
    assert not torch.equal(alone, elsewhere)
    many = BASE.stream([PackedRow(0, 0, [3] * 200, noise=7)], [stack]).parts[0].keep_TI(0, 64, 0.25)
    assert many is not None
    assert many.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(many.mean()) == pytest.approx(1.0, abs=0.02)
    quiet = BASE.stream([PackedRow(0, 0, TOKENS.ids[0])], [stack]).parts[0]
    assert quiet.keep_TI(5, 64, 0.25) is None


def test_every_row_of_every_step_of_every_trial_has_its_own_dropout() -> None:
    engine = Lockstep.on_split(BASE, [trial(seed=0, batch_size=3), trial(seed=1, batch_size=3)], 3, TOKENS, None)
    seen, build = [], BASE.stream

    def spy(rows: list[PackedRow], *args: object, **how: object) -> object:
        seen.extend(row.noise for row in rows)
        return build(rows, *args, **how)  # type: ignore[arg-type]

    BASE.stream = spy  # type: ignore[assignment, method-assign]
    try:
        engine.run()
    finally:
        del BASE.stream  # type: ignore[method-assign]
    assert None not in seen
    assert len(set(seen)) == len(seen) == 2 * 3 * 10


@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.01, 1e6])
def test_each_trials_gradient_is_clipped_by_its_own_norm(name: str, clip_norm: float) -> None:
    trials = [trial(name, seed, clip_norm=c) for seed, c in ((0, clip_norm), (1, 1.0))][: 1 if name == "full" else 2]
    engine = Lockstep.on_split(tiny_base(), trials, 3, TOKENS, None)
    stack, state = engine.stacks[0], engine.states[0]
    engine._gradients(engine.states, [s.batch() for s in engine.states])
    before = [gradient.clone() for _, gradient, _ in stack.trained(0)]
    own = torch.cat([gradient.flatten() for gradient in before]).double().norm()
    norm = state.optimizer.step_(0, 30)
    assert float(norm) == pytest.approx(float(own), rel=1e-5)
    factor = min(1.0, clip_norm / float(own)) if clip_norm else 1.0
    assert factor < 1.0 or clip_norm != 0.01
    for (_, gradient, _), was in zip(stack.trained(0), before, strict=True):
        torch.testing.assert_close(gradient, was * factor, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("token_budget", [10_000, 20])
def test_an_overflow_on_the_way_down_stays_the_trials_own(name: str, token_budget: int) -> None:
    """fp16: the wild trial's loss is finite, its gradient is not; 0 · inf in shared products must reach no companion."""
    base = tiny_base(dtype=torch.float16)

    def pushed(trials: list[Trial]) -> Lockstep:
        engine = Lockstep.on_split(base, trials, 3, TOKENS, None, token_budget=token_budget)
        for state in engine.states:
            rng = torch.Generator().manual_seed(state.trial.seed)
            theta_M = engine.stacks[0].theta_NM[state.n]
            with torch.no_grad():
                theta_M += 0.05 * torch.randn(theta_M.shape, generator=rng)
        return engine

    calm, wild = trial(name, 0, epsilon=1e-3), trial(name, 1, epsilon=1e-3)
    both, alone = pushed([calm, wild]), pushed([calm])
    with torch.no_grad():
        both.stacks[0].tensors[HEAD][1] *= 3e4
    began = both.stacks[0].theta_NM.clone()
    for _ in range(3):
        both.tick()
        alone.tick()
    moved, wild_moved = (both.stacks[0].theta_NM - began).abs().amax(1)
    assert float((both.stacks[0].theta_NM[0] - alone.stacks[0].theta_NM[0]).abs().max()) < 0.02 * float(moved)
    assert wild_moved > 1e-3, "without the loss scale its own gradient fits"
    assert float(both.states[0].nats) == pytest.approx(float(alone.states[0].nats), rel=1e-3)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_where_adapters_share_a_product_an_infinite_gradient_stays_its_trials_own(name: str) -> None:
    """The way of a GPU, in float32: the wild trial's loss is finite, its gradient is not."""
    trials = [trial(name, 0), trial(name, 1)]
    with ops.planned("cuda"):
        engine = Lockstep.on_split(tiny_base(), trials, 3, TOKENS, None)
        calm = Lockstep.on_split(tiny_base(), trials[:1], 3, TOKENS, None)
        with torch.no_grad():
            engine.stacks[0].tensors[HEAD][1] *= 1e38
        began = engine.stacks[0].theta_NM.clone()
        for _ in range(3):
            engine.tick()
            calm.tick()
    torch.testing.assert_close(engine.stacks[0].theta_NM[0], calm.stacks[0].theta_NM[0], rtol=1e-4, atol=1e-6)
    assert engine.states[0].finished is None
    moved = (engine.stacks[0].theta_NM - began).abs().amax(1)
    assert moved[0] > 0
    assert moved[1] == 0 or engine.states[1].finished == "diverged"


def test_a_diverged_trials_later_rows_reach_nobody() -> None:
    """Its first row's loss is not finite, its others' may be, with gradients that are not."""
    wild = trial(seed=1, batch_size=4, epsilon=1e-3)
    calm = trial(seed=0, batch_size=4, epsilon=1e-3)
    engine = Lockstep.on_split(BASE, [wild, calm], 3, TOKENS, None, token_budget=15)
    passed, backward = [], engine._backward

    def spy(work: list[Any], *args: Any) -> Any:
        passed.extend(item.state.trial.name for item in work if item.state.finished)
        return backward(work, *args)

    engine._backward = spy  # type: ignore[method-assign]
    with torch.no_grad():
        engine.stacks[0].tensors[HEAD][0] = torch.inf
    engine.tick()
    assert engine.states[0].finished == "diverged"
    assert passed == []


@pytest.mark.parametrize("ticks", [1, 4, 10, 13])
def test_a_restored_run_ends_with_the_same_bytes(ticks: int, tmp_path: Path) -> None:
    trials = [trial(name, batch_size=1 + i % 2, keep="best") for i, name in enumerate(STACKED)]

    def fresh() -> Lockstep:
        return Lockstep.on_split(BASE, trials, 3, TOKENS, VALID)

    whole, begun, resumed = fresh(), fresh(), fresh()
    whole.run()
    for _ in range(ticks):
        begun.tick()
    save_state(tmp_path / "state.safetensors", begun, "me")
    load_state(tmp_path / "state.safetensors", resumed, "me")
    resumed.run()
    for a, b in zip(whole.stacks, resumed.stacks, strict=True):
        assert torch.equal(a.theta_NM, b.theta_NM)
    assert [s.epochs for s in whole.states] == [s.epochs for s in resumed.states]
    with pytest.raises(RunError, match="another recipe"):
        load_state(tmp_path / "state.safetensors", fresh(), "somebody else")


@pytest.mark.parametrize("name", STACKED)
def test_a_pass_that_touches_few_of_many_adapters_writes_the_same_gradients(name: str) -> None:
    """Ten in a stack: small passes see it narrowed to two or three of them, the big one sees it whole."""
    trials = [trial(name, seed) for seed in range(10)]
    whole, narrow = (Lockstep.on_split(BASE, trials, 3, TOKENS, VALID, token_budget=budget) for budget in (10_000, 30))
    seen: list[int] = []
    honest = narrow.stacks[0].scores

    def spy(*arguments: Any) -> Any:
        seen.append(narrow.stacks[0].adapters)
        return honest(*arguments)

    narrow.stacks[0].scores = spy  # type: ignore[method-assign]
    for engine in (whole, narrow):
        perturb_(engine.stacks[0])
        engine._gradients(engine.states, [state.batch() for state in engine.states])
    assert max(seen) <= 5
    assert narrow.stacks[0].adapters == 10
    assert float(whole.stacks[0].grad_NM.abs().amax(1).min()) > 0
    torch.testing.assert_close(narrow.stacks[0].grad_NM, whole.stacks[0].grad_NM, rtol=1e-3, atol=1e-5)
    jobs = [[(state, state.trial.valid) for state in engine.states] for engine in (whole, narrow)]
    for a, b in zip(whole.probabilities(jobs[0]), narrow.probabilities(jobs[1]), strict=True):
        assert abs(a - b).max() < 1e-4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", 1e9),
        ("epochs", 0),
        ("batch_size", 0),
        ("accumulation", -1),
        ("weight_decay", -0.1),
        ("weight_decay", 1e6),
        ("warmup", 1.0),
        ("clip_norm", float("inf")),
        ("patience", -1),
        ("keep", "middle"),
        ("beta1", 1.0),
        ("epsilon", 0.0),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(field: str, value: object) -> None:
    with pytest.raises(RecipeError, match=field) as caught:
        Training(**{"learning_rate": 1e-3, field: value})  # type: ignore[arg-type]
    assert caught.value.hint
