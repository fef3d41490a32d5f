"""A decoder layer of the usual kind, run by our own few lines over the frozen arithmetic of `katei.base.ops`.

    x = norm(h)      q, k, v = W x      o = attention(rotate(q), rotate(k), v)      h = h + [norm] W o
    x = norm(h)      h = h + [norm] W (act(gate x) ⊙ up x)                                    [norm]: Gemma's second norms

Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3 and whatever else is built like them. `usual_layer` looks at what a layer is made of, and
`Base` compares the numbers with the model's own before using it; any other layer is run as transformers wrote it. Why
at all: about a third of the time outside the matrix products and half of what is kept for backward (`benchmarks/LOG.md`).

In the last layer only each row's pooled token is asked for, so only it needs q, o and the MLP.

Dimensions: T tokens · B rows · D width · H heads · G key/value heads · K head size · F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from katei.base import ops

Linear = Callable[[str, Tensor, bool], Tensor]
"""`linear("layers.3.mlp.up_proj", x, pooled)`: the frozen product with what the adapters add."""
Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""`attend(q_THK, k_TGK, v_TGK, pooled)` → (T, H, K), or (B, H, K) where q holds the pooled tokens alone."""


@dataclass(frozen=True)
class Norm:
    scale_D: Tensor
    eps: float
    cast_first: bool

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.scale_D, self.eps, cast_first=self.cast_first)


@dataclass(frozen=True)
class UsualLayer:
    """What `run` needs to know of one layer."""

    name: str
    """Its path below the backbone: `layers.3`."""
    head_size: int
    activation: str
    norm: Norm
    mlp_norm: Norm
    attention_out_norm: Norm | None
    mlp_out_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None

    def run(
        self, h_TD: Tensor, cos_T1K: Tensor, sin_T1K: Tensor, linear: Linear, attend: Attend, pooled_B: Tensor | None
    ) -> Tensor:
        """What leaves the layer: (T, D), or with `pooled_B` those tokens alone, (B, D)."""
        pooled = pooled_B is not None

        def heads(y: Tensor) -> Tensor:
            return torch.unflatten(y, 1, (-1, self.head_size))

        x_TD = self.norm(h_TD)
        x_BD, h_BD, cos_B1K, sin_B1K = (y if pooled_B is None else y[pooled_B] for y in (x_TD, h_TD, cos_T1K, sin_T1K))
        q_BHK = heads(linear(f"{self.name}.self_attn.q_proj", x_BD, pooled))
        k_TGK = heads(linear(f"{self.name}.self_attn.k_proj", x_TD, False))
        v_TGK = heads(linear(f"{self.name}.self_attn.v_proj", x_TD, False))
        q_BHK = ops.rotate(self.q_norm(q_BHK) if self.q_norm else q_BHK, cos_B1K, sin_B1K)
        k_TGK = ops.rotate(self.k_norm(k_TGK) if self.k_norm else k_TGK, cos_T1K, sin_T1K)
        o_BO = attend(q_BHK, k_TGK, v_TGK, pooled).flatten(1)
        o_BD = linear(f"{self.name}.self_attn.o_proj", o_BO, pooled)
        h_BD = h_BD + (self.attention_out_norm(o_BD) if self.attention_out_norm else o_BD)
        x_BD = self.mlp_norm(h_BD)
        gate_BF = linear(f"{self.name}.mlp.gate_proj", x_BD, pooled)
        up_BF = linear(f"{self.name}.mlp.up_proj", x_BD, pooled)
        y_BD = linear(f"{self.name}.mlp.down_proj", ops.gated(gate_BF, up_BF, self.activation), pooled)
        return h_BD + (self.mlp_out_norm(y_BD) if self.mlp_out_norm else y_BD)


def usual_layer(name: str, layer: Any, head_size: int, activation: str | None) -> UsualLayer | None:
    """The layer's description, or None where it is made of anything else."""
    norms = {"input_layernorm", "post_attention_layernorm"}
    second_norms = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
    children = {part for part, _ in layer.named_children()}
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if children not in ({"self_attn", "mlp"} | norms, {"self_attn", "mlp"} | norms | second_norms):
        return None
    assert attention is not None
    assert mlp is not None
    linears = {f"{part}_proj" for part in "qkvo"}
    inside = {part for part, _ in attention.named_children()}
    if inside not in (linears, linears | {"q_norm", "k_norm"}) or activation not in ops.ACTIVATIONS:
        return None
    if {part for part, child in mlp.named_children() if any(True for _ in child.parameters())} != {
        "gate_proj",
        "up_proj",
        "down_proj",
    }:
        return None
    if not all(isinstance(getattr(attention, part), nn.Linear) for part in linears):
        return None
    found = {part: _norm(getattr(layer, part)) for part in children & (norms | second_norms)}
    heads = {part: _norm(getattr(attention, part)) for part in inside - linears}
    if None in found.values() or any(n is None or n.scale_D.shape != (head_size,) for n in heads.values()):
        return None
    gemma = "pre_feedforward_layernorm" in found
    first, second = (
        found["input_layernorm"],
        found["pre_feedforward_layernorm" if gemma else "post_attention_layernorm"],
    )
    assert first is not None
    assert second is not None
    return UsualLayer(
        name=name,
        head_size=head_size,
        activation=activation,
        norm=first,
        mlp_norm=second,
        attention_out_norm=found["post_attention_layernorm"] if gemma else None,
        mlp_out_norm=found["post_feedforward_layernorm"] if gemma else None,
        q_norm=heads.get("q_norm"),
        k_norm=heads.get("k_norm"),
    )


def _norm(module: Any) -> Norm | None:
    """A root-mean-square norm by what it holds; Gemma's weight counts from 1."""
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if set(parameters) != {"weight"} or not isinstance(eps, float) or "RMSNorm" not in type(module).__name__:
        return None
    weight = parameters["weight"].detach()
    if type(module).__name__.startswith("Gemma"):
        return Norm(1.0 + weight.float(), eps, cast_first=False)
    return Norm(weight, eps, cast_first=True)


def tables(layer_call: dict[str, Any], tokens: int, head_size: int) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine (T, 1, K) among what a layer is handed, or None where the rotation is of another kind."""
    pair = layer_call.get("position_embeddings")
    if not isinstance(pair, tuple) or len(pair) != 2 or any(not isinstance(x, torch.Tensor) for x in pair):
        return None
    if any(x.shape != (1, tokens, head_size) for x in pair):
        return None
    return pair[0][0].unsqueeze(1), pair[1][0].unsqueeze(1)
