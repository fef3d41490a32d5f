"""The frozen arithmetic of a decoder layer, as backward needs it when no weight asks for a gradient.

    frozen_linear   y = x Wᵀ + b             keeps nothing but the weight, which is there anyway
    rms_norm        y = x / rms(x) ⊙ w       keeps x
    rotate          y = R(position) x        keeps the rotary table
    gated           y = act(gate) ⊙ up       keeps gate and up

Autograd of the same lines in plain torch keeps two to four times as much and runs more kernels; `*_plain` beside each op are those
lines, which the tests compare with.  On CPU in float32 the products go through oneDNN, which is in every torch build for x86 and was
1.1 to 1.5 times as fast as the default BLAS there (`benchmarks/LOG.md`), with the weights as they lie in memory.

Dimensions: T tokens · I inputs · O outputs · D width · H heads · K head size · F width of the MLP.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from katei.base.host import shapes_only

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
"""Names of `config.hidden_act` that `gated` knows."""


ONE_DNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

KERNELS_KEPT = 32
"""By oneDNN, and by torch on top of it, unless the environment says otherwise. Each number of tokens in a pass has kernels of its own,
some twenty for all layers; the 1,024 that both would keep were as much memory again as 60 trials' tensors, and split the heap."""
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, str(KERNELS_KEPT))  # read at the first product

_planned_kind: ContextVar[str | None] = ContextVar("planned_kind", default=None)


@contextmanager
def planned(kind: str) -> Iterator[None]:
    """Inside, tensors are taken for ones on a device of this kind (`katei.plan` runs shapes of one device on another)."""
    before = _planned_kind.set(kind)
    try:
        yield
    finally:
        _planned_kind.reset(before)


def device_kind(x: Tensor) -> str:
    """cpu, cuda or mps: what a choice between kernels goes by."""
    return _planned_kind.get() or x.device.type


def one_dnn(x: Tensor) -> bool:
    """Products of `x` go through oneDNN: decided by device and type alone, so that a machine always takes the same path."""
    return device_kind(x) == "cpu" and x.dtype == torch.float32 and ONE_DNN


