"""A frozen base that knows three call sites, not methods: embed, linear, attend.

    h = embed(ids)                 embed:  a stack's virtual tokens take their places in the stream
    y = W x                        linear: a stack may change its own tokens' outputs        (forward hook)
    o = softmax(q kᵀ) v            attend: a stack may add keys in front, or change o        (AttentionInterface)

Any decoder of `transformers` that goes through its attention interface works, unpatched. We run its layers ourselves
(entering at any layer, normalising pooled tokens alone). How each layer wants to be called is recorded from the model's
own forward on a probe of a few tokens, and our run is compared with it before anything else happens.

Dimensions: T tokens · B rows · D width · H heads · G key/value heads · K head size · P prompt length · L longest row of a
bucket · I inputs · O outputs · N adapters of a stack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from katei.base.stream import Bare, Bucket, PackedRow, Stream, build_stream
from katei.core.errors import BaseError

if TYPE_CHECKING:
    from katei.methods.contract import Stack

ATTENTION = "katei"


@dataclass(frozen=True)
class Site:
    """A linear module an adapter may act on. `name` is its path below the backbone: `layers.3.self_attn.q_proj`."""

    name: str
    outputs: int
    inputs: int

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[1])

    @property
    def leaf(self) -> str:
        return self.name.rsplit(".", 1)[-1]


def check_ids(ids: Sequence[int], vocabulary: int, tokenizer: Any) -> None:
    """Raise BaseError for a token the base has no embedding for: some tokenizers know more than their model does."""
    beyond = next((i for i in ids if i >= vocabulary), None)
    if beyond is not None:
        raise BaseError(
            f"the text holds '{tokenizer.convert_ids_to_tokens(beyond)}', a token this base has no embedding for",
            hint="take it out of the text",
        )


class Base:
    """One frozen base model: its shape, its sites, and the packed forward.

    `model` is the backbone (no language-model head). Raises `BaseError` for an architecture whose layers cannot be run
    one by one to the same result as its own forward.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, name: str = "", fingerprint: str = ""):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        config = self.model.config
        self.config = config
        self.model_type: str = config.model_type
        self.width: int = config.hidden_size
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.vocabulary: int = config.vocab_size
        self.init_std: float = getattr(config, "initializer_range", 0.02)
        try:
            self.layers: Sequence[Any] = self.model.layers
            self.attention_blocks: list[Any] = [layer.self_attn for layer in self.layers]
            self.embedding: Any = self.model.get_input_embeddings()
            self.norm: Any = self.model.norm
        except AttributeError as error:
            raise _unsupported(self.model_type, str(error)) from None
        self.sites: dict[str, Site] = {}
        self._running: tuple[Stream, Sequence[Stack]] | None = None
        self.model.eval()
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and path.startswith("layers."):
                self.sites[path] = Site(path, module.out_features, module.in_features)
                module.register_forward_hook(self._linear_hook(path))
        for block in self.attention_blocks:
            block.katei_base = _Reference(self)
        self.model.set_attn_implementation(ATTENTION)
        self._layer_calls: list[dict[str, Any]] = []
        self._rotary_calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._probe()

    # ---------------------------------------------------------------- facts

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype  # type: ignore[no-any-return]

    @property
    def depth(self) -> int:
        return len(self.layers)

    def parameters_count(self) -> int:
        """Numbers in the backbone (tied embeddings counted once), without any adapter or head."""
        return sum(p.numel() for p in self.model.parameters())

    def sites_named(self, leaves: Sequence[str]) -> list[Site]:
        """Sites whose last path component is one of `leaves`, in the model's order."""
        chosen = [site for site in self.sites.values() if site.leaf in leaves]
        missing = set(leaves) - {site.leaf for site in chosen}
        if missing or not chosen:
            known = sorted({site.leaf for site in self.sites.values()})
            raise BaseError(
                f"{self.model_type} has no linear module named {', '.join(sorted(missing)) or '(none given)'}",
                hint=f"targets of this model: {', '.join(known)}",
            )
        return chosen

    def weight(self, site: str) -> nn.Linear:
        module = self.model.get_submodule(site)
        assert isinstance(module, nn.Linear)
        return module

    def tokenize(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids of one text, with the special tokens its tokenizer adds, cut to `max_length`."""
        ids: list[int] = self.tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
        check_ids(ids, self.vocabulary, self.tokenizer)
        return ids

    # ---------------------------------------------------------------- the pass

    def stream(
        self, rows: Sequence[PackedRow], stacks: Sequence[Stack], entries: Sequence[int] | None = None
    ) -> Stream:
        """Lay out rows for one pass; `entries[s]` is the layer at which rows of stack s join it, 0 without it."""
        return build_stream(rows, stacks, [stack.adapters for stack in stacks], self.device, entries, self.depth)

    @contextmanager
    def running(self, stream: Stream, stacks: Sequence[Stack]) -> Iterator[None]:
        """Everything of one pass, forward and backward, happens inside: hooks see `stream` and `stacks`, then nothing."""
        assert self._running is None, "passes do not nest"
        self._running = (stream, stacks)
        try:
            yield
        finally:
            self._running = None
            for part in stream.parts:
                part.memo.clear()

    def pooled(
        self,
        stream: Stream,
        stacks: Sequence[Stack],
        *,
        joining: Mapping[int, Tensor] | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Hidden state of each row's last true token after the final norm: (B, D), in the stream's order. Call inside `running`.

        `joining` holds, for each phase that does not begin at the embedding, what enters its layer: (tokens, D).
        """
        for part in stream.parts:
            part.recomputed = checkpointing
        h_TD = self.layers_forward(stream, stacks, joining=joining, checkpointing=checkpointing)
        pooled_BD: Tensor = self.norm(h_TD[stream.last_B][None])[0]
        return pooled_BD

    def embed(self, stream: Stream, stacks: Sequence[Stack]) -> Tensor:
        """What enters the first layer, for the tokens of the first phase: (T, D)."""
        h_TD: Tensor = self.embedding(stream.ids_T[: stream.phases[0].tokens])
        if stream.virtual_T is not None:
            vectors = [
                stacks[part.stack].embed()[part.adapter_B].flatten(0, 1)
                for part in stream.parts
                if stacks[part.stack].virtual_tokens
            ]
            h_TD = h_TD.index_copy(0, stream.virtual_T, torch.cat(vectors).to(h_TD.dtype))
        return h_TD

    def layers_forward(
        self,
        stream: Stream,
        stacks: Sequence[Stack],
        *,
        joining: Mapping[int, Tensor] | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """The stream after the last layer, before the final norm: (T, D)."""
        h_TD = self.embed(stream, stacks) if stream.phases[0].first_layer == 0 else None
        ends = [phase.first_layer for phase in stream.phases[1:]] + [self.depth]
        for phase, end in zip(stream.phases, ends, strict=True):
            if phase.first_layer:
                new_TD = (joining or {})[phase.first_layer]
                h_TD = new_TD if h_TD is None else torch.cat([h_TD, new_TD])
            assert h_TD is not None
            h_TD = self._run_layers(stream, h_TD, phase.first_layer, end, checkpointing)
        assert h_TD is not None
        return h_TD

    def hidden_at(self, stream: Stream, stacks: Sequence[Stack], layers: Sequence[int]) -> dict[int, Tensor]:
        """What enters each of `layers` (rising; `depth` is what leaves the last one), for a stream of one phase: (T, D) each."""
        out: dict[int, Tensor] = {}
        h_TD, first = self.embed(stream, stacks), 0
        for layer in layers:
            out[layer] = h_TD = self._run_layers(stream, h_TD, first, layer, checkpointing=False)
            first = layer
        return out

    def _run_layers(self, stream: Stream, h_TD: Tensor, first: int, last: int, checkpointing: bool) -> Tensor:
        h_1TD = h_TD[None]
        if first < last:
            position_1T = stream.position_T[None, : h_TD.shape[0]]
            rotary = self._rotary(h_1TD, position_1T)
        for index in range(first, last):
            kwargs = self._layer_kwargs(index, position_1T, rotary)
            if checkpointing and torch.is_grad_enabled():
                h_1TD = recompute(self.layers[index], h_1TD, use_reentrant=False, **kwargs)
            else:
                h_1TD = self.layers[index](h_1TD, **kwargs)
            h_1TD = h_1TD[0] if isinstance(h_1TD, tuple) else h_1TD
        return h_1TD[0]

    # ---------------------------------------------------------------- the two hooks

    def _linear_hook(self, site: str) -> Any:
        def hook(module: nn.Linear, args: tuple[Tensor, ...], y_1TO: Tensor) -> Tensor | None:
            if self._running is None:
                return None
            stream, stacks = self._running
            touching = [part for part in stream.parts if site in stacks[part.stack].linear_sites]
            if not touching:
                return None
            x_TI, y_TO = args[0][0], y_1TO[0]
            pieces, done = [], 0
            for part in touching:
                if part.start > done:
                    pieces.append(y_TO[done : part.start])
                pieces.append(
                    stacks[part.stack].linear(site, x_TI[part.start : part.stop], y_TO[part.start : part.stop], part)
                )
                done = part.stop
            if done < y_TO.shape[0]:
                pieces.append(y_TO[done:])
            return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[None]

        return hook

    def attend(
        self,
        block: Any,
        q_1HTK: Tensor,
        k_1GTK: Tensor,
        v_1GTK: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention of every row of the stream, causal within the row: (1, T, H, K)."""
        assert self._running is not None
        stream, stacks = self._running
        q_THK, k_TGK, v_TGK = (x[0].transpose(0, 1) for x in (q_1HTK, k_1GTK, v_1GTK))
        outs = []
        phase = stream.phase(block.layer_idx)
        for bucket in phase.buckets:
            q, k, v = (_to_bucket(x, bucket) for x in (q_THK, k_TGK, v_TGK))
            part = None if bucket.part is None else stream.parts[bucket.part]
            stack = None if part is None else stacks[part.stack]
            if stack is not None and part is not None and bucket.prefix_tokens:
                prefix_k, prefix_v = stack.prefix(block.layer_idx, part)
                k = torch.cat([prefix_k[bucket.adapter_B].to(k.dtype), k], dim=2)
                v = torch.cat([prefix_v[bucket.adapter_B].to(v.dtype), v], dim=2)
            out = _attention(q, k, v, scaling, bucket.prefix_tokens, window, softcap)
            if stack is not None and part is not None and stack.attends:
                assert bucket.adapter_B is not None
                out = stack.attend(block, q, out, bucket.adapter_B, part, scaling)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        out_THK = outs[0] if len(outs) == 1 else torch.cat(outs)
        if phase.scatter_T is not None:
            out_THK = out_THK.index_select(0, phase.scatter_T)
        return out_THK[None]

    # ---------------------------------------------------------------- how this architecture calls its layers

    def _probe(self) -> None:
        """Record how the model calls its rotary table and its layers, then check that our own run gives its result."""
        position_1T = torch.arange(3, device=self.device)[None]
        rotary_outputs: list[Any] = []
        layer_calls: list[dict[str, Any]] = []

        def see_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._rotary_calls.append((args, kwargs))
            rotary_outputs.append(output)

        def see_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) != 1:
                raise _unsupported(self.model_type, f"its layers take {len(args)} positional arguments")
            layer_calls.append(kwargs)

        handles = [layer.register_forward_pre_hook(see_layer, with_kwargs=True) for layer in self.layers]
        if hasattr(self.model, "rotary_emb"):
            handles.append(self.model.rotary_emb.register_forward_hook(see_rotary, with_kwargs=True))
        rows = [PackedRow(0, 0, [0, 1 % self.vocabulary, 2 % self.vocabulary])]
        stacks: list[Any] = [Bare()]
        stream = build_stream(rows, stacks, [1], self.device)
        try:
            with torch.no_grad(), self.running(stream, stacks):
                # the mask of ones keeps transformers from looking for packed rows, which needs values (none on "meta")
                own_1TD = self.model(
                    inputs_embeds=self.embedding(stream.ids_T)[None],
                    attention_mask=torch.ones_like(position_1T),
                    position_ids=position_1T,
                    use_cache=False,
                ).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        if len(layer_calls) != len(self.layers):
            raise _unsupported(self.model_type, f"{len(layer_calls)} of its {len(self.layers)} layers ran on a probe")
        for call in layer_calls:
            kept: dict[str, Any] = {}
            for key, value in call.items():
                source = next((i for i, output in enumerate(rotary_outputs) if output is value), None)
                if source is not None:
                    kept[key] = _Rotary(source)
                elif key == "position_ids":
                    kept[key] = _Positions()
                elif isinstance(value, Tensor):
                    raise _unsupported(
                        self.model_type, f"its layers are handed a tensor '{key}' that we cannot rebuild"
                    )
                else:
                    kept[key] = value
            self._layer_calls.append(kept)
        with torch.no_grad(), self.running(stream, stacks):
            ours_TD = self.norm(self.layers_forward(stream, stacks)[None])[0]
        tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        scale = own_1TD.float().abs().max().clamp_min(1e-6)
        if own_1TD.device.type != "meta" and not bool(
            ((ours_TD.float() - own_1TD[0].float()).abs().max() / scale) <= tolerance
        ):
            raise _unsupported(self.model_type, "running its layers one by one does not give its own result")

    def _rotary(self, h_1TD: Tensor, position_1T: Tensor) -> list[Any]:
        outputs = []
        for args, kwargs in self._rotary_calls:
            swapped = [self._swap(value, h_1TD, position_1T) for value in args]
            outputs.append(
                self.model.rotary_emb(*swapped, **{k: self._swap(v, h_1TD, position_1T) for k, v in kwargs.items()})
            )
        return outputs

    @staticmethod
    def _swap(value: Any, h_1TD: Tensor, position_1T: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return h_1TD if value.is_floating_point() else position_1T

    def _layer_kwargs(self, index: int, position_1T: Tensor, rotary: Sequence[Any]) -> dict[str, Any]:
        kwargs: dict[str, Any] = {}
        for key, value in self._layer_calls[index].items():
            if isinstance(value, _Rotary):
                kwargs[key] = rotary[value.call]
            elif isinstance(value, _Positions):
                kwargs[key] = position_1T
            else:
                kwargs[key] = value
        return kwargs


@dataclass(frozen=True)
class _Rotary:
    """Stands in a recorded layer call for the output of the rotary table's call number `call`."""

    call: int


@dataclass(frozen=True)
class _Positions:
    """Stands in a recorded layer call for the stream's positions."""


class _Reference:
    """Holds the base for an attention block without making it a submodule of its own child."""

    def __init__(self, base: Base):
        self.base = base


def _unsupported(model_type: str, why: str) -> BaseError:
    return BaseError(
        f"katei cannot run the architecture '{model_type}': {why}",
        hint="decoder models such as Llama, Mistral, Qwen2, Qwen3 and Gemma 3 work; run `katei models` for the built-in ones",
    )


def _to_bucket(x_THK: Tensor, bucket: Bucket) -> Tensor:
    """The bucket's rows, padded: (rows, H, L, K)."""
    if bucket.gather_T is None:
        x = x_THK[bucket.start : bucket.start + bucket.rows * bucket.longest]
    else:
        x = x_THK.index_select(0, bucket.gather_T)
    return torch.unflatten(x, 0, (bucket.rows, bucket.longest)).transpose(1, 2)


def _attention(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLK: Tensor,
    scaling: float,
    prefix: int,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of rows padded on the right; the `prefix` keys in front are earlier than every query."""
    queries, keys = q_BHLK.shape[2], k_BGLK.shape[2]
    groups = q_BHLK.shape[1] // k_BGLK.shape[1]
    mask_LL = None
    if prefix or softcap or (window and keys > window):
        position_L1 = torch.arange(prefix, prefix + queries, device=q_BHLK.device)[:, None]
        key_1L = torch.arange(keys, device=q_BHLK.device)[None]
        mask_LL = key_1L <= position_L1
        if window:
            mask_LL = mask_LL & (position_L1 - key_1L < window)
    if softcap:
        k_BHLK, v_BHLK = k_BGLK.repeat_interleave(groups, 1), v_BGLK.repeat_interleave(groups, 1)
        scores = torch.tanh(q_BHLK @ k_BHLK.transpose(2, 3) * (scaling / softcap)) * softcap
        assert mask_LL is not None
        return torch.softmax(scores.float().masked_fill(~mask_LL, -torch.inf), -1).to(v_BHLK.dtype) @ v_BHLK
    return F.scaled_dot_product_attention(
        q_BHLK, k_BGLK, v_BGLK, attn_mask=mask_LL, is_causal=mask_LL is None, scale=scaling, enable_gqa=groups > 1
    )


def _attention_interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if kwargs.get("s_aux") is not None:
        raise _unsupported(module.config.model_type, "attention sinks are not implemented")
    if sliding_window is None:
        sliding_window = getattr(module, "sliding_window", None)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return module.katei_base.base.attend(module, query, key, value, scale, sliding_window, softcap), None


AttentionInterface.register(ATTENTION, _attention_interface)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **kwargs: None)


def place_number(name: str) -> int:
    """A number for a site's name that does not depend on the process (Python's own hash does)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")
