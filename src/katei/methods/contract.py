"""What a method is: a frozen setting that builds a *stack*, the adapters of N trials side by side.

    Method (settings, one dataclass per paper)  --build-->  Stack (tensors of N adapters + heads, and how they act)

Trials of equal settings share one stack, so nothing loops over trials. A stack keeps all it trains in one buffer

    theta_NM     row n = everything trial n trains: adapter and head, M numbers

and each named tensor is a leaf that views it, (N, *shape), whose `.grad` views `grad_NM` in the same place. So one trial's
norm, AdamW step, snapshot and file are each a row; the frozen base never knows how many trials there are.

Dimensions: N adapters · M numbers of one adapter · T tokens · B rows · I inputs · O outputs · D width · H heads · K head
size · P prompt length · L longest row of a bucket · C classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from katei.base.host import shapes_only
from katei.base.packed import Base
from katei.base.stream import Part
from katei.core.errors import AdapterError

HEAD = "score"
"""Name of the head's tensor, (C, D), in a stack and, with a prefix, in peft's files."""


@dataclass(frozen=True)
class TensorSpec:
    """One trained tensor of one adapter."""

    shape: tuple[int, ...]
    init: Callable[[torch.Generator], Tensor]
    decay: bool = True
    """Weight decay applies: to all but biases and norms, as in transformers' Trainer."""

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TrialFacts:
    """What a stack may know of a trial's length: AdaLoRA's budget schedule needs it."""

    total_steps: int


class Method(ABC):
    """Settings of one method: a frozen, hashable dataclass, validated where built."""

    name: ClassVar[str]
    """The word used in files and flags."""
    peft_type: ClassVar[str | None]
    """peft's name for it, None where peft has no such thing."""
    learning_rate: ClassVar[float]
    """Default learning rate, tuned on validation rows only (docs/methods.md)."""
    merges: ClassVar[bool]
    """The adapter can be folded into the base's weights."""
    search: ClassVar[Mapping[str, tuple[float | str, ...]]] = {}
    """What `--tune` tries beside the learning rate: values of each setting, in their order, any of which goes with any other."""

    @abstractmethod
    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> Stack:
        """`seeds` has one entry per trial, `facts` too; all tensors are drawn from each trial's own seed."""

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method:
        """The settings an adapter_config.json of this `peft_type` describes. Raises AdapterError for what we lack."""
        raise AdapterError(f"peft has no adapter of the method {cls.name}")

    def settings(self) -> dict[str, Any]:
        """All settings by name, as katei.json and a resolved recipe hold them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def saved_as(self) -> Method:
        """The method whose stack reads this one's file: itself, unless training needed more than the result does."""
        return self


