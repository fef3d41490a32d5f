"""What is left out or shared must change no number: our own layers, pooled last layer and trunks against the model's layers."""

from __future__ import annotations

import pytest
import torch

from katei.base.packed import Base
from katei.base.stream import Bare, PackedRow, build_stream
from katei.engine.lockstep import Lockstep, Tokens, Trial, score_rows
from katei.engine.optimizer import Training
from katei.methods.contract import Stack, TrialFacts
from tests.helpers.models import CONFIGS, STACKED, perturb_, random_tokens, settings, tiny_model

TOKENS = random_tokens(8)
SHARED = tuple((5, 6, 7, 8, *row) for row in TOKENS.ids)
"""Rows that begin with one instruction."""


def bases(architecture: str, dtype: torch.dtype = torch.float32) -> tuple[Base, Base]:
    return tuple(Base(tiny_model(architecture, dtype=dtype), fast=fast) for fast in (True, False))  # type: ignore[return-value]


def stacks_of(base: Base, **more: float) -> list[Stack]:
    stacks = []
    for i, name in enumerate(STACKED):
        dropout = more if name in ("lora", "adalora") else {}
        stacks.append(settings(name, **dropout).build(base, 3, [0, 1], [TrialFacts(10)] * 2))
        perturb_(stacks[-1], seed=i, size=0.2)
    return stacks


@pytest.mark.parametrize("architecture", list(CONFIGS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("late", [False, True], ids=["all from the embedding", "some join late"])
def test_the_fast_way_gives_the_same_scores_and_gradients(architecture: str, dropout: float, late: bool) -> None:
    rows = [(s, n, SHARED[i]) for s in range(len(STACKED)) for n in (0, 1) for i in (n, n + 1, 5)]
    results = []
    for base in bases(architecture):
        assert bool(base.usual_layers) == base.trunks == (not results)
        stacks = stacks_of(base, dropout=dropout)
        packed = [PackedRow(s, n, ids, noise=i) for i, (s, n, ids) in enumerate(rows)]
        entries = [stack.lowest_layer for stack in stacks] if late else None
        stream = base.stream(packed, stacks, entries)
        joining = {}
        if late:
            from katei.engine.cache import ActivationCache

            cache = ActivationCache(base, entries or [], token_budget=50)
            cache.fill(SHARED)
            joining = cache.joining(stream)
        with base.running(stream, stacks):
            pooled_BD = base.pooled(stream, stacks, joining=joining)
            scores = [stacks[p.stack].scores(pooled_BD[p.first : p.last], p) for p in stream.parts]
            torch.cat(scores).square().sum().backward()
        results.append([stream.unsort(torch.cat(scores).detach()), *(stack.grad_NM for stack in stacks)])
    for ours, plain in zip(*results, strict=True):
        scale = float(plain.abs().max())
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-5 * scale)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trials_end_the_same_with_every_saving_on_and_off(checkpointing: bool) -> None:
    training = Training(learning_rate=1e-2, epochs=2, batch_size=3, epsilon=1e-3)
    trials = [
        Trial(f"{name}-{seed}", settings(name), seed, training, tuple(range(8))) for name in STACKED for seed in (0, 1)
    ]
    tokens = Tokens(SHARED, TOKENS.labels)
    engines = []
    for base, cache in zip(bases("llama"), (True, False), strict=True):
        engine = Lockstep.on_split(base, trials, 3, tokens, tokens, cache=cache, checkpointing=checkpointing)
        for stack in engine.stacks:
            perturb_(stack, size=0.1)
        engine.run()
        engines.append(engine)
    for fast, plain in zip(*(engine.states for engine in engines), strict=True):
        ours, theirs = (e.stacks[s.stack].theta_NM[s.n] for e, s in zip(engines, (fast, plain), strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
        assert fast.epochs[-1].valid_loss == pytest.approx(plain.epochs[-1].valid_loss, rel=1e-4)


def test_a_trunk_is_computed_once_per_adapter() -> None:
    rows = [PackedRow(0, n, ids) for n in (0, 1) for ids in SHARED]
    stream = build_stream(rows, [Bare()], torch.device("cpu"))
    apart = build_stream(rows, [Bare()], torch.device("cpu"), trunks=False)
    assert apart.tokens - stream.tokens == 2 * (len(SHARED) - 1) * 4
    assert torch.equal(stream.ids_T[stream.last_B], apart.ids_T[apart.last_B])
    assert torch.equal(stream.position_T[stream.last_B], apart.position_T[apart.last_B])


def test_rows_that_are_dropped_from_share_nothing_while_training() -> None:
    class Dropping(Bare):
        dropout = 0.1

    for noise, tokens in ((3, sum(map(len, SHARED))), (None, sum(map(len, SHARED)) - 4 * (len(SHARED) - 1))):
        rows = [PackedRow(0, 0, ids, noise=noise) for ids in SHARED]
        assert build_stream(rows, [Dropping()], torch.device("cpu")).tokens == tokens


@pytest.mark.parametrize("copies", [2, 5])
def test_rows_of_one_token_and_equal_rows_keep_their_pooled_token(copies: int) -> None:
    fast, plain = bases("mistral")
    rows = [(0, 0, ids) for ids in [(9,)] * copies + [(9, 9, 9)] * copies]
    scores = [score_rows(base, [stacks_of(base)[2]], rows, token_budget=100) for base in (fast, plain)]
    assert abs(scores[0] - scores[1]).max() < 1e-5


def test_a_layer_of_another_kind_is_run_as_the_library_wrote_it() -> None:
    """Numbers decide: a layer that only looks usual, and one that does not even look it."""
    doubled, added = tiny_model("llama"), tiny_model("llama")
    forward = doubled.layers[1].mlp.forward
    doubled.layers[1].mlp.forward = lambda x: 2 * forward(x)
    added.layers[1].extra = torch.nn.Identity()
    for model in (doubled, added):
        base = Base(model)
        assert base.usual_layers == []
        stacks = stacks_of(base)
        rows = [(0, 0, ids) for ids in TOKENS.ids]
        alone = [score_rows(base, stacks, [row], token_budget=100)[0] for row in rows]
        assert abs(score_rows(base, stacks, rows, token_budget=100) - alone).max() < 2e-5
