"""Every method, away from its starting point, against peft and plain transformers: scores in every architecture and precision,
counts, gradients, lockstep to the last digits, merged weights. Beside it, test_promises.py has the promises one by one.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from katei.base import ops
from katei.base.packed import Base
from katei.base.stream import PackedRow
from katei.engine.lockstep import Lockstep, Trial, score_rows
from katei.engine.optimizer import Training
from katei.methods import METHODS
from katei.methods.contract import HEAD, Stack, TrialFacts
from tests.helpers.models import (
    CONFIGS,
    STACKED,
    perturb_,
    pooled_one_by_one,
    random_tokens,
    settings,
    tiny_base,
    tiny_model,
)
from tests.helpers.peft_reference import peft_config, peft_model, sequence_classifier

warnings.filterwarnings("ignore")

TOKENS = random_tokens(12, longest=16)
VALID = random_tokens(9, seed=9)
IN_PEFT = [name for name in STACKED if METHODS[name].peft_type is not None]
PEFT_ADAPTS = ("llama", "mistral")
"""Architectures for which peft has LLaMA-Adapter."""
EVERYWHERE = [(a, n) for a in CONFIGS for n in IN_PEFT if n != "llama-adapter" or a in PEFT_ADAPTS]


def logits(base: Base, stack: Stack, rows: list[tuple[int, tuple[int, ...]]]) -> torch.Tensor:
    """Scores of (adapter, ids) rows, all in one pass."""
    stream = base.stream([PackedRow(0, n, ids) for n, ids in rows], [stack])
    with torch.no_grad(), base.running(stream, [stack]):
        return stream.unsort(stack.scores(base.pooled(stream, [stack]), stream.parts[0]))


def alone(model: Any) -> torch.Tensor:
    """peft's scores at batch 1, where it is right for every method."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in TOKENS.ids])


def assert_as_good_as(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Our root-mean-square error against float64 is at most twice the reference's, beyond one rounding of float32."""
    scale = exact.square().mean().sqrt()
    error, allowed = ((x.double() - exact).square().mean().sqrt() / scale for x in (ours, theirs))
    assert error <= 2 * allowed + 2e-7, f"error {error:.2e}, the reference has {allowed:.2e}"


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize(("architecture", "name"), EVERYWHERE)
def test_scores_in_company_are_pefts_of_the_row_alone(architecture: str, name: str) -> None:
    backbone, method = tiny_model(architecture), settings(name)
    base = Base(copy.deepcopy(backbone))
    stack = method.build(base, 3, [0, 1], [TrialFacts(10)] * 2)
    perturb_(stack, size=0.2)
    model = peft_model(sequence_classifier(backbone, 3), stack, 1, method, 10).eval()
    theirs, exact = alone(model), alone(copy.deepcopy(model).double())
    ours = logits(base, stack, [(1, ids) for ids in TOKENS.ids] + [(0, ids) for ids in TOKENS.ids])[: len(TOKENS)]
    assert_as_good_as(ours, theirs, exact)
    assert exact.std(0).min() > 1e-2, "rows that all score alike would hide a mistake"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("architecture", "name"), [(a, n) for a, n in EVERYWHERE if a in ("llama", "qwen2", "gemma3")])
def test_a_half_precision_base_costs_no_more_than_in_peft(architecture: str, name: str, dtype: torch.dtype) -> None:
    backbone, method = tiny_model(architecture, dtype=dtype), settings(name)
    base = Base(copy.deepcopy(backbone))
    stack = method.build(base, 3, [0, 1], [TrialFacts(10)] * 2)
    perturb_(stack, size=0.2)
    assert stack.theta_NM.dtype == torch.float32
    halved = sequence_classifier(backbone, 3)
    for parameter in halved.parameters():
        parameter.data = parameter.data.to(dtype)
    theirs = alone(peft_model(halved, stack, 1, method, 10).eval())
    exact = alone(peft_model(sequence_classifier(backbone, 3).double(), stack, 1, method, 10).eval().double())
    assert_as_good_as(logits(base, stack, [(1, ids) for ids in TOKENS.ids]), theirs, exact)