class Stack(ABC):
    """N adapters of one method and setting, with their heads. Subclasses are final.

    A subclass calls `super().__init__` with its tensors' specs, sets the four facts below, and overrides the places
    its method acts at.
    """

    virtual_tokens: int = 0
    """Vectors put in front of each row; they pass through all layers (prompt tuning, P-tuning)."""
    prefix_tokens: int = 0
    """Keys and values put in front of each row at every attention (prefix tuning); rows start at this position."""
    attends: bool = False
    """True if `attend` changes attention's output (LLaMA-Adapter)."""
    dropout: float = 0.0
    """Share of a site's inputs dropped while training (LoRA, AdaLoRA): then no two rows have anything in common."""
    linear_sites: Mapping[str, object]
    """The linear sites this method acts on."""
    lowest_layer: int = 0
    """The first layer that sees anything of the adapter; the activations entering it are the base's own."""

    def __init__(self, base: Base, classes: int, seeds: Sequence[int], specs: Mapping[str, TensorSpec]):
        self.adapters = len(seeds)
        self.classes = classes
        self.linear_sites = {}
        head = TensorSpec((classes, base.width), normal((classes, base.width), base.init_std))
        # decayed numbers first, so that a row is two contiguous runs and AdamW needs two calls at most
        named = dict(sorted({**specs, HEAD: head}.items(), key=lambda item: not item[1].decay))
        self.specs: dict[str, TensorSpec] = named
        self.numbers = sum(spec.numbers for spec in named.values())
        self.decayed_numbers = sum(spec.numbers for spec in named.values() if spec.decay)
        self.theta_NM = torch.empty(self.adapters, self.numbers, device=base.device)
        self.grad_NM = torch.zeros_like(self.theta_NM)
        self.tensors: dict[str, Tensor] = self._leaves(slice(None))
        with torch.no_grad():
            for name, leaf in self.tensors.items():
                for n, seed in enumerate(seeds if not shapes_only(leaf) else ()):
                    leaf[n] = named[name].init(generator(seed, name)).to(leaf)

    def _leaves(self, which: slice) -> dict[str, Tensor]:
        """Each named tensor of the adapters `which`, a leaf whose gradient is written where `grad_NM` has it."""
        leaves, start = {}, 0
        for name, spec in self.specs.items():
            stop = start + spec.numbers
            leaf = torch.unflatten(self.theta_NM[which, start:stop], 1, spec.shape).detach().requires_grad_()
            leaf.grad = torch.unflatten(self.grad_NM[which, start:stop], 1, spec.shape)
            leaves[name] = leaf
            start = stop
        return leaves

    @contextmanager
    def narrowed(self, first: int, stop: int) -> Iterator[None]:
        """Inside, the stack is adapters `first:stop` alone: a pass that touches few computes, and writes gradients, of no others."""
        whole = self.adapters, self.tensors
        self.adapters, self.tensors = stop - first, self._leaves(slice(first, stop))
        try:
            yield
        finally:
            self.adapters, self.tensors = whole

    # ---------------------------------------------------------------- the places

    def embed(self) -> Tensor:
        """The virtual tokens' vectors, (N, P, D)."""
        raise NotImplementedError

    def linear(self, site: str, x_TI: Tensor, y_TO: Tensor, part: Part) -> Tensor:
        """The site's outputs for this stack's tokens, given inputs and the frozen outputs."""
        return y_TO

    def prefix(self, layer: int, part: Part) -> tuple[Tensor, Tensor]:
        """Keys and values in front of every row at `layer`: two (N, G, P, K)."""
        raise NotImplementedError

    def attend(
        self, block: Any, q_BHLK: Tensor, out_BHLK: Tensor, adapter_B: Tensor, part: Part, scaling: float
    ) -> Tensor:
        """Attention's output for this stack's rows, given the queries after rotation."""
        return out_BHLK

    def scores(self, pooled_BD: Tensor, part: Part) -> Tensor:
        """The head: each pooled row by its own adapter's weights, (B, C)."""
        score_NCD = self.tensors[HEAD]
        pooled_BD = pooled_BD.float()
        if self.adapters == 1:
            return pooled_BD @ score_NCD[0].T
        all_BNC = torch.unflatten(pooled_BD @ score_NCD.flatten(0, 1).T, 1, (self.adapters, self.classes))
        return all_BNC[torch.arange(len(part.adapter_B), device=all_BNC.device), part.adapter_B]

    def penalty_N(self) -> Tensor | None:
        """Added to each trial's loss once per step (AdaLoRA's orthogonality), or None."""
        return None

    def after_step(self, n: int, step: int) -> None:  # noqa: B027 (most methods have nothing to do here)
        """Trial n has taken optimizer step `step` (1-based); gradients are still there (AdaLoRA moves its budget)."""

    # ---------------------------------------------------------------- one trial's row

    def trained(self, n: int) -> list[tuple[Tensor, Tensor, bool]]:
        """What AdamW updates for trial n: (numbers, gradient, decays), contiguous runs of its row."""
        cut = self.decayed_numbers
        runs = [
            (self.theta_NM[n, :cut], self.grad_NM[n, :cut], True),
            (self.theta_NM[n, cut:], self.grad_NM[n, cut:], False),
        ]
        return [run for run in runs if run[0].numel()]

    def buffers(self) -> dict[str, Tensor]:
        """State beside the trained numbers that a restart needs, each (N, …)."""
        return {}

    def current(self, n: int) -> dict[str, Tensor]:
        """All that makes trial n's adapter what it is, as it goes on."""
        return {"theta_M": self.theta_NM[n]} | {k: v[n] for k, v in self.buffers().items()}

    def snapshot(self, n: int) -> dict[str, Tensor]:
        """A copy of what it is now."""
        return {name: tensor.clone() for name, tensor in self.current(n).items()}

    def restore_(self, n: int, snapshot: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.theta_NM[n] = snapshot["theta_M"]
            for name, buffer in self.buffers().items():
                buffer[n] = snapshot[name]

    def zero_grad_(self) -> None:
        self.grad_NM.zero_()

    @property
    def trainable(self) -> int:
        """Numbers trained by one adapter, head included (the count peft prints)."""
        return self.numbers

    def total(self, base: Base) -> int:
        """All numbers, as peft counts them: the base, what is trained, and the untrained head peft keeps beside the trained one."""
        return base.parameters_count() + self.trainable + (self.classes * base.width if self.head_in_peft else 0)

    # ---------------------------------------------------------------- peft's format

    @abstractmethod
    def peft_config(self, n: int) -> dict[str, Any]:
        """The method's own fields of adapter_config.json."""

    @abstractmethod
    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        """adapter_model.safetensors without the head: peft's names and shapes."""

    @abstractmethod
    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `peft_tensors`. Raises AdapterError listing every missing, unexpected or misshapen tensor."""

    head_in_peft: bool = True
    """peft's file has a place for the head (`modules_to_save`)."""

    # ---------------------------------------------------------------- merging

    def merge(self, n: int, site: str, w_OI: Tensor) -> Tensor:
        """`w_OI` (float32) with adapter n folded in; only for methods that say `merges`."""
        raise AssertionError(f"{type(self).__name__} has no weights to merge into")

    def merge_bias(self, n: int, site: str, bias_O: Tensor) -> Tensor:
        """A site's bias with adapter n folded in; only (IA)³ scales it."""
        return bias_O


# -------------------------------------------------------------------- initial values


def generator(seed: int, name: str) -> torch.Generator:
    """A trial's own generator for one tensor: companions and other tensors never change its draws."""
    from katei.base.packed import place_number

    return torch.Generator().manual_seed((seed * 1_000_003 + place_number(name)) % 2**63)


def normal(shape: tuple[int, ...], std: float = 1.0) -> Callable[[torch.Generator], Tensor]:
    return lambda rng: torch.randn(shape, generator=rng) * std


def uniform(shape: tuple[int, ...], bound: float) -> Callable[[torch.Generator], Tensor]:
    return lambda rng: (torch.rand(shape, generator=rng) * 2 - 1) * bound


def constant(shape: tuple[int, ...], value: float) -> Callable[[torch.Generator], Tensor]:
    return lambda rng: torch.full(shape, value)


def fill_(
    tensors: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[Tensor, Callable[[Tensor], Tensor]]],
) -> None:
    """Copy each given tensor into its place, after checking all of them.

    `wanted` maps a file's name to (destination, reshape). Raises AdapterError with every mismatch at once.
    """
    problems = [f"missing {name}" for name in wanted if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in wanted]
    values = {}
    for name, (place, shaped) in wanted.items():
        if name not in given:
            continue
        try:
            value = shaped(given[name])
        except (RuntimeError, IndexError):
            value = given[name]
        if value.shape != place.shape:
            problems.append(f"{name} has shape {tuple(given[name].shape)}, which does not fit {tuple(place.shape)}")
        values[name] = value
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise AdapterError(
            f"the adapter file does not fit this base and method: {listed}", hint="was it trained on another base?"
        )
    with torch.no_grad():
        for name, (place, _) in wanted.items():
            place.copy_(values[name])


