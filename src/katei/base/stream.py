"""The packed stream: rows of many trials, one after the other, without padding.

    rows of adapter 0 of stack 0 | … | rows of adapter N-1 of stack 0 | rows of stack 1 | …        positions restart per row

What all rows of one adapter begin with (its virtual tokens, an instruction, the token a tokenizer puts in front) is the same
computation for each of them, since attention is causal. It stands in the stream once, as a *trunk*, and the rows attend to it:

    trunk of adapter 0 | the rest of its rows | trunk of adapter 1 | …

Built once per pass from plain lists, so everything value-dependent (lengths, owners) is decided here, on the host,
and the forward pass that follows only sees tensors of known shape.

Dimensions: T tokens of the stream · B rows · N adapters of a stack · L longest row of a bucket · P prompt length · U trunk length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, pairwise
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
    dropout: float


class Bare:
    """Rows of nobody: the base as it is."""

    virtual_tokens = 0
    prefix_tokens = 0
    attends = False
    dropout = 0.0
    adapters = 1
    linear_sites: Mapping[str, object] = {}


Segments = tuple[tuple[int, int, int], ...]
"""(adapter, start, stop) of each adapter's tokens, counted from their part's beginning."""


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
    segments: Segments
    lengths: tuple[int, ...]
    """Of its rows, without trunks: where something is dropped there are none."""
    noise: tuple[int | None, ...]
    last_only: bool = False
    """Its tokens are its rows' pooled ones alone (the last layer, see `Base.pooled`)."""
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

    def others_TM(self, adapters: int, rank: int = 1) -> Tensor | None:
        """Which of all adapters' `rank` columns are not the token's own: (T, adapters · rank); None where there is one adapter."""
        if adapters == 1:
            return None

        def compute() -> Tensor:
            owner_M = torch.arange(adapters * rank, device=self.adapter_T.device) // rank
            return self.adapter_T[:, None] != owner_M

        return self.once(("others", rank), compute)

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
            keep = torch.rand(length, width, generator=rng) >= dropout
            rows.append(keep[-1:] if self.last_only else keep)
        return (torch.cat(rows).float() / (1.0 - dropout)).to(self.adapter_T.device)


@dataclass(frozen=True)
class Bucket:
    """Rows that share one attention call, padded on the right to L tokens."""

    part: int | None
    """The part whose stack acts at the attend place, None for rows without such a stack."""
    rows: int
    longest: int
    gather_T: Tensor | None
    """(rows · L) stream positions of the queries; None where the rows are already a rectangle beginning at `start`."""
    start: int
    adapter_B: Tensor | None
    prefix_tokens: int
    trunk: int = 0
    """U: keys in front of each row's own, at positions it shares with others."""
    keys_T: Tensor | None = None
    """(rows · (U + L)) stream positions of the keys; None where they are the queries'."""
    pooled_B: Tensor | None = None
    """Which of the stream's rows these are; None in a bucket with a trunk among its rows."""
    own_lengths: tuple[int, ...] = ()
    """Of each row, without its trunk."""


@dataclass(frozen=True)
class Phase:
    """From layer `first_layer` on, the first `tokens` tokens of the stream are there.

    Rows whose adapter acts only on the top layers join late: what enters that layer is the base's own and was computed once
    (`katei.engine.cache`). Rows are ordered by when they join, so each phase is a longer beginning of the same stream.
    """

    first_layer: int
    tokens: int
    rows: int
    joining: tuple[tuple[int, ...], ...]
    """Token ids of the rows that join here; of a row that joins after the last layer the pooled token alone is there."""
    buckets: tuple[Bucket, ...]
    scatter_T: Tensor | None
    """Where each token stands in the concatenated buckets, or None where one rectangle is the whole."""
    pooled_buckets: tuple[Bucket, ...]
    """The buckets that hold rows (not trunks), for the last layer, where only pooled tokens ask."""
    pooled_scatter_B: Tensor | None
    """Where each row stands in the concatenated pooled buckets, or None where that is the stream's order."""


@dataclass(frozen=True)
class Stream:
    ids_T: Tensor
    position_T: Tensor
    last_B: Tensor
    """The token each row is pooled at: its true last one."""
    virtual_T: Tensor | None
    """Stream positions of all virtual tokens, parts in order, or None."""
    virtual_adapters: tuple[tuple[int, Tensor], ...]
    """For each stack with virtual tokens: the stack, and whose vectors stand at `virtual_T`, block by block."""
    parts: tuple[Part, ...]
    pooled_parts: tuple[Part, ...]
    """The same parts where only the pooled tokens are left: token b is row b."""
    phases: tuple[Phase, ...]
    order: tuple[int, ...]
    """`order[i]` is the place in the caller's list of the stream's row i."""

    @property
    def tokens(self) -> int:
        return int(self.ids_T.shape[0])

    def phase(self, layer: int) -> Phase:
        """The phase `layer` runs in."""
        return next(phase for phase in reversed(self.phases) if phase.first_layer <= layer)

    def unsort(self, x_B: Tensor) -> Tensor:
        """Rows back in the caller's order."""
        return x_B[torch.tensor(_inverse(self.order)).to(x_B.device)]


