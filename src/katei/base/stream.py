"""The packed stream: rows of many trials, one after the other, without padding.

    rows of adapter 0 of stack 0 | … | rows of adapter N-1 of stack 0 | rows of stack 1 | …        positions restart per row

Built once per pass from plain lists, so everything value-dependent (lengths, owners) is decided here, on the host,
and the forward pass that follows only sees tensors of known shape.

Dimensions: T tokens of the stream · B rows · N adapters of a stack · L longest row of a bucket · P prompt length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRow:
    """One row on its way through the base: which adapter of which stack reads it."""

    stack: int
    adapter: int
    ids: Sequence[int]
    noise: int | None = None
    """Seed of this row's dropout in this step; None where nothing is dropped (evaluation)."""


class RowShape(Protocol):
    """What a stack adds to its rows (see `katei.methods.contract.Stack`)."""

    virtual_tokens: int
    prefix_tokens: int
    attends: bool


class Bare:
    """Rows of nobody: the base as it is."""

    virtual_tokens = 0
    prefix_tokens = 0
    attends = False
    adapters = 1
    linear_sites: Mapping[str, object] = {}


@dataclass
class Part:
    """One stack's slice of the stream: tokens `start:stop`, rows `first:last`. Lives for one pass."""

    stack: int
    start: int
    stop: int
    first: int
    last: int
    adapter_B: Tensor
    adapter_T: Tensor
    lengths: tuple[int, ...]
    noise: tuple[int | None, ...]
    adapters: int
    memo: dict[object, Tensor] = field(default_factory=dict)
    """Tensors computed once per pass and used at several places; gone with the pass, so nothing outlives a step."""
    recomputed: bool = False
    """Layers run twice (gradient checkpointing): then both runs must do the same, and nothing is kept between them."""

    def once(self, key: object, compute: Callable[[], Tensor]) -> Tensor:
        if self.recomputed:
            return compute()
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def owner_TN(self, columns: int = 1) -> Tensor:
        """True where a token's own adapter owns the column: (T, N · columns), bool."""

        def compute() -> Tensor:
            owner = self.adapter_T[:, None] == torch.arange(self.adapters, device=self.adapter_T.device)
            return owner.repeat_interleave(columns, dim=1) if columns > 1 else owner

        return self.once(("owner", columns), compute)

    def owner_float_TN(self) -> Tensor:
        """`owner_TN` as 0.0 / 1.0: `owner @ v_NO` hands each token its own adapter's vector, and its backward is a product."""
        return self.once("owner_float", lambda: self.owner_TN().float())

    def keep_TI(self, place: int, width: int, dropout: float) -> Tensor | None:
        """Dropout's 0 or 1/(1-p) per token and column, a function of each row's own seed and the place alone.

        So a trial's draws are the same alone, beside others, split over several passes, or after a restart.
        """
        if dropout == 0.0 or self.noise[0] is None:
            return None
        rng = torch.Generator()
        rows = []
        for length, seed in zip(self.lengths, self.noise, strict=True):
            assert seed is not None
            rng.manual_seed((seed * 1_000_003 + place) % 2**63)
            rows.append(torch.rand(length, width, generator=rng) >= dropout)
        return (torch.cat(rows).float() / (1.0 - dropout)).to(self.adapter_T.device)


@dataclass(frozen=True)
class Bucket:
    """Rows that share one attention call, padded on the right to L tokens."""

    part: int | None
    """The part whose stack acts at the attend place, None for rows without such a stack."""
    rows: int
    longest: int
    gather_T: Tensor | None
    """(rows · L) stream positions; None where the rows are already a rectangle beginning at `start`."""
    start: int
    adapter_B: Tensor | None
    prefix_tokens: int


@dataclass(frozen=True)
class Phase:
    """From layer `first_layer` on, the first `tokens` tokens of the stream are there.

    Rows whose adapter acts only on the top layers join late: what enters that layer is the base's own and was computed once
    (`katei.engine.cache`). Rows are ordered by when they join, so each phase is a longer beginning of the same stream.
    """

    first_layer: int
    tokens: int
    joining: tuple[tuple[int, ...], ...]
    """Token ids of the rows that join here; of a row that joins after the last layer the pooled token alone is there."""
    buckets: tuple[Bucket, ...]
    scatter_T: Tensor | None
    """Where each token stands in the concatenated buckets, or None where one rectangle is the whole."""


@dataclass(frozen=True)
class Stream:
    ids_T: Tensor
    position_T: Tensor
    last_B: Tensor
    """The token each row is pooled at: its true last one."""
    virtual_T: Tensor | None
    """Stream positions of all virtual tokens, parts in order, or None."""
    parts: tuple[Part, ...]
    phases: tuple[Phase, ...]
    order: tuple[int, ...]
    """`order[i]` is the place in the caller's list of the stream's row i."""
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return int(self.ids_T.shape[0])

    def phase(self, layer: int) -> Phase:
        """The phase `layer` runs in."""
        return next(phase for phase in reversed(self.phases) if phase.first_layer <= layer)

    def unsort(self, x_B: Tensor) -> Tensor:
        """Rows back in the caller's order."""
        inverse = torch.empty(len(self.order), dtype=torch.long)
        inverse[list(self.order)] = torch.arange(len(self.order))
        return x_B[inverse.to(x_B.device)]


PADDING = 0.6
"""A bucket takes rows down to this share of its longest one: attention is a few percent of the work, calls cost more."""