def same(x: Tensor) -> Tensor:
    return x


def transposed(x: Tensor) -> Tensor:
    return x.T


# -------------------------------------------------------------------- reading peft's configs


def plain(config: Mapping[str, Any], **expected: object) -> None:
    """Raise AdapterError for a peft option katei does not implement, unless it is at the value that turns it off."""
    for name, off in expected.items():
        value = config.get(name, off)
        if value != off and value not in (None, [], {}):
            raise AdapterError(
                f"the adapter was made with {name} = {value!r}, which katei does not implement",
                hint=f"{name} = {off!r} works",
            )


def target_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise AdapterError(
            f"target_modules is {targets!r}", hint="katei reads a list of module names, such as ['q_proj', 'v_proj']"
        )
    return tuple(sorted({str(t).rsplit(".", 1)[-1] for t in targets}))


def merged_weights(base: Base, stack: Stack) -> dict[str, Tensor]:
    """The backbone's weights with adapter 0 folded in, float32, by their names below the backbone."""
    assert base.dtype == torch.float32, "a merge is computed in float32"
    weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in base.model.named_parameters()}
    for site in base.sites:
        weights[f"{site}.weight"] = stack.merge(0, site, weights[f"{site}.weight"])
        if f"{site}.bias" in weights:
            weights[f"{site}.bias"] = stack.merge_bias(0, site, weights[f"{site}.bias"])
    return weights