@pytest.mark.parametrize("name", [n for n in STACKED if n in ("lora", "adalora", "ia3", "llama-adapter")])
def test_an_untrained_adapter_is_the_base_model(name: str) -> None:
    """And a perturbed one is not: the adapter does act."""
    base = tiny_base()
    stack, bare = (settings(n).build(base, 3, [4], [TrialFacts(10)]) for n in (name, "head"))
    rows = [(0, ids) for ids in TOKENS.ids]
    assert torch.equal(stack.tensors[HEAD], bare.tensors[HEAD]), "one seed, one head, whatever the method"
    torch.testing.assert_close(logits(base, stack, rows), logits(base, bare, rows), rtol=1e-5, atol=1e-6)
    head = stack.tensors[HEAD].detach().clone()
    perturb_(stack)
    with torch.no_grad():
        stack.tensors[HEAD].copy_(head)
    assert (logits(base, stack, rows) - logits(base, bare, rows)).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", list(CONFIGS))
@pytest.mark.parametrize("name", [n for n in STACKED if METHODS[n].merges and n != "head"])
def test_the_plain_model_with_merged_weights_gives_the_adapters_scores(architecture: str, name: str) -> None:
    backbone = tiny_model(architecture)
    every_linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    method = settings(name) if name == "ia3" else settings(name, targets=every_linear)
    base = Base(copy.deepcopy(backbone))
    stack = method.build(base, 3, [0, 1], [TrialFacts(10)] * 2)
    perturb_(stack, size=0.1)
    with torch.no_grad():
        for site in base.sites:
            module = backbone.get_submodule(site)
            module.weight.copy_(stack.merge(1, site, module.weight))
            if module.bias is not None:
                module.bias.copy_(stack.merge_bias(1, site, module.bias))
        merged = pooled_one_by_one(backbone, TOKENS.ids) @ stack.tensors[HEAD][1].T
    ours = logits(base, stack, [(1, ids) for ids in TOKENS.ids])
    torch.testing.assert_close(ours, merged, rtol=1e-4, atol=2e-4)
    assert merged.std(0).min() > 1e-2


# ------------------------------------------------------------------ counts and gradients

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("lora", {"rank": 7, "rslora": True, "targets": ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")}),
    ("lora", {"rank": 1, "dropout": 0.1}),
    ("adalora", {"rank": 5, "target_rank": 0.5, "targets": ("k_proj", "up_proj")}),
    ("prompt-tuning", {"virtual_tokens": 11, "init": "vocabulary"}),
    ("p-tuning", {"virtual_tokens": 5, "hidden": None}),
    ("p-tuning", {"virtual_tokens": 5, "hidden": 9, "encoder": "lstm"}),
    ("p-tuning", {"virtual_tokens": 2, "hidden": 6, "encoder": "lstm", "lstm_layers": 3}),
    ("prefix-tuning", {"virtual_tokens": 7, "init": "zero"}),
    ("llama-adapter", {"layers": 4, "length": 1}),
]
IDS = [" ".join([name, *(f"{k}={v}" for k, v in more.items())]) for name, more in VARIANTS]


@pytest.mark.parametrize(("name", "more"), VARIANTS, ids=IDS)
def test_every_trained_tensor_of_every_variant_gets_a_gradient(name: str, more: dict[str, Any]) -> None:
    base = tiny_base()
    stack = settings(name, **more).build(base, 3, [3], [TrialFacts(10)])
    perturb_(stack, size=0.2)
    score_rows(base, [stack], [(0, 0, ids) for ids in VALID.ids], token_budget=30)  # a validation pass leaves no trace
    assert not stack.grad_NM.any()
    stream = base.stream([PackedRow(0, 0, ids, noise=i) for i, ids in enumerate(TOKENS.ids)], [stack])
    with base.running(stream, [stack]):
        stack.scores(base.pooled(stream, [stack]), stream.parts[0]).square().sum().backward()
    tensors = dict(getattr(stack, "weights", {})) | stack.tensors
    assert [key for key, tensor in tensors.items() if tensor.grad is None or not tensor.grad.any()] == []
    if name != "full":
        assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters()), "the base is frozen"


