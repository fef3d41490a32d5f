"""The promises, over every method, away from the starting point: neighbours, lockstep, seeds, gradients, saved bits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from katei.base.packed import Base
from katei.base.stream import PackedRow
from katei.engine.lockstep import Lockstep, Tokens, Trial, score_rows
from katei.engine.optimizer import Training
from katei.methods import METHODS
from katei.methods.adalora import AdaLoRAStack
from katei.methods.contract import HEAD, Stack, TrialFacts
from katei.methods.saved import AdapterNote, read_adapter, save_adapter
from tests.helpers.models import STACKED, perturb_, random_tokens, settings, tiny_base

warnings.filterwarnings("ignore", message="grad and param do not obey")


def stacks_of(base: Base, adapters: int = 2) -> list[Stack]:
    """One stack of every method that shares a base, perturbed."""
    built = []
    for i, name in enumerate(STACKED):
        seeds = list(range(adapters))
        stack = settings(name).build(base, 3, seeds, [TrialFacts(10)] * adapters)
        perturb_(stack, seed=i)
        built.append(stack)
    return built


BASE = tiny_base()
STACKS = stacks_of(BASE)
TOKENS = random_tokens(12)


@effort(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(STACKED) - 1), st.integers(0, 1), st.integers(0, 11)), min_size=1, max_size=14
    ),
    st.sampled_from([8, 40, 10_000]),
)
def test_neighbours_do_not_matter(rows: list[tuple[int, int, int]], token_budget: int) -> None:
    together = score_rows(BASE, STACKS, [(s, n, TOKENS.ids[i]) for s, n, i in rows], token_budget=token_budget)
    for place, (s, n, i) in enumerate(rows):
        alone = score_rows(BASE, STACKS, [(s, n, TOKENS.ids[i])], token_budget=10_000)[0]
        np.testing.assert_allclose(together[place], alone, atol=2e-5)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_neighbours_do_not_matter_in_any_architecture(architecture: str) -> None:
    base = tiny_base(architecture)
    stacks = stacks_of(base)
    rows = [(s, i % 2, TOKENS.ids[i]) for s in range(len(stacks)) for i in range(4)]
    together = score_rows(base, stacks, rows, token_budget=10_000)
    alone = np.concatenate([score_rows(base, stacks, [row], token_budget=10_000) for row in rows])
    np.testing.assert_allclose(together, alone, atol=5e-5)


def trial(name: str, seed: int, **more: object) -> Trial:
    dropout = {"dropout": 0.2} if name in ("lora", "adalora") else {}
    training = replace(Training(learning_rate=5e-3, epochs=3, weight_decay=0.1), **more)  # type: ignore[arg-type]
    return Trial(f"{name}-{seed}", settings(name, **dropout), seed, training, tuple(range(12 - seed)))


def companions() -> list[Trial]:
    """Every method twice, no two trained alike: batch size, rows, rate, warm-up, accumulation, stopping."""
    trials = []
    for name in STACKED:
        trials.append(trial(name, 0))
        trials.append(
            trial(
                name, 1, batch_size=3, accumulation=2, learning_rate=2e-2, warmup=0.3, keep="best", patience=1, epochs=4
            )
        )
    return trials


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_lockstep_equals_alone(cache: bool) -> None:
    valid = random_tokens(6, seed=9)
    together = Lockstep.on_split(BASE, companions(), 3, TOKENS, valid, cache=cache)
    together.run()
    for state in together.states:
        alone = Lockstep.on_split(BASE, [state.trial], 3, TOKENS, valid, token_budget=20, cache=not cache)
        alone.run()
        ours, theirs = together.stacks[state.stack].theta_NM[state.n], alone.stacks[0].theta_NM[0]
        # Adam divides by the gradient's size: where a gradient is nearly zero its rounding decides the direction
        close = (ours - theirs).abs() <= 1e-4 + 1e-3 * theirs.abs()
        assert close.float().mean() > 0.999, f"{state.trial.name}: {(~close).sum()} of {close.numel()} numbers differ"
        assert [e.epoch for e in state.epochs] == [e.epoch for e in alone.states[0].epochs]
        assert state.epochs[-1].valid_loss == pytest.approx(alone.states[0].epochs[-1].valid_loss, rel=1e-3)
        assert state.finished == alone.states[0].finished


def test_checkpointing_and_passes_change_nothing() -> None:
    trials = [trial(name, 0, batch_size=4) for name in STACKED]
    plain = Lockstep.on_split(BASE, trials, 3, TOKENS, None)
    saving = Lockstep.on_split(BASE, trials, 3, TOKENS, None, checkpointing=True, token_budget=15)
    for engine in (plain, saving):
        engine.tick()
    for a, b in zip(plain.stacks, saving.stacks, strict=True):
        torch.testing.assert_close(a.grad_NM, b.grad_NM, rtol=1e-4, atol=1e-6)


def test_one_seed_same_bytes_and_another_seed_others() -> None:
    runs = []
    for seed in (0, 0, 1):
        engine = Lockstep.on_split(BASE, [replace(trial(name, seed), name=name) for name in STACKED], 3, TOKENS, None)
        engine.run()
        runs.append([stack.theta_NM.clone() for stack in engine.stacks])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("name", list(METHODS))
def test_every_trained_tensor_gets_a_gradient_even_after_validation(name: str) -> None:
    base = tiny_base()
    stack = settings(name).build(base, 3, [0], [TrialFacts(10)])
    perturb_(stack)
    rows = [(0, 0, TOKENS.ids[i]) for i in range(3)]
    score_rows(base, [stack], rows, token_budget=100)  # a validation pass must leave no trace
    stream = base.stream([PackedRow(*row) for row in rows], [stack])
    with base.running(stream, [stack]):
        stack.scores(base.pooled(stream, [stack]), stream.parts[0]).square().sum().backward()
    dead = [key for key, tensor in stack.tensors.items() if tensor.grad is None or not tensor.grad.any()]
    dead += [str(i) for i, (_, gradient, _) in enumerate(stack.trained(0)) if not gradient.any()]
    assert dead == []


def formula(name: str, base: Base) -> int:
    """The count each method's docstring promises, written out for the tiny Llama: width 64, kv width 32, MLP 96."""
    q, v, layers = (64, 64), (64, 32), 4
    return {
        "lora": layers * 3 * (sum(q) + sum(v)),
        "adalora": layers * 4 * (sum(q) + sum(v) + 2),
        "prompt-tuning": 3 * 64,
        "p-tuning": 3 * 64 + 64 * 12 + 12 * 12 + 12 * 64 + 2 * 12 + 64,
        "prefix-tuning": 3 * layers * 2 * 32,
        "ia3": layers * (32 + 32 + 96),
        "llama-adapter": 2 * (3 * 64 + 1),
        "head": 0,
        "full": base.parameters_count(),
    }[name] + 3 * 64


