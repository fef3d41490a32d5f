"""Follows every storage on "meta" through a run: when it is born and gone, and whose it is.

    with Meter() as meter:                live, peak           bytes now, at most
        …                                 at_peak              bytes by owner when there were most
                                          layers_at_peak       of these, what each layer of the base made going forward
                                          events               (serial, bytes) of each birth, (serial, -1) of each end, in order

Whose a storage is, is read off the call stack when it is born: what `Base.attend` makes is attention's, what `AdamW.step_` makes
the optimizer's, and so on; so the engine knows nothing of the meter.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from katei.base.packed import Base
from katei.engine.cache import ActivationCache
from katei.engine.lockstep import Lockstep, score_rows
from katei.engine.optimizer import AdamW
from katei.methods.contract import Stack
from katei.methods.full import FullStack

WEIGHTS, ADAPTERS, GRADIENTS, MOMENTS = "frozen weights", "adapters and heads", "gradients", "moments"
ATTENTION, SCORES, BACKWARD, OPTIMIZER = "attention", "scores and loss", "backward", "optimizer's temporaries"
LAYERS, CACHE, STREAM = "activations", "activation cache", "stream"
DEQUANTISED, MERGED = "a weight, dequantised", "merged weights"

_BORN_IN: dict[CodeType, str] = {
    Base.attend.__code__: ATTENTION,
    Base._run_layers.__code__: LAYERS,
    Base.embed.__code__: LAYERS,
    Base.stream.__code__: STREAM,
    AdamW.step_.__code__: OPTIMIZER,
    AdamW.__init__.__code__: MOMENTS,
    ActivationCache.fill.__code__: CACHE,
    ActivationCache.joining.__code__: CACHE,
    Stack.__init__.__code__: ADAPTERS,
    Stack.snapshot.__code__: ADAPTERS,
    FullStack.__init__.__code__: GRADIENTS,
    Lockstep._backward.__code__: SCORES,
    score_rows.__code__: SCORES,
}
"""The innermost of these on the stack decides."""


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Storages that were there before are met as `WEIGHTS` if they are `claim`ed so, else not at all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.events: list[tuple[int, int]] = []
        self.by_owner: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.by_layer: Counter[int] = Counter()
        self.layers_at_peak: Counter[int] = Counter()
        self._known: dict[int, tuple[int, int, str, int | None]] = {}
        """Serial, bytes, owner and layer by the storage's address."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._meet(tensor, None)
        return result

    def claim(self, tensors: Iterable[Tensor], owner: str, stored: Callable[[Tensor], int] | None = None) -> None:
        """These are `owner`'s, whoever made them. `stored` says how many bytes one takes, if not those of its numbers."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._known:
                serial, size, before, layer = self._known[key]
                self.by_owner[before] -= size
                self.by_owner[owner] += size
                self._known[key] = (serial, size, owner, layer)
            else:
                self._meet(tensor, owner, stored(tensor) if stored else None)

    def _meet(self, tensor: Tensor, owner: str | None, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size
        serial = len(self.events)
        owner, layer = (owner, None) if owner else _owner()
        self._known[key] = (serial, size, owner, layer)
        self.events.append((serial, size))
        self.live += size
        self.by_owner[owner] += size
        if layer is not None:
            self.by_layer[layer] += size
        if self.live > self.peak:
            self.peak, self.at_peak, self.layers_at_peak = self.live, self.by_owner.copy(), self.by_layer.copy()
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        serial, size, owner, layer = self._known.pop(key)
        self.events.append((serial, -1))
        self.live -= size
        self.by_owner[owner] -= size
        if layer is not None:
            self.by_layer[layer] -= size


def _owner() -> tuple[str, int | None]:
    """Whose the storage is that is being made, and in which layer."""
    if torch._C._current_graph_task_id() != -1:
        return BACKWARD, None
    found, frame = None, sys._getframe(3)
    while frame is not None:
        found = found or _BORN_IN.get(frame.f_code)
        if frame.f_code is Base._run_layers.__code__:
            return found or LAYERS, frame.f_locals.get("index")  # none yet: what all layers share
        if found and found != ATTENTION:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return found or STREAM, None