@pytest.mark.parametrize(
    ("architecture", "name", "more"),
    [(a, n, more) for a in CONFIGS for n, more in VARIANTS if (a, n) in EVERYWHERE],
    ids=[f"{a}: {i}" for a in CONFIGS for i, (n, _) in zip(IDS, VARIANTS, strict=True) if (a, n) in EVERYWHERE],
)
def test_trainable_and_total_counts_are_those_peft_prints(architecture: str, name: str, more: dict[str, Any]) -> None:
    base, method = tiny_base(architecture), settings(name, **more)
    stack = method.build(base, 3, [0], [TrialFacts(100)])
    config = peft_config(method, 100)
    if "lstm_layers" in more:
        config.encoder_num_layers = more["lstm_layers"]
    with torch.device("meta"):
        whole = copy.deepcopy(base.config)
        whole.num_labels = 3
        model = get_peft_model(AutoModelForSequenceClassification.from_config(whole), config)
    trainable, total = model.get_nb_trainable_parameters()
    head = 3 * 64
    assert stack.trainable == trainable + (head if name == "llama-adapter" else 0)  # peft leaves its head untrained
    assert stack.total(base) == total


def formula(name: str, m: Any) -> int:
    """The count each method's docstring promises, on the tiny Llama: 4 layers, width 64, keys and values 32, MLP 96; 3 classes."""
    widths = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
    widths |= {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
    if name == "p-tuning":
        h, p = m.hidden or 64, m.virtual_tokens
        if m.encoder == "mlp":
            return p * 64 + (64 * h + h) + (h * h + h) + (h * 64 + 64) + 192
        inputs = [64] + [2 * h] * (m.lstm_layers - 1)
        lstm = sum(2 * 4 * h * (i + h + 2) for i in inputs)
        return p * 64 + lstm + (2 * h * 2 * h + 2 * h) + (2 * h * 64 + 64) + 192
    return (
        192
        + {
            "lora": lambda: 4 * sum(m.rank * sum(widths[t]) for t in m.targets),
            "adalora": lambda: 4 * sum(m.rank * (sum(widths[t]) + 1) for t in m.targets),
            "prompt-tuning": lambda: m.virtual_tokens * 64,
            "prefix-tuning": lambda: m.virtual_tokens * 4 * 2 * 32,
            "ia3": lambda: 4 * (32 + 32 + 96),
            "llama-adapter": lambda: m.layers * (m.length * 64 + 1),
            "head": lambda: 0,
            "full": lambda: 300 * 64 + 4 * (sum(i * o for i, o in widths.values()) + 2 * 64) + 64,
        }[name]()
    )


@pytest.mark.parametrize(("name", "more"), VARIANTS, ids=IDS)
def test_trainable_counts_are_the_docstrings_formulas(name: str, more: dict[str, Any]) -> None:
    method = settings(name, **more)
    assert method.build(tiny_base(), 3, [0], [TrialFacts(100)]).trainable == formula(name, method)


# ------------------------------------------------------------------ neighbours, on the way back

BASE = tiny_base()


def stacks(size: float) -> list[Stack]:
    """One stack of two adapters of every method, pushed off its start."""
    built = []
    for i, name in enumerate(STACKED):
        dropout = {"dropout": 0.3} if name in ("lora", "adalora") else {}
        built.append(settings(name, **dropout).build(BASE, 3, [0, 1], [TrialFacts(10)] * 2))
        perturb_(built[-1], seed=i, size=size)
    return built


STACKS = stacks(0.2)


def gradients(rows: list[PackedRow], *, checkpointing: bool = False) -> list[torch.Tensor]:
    """Every stack's gradient of the sum of squared scores of `rows`: (N, M) each."""
    for stack in STACKS:
        stack.zero_grad_()
    stream = BASE.stream(rows, STACKS)
    with BASE.running(stream, STACKS):
        pooled_BD = BASE.pooled(stream, STACKS, checkpointing=checkpointing)
        scores = [STACKS[p.stack].scores(pooled_BD[p.first : p.last], p) for p in stream.parts]
        torch.cat(scores).square().sum().backward()
    return [stack.grad_NM.clone() for stack in STACKS]


@effort(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(STACKED) - 1), st.integers(0, 1), st.integers(0, 11)),
        min_size=2,
        max_size=12,
        unique=True,
    ),
    st.booleans(),
)
def test_gradients_do_not_depend_on_neighbours(chosen: list[tuple[int, int, int]], checkpointing: bool) -> None:
    rows = [PackedRow(s, n, TOKENS.ids[i], noise=100 * s + i) for s, n, i in chosen]
    together = gradients(rows, checkpointing=checkpointing)
    one_by_one = [torch.zeros_like(g) for g in together]
    for row in rows:
        for sum_NM, own_NM in zip(one_by_one, gradients([row]), strict=True):
            sum_NM += own_NM
    for name, a, b in zip(STACKED, together, one_by_one, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * scale + 1e-9, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------ lockstep, to the last digits


def trial(name: str, kind: int, **more: Any) -> Trial:
    """No two kinds alike. A large epsilon keeps Adam from turning the rounding of a tiny gradient into a whole step."""
    dropout = {"dropout": 0.2} if name in ("lora", "adalora") else {}
    training = Training(learning_rate=2e-2, epochs=3, weight_decay=0.1, epsilon=1e-3, warmup=0.2)
    kinds: list[dict[str, Any]] = [
        {},
        {"batch_size": 3, "accumulation": 2, "learning_rate": 1e-2, "clip_norm": 0.1, "epochs": 5, "weight_decay": 0.0},
        {"batch_size": 4, "learning_rate": 4e-2, "clip_norm": 0.0, "keep": "best", "patience": 2, "epochs": 6},
    ]
    rows = tuple(i for i in range(12) if kind == 0 or i % 4 != kind)  # folds
    return Trial(f"{name}-{kind}", settings(name, **dropout), kind, replace(training, **(kinds[kind] | more)), rows)


def push_(engine: Lockstep) -> None:
    """Away from the start, each adapter by noise of its own."""
    for state in engine.states:
        stack = engine.stacks[state.stack]
        rng = torch.Generator().manual_seed(state.trial.seed)
        with torch.no_grad():
            stack.theta_NM[state.n] += 0.1 * torch.randn(stack.numbers, generator=rng)


def trained(base: Base, trials: list[Trial], **how: Any) -> Lockstep:
    engine = Lockstep.on_split(base, trials, 3, TOKENS, VALID, **how)
    push_(engine)
    engine.run()
    return engine


def assert_same_trials(together: Lockstep, base: Base, atol: float, **how: Any) -> None:
    """Each trial by itself, in small passes, ends where it ended in company."""
    for state in together.states:
        apart = trained(base, [state.trial], token_budget=20, **how)
        ours, theirs = together.stacks[state.stack].theta_NM[state.n], apart.stacks[0].theta_NM[0]
        difference = float((ours - theirs).abs().max())
        assert difference <= atol, f"{state.trial.name}: {difference:.1e}"
        assert state.finished == apart.states[0].finished
        assert state.best_epoch == apart.states[0].best_epoch
        table, other = (
            [[e.train_loss, e.valid_loss, e.valid_accuracy] for e in s.epochs] for s in (state, apart.states[0])
        )
        np.testing.assert_allclose(np.array(table), np.array(other), rtol=200 * atol, atol=20 * atol)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_lockstep_equals_alone_in_every_number(checkpointing: bool, kind: str) -> None:
    """In the way of each kind of device, on this one."""
    everyone = [trial(name, number) for name in STACKED for number in range(3)]
    with ops.planned(kind):
        together = trained(BASE, everyone, token_budget=10_000, checkpointing=checkpointing)
        assert {state.finished for state in together.states} == {"done", "early"}, "the settings should show both"
        assert_same_trials(together, BASE, atol=5e-6, cache=checkpointing)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str)