@pytest.mark.parametrize("name", list(METHODS))
def test_trainable_count_is_the_docstrings_formula(name: str) -> None:
    base = tiny_base()
    assert settings(name).build(base, 3, [0], [TrialFacts(10)]).trainable == formula(name, base)


@pytest.mark.parametrize("name", STACKED)
def test_saved_and_loaded_scores_are_the_same_bits(name: str, tmp_path: Path) -> None:
    method = settings(name)
    stack = STACKS[STACKED.index(name)]
    note = AdapterNote(name, name, method.settings(), ("a", "b", "c"), "tiny", "", 50, "text", {})
    save_adapter(tmp_path, stack, 1, method, note, "tiny")
    saved = read_adapter(tmp_path)
    assert saved.method == method
    rows = TOKENS.ids[:5]
    before = score_rows(BASE, [stack], [(0, 1, row) for row in rows], token_budget=1000)
    # the same shape of stack: only what came from the disk may make a difference
    other = method.saved_as().build(BASE, 3, [7, 8], [TrialFacts(10)] * 2)
    from katei.methods.saved import load_into_

    load_into_(other, 1, saved)
    after = score_rows(BASE, [other], [(0, 1, row) for row in rows], token_budget=1000)
    assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("name", [n for n in STACKED if METHODS[n].merges])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_merged_weights_give_the_adapters_scores(name: str, architecture: str) -> None:
    base = tiny_base(architecture)
    stack = settings(name).build(base, 3, [0], [TrialFacts(10)])
    perturb_(stack, size=0.1)
    rows = [(0, 0, TOKENS.ids[i]) for i in range(4)]
    before = score_rows(base, [stack], rows, token_budget=1000)
    with torch.no_grad():
        for site in base.sites:
            module = base.weight(site)
            module.weight.copy_(stack.merge(0, site, module.weight))
            if module.bias is not None:
                module.bias.copy_(stack.merge_bias(0, site, module.bias))
    stack.linear_sites = {}
    after = score_rows(base, [stack], rows, token_budget=1000)
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.abs(before - before[0]).max() > 1e-3  # rows differ: the comparison could fail