def build_stream(
    rows: Sequence[PackedRow],
    stacks: Sequence[RowShape],
    adapters: Sequence[int],
    device: torch.device,
    entries: Sequence[int] | None = None,
    depth: int = 0,
) -> Stream:
    """Order rows by (entry layer, stack, adapter), lay them end to end and plan the attention calls.

    `adapters[s]` is the number of adapters in stack s, `entries[s]` the layer its rows join at (all at 0 without it);
    rows that join at `depth`, after the last layer, are there with their pooled token alone.
    """
    entry = entries or [0] * len(stacks)
    order = sorted(range(len(rows)), key=lambda i: (entry[rows[i].stack], rows[i].stack, rows[i].adapter))
    ids: list[int] = []
    positions: list[int] = []
    virtual: list[int] = []
    starts: list[int] = []
    lengths: list[int] = []
    for i in order:
        row, shape = rows[i], stacks[rows[i].stack]
        own_ids = row.ids[-1:] if 0 < depth <= entry[row.stack] else row.ids
        length = shape.virtual_tokens + len(own_ids)
        starts.append(len(ids))
        lengths.append(length)
        virtual.extend(range(len(ids), len(ids) + shape.virtual_tokens))
        ids.extend([0] * shape.virtual_tokens)
        ids.extend(own_ids)
        positions.extend(range(shape.prefix_tokens, shape.prefix_tokens + length))

    parts = []
    sorted_rows = [rows[i] for i in order]
    for stack in dict.fromkeys(row.stack for row in sorted_rows):
        first = next(b for b, row in enumerate(sorted_rows) if row.stack == stack)
        last = first + sum(row.stack == stack for row in sorted_rows)
        owners = torch.tensor([row.adapter for row in sorted_rows[first:last]])
        parts.append(
            Part(
                stack=stack,
                start=starts[first],
                stop=starts[last - 1] + lengths[last - 1],
                first=first,
                last=last,
                adapter_B=owners.to(device),
                adapter_T=owners.repeat_interleave(torch.tensor(lengths[first:last])).to(device),
                lengths=tuple(lengths[first:last]),
                noise=tuple(row.noise for row in sorted_rows[first:last]),
                adapters=adapters[stack],
            )
        )

    row_entries = [entry[row.stack] for row in sorted_rows]
    phases = []
    for first_layer in sorted(set(row_entries)):
        present = sum(e <= first_layer for e in row_entries)
        there = [part for part in parts if part.last <= present]
        tokens = starts[present - 1] + lengths[present - 1]
        buckets: tuple[Bucket, ...] = ()
        scatter = None
        if not 0 < depth <= first_layer:
            buckets, scatter = _plan_buckets(starts[:present], lengths[:present], there, stacks, tokens, device)
        joining = [tuple(r.ids) for r, e in zip(sorted_rows, row_entries, strict=True) if e == first_layer]
        phases.append(Phase(first_layer, tokens, tuple(joining), buckets, scatter))
    return Stream(
        ids_T=torch.tensor(ids).to(device),
        position_T=torch.tensor(positions).to(device),
        last_B=torch.tensor([s + n - 1 for s, n in zip(starts, lengths, strict=True)]).to(device),
        virtual_T=torch.tensor(virtual).to(device) if virtual else None,
        parts=tuple(parts),
        phases=tuple(phases),
        order=tuple(order),
        lengths=tuple(lengths),
    )


def _plan_buckets(
    starts: list[int],
    lengths: list[int],
    parts: list[Part],
    stacks: Sequence[RowShape],
    tokens: int,
    device: torch.device,
) -> tuple[tuple[Bucket, ...], Tensor | None]:
    special = [p for p in range(len(parts)) if stacks[parts[p].stack].attends or stacks[parts[p].stack].prefix_tokens]
    in_special = {b for p in special for b in range(parts[p].first, parts[p].last)}
    groups: list[tuple[int | None, list[int]]] = [(p, list(range(parts[p].first, parts[p].last))) for p in special]
    groups.insert(0, (None, [b for b in range(len(lengths)) if b not in in_special]))

    buckets: list[Bucket] = []
    place = torch.empty(tokens, dtype=torch.long)
    offset = 0
    for part, members in groups:
        members = sorted(members, key=lambda b: (-lengths[b], b))
        while members:
            longest = lengths[members[0]]
            inside = sorted(b for b in members if lengths[b] >= PADDING * longest)
            members = [b for b in members if lengths[b] < PADDING * longest]
            rectangle = all(lengths[b] == longest for b in inside) and inside == list(
                range(inside[0], inside[0] + len(inside))
            )
            gather = torch.zeros(len(inside), longest, dtype=torch.long)
            for i, b in enumerate(inside):
                gather[i] = starts[b]  # padding repeats the row's own first token; causality hides it, nothing reads it
                gather[i, : lengths[b]] = torch.arange(starts[b], starts[b] + lengths[b])
                place[starts[b] : starts[b] + lengths[b]] = torch.arange(lengths[b]) + offset + i * longest
            owner = None
            if part is not None:
                owner = parts[part].adapter_B[torch.tensor([b - parts[part].first for b in inside]).to(device)]
            buckets.append(
                Bucket(
                    part=part,
                    rows=len(inside),
                    longest=longest,
                    gather_T=None if rectangle else gather.flatten().to(device),
                    start=starts[inside[0]],
                    adapter_B=owner,
                    prefix_tokens=0 if part is None else stacks[parts[part].stack].prefix_tokens,
                )
            )
            offset += len(inside) * longest
    whole = len(buckets) == 1 and buckets[0].gather_T is None
    return tuple(buckets), None if whole else place.to(device)


def passes(lengths: Sequence[int], token_budget: int) -> Iterable[list[int]]:
    """Indices in order, cut where a pass would exceed the budget; a longer row goes alone."""
    chosen: list[int] = []
    tokens = 0
    for i, length in enumerate(lengths):
        if chosen and tokens + length > token_budget:
            yield chosen
            chosen, tokens = [], 0
        chosen.append(i)
        tokens += length
    if chosen:
        yield chosen