def test_lockstep_equals_alone_over_a_half_precision_base(dtype: torch.dtype, share: float) -> None:
    """To the base's own rounding: a pass of another shape rounds otherwise, by a share of what training changed.

    Not AdaLoRA: which rank it prunes is a choice that half-precision rounding can tip. In float32 it is held to every number above.
    """
    base = tiny_base(dtype=dtype)
    smooth = [name for name in STACKED if name != "adalora"]
    everyone = [trial(name, kind, epochs=2) for name in smooth for kind in range(2)]
    together = trained(base, everyone, token_budget=10_000)
    for state in together.states:
        apart = trained(base, [state.trial], token_budget=20)
        begun = Lockstep.on_split(base, [state.trial], 3, TOKENS, VALID)
        push_(begun)
        ours, theirs = together.stacks[state.stack].theta_NM[state.n], apart.stacks[0].theta_NM[0]
        moved = (theirs - begun.stacks[0].theta_NM[0]).square().mean().sqrt()
        assert (ours - theirs).square().mean().sqrt() <= share * moved, state.trial.name


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str)
def test_adalora_over_a_half_precision_base_equals_alone_until_it_must_choose(dtype: torch.dtype, share: float) -> None:
    """Up to its first pruning nothing can tip: there AdaLoRA is held to what the other methods are."""
    base = tiny_base(dtype=dtype)
    one = replace(trial("adalora", 0, epochs=2), method=settings("adalora", dropout=0.2, warmup=0.5))
    together = Lockstep.on_split(
        base, [one, *(trial(name, 0, epochs=2) for name in ("lora", "ia3", "head"))], 3, TOKENS, None
    )
    apart = Lockstep.on_split(base, [one], 3, TOKENS, None, token_budget=20)
    push_(together)
    push_(apart)
    begun = apart.stacks[0].theta_NM[0].clone()
    for _ in range(12):  # the warm-up's steps
        together.tick()
        apart.tick()
    ours, theirs = together.stacks[0].theta_NM[0], apart.stacks[0].theta_NM[0]
    assert (ours - theirs).square().mean().sqrt() <= share * (theirs - begun).square().mean().sqrt()
    assert together.stacks[0].ranks(0) == apart.stacks[0].ranks(0)  # type: ignore[attr-defined]
    assert set(apart.stacks[0].ranks(0).values()) == {4}  # type: ignore[attr-defined]


