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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from katei.base import ops
from katei.base.host import shapes_only
from katei.base.layer import Norm, UsualLayer, tables, usual_layer
from katei.base.stream import Bare, Bucket, PackedRow, Part, Stream, build_stream
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

    `model` is the backbone (no language-model head). `fast=False` runs every layer as transformers wrote it, for every token.
    Raises `BaseError` for an architecture whose layers cannot be run one by one to the same result as its own forward.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, name: str = "", fingerprint: str = "", fast: bool = True):
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
        self.linears: dict[str, nn.Linear] = {}
        self._running: tuple[Stream, Sequence[Stack]] | None = None
        self.model.eval()
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and path.startswith("layers."):
                self.sites[path] = Site(path, module.out_features, module.in_features)
                self.linears[path] = module
                module.register_forward_hook(self._linear_hook(path))
        for block in self.attention_blocks:
            block.katei_base = _Reference(self)
        self.model.set_attn_implementation(ATTENTION)
        self._layer_calls: list[dict[str, Any]] = []
        self._rotary_calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._attention_calls: dict[int, _AttentionCall] = {}
        self.trunks = fast
        self.usual_layers: list[UsualLayer] = []
        """Our own run of every layer; empty where transformers' is used."""
        self._probe(fast)

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
        return self.linears[site]

    def tokenize(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids of one text, with the special tokens its tokenizer adds, cut to `max_length`."""
        ids: list[int] = self.tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
        check_ids(ids, self.vocabulary, self.tokenizer)
        return ids

    # ---------------------------------------------------------------- the pass

    def stream(
        self,
        rows: Sequence[PackedRow],
        stacks: Sequence[Stack],
        entries: Sequence[int] | None = None,
        *,
        trunks: bool = True,
    ) -> Stream:
        """Lay out rows for one pass; `entries[s]` is the layer at which rows of stack s join it, 0 without it. `trunks=False` keeps
        every row whole.
        """
        return build_stream(rows, stacks, self.device, entries, self.depth, trunks=trunks and self.trunks)

    @contextmanager
    def running(self, stream: Stream, stacks: Sequence[Stack]) -> Iterator[None]:
        """Everything of one pass, forward and backward, happens inside: hooks see `stream` and `stacks`, then nothing."""
        assert self._running is None, "passes do not nest"
        self._running = (stream, stacks)
        try:
            yield
        finally:
            self._running = None
            for part in (*stream.parts, *stream.pooled_parts):
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
        for part in (*stream.parts, *stream.pooled_parts):
            part.recomputed = checkpointing
        h_BD = self._through_layers(stream, stacks, joining or {}, checkpointing, pooled=True)
        pooled_BD: Tensor = self.norm(h_BD[None])[0]
        return pooled_BD

    def embed(self, stream: Stream, stacks: Sequence[Stack]) -> Tensor:
        """What enters the first layer, for the tokens of the first phase: (T, D)."""
        h_TD: Tensor = self.embedding(stream.ids_T[: stream.phases[0].tokens])
        if stream.virtual_T is not None:
            vectors = [stacks[stack].embed()[owner_V].flatten(0, 1) for stack, owner_V in stream.virtual_adapters]
            h_TD = h_TD.index_copy(0, stream.virtual_T, torch.cat(vectors).to(h_TD.dtype))
        return h_TD

    def hidden_at(self, stream: Stream, stacks: Sequence[Stack], layers: Sequence[int]) -> dict[int, Tensor]:
        """What enters each of `layers` (rising; `depth` is what leaves the last one), for a stream of one phase: (T, D) each."""
        out: dict[int, Tensor] = {}
        h_TD, first = self.embed(stream, stacks), 0
        for layer in layers:
            out[layer] = h_TD = self._run_layers(stream, h_TD, first, layer, checkpointing=False, pooled_B=None)
            first = layer
        return out

    def _through_layers(
        self,
        stream: Stream,
        stacks: Sequence[Stack],
        joining: Mapping[int, Tensor],
        checkpointing: bool,
        pooled: bool,
    ) -> Tensor:
        """What leaves the last layer, before the final norm: every token (T, D), or the pooled ones (B, D)."""
        h_TD = self.embed(stream, stacks) if stream.phases[0].first_layer == 0 else None
        ends = [phase.first_layer for phase in stream.phases[1:]] + [self.depth]
        for phase, end in zip(stream.phases, ends, strict=True):
            if phase.first_layer == self.depth:  # rows that join behind the last layer are their pooled tokens alone
                new_TD = joining[phase.first_layer]
                return new_TD if h_TD is None else torch.cat([h_TD, new_TD])
            if phase.first_layer:
                new_TD = joining[phase.first_layer]
                h_TD = new_TD if h_TD is None else torch.cat([h_TD, new_TD])
            assert h_TD is not None
            pooled_B = stream.last_B[: phase.rows] if pooled and end == self.depth else None
            h_TD = self._run_layers(stream, h_TD, phase.first_layer, end, checkpointing, pooled_B)
        assert h_TD is not None
        return h_TD

    def _run_layers(
        self, stream: Stream, h_TD: Tensor, first: int, last: int, checkpointing: bool, pooled_B: Tensor | None
    ) -> Tensor:
        """Layers `first` to `last` (not included); `pooled_B` names the tokens asked for behind the last one."""
        position_1T = stream.position_T[None, : h_TD.shape[0]]
        rotary = self._rotary(h_TD[None], position_1T) if first < last else []
        frozen = (
            not self.embedding.weight.requires_grad
        )  # full fine-tuning changes weights that our own layers take as constant
        for index in range(first, last):
            kwargs = self._layer_kwargs(index, position_1T, rotary)
            asked_B = pooled_B if index == last - 1 else None
            run = self._usual_run(index, kwargs) if self.usual_layers and frozen else self._library_run(index, kwargs)
            if checkpointing and torch.is_grad_enabled():
                h_TD = recompute(run, h_TD, asked_B, use_reentrant=False)
            else:
                h_TD = run(h_TD, asked_B)
        return h_TD

    def _library_run(self, index: int, kwargs: dict[str, Any]) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Layer `index` as transformers wrote it."""

        def run(h_TD: Tensor, asked_B: Tensor | None) -> Tensor:
            out = self.layers[index](h_TD[None], **kwargs)
            h_TD = (out[0] if isinstance(out, tuple) else out)[0]
            return h_TD if asked_B is None else h_TD[asked_B]

        return run

    def _usual_run(self, index: int, kwargs: dict[str, Any]) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Layer `index` in our own lines."""
        block, call = self.attention_blocks[index], self._attention_calls[index]

        def linear(site: str, x_TI: Tensor, pooled: bool) -> Tensor:
            module = self.linears[site]
            return self.adapt(site, x_TI, ops.frozen_linear(x_TI, module.weight, module.bias), pooled)

        def attend(q_BHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, pooled: bool) -> Tensor:
            return self.attend(block, q_BHK, k_TGK, v_TGK, call, pooled)

        def run(h_TD: Tensor, asked_B: Tensor | None) -> Tensor:
            pair = tables(kwargs, h_TD.shape[0], self.head_size)
            assert pair is not None
            return self.usual_layers[index].run(h_TD, *pair, linear, attend, asked_B)

        return run

    # ---------------------------------------------------------------- the two places inside a layer

    def _linear_hook(self, site: str) -> Any:
        def hook(module: nn.Linear, args: tuple[Tensor, ...], y_1TO: Tensor) -> Tensor | None:
            if self._running is None:
                return None
            return self.adapt(site, args[0][0], y_1TO[0], False)[None]

        return hook

    def adapt(self, site: str, x_TI: Tensor, y_TO: Tensor, pooled: bool) -> Tensor:
        """A site's outputs, each stack's slice changed by its adapters."""
        assert self._running is not None
        stream, stacks = self._running
        parts = stream.pooled_parts if pooled else stream.parts
        touching = [part for part in parts if site in stacks[part.stack].linear_sites]
        if not touching:
            return y_TO
        owners: list[Part | None] = []
        sizes: list[int] = []
        done = 0
        for part in touching:
            if part.start > done:
                owners.append(None)
                sizes.append(part.start - done)
            owners.append(part)
            sizes.append(part.stop - part.start)
            done = part.stop
        if done < y_TO.shape[0]:
            owners.append(None)
            sizes.append(y_TO.shape[0] - done)
        if len(sizes) == 1:
            return stacks[touching[0].stack].linear(site, x_TI, y_TO, touching[0])
        # one split, not slices: the gradient of each slice would be a stream of zeros with a little in it
        pieces = [
            y if owner is None else stacks[owner.stack].linear(site, x, y, owner)
            for owner, x, y in zip(owners, torch.split(x_TI, sizes), torch.split(y_TO, sizes), strict=True)
        ]
        return torch.cat(pieces)

    def attend(
        self, block: Any, q_BHK: Tensor, k_TGK: Tensor, v_TGK: Tensor, call: _AttentionCall, pooled: bool
    ) -> Tensor:
        """Attention of every row of the stream, causal within the row: (T, H, K); for q of the pooled tokens alone (B, H, K)."""
        assert self._running is not None
        stream, stacks = self._running
        parts = stream.pooled_parts if pooled else stream.parts
        phase = stream.phase(block.layer_idx)
        outs = []
        for bucket in phase.pooled_buckets if pooled else phase.buckets:
            if pooled:
                assert bucket.pooled_B is not None
                q = q_BHK[bucket.pooled_B][:, :, None]
            else:
                q = _to_bucket(q_BHK, bucket)
            k, v = _keys_to_bucket(k_TGK, bucket), _keys_to_bucket(v_TGK, bucket)
            part = None if bucket.part is None else parts[bucket.part]
            stack = None if part is None else stacks[part.stack]
            if stack is not None and part is not None and bucket.prefix_tokens:
                prefix_k, prefix_v = stack.prefix(block.layer_idx, part)
                k = torch.cat([prefix_k[bucket.adapter_B].to(k.dtype), k], dim=2)
                v = torch.cat([prefix_v[bucket.adapter_B].to(v.dtype), v], dim=2)
            out = _attention(q, k, v, call, _visible(bucket, call, pooled, q.device), causal=not pooled)
            if stack is not None and part is not None and stack.attends:
                assert bucket.adapter_B is not None
                out = stack.attend(block, q, out, bucket.adapter_B, part, call.scaling)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        out_BHK = outs[0] if len(outs) == 1 else torch.cat(outs)
        scatter = phase.pooled_scatter_B if pooled else phase.scatter_T
        return out_BHK if scatter is None else out_BHK.index_select(0, scatter)

    def frozen_tensors(self) -> list[Tensor]:
        """Everything it holds: the model's own tensors, and the norms' effective weights where these are others."""
        norms = [norm.scale_D for layer in self.usual_layers for norm in vars(layer).values() if isinstance(norm, Norm)]
        return [*self.model.parameters(), *self.model.buffers(), *norms]

    # ---------------------------------------------------------------- how this architecture calls its layers

    def _probe(self, fast: bool) -> None:
        """Record how the model calls its rotary table, its layers and its attention, then check that our own run gives its result."""
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
        stream = build_stream(rows, stacks, self.device)
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
        if not self._same(own_1TD, stream, stacks):
            raise _unsupported(self.model_type, "running its layers one by one does not give its own result")
        if fast:
            self._use_usual_layers(own_1TD, stream, stacks)

    def _same(self, own_1TD: Tensor, stream: Stream, stacks: Sequence[Any]) -> bool:
        """Our run of the layers gives the model's own result. (Without numbers there is nothing to compare.)"""
        with torch.no_grad(), self.running(stream, stacks):
            ours_TD = self.norm(self._through_layers(stream, stacks, {}, checkpointing=False, pooled=False)[None])[0]
        if shapes_only(own_1TD):
            return True
        tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        scale = own_1TD.float().abs().max().clamp_min(1e-6)
        return bool(((ours_TD.float() - own_1TD[0].float()).abs().max() / scale) <= tolerance)

    def _use_usual_layers(self, own_1TD: Tensor, stream: Stream, stacks: Sequence[Any]) -> None:
        """Take our own lines for the layers, if every layer is of the usual kind and the numbers agree."""
        activation = getattr(self.config, "hidden_activation", None) or getattr(self.config, "hidden_act", None)
        position_1T = stream.position_T[None]
        rotary = self._rotary(self.embedding(stream.ids_T)[None], position_1T)
        found = []
        for index, layer in enumerate(self.layers):
            usual = usual_layer(f"layers.{index}", layer, self.head_size, activation)
            if (
                usual is None
                or tables(self._layer_kwargs(index, position_1T, rotary), stream.tokens, self.head_size) is None
            ):
                return
            found.append(usual)
        self.usual_layers = found
        if not self._same(own_1TD, stream, stacks):
            self.usual_layers = []

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


@dataclass(frozen=True)
class _AttentionCall:
    """What a layer hands to its attention beside q, k and v."""

    scaling: float
    window: int | None
    softcap: float | None


def _to_bucket(x_THK: Tensor, bucket: Bucket) -> Tensor:
    """The bucket's rows, padded: (rows, H, L, K)."""
    if bucket.gather_T is None:
        x = x_THK[bucket.start : bucket.start + bucket.rows * bucket.longest]
    else:
        x = x_THK.index_select(0, bucket.gather_T)
    return torch.unflatten(x, 0, (bucket.rows, bucket.longest)).transpose(1, 2)


def _keys_to_bucket(x_TGK: Tensor, bucket: Bucket) -> Tensor:
    """What the bucket's rows attend to, their trunk in front: (rows, G, U + L, K)."""
    if bucket.keys_T is None:
        return _to_bucket(x_TGK, bucket)
    x = x_TGK.index_select(0, bucket.keys_T)
    return torch.unflatten(x, 0, (bucket.rows, bucket.trunk + bucket.longest)).transpose(1, 2)


def _visible(bucket: Bucket, call: _AttentionCall, pooled: bool, device: torch.device) -> Tensor | None:
    """Which keys each query sees, (rows or 1, 1, queries, keys), True for yes; None where plain causality says it, or where the
    pooled token of every row sees all of them.
    """
    front = bucket.prefix_tokens + bucket.trunk
    keys = front + bucket.longest
    plain = not call.softcap and not (call.window and keys > call.window)
    if plain and (min(bucket.own_lengths) == bucket.longest if pooled else not front):
        return None
    if pooled:
        last_B1 = torch.tensor(bucket.own_lengths, device=device)[:, None, None, None] + (front - 1)
    else:
        last_B1 = torch.arange(front, keys, device=device)[None, None, :, None]
    key_1L = torch.arange(keys, device=device)[None, None, None]
    seen = key_1L <= last_B1
    return seen & (last_B1 - key_1L < call.window) if call.window else seen


def _attention(
    q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, call: _AttentionCall, visible_BL: Tensor | None, *, causal: bool
) -> Tensor:
    """Attention of rows padded on the right: to what `visible_BL` says; without it causal, or to every key."""
    groups = q_BHLK.shape[1] // k_BGLK.shape[1]
    if call.softcap:
        k_BHLK, v_BHLK = k_BGLK.repeat_interleave(groups, 1), v_BGLK.repeat_interleave(groups, 1)
        scores = torch.tanh(q_BHLK @ k_BHLK.transpose(2, 3) * (call.scaling / call.softcap)) * call.softcap
        assert visible_BL is not None
        return torch.softmax(scores.float().masked_fill(~visible_BL, -torch.inf), -1).to(v_BHLK.dtype) @ v_BHLK
    return ops.attention(q_BHLK, k_BGLK, v_BGLK, call.scaling, visible_BL, causal)


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
    call = _AttentionCall(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap)
    base: Base = module.katei_base.base
    base._attention_calls[module.layer_idx] = call
    q_THK, k_TGK, v_TGK = (x[0].transpose(0, 1) for x in (query, key, value))
    return base.attend(module, q_THK, k_TGK, v_TGK, call, False)[None], None


AttentionInterface.register(ATTENTION, _attention_interface)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **kwargs: None)


def place_number(name: str) -> int:
    """A number for a site's name that does not depend on the process (Python's own hash does)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")
