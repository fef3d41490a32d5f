"""Each op of the frozen arithmetic against the plain lines beside it, values and gradients, in three precisions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from katei.base import ops
from katei.base.stream import Part
from katei.methods.ia3 import _Scale, _ScaleTogether
from katei.methods.lora import low_rank, low_rank_plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RNG = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=RNG)


def as_good_as_plain(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    trained: list[Tensor],
    constant: list[Tensor],
    dtype: torch.dtype,
) -> None:
    """Error against the plain lines in float64 at most twice their own error at `dtype` (and a rounding)."""

    def run(f: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in trained]
        out = f(*leaves, *(x.to(dtype).to(kind) for x in constant))
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype).to(kind)
        return [out.detach().double(), *(g.double() for g in torch.autograd.grad(out, leaves, weight))]

    for exact, mine, theirs in zip(run(plain, torch.float64), run(ours, dtype), run(plain, dtype), strict=True):
        assert exact.abs().max() > 1e-2, "a comparison of zeros could not fail"
        rounding = torch.finfo(dtype).eps * float(exact.abs().max())
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_linear(dtype: torch.dtype, bias: bool) -> None:
    constant = [random(24, 16)] + ([random(24)] if bias else [])
    as_good_as_plain(ops.frozen_linear, torch.nn.functional.linear, [random(7, 16)], constant, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast_first", [True, False])
def test_rms_norm(dtype: torch.dtype, cast_first: bool) -> None:
    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return ops.rms_norm(x, scale, 1e-5, cast_first=cast_first)

    def plain(x: Tensor, scale: Tensor) -> Tensor:
        return ops.rms_norm_plain(x, scale, 1e-5, cast_first=cast_first)

    as_good_as_plain(ours, plain, [random(7, 3, 16) * 3], [1 + random(16) / 3], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate(dtype: torch.dtype) -> None:
    angle = random(7, 1, 16) * 3
    as_good_as_plain(ops.rotate, ops.rotate_plain, [random(7, 3, 16)], [angle.cos(), angle.sin()], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gated(dtype: torch.dtype, activation: str) -> None:
    def ours(gate: Tensor, up: Tensor) -> Tensor:
        return ops.gated(gate, up, activation)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return ops.gated_plain(gate, up, activation)

    as_good_as_plain(ours, plain, [random(7, 24), random(7, 24)], [], dtype)


@pytest.mark.parametrize("kind", ["causal", "all", "masked"])
@pytest.mark.parametrize("groups", [8, 4, 1])
@pytest.mark.parametrize("keys", [9, ops.SHORT + 3])
def test_attention(keys: int, groups: int, kind: str) -> None:
    """Both ways of it, chosen by the number of keys, against the formula written out."""
    queries = keys if kind == "causal" else 5
    visible = torch.rand(4, 1, queries, keys, generator=RNG) < 0.6 if kind == "masked" else None
    if visible is not None:
        visible[..., 0] = True

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, 0.4, visible, kind == "causal")

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(8 // groups, dim=1) for x in (k, v))
        scores = 0.4 * q @ k.mT
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        elif kind == "causal":
            scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), -torch.inf)
        return torch.softmax(scores, -1) @ v

    given = [random(4, 8, queries, 16), random(4, groups, keys, 16), random(4, groups, keys, 16)]
    weight = random(4, 8, queries, 16)
    results = []
    for f, kind_of in ((ours, torch.float32), (plain, torch.float64)):
        leaves = [x.to(kind_of).requires_grad_() for x in given]
        out = f(*leaves)
        results.append([out.double(), *(g.double() for g in torch.autograd.grad(out, leaves, weight.to(kind_of)))])
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_attention_in_half_precision_is_as_good_as_torchs_own(dtype: torch.dtype) -> None:
    """Both against float64, from the same rounded values."""
    given = [random(8, 8, 9, 16).to(dtype), random(8, 4, 9, 16).to(dtype), random(8, 4, 9, 16).to(dtype)]
    weight = random(8, 8, 9, 16).to(dtype)
    results = []
    for f, kind_of in ((ops.attention, dtype), (ops.torch_attention, dtype), (ops.torch_attention, torch.float64)):
        leaves = [x.to(kind_of).requires_grad_() for x in given]
        out = f(*leaves, 0.4, None, True)
        assert out.dtype == kind_of
        gradients = torch.autograd.grad(out, leaves, weight.to(kind_of))
        assert ("Short" in str(out.grad_fn)) == (f is ops.attention)
        results.append([out.double(), *(g.double() for g in gradients)])
    for mine, torchs, exact in zip(*results, strict=True):
        assert float((mine - exact).norm()) <= 1.1 * float((torchs - exact).norm())


def part(segments: tuple[tuple[int, int, int], ...]) -> Part:
    owner_T = torch.cat([torch.full((stop - start,), n) for n, start, stop in segments])
    return Part(0, 0, len(owner_T), 0, 1, owner_T, owner_T, segments, (), ())


SEGMENTS = {
    "ragged": ((0, 0, 4), (1, 4, 5), (2, 5, 12)),
    "a rectangle": ((0, 0, 4), (1, 4, 8), (2, 8, 12)),
    "one of three": ((1, 0, 12),),
    "equal, one missing": ((0, 0, 6), (2, 6, 12)),
}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=list(SEGMENTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank(segments: tuple[tuple[int, int, int], ...], dtype: torch.dtype, kind: str) -> None:
    """The adapter stays in float32 over a base of any type. The way of each kind of device, on this one."""
    where = part(segments)
    given = [random(12, 16).to(dtype), random(12, 10).to(dtype), random(3, 2, 16), random(3, 2, 10)]
    results = []
    for f in (low_rank, low_rank_plain):
        leaves = [x.clone().requires_grad_() for x in given]
        with ops.planned(kind):
            out = f(*leaves, 0.7, where)
        results.append([out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, 120).view(12, 10).to(dtype))])
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=list(SEGMENTS))
def test_scale(segments: tuple[tuple[int, int, int], ...]) -> None:
    where = part(segments)
    y, l_NO = random(12, 10).requires_grad_(), random(3, 10).requires_grad_()
    weight = random(12, 10)
    plain = y * l_NO[where.adapter_T]
    for ours in (
        _Scale.apply(y, l_NO, where.segments),
        _ScaleTogether.apply(y, l_NO, where.adapter_T, where.others_TM(3)),
    ):
        torch.testing.assert_close(ours, plain)
        found = (torch.autograd.grad(out, (y, l_NO), weight, retain_graph=True) for out in (ours, plain))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_a_trials_infinity_reaches_no_other_adapter() -> None:
    where = part(SEGMENTS["ragged"])
    x = random(12, 16)
    x[4] = torch.inf  # adapter 1's only token
    leaves = [x, random(12, 10), random(3, 2, 16).requires_grad_(), random(3, 2, 10).requires_grad_()]
    to_a, to_b = torch.autograd.grad(low_rank(*leaves, 1.0, where).sum(), leaves[2:])
    for gradient in (to_a, to_b):
        assert gradient[[0, 2]].isfinite().all()
        assert not gradient[1].isfinite().all()


MANY_LENGTHS = """
from katei.base.ops import product
from katei.core.machine import resident_bytes
import torch
weights = [torch.randn(64, 64), torch.randn(192, 64), torch.randn(64, 192)]
def all_products(tokens):
    for w in weights: product(torch.zeros(tokens, w.shape[1]), w)
all_products(1000)
before = resident_bytes()
for tokens in range(300, 700): all_products(tokens)
print(resident_bytes() - before)
"""


def test_passes_of_many_lengths_leave_little_behind() -> None:
    if not ops.ONE_DNN:
        pytest.skip("no oneDNN in this torch, whose kernels these are")
    done = subprocess.run([sys.executable, "-c", MANY_LENGTHS], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 100 << 20, "446 MB stay where oneDNN keeps as many kernels as it likes"