PADDING = 0.6
"""A bucket takes rows down to this share of its longest one: attention is a few percent of the work, calls cost more."""
WORTH_A_TRUNK = 0.05
"""A trunk must save this share of its rows' tokens: its attention needs a mask and a gather."""


@dataclass(frozen=True)
class _Segment:
    """A run of tokens that attend to one another: a trunk (`row` is None) or a row without its trunk."""

    row: int | None
    start: int
    length: int
    position: int
    """Of its first token."""
    trunk: _Segment | None

    @property
    def stop(self) -> int:
        return self.start + self.length


def build_stream(
    rows: Sequence[PackedRow],
    stacks: Sequence[RowShape],
    device: torch.device,
    entries: Sequence[int] | None = None,
    depth: int = 0,
    *,
    trunks: bool = True,
) -> Stream:
    """Order rows by (entry layer, stack, adapter), lay them end to end and plan the attention calls.

    `entries[s]` is the layer at which rows of stack s join it (all at 0 without it);
    rows that join at `depth`, after the last layer, are there with their pooled token alone. `trunks=False` computes what rows
    share once per row.
    """
    entry = entries or [0] * len(stacks)
    order = sorted(range(len(rows)), key=lambda i: (entry[rows[i].stack], rows[i].stack, rows[i].adapter))
    sorted_rows = [rows[i] for i in order]
    ids: list[int] = []
    positions: list[int] = []
    virtual: list[int] = []
    virtual_adapters: dict[int, list[int]] = {}
    segments: list[_Segment] = []
    parts: list[Part] = []
    pooled_parts: list[Part] = []
    row_segments: list[_Segment] = []

    def lay(row: int | None, own: Sequence[int], blanks: int, position: int, trunk: _Segment | None) -> _Segment:
        """Put `blanks` virtual tokens and the ids `own` at the stream's end."""
        segment = _Segment(row, len(ids), blanks + len(own), position, trunk)
        virtual.extend(range(len(ids), len(ids) + blanks))
        ids.extend([0] * blanks)
        ids.extend(own)
        positions.extend(range(position, position + segment.length))
        segments.append(segment)
        return segment

    for stack, of_stack in groupby(range(len(sorted_rows)), key=lambda b: sorted_rows[b].stack):
        shape, start, owners = stacks[stack], len(ids), []
        members = list(of_stack)
        for adapter, of_adapter in groupby(members, key=lambda b: sorted_rows[b].adapter):
            mine = list(of_adapter)
            began = len(ids)
            late = entry[stack] > 0
            shared = 0 if late or not trunks else _shared([sorted_rows[b] for b in mine], shape)
            trunk = None
            if shared:
                first_ids = sorted_rows[mine[0]].ids[: shared - shape.virtual_tokens]
                trunk = lay(None, first_ids, shape.virtual_tokens, shape.prefix_tokens, None)
            blanks = 0 if trunk else shape.virtual_tokens
            for b in mine:
                row_ids = sorted_rows[b].ids
                own = row_ids[-1:] if 0 < depth <= entry[stack] else row_ids[max(0, shared - shape.virtual_tokens) :]
                row_segments.append(lay(b, own, blanks, shape.prefix_tokens + shared, trunk))
            if shape.virtual_tokens:
                virtual_adapters.setdefault(stack, []).extend([adapter] * (1 if trunk else len(mine)))
            owners.append((adapter, len(mine), len(ids) - began))
        adapter_B = torch.tensor([adapter for adapter, n, _ in owners for _ in range(n)]).to(device)
        adapter_T = torch.tensor([adapter for adapter, _, n in owners for _ in range(n)]).to(device)
        parts.append(
            Part(
                stack=stack,
                start=start,
                stop=len(ids),
                first=members[0],
                last=members[-1] + 1,
                adapter_B=adapter_B,
                adapter_T=adapter_T,
                segments=_segments([(adapter, n) for adapter, _, n in owners]),
                lengths=tuple(row_segments[b].length for b in members),
                noise=tuple(sorted_rows[b].noise for b in members),
            )
        )
        pooled_parts.append(
            replace(
                parts[-1],
                start=members[0],
                stop=members[-1] + 1,
                adapter_T=adapter_B,
                segments=_segments([(adapter, n) for adapter, n, _ in owners]),
                last_only=True,
                memo={},
            )
        )

    row_entries = [entry[row.stack] for row in sorted_rows]
    phases = []
    for first_layer in sorted(set(row_entries)):
        present = sum(e <= first_layer for e in row_entries)
        there = [part for part in parts if part.last <= present]
        joining = tuple(tuple(r.ids) for r, e in zip(sorted_rows, row_entries, strict=True) if e == first_layer)
        tokens = there[-1].stop
        inside = [segment for segment in segments if segment.stop <= tokens]
        if 0 < depth <= first_layer:
            inside = []
        phases.append(_phase(first_layer, tokens, present, joining, inside, there, stacks, device))
    return Stream(
        ids_T=torch.tensor(ids).to(device),
        position_T=torch.tensor(positions).to(device),
        last_B=torch.tensor([segment.stop - 1 for segment in row_segments]).to(device),
        virtual_T=torch.tensor(virtual).to(device) if virtual else None,
        virtual_adapters=tuple((s, torch.tensor(owners).to(device)) for s, owners in virtual_adapters.items()),
        parts=tuple(parts),
        pooled_parts=tuple(pooled_parts),
        phases=tuple(phases),
        order=tuple(order),
    )