def test_full_fine_tuning_does_not_depend_on_passes_either() -> None:
    ends = []
    for how in ({"token_budget": 10_000}, {"token_budget": 15, "checkpointing": True}):
        engine = trained(tiny_base(), [trial("full", 2)], **how)  # type: ignore[arg-type]
        ends.append(
            {**engine.stacks[0].snapshot(0), "epochs": torch.tensor([e.valid_loss for e in engine.states[0].epochs])}
        )
    begun = tiny_base().model.state_dict()
    for key, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][key], rtol=1e-4, atol=5e-6)
        assert key in ("theta_M", "epochs") or not torch.equal(tensor, begun[key.removeprefix("weights.")])


def test_full_fine_tuning_learns_a_word() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = [(*torch.randint(20, 300, (6,), generator=rng).tolist(), 3 + i % 2) for i in range(24)]
    tokens = replace(TOKENS, ids=tuple(rows), labels=tuple(i % 2 for i in range(24)))
    one = Trial("t", settings("full"), 0, Training(learning_rate=1e-3, epochs=5), tuple(range(24)))
    engine = Lockstep.on_split(tiny_base(), [one], 2, tokens, tokens)
    engine.run()
    losses = [epoch.train_loss for epoch in engine.states[0].epochs]
    assert losses[-1] < 0.3 * losses[0]
    assert engine.states[0].epochs[-1].valid_accuracy == 1.0