def product(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. `w_OI` may be the transposed view of a matrix."""
    if one_dnn(x_TI):
        return torch.ops.mkldnn._linear_pointwise(x_TI, w_OI, bias_O, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x_TI, w_OI, bias_O)


def frozen_linear(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(T, O). No gradient reaches the weight or the bias."""
    return _FrozenLinear.apply(x_TI, w_OI, bias_O)  # type: ignore[no-any-return, no-untyped-call]


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.w_OI = w_OI
        return product(x_TI, w_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return product(grads[0], ctx.w_OI.t()), None, None


def rms_norm(x: Tensor, scale_D: Tensor, eps: float, *, cast_first: bool) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32.

    With `cast_first` the normalised x is rounded to x's type before it is scaled (Llama), else after (Gemma); `scale_D` is the
    effective weight. No gradient reaches it.
    """
    return _RmsNorm.apply(x, scale_D, eps, cast_first)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm_plain(x: Tensor, scale_D: Tensor, eps: float, *, cast_first: bool) -> Tensor:
    x32 = x.float() if x.dtype != torch.float64 else x
    unit = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return unit.to(x.dtype) * scale_D if cast_first else (unit * scale_D).to(x.dtype)


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_D: Tensor, eps: float, cast_first: bool) -> Tensor:
        x32 = _wide(x)
        rms = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        inverse = rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale_D, inverse)
        unit: Tensor = x32 * inverse
        return (unit.to(x.dtype).mul_(scale_D) if cast_first else unit.mul_(scale_D)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, scale_D, inverse = ctx.saved_tensors
        x32 = _wide(x)
        scaled = grads[0].to(x32.dtype) * scale_D.to(x32.dtype)
        along = (scaled * x32).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(x.shape[-1])
        return scaled.mul_(inverse).addcmul_(x32, along, value=-1).to(x.dtype), None, None, None


def rotate(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotary position embedding in halves, as Llama's: (T, H, K), contiguous."""
    return _Rotate.apply(x_THK, cos_T1K, sin_T1K)  # type: ignore[no-any-return, no-untyped-call]


def rotate_plain(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    first, second = x_THK.chunk(2, -1)
    return x_THK * cos_T1K + torch.cat([-second, first], -1) * sin_T1K


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        g = grads[0]
        half = g.shape[-1] // 2
        out = g * cos
        out[..., :half].addcmul_(g[..., half:], sin[..., half:])
        out[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
        return out, None, None


def gated(gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
    """act(gate) ⊙ up: (T, F)."""
    return _Gated.apply(gate_TF, up_TF, activation)  # type: ignore[no-any-return, no-untyped-call]


def gated_plain(gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
    return _activate(gate_TF, activation) * up_TF


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_pytorch_tanh" else "none")


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activate(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        g = grads[0]
        if ctx.activation == "silu":
            to_gate = g * up
            torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        else:
            kind = "tanh" if ctx.activation == "gelu_pytorch_tanh" else "none"
            to_gate = torch.ops.aten.gelu_backward(g * up, gate, approximate=kind)
        return to_gate, _activate(gate, ctx.activation).mul_(g), None


SHORT = 128
"""Keys up to which `short_attention` is the faster one on a CPU: there torch's own works in blocks of that size."""


def attention(
    q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, scaling: float, visible: Tensor | None, causal: bool
) -> Tensor:
    """softmax(scaling · q kᵀ) v over the keys that `visible` (broadcast to B, 1, L, keys) allows; without it causal, or all keys."""
    rows, heads, _, _ = q_BHLK.shape
    if device_kind(q_BHLK) == "cpu" and k_BGLK.shape[2] <= SHORT and rows * heads >= 32:
        if causal and visible is None:
            visible = torch.ones(q_BHLK.shape[2], k_BGLK.shape[2], dtype=torch.bool).tril_()
        return _ShortAttention.apply(q_BHLK, k_BGLK, v_BGLK, scaling, visible)  # type: ignore[no-any-return, no-untyped-call]
    return torch_attention(q_BHLK, k_BGLK, v_BGLK, scaling, visible, causal and visible is None)


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, visible: Tensor | None = None, causal: bool = False
) -> Tensor:
    """torch's own, by the kernel it picks on the device; on "meta" by the one it picks on the planned device
    (aten/native/transformers/attention.cpp), since for "meta" itself it picks the one that keeps every score.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and device_kind(q) == "cuda":
        # there grouped heads in float32, or with a mask, would go the way that keeps every score; its memory-efficient kernel
        # takes equal numbers of heads alone
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    if not shapes_only(q):
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=causal, scale=scaling, enable_gqa=gqa
        )
    mask = None
    if visible is not None:
        mask = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(visible.logical_not(), -torch.inf)
    aten = torch.ops.aten
    if device_kind(q) == "cuda":
        kernel = aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, mask, True, 0.0, causal, scale=scaling)[0]  # type: ignore[no-any-return]
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, 0.0, causal, attn_mask=mask, scale=scaling)[0]  # type: ignore[no-any-return]


class _ShortAttention(Function):
    """Many short rows: one batched product per step of the formula, the heads of a group side by side. Half precision is computed in
    float32, as torch's own does.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, visible: Tensor | None) -> Tensor:
        rows, heads, queries, size = q.shape
        groups, keys = k.shape[1], k.shape[2]
        flat_q = q.reshape(rows * groups, -1, size)
        flat_k, flat_v = k.reshape(-1, keys, size), v.reshape(-1, keys, size)
        scores = torch.bmm(_wide(flat_q), _wide(flat_k).mT).mul_(scaling)
        if visible is not None:
            scores.view(rows, heads, queries, keys).masked_fill_(~visible, -torch.inf)
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(flat_q, flat_k, flat_v, p)
        ctx.scaling, ctx.shapes = scaling, (q.shape, k.shape)
        return torch.bmm(p, _wide(flat_v)).view(rows, heads, queries, size).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, p = ctx.saved_tensors
        q_shape, k_shape = ctx.shapes
        g = _wide(grads[0].reshape(q.shape))
        to_v = torch.bmm(p.mT, g)
        to_scores = torch.ops.aten._softmax_backward_data(torch.bmm(g, _wide(v).mT), p, -1, p.dtype).mul_(ctx.scaling)
        to_q, to_k = torch.bmm(to_scores, _wide(k)), torch.bmm(to_scores.mT, _wide(q))
        to_q, to_k, to_v = (x.to(q.dtype) for x in (to_q, to_k, to_v))
        return to_q.view(q_shape), to_k.view(k_shape), to_v.view(k_shape), None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