def _inverse(order: Sequence[int]) -> list[int]:
    """Where each of 0, 1, 2 … stands in `order`."""
    return sorted(range(len(order)), key=order.__getitem__)


def _segments(counts: Sequence[tuple[int, int]]) -> Segments:
    """Of (adapter, tokens) pairs that follow one another."""
    stops = list(accumulate(n for _, n in counts))
    return tuple((adapter, stop - n, stop) for (adapter, n), stop in zip(counts, stops, strict=True))


def _shared(rows: Sequence[PackedRow], shape: RowShape) -> int:
    """Length of the trunk of these rows of one adapter, virtual tokens included; 0 where one is not worth it.

    The token a row is pooled at stays its own. Rows whose dropout differs have nothing in common.
    """
    if len(rows) < 2 or (shape.dropout and rows[0].noise is not None):
        return 0
    low, high = min(tuple(row.ids) for row in rows), max(tuple(row.ids) for row in rows)
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    common = min(common, min(len(row.ids) for row in rows) - 1)
    shared = shape.virtual_tokens + common
    tokens = sum(shape.virtual_tokens + len(row.ids) for row in rows)
    return shared if (len(rows) - 1) * shared >= WORTH_A_TRUNK * tokens else 0


def _phase(
    first_layer: int,
    tokens: int,
    rows: int,
    joining: tuple[tuple[int, ...], ...],
    segments: list[_Segment],
    parts: list[Part],
    stacks: Sequence[RowShape],
    device: torch.device,
) -> Phase:
    """Group the segments into buckets: by the part that acts at the attend place, by trunk length, by own length."""
    special = {
        p: part for p, part in enumerate(parts) if stacks[part.stack].attends or stacks[part.stack].prefix_tokens
    }

    def group(segment: _Segment) -> tuple[int, int, int]:
        owner = next((p for p, part in special.items() if part.start <= segment.start < part.stop), -1)
        return owner, segment.trunk.length if segment.trunk else 0, int(segment.row is None)

    buckets: list[Bucket] = []
    place = [0] * tokens
    row_order: list[int] = []
    offset = 0
    for (owner, trunk, _), alike in groupby(sorted(segments, key=lambda s: (*group(s), -s.length, s.start)), key=group):
        members = list(alike)
        while members:
            longest = members[0].length
            inside = sorted((s for s in members if s.length >= PADDING * longest), key=lambda s: s.start)
            members = [s for s in members if s.length < PADDING * longest]
            bucket = _bucket(inside, longest, trunk, None if owner < 0 else owner, parts, stacks, device)
            for i, s in enumerate(inside):
                first = offset + i * longest
                place[s.start : s.stop] = range(first, first + s.length)
            buckets.append(bucket)
            row_order.extend(s.row for s in inside if s.row is not None)
            offset += len(inside) * longest
    whole = len(buckets) == 1 and buckets[0].gather_T is None
    pooled = tuple(bucket for bucket in buckets if bucket.pooled_B is not None)
    in_order = row_order == sorted(row_order)
    return Phase(
        first_layer,
        tokens,
        rows,
        joining,
        tuple(buckets),
        None if whole else torch.tensor(place).to(device),
        pooled,
        None if in_order else torch.tensor(_inverse(row_order)).to(device),
    )


def _bucket(
    inside: list[_Segment],
    longest: int,
    trunk: int,
    owner: int | None,
    parts: list[Part],
    stacks: Sequence[RowShape],
    device: torch.device,
) -> Bucket:
    ends_meet = all(a.stop == b.start for a, b in pairwise(inside))
    rectangle = ends_meet and all(s.length == longest for s in inside)
    gather: list[int] = []
    keys: list[int] = []
    for s in inside:
        # padding repeats the row's own first token; causality hides it, nothing reads it
        own = [*range(s.start, s.stop), *[s.start] * (longest - s.length)]
        gather += own
        keys += [*range(s.trunk.start, s.trunk.stop), *own] if s.trunk else own
    adapter_B = None
    if owner is not None:
        part = parts[owner]
        adapter_B = part.adapter_T[torch.tensor([s.start - part.start for s in inside]).to(device)]
    rows = [s.row for s in inside if s.row is not None]
    return Bucket(
        part=owner,
        rows=len(inside),
        longest=longest,
        gather_T=None if rectangle else torch.tensor(gather).to(device),
        start=inside[0].start,
        adapter_B=adapter_B,
        prefix_tokens=0 if owner is None else stacks[parts[owner].stack].prefix_tokens,
        trunk=trunk,
        keys_T=torch.tensor(keys).to(device) if trunk else None,
        pooled_B=torch.tensor(rows).to(device) if rows else None,
        own_lengths=tuple(s.length for s in inside),
    )


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
