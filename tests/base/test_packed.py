"""The packed forward against the library's own, a row at a time, for six architectures and three precisions."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from katei.base.packed import Base, check_ids
from katei.base.stream import Bare, PackedRow, build_stream, passes
from katei.core.errors import BaseError
from katei.engine.cache import ActivationCache
from katei.methods.contract import Stack, TrialFacts
from tests.helpers.models import CONFIGS, pooled_one_by_one, random_tokens, settings, tiny_base, tiny_model

ROWS = random_tokens(9).ids
BASES = {name: tiny_base(name) for name in ("llama", "mistral", "gemma2", "gemma3")}


def pooled(base: Base, rows: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    stacks: list[Stack] = [settings("head").build(base, 2, [0], [TrialFacts(1)])]
    stream = base.stream([PackedRow(0, 0, row) for row in rows], stacks)
    with torch.no_grad(), base.running(stream, stacks):
        return stream.unsort(base.pooled(stream, stacks))


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_packed_equals_the_library_a_row_at_a_time(architecture: str) -> None:
    model = tiny_model(architecture)
    reference_BD = pooled_one_by_one(model, ROWS)
    ours_BD = pooled(Base(model), ROWS)
    assert reference_BD.std(0).min() > 1e-3, "rows that all look alike would hide a mistake"
    torch.testing.assert_close(ours_BD, reference_BD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_librarys(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype=dtype)
    exact_BD = pooled_one_by_one(copy.deepcopy(model).double(), ROWS)
    theirs_BD = pooled_one_by_one(model, ROWS).double()
    ours_BD = pooled(Base(model), ROWS).double()
    error, allowed = ((x - exact_BD).square().mean().sqrt() for x in (ours_BD, theirs_BD))
    assert error <= 2 * allowed


@pytest.mark.parametrize("architecture", [a for a in CONFIGS if a != "gemma2"])  # its soft caps rule sdpa out
def test_as_good_as_sdpa_too(architecture: str) -> None:
    """The library's faster attention, whose rounding is its own, measures ours in float32."""
    model = tiny_model(architecture)
    exact_BD = pooled_one_by_one(copy.deepcopy(model).double(), ROWS)
    theirs_BD = pooled_one_by_one(model, ROWS, "sdpa").double()
    error, allowed = ((x - exact_BD).square().mean().sqrt() for x in (pooled(Base(model), ROWS).double(), theirs_BD))
    assert allowed < 1e-5, "a reference that is wrong allows anything"
    assert error <= 2 * allowed


@effort(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=10), st.sampled_from(sorted(BASES)))
def test_any_mixture_of_lengths_is_packed_right(lengths: list[int], architecture: str) -> None:
    rng = torch.Generator().manual_seed(sum(lengths))
    rows = tuple(tuple(torch.randint(3, 300, (n,), generator=rng).tolist()) for n in lengths)
    base = BASES[architecture]
    one_by_one = torch.cat([pooled(base, (row,)) for row in rows])
    torch.testing.assert_close(pooled(base, rows), one_by_one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_bytes", [1 << 30, 2000, 0], ids=["in memory", "spilling to a file", "in a file"])
def test_joining_late_equals_passing_through(dtype: torch.dtype, memory_bytes: int) -> None:
    base = tiny_base(dtype=dtype)
    method = settings("llama-adapter", layers=1)
    stacks = [settings(n).build(base, 2, [0], [TrialFacts(9)]) for n in ("lora", "head")]
    stacks.insert(1, method.build(base, 2, [0], [TrialFacts(9)]))
    with torch.no_grad():
        stacks[1].tensors["3.gate"].fill_(0.7)
    entries = [stack.lowest_layer for stack in stacks]
    assert entries == [0, 3, 4]
    rows = [PackedRow(i % 3, 0, row) for i, row in enumerate(ROWS)]
    cache = ActivationCache(base, entries, token_budget=30, memory_bytes=memory_bytes)
    cache.fill(ROWS)
    whole, late = base.stream(rows, stacks), base.stream(rows, stacks, entries)
    with torch.no_grad(), base.running(whole, stacks):
        expected_BD = whole.unsort(base.pooled(whole, stacks))
    with torch.no_grad(), base.running(late, stacks):
        ours_BD = late.unsort(base.pooled(late, stacks, joining=cache.joining(late)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(ours_BD, expected_BD, rtol=tolerance, atol=tolerance)
    assert late.phases[0].tokens < late.phases[1].tokens < late.phases[2].tokens
    assert bool(cache.in_file) == (memory_bytes < 1 << 30)


def test_what_the_cache_holds_depends_on_the_data_alone() -> None:
    base = tiny_base()
    first, again = (ActivationCache(base, [2], token_budget=30) for _ in range(2))
    first.fill(ROWS)
    again.fill(ROWS)
    assert all(torch.equal(first._get(2, row), again._get(2, row)) for row in ROWS)
    full = ActivationCache(base, [2], token_budget=30, memory_bytes=0, file_bytes=0)
    full.fill(ROWS)
    assert not full.in_memory
    torch.testing.assert_close(full._get(2, ROWS[0]), first._get(2, ROWS[0]), rtol=1e-5, atol=1e-5)


def test_buckets_hold_every_token_once_and_little_padding() -> None:
    rows = [PackedRow(0, 0, row) for row in random_tokens(40, longest=60).ids]
    stream = build_stream(rows, [Bare()], torch.device("cpu"))
    (phase,) = stream.phases
    places = [
        torch.arange(b.start, b.start + b.rows * b.longest) if b.gather_T is None else b.gather_T for b in phase.buckets
    ]
    gathered = torch.cat(places)
    assert phase.scatter_T is not None
    assert torch.equal(gathered[phase.scatter_T], torch.arange(stream.tokens))
    assert len(gathered) < 1.4 * stream.tokens


def test_passes_keep_the_order_and_the_budget() -> None:
    lengths = [3, 4, 5, 50, 2, 2]
    assert list(passes(lengths, 9)) == [[0, 1], [2], [3], [4, 5]]


def test_an_encoder_is_refused_by_name() -> None:
    model = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    )
    with pytest.raises(BaseError, match="bert"):
        Base(model.eval())


def test_unknown_targets_are_answered_with_the_known_ones() -> None:
    with pytest.raises(BaseError, match="no linear module named query") as caught:
        tiny_base().sites_named(["query"])
    assert "q_proj" in str(caught.value.hint)


def test_a_token_beyond_the_vocabulary_is_named() -> None:
    class Tokenizer:
        def convert_ids_to_tokens(self, i: int) -> str:
            return f"<image_{i}>"

    with pytest.raises(BaseError, match="<image_301>"):
        check_ids([5, 301], 300, Tokenizer())


def test_a_pass_leaves_nothing_behind() -> None:
    base = tiny_base()
    stack = settings("llama-adapter").build(base, 2, [0, 1], [TrialFacts(1)] * 2)
    stream = base.stream([PackedRow(0, i, ROWS[i]) for i in (0, 1)], [stack])
    with base.running(stream, [stack]):
        base.pooled(stream, [stack])
        assert stream.parts[0].memo
    assert not stream.parts[0].memo
    assert base._running is None
