"""Frozen-prefix cache: what enters layer j of the frozen base, computed once per row and study.

Below the lowest layer a trial's adapter acts on, its rows pass through the base alone: the same activations in every epoch, fold,
seed and trial. They are computed when the rows are first known, in the rows' own order and in passes of their own, so a
value depends on the data alone (a restarted run computes the same bits), and kept in memory, then in an unnamed file, each up
to a limit. A row beyond both limits is computed alone whenever it is asked for.

Dimensions: T tokens of a row · D width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from katei.base.host import shapes_only
from katei.base.packed import Base
from katei.base.stream import Bare, PackedRow, Stream, passes

Row = tuple[int, ...]


class ActivationCache:
    """Activations entering the layers `layers`, by row. After the last layer (`base.depth`) only the pooled token's are kept."""

    def __init__(
        self,
        base: Base,
        layers: Sequence[int],
        *,
        token_budget: int,
        memory_bytes: int = 1 << 30,
        file_bytes: int = 16 << 30,
    ):
        self.base, self.layers, self.token_budget = base, sorted(set(layers) - {0}), token_budget
        self.memory_left, self.file_left = memory_bytes, file_bytes
        self.in_memory: dict[tuple[int, Row], Tensor] = {}
        self.in_file: dict[tuple[int, Row], tuple[int, tuple[int, ...]]] = {}
        self.file: IO[bytes] | None = None

    def fill(self, rows: Sequence[Row]) -> None:
        """Compute and keep what the rows bring to every layer, in this order; rows already there are left out."""
        if not self.layers:
            return
        new = [row for row in dict.fromkeys(rows) if any((layer, row) not in self for layer in self.layers)]
        groups = list(passes([len(row) for row in new], self.token_budget))
        shapes = [tuple(len(new[i]) for i in chosen) for chosen in groups]
        last = {shape: number for number, shape in enumerate(shapes)}
        planned = shapes_only(self.base.embedding.weight)
        for number, chosen in enumerate(groups):
            if self.memory_left <= 0 and self.file_left <= 0:
                return
            # without numbers passes of equal lengths are alike, and the last of them meets the fullest cache
            compute = self._empty if planned and last[shapes[number]] != number else self._compute
            self._keep_all([new[i] for i in chosen], compute)

    def _keep_all(self, rows: Sequence[Row], compute: Callable[[Sequence[Row]], dict[int, list[Tensor]]]) -> None:
        """Of one pass, all of whose tensors are gone before the next begins."""
        for layer, pieces in compute(rows).items():
            for row, piece_TD in zip(rows, pieces, strict=True):
                self._keep((layer, row), piece_TD)

    def joining(self, stream: Stream) -> dict[int, Tensor]:
        """What enters each late phase of `stream`: (tokens, D) by layer."""
        late = [phase for phase in stream.phases if phase.first_layer]
        return {
            phase.first_layer: torch.cat([self._get(phase.first_layer, row) for row in phase.joining]) for phase in late
        }

    def __contains__(self, key: tuple[int, Row]) -> bool:
        return key in self.in_memory or key in self.in_file

    def _get(self, layer: int, row: Row) -> Tensor:
        key = (layer, row)
        if key in self.in_memory:
            return self.in_memory[key]
        if key in self.in_file:
            offset, shape = self.in_file[key]
            if self.file is None:
                return torch.empty(shape, dtype=self.base.dtype, device="meta")
            self.file.seek(offset)
            kind = torch.empty(0, dtype=self.base.dtype).element_size()
            content = bytearray(self.file.read(kind * int(np.prod(shape))))
            return torch.frombuffer(content, dtype=self.base.dtype).reshape(shape).to(self.base.device)
        return self._compute([row])[layer][0]

    def _keep(self, key: tuple[int, Row], piece_TD: Tensor) -> None:
        size = piece_TD.numel() * piece_TD.element_size()
        if size <= self.memory_left:
            self.memory_left -= size
            self.in_memory[key] = piece_TD.clone()  # a view would keep the whole pass alive
        elif size <= self.file_left:
            self.memory_left = 0  # later rows go behind it, so that which rows are kept depends on their order alone
            self.file_left -= size
            offset = 0
            if not shapes_only(piece_TD):  # without numbers there is nothing to write
                self.file = self.file or tempfile.TemporaryFile(prefix="katei-")  # noqa: SIM115 (lives as long as the cache)
                offset = self.file.seek(0, 2)
                self.file.write(piece_TD.contiguous().cpu().view(torch.uint8).numpy().tobytes())
            self.in_file[key] = (offset, tuple(piece_TD.shape))
        else:
            self.memory_left = self.file_left = 0

    def _empty(self, rows: Sequence[Row]) -> dict[int, list[Tensor]]:
        """What `_compute` gives, without its numbers."""
        like, width = self.base.embedding.weight, self.base.width
        return {
            layer: [like.new_empty(1 if layer == self.base.depth else len(row), width) for row in rows]
            for layer in self.layers
        }

    def _compute(self, rows: Sequence[Row]) -> dict[int, list[Tensor]]:
        """The rows through the bare base, as far as the highest layer asked for: pieces (T, D) by layer."""
        stacks: list[Any] = [Bare()]
        stream = self.base.stream([PackedRow(0, 0, row) for row in rows], stacks, trunks=False)
        out: dict[int, list[Tensor]] = {}
        with torch.no_grad(), self.base.running(stream, stacks):
            for layer, h_TD in self.base.hidden_at(stream, stacks, self.layers).items():
                pieces = torch.split(h_TD, [len(row) for row in rows])
                out[layer] = [piece[-1:] if layer == self.base.depth else piece for piece in pieces]
        return out