def test_adalora_prunes_to_its_target_by_itself() -> None:
    method = settings("adalora")
    engine = Lockstep.on_split(
        BASE, [Trial("a", method, 0, Training(learning_rate=1e-2, epochs=3), tuple(range(12)))], 3, TOKENS, None
    )
    engine.run()
    stack = engine.stacks[0]
    assert isinstance(stack, AdaLoRAStack)
    ranks = stack.ranks(0)
    assert sum(ranks.values()) == 2 * len(ranks)
    assert len(set(ranks.values())) > 1, "a budget that moved nowhere is not AdaLoRA"


@pytest.mark.parametrize("token_budget", [10_000, 20])
def test_a_diverging_trial_is_named_and_harms_nobody(token_budget: int) -> None:
    calm, wild = trial("lora", 0), replace(trial("lora", 1), name="wild", rows=tuple(range(12)))
    both = Lockstep.on_split(BASE, [calm, wild], 3, TOKENS, None, token_budget=token_budget)
    both.tick()
    with torch.no_grad():
        both.stacks[0].tensors[HEAD][1].fill_(3e38)  # its next scores overflow
    both.run()
    alone = Lockstep.on_split(BASE, [calm], 3, TOKENS, None)
    alone.run()
    assert [state.finished for state in both.states] == ["done", "diverged"]
    assert both.states[1].step == 1
    torch.testing.assert_close(both.stacks[0].theta_NM[0], alone.stacks[0].theta_NM[0], rtol=1e-3, atol=1e-5)


def test_a_half_precision_overflow_is_a_diverged_trial() -> None:
    base = tiny_base(dtype=torch.float16)  # overflows beyond 65,504
    wild = Trial("wild", settings("lora"), 5, Training(learning_rate=1000, epochs=3), tuple(range(12)))
    engine = Lockstep.on_split(base, [wild], 3, TOKENS, None)
    engine.run()
    assert engine.states[0].finished == "diverged"
    assert engine.stacks[0].theta_NM.isfinite().all()


@pytest.mark.parametrize("name", STACKED)
def test_every_method_learns_a_word(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(20, 300, (6,), generator=rng).tolist()) for _ in range(24)]
    ids = tuple((*row, 3 + i % 2) for i, row in enumerate(rows))
    tokens = Tokens(ids, tuple(i % 2 for i in range(24)))
    engine = Lockstep.on_split(
        BASE,
        [Trial("t", settings(name), 0, Training(learning_rate=2e-2, epochs=6), tuple(range(24)))],
        2,
        tokens,
        tokens,
    )
    engine.run()
    assert engine.states[0].epochs[-1].valid_accuracy >= 0.95, engine.states[0].epochs[-1]
