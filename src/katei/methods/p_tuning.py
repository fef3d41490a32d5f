"""P-tuning: virtual tokens written by a small trained network. Liu et al. 2021, https://arxiv.org/abs/2103.10385, section 3.

    p = mlp(e)                    e: (P, D); mlp: three linear layers with ReLU between, width `hidden`
    p = mlp(bilstm(e))            mlp: two linear layers on the 2 · hidden outputs of a bidirectional LSTM

At the embed place, like prompt tuning. Layers and starting values are those of peft's `tuners/p_tuning/model.py`
(`PromptEncoder`; e from N(0, 1), weights as torch.nn initialises them). After training only p is needed: peft's file
holds p alone, and so does ours, so what is loaded again acts as prompt tuning.
Trainable numbers, MLP: P·D + D·h + h·h + h·D + 2h + D; LSTM of ℓ layers (first input D, then 2h, two directions):
P·D + Σ 2·4h·(input + h + 2) + 4h² + 2h·D + 2h + D; and the head.

Dimensions: N adapters · P virtual tokens · D width · J hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from katei.base.packed import Base
from katei.core.errors import RecipeError
from katei.methods.contract import Method, Stack, TensorSpec, TrialFacts, normal, uniform
from katei.methods.prompt_tuning import PromptTuning, check_length, peft_dims


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    name: ClassVar[str] = "p-tuning"
    peft_type: ClassVar[str | None] = "P_TUNING"
    learning_rate: ClassVar[float] = 3e-3
    merges: ClassVar[bool] = False
    search: ClassVar[Mapping[str, tuple[float | str, ...]]] = {"virtual_tokens": (5, 10, 20)}

    virtual_tokens: int = 10
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int | None = None
    """Width of the encoder; None is the base's width, peft's default."""
    lstm_layers: int = 2

    def __post_init__(self) -> None:
        check_length("virtual_tokens", self.virtual_tokens)
        if self.encoder not in ("mlp", "lstm"):
            raise RecipeError(f"encoder is '{self.encoder}'", hint="one of: mlp, lstm")
        if self.hidden is not None and self.hidden < 1:
            raise RecipeError(f"hidden is {self.hidden}, but it is the encoder's width", hint="hidden = 128")
        if not 1 <= self.lstm_layers <= 8:
            raise RecipeError(f"lstm_layers is {self.lstm_layers}", hint="lstm_layers = 2")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> PTuning:
        encoder = str(config["encoder_reparameterization_type"]).lower()
        return cls(
            virtual_tokens=config["num_virtual_tokens"],
            encoder="lstm" if encoder == "lstm" else "mlp",
            hidden=config["encoder_hidden_size"],
        )

    def saved_as(self) -> PromptTuning:
        return PromptTuning(virtual_tokens=self.virtual_tokens)

    def build(self, base: Base, classes: int, seeds: Sequence[int], facts: Sequence[TrialFacts]) -> PTuningStack:
        return PTuningStack(self, base, classes, seeds)


class PTuningStack(Stack):
    def __init__(self, method: PTuning, base: Base, classes: int, seeds: Sequence[int]):
        self.method = method
        hidden = method.hidden or base.width
        lstm = method.encoder == "lstm"
        specs = {
            "embedding_PD": TensorSpec((method.virtual_tokens, base.width), normal((method.virtual_tokens, base.width)))
        }
        self.lstm_names: list[str] = []
        if lstm:
            for layer in range(method.lstm_layers):
                for direction in ("", "_reverse"):
                    inputs = base.width if layer == 0 else 2 * hidden
                    shapes = {
                        "weight_ih": (4 * hidden, inputs),
                        "weight_hh": (4 * hidden, hidden),
                        "bias_ih": (4 * hidden,),
                        "bias_hh": (4 * hidden,),
                    }
                    for kind, shape in shapes.items():
                        name = f"lstm.{kind}_l{layer}{direction}"
                        specs[name] = TensorSpec(shape, uniform(shape, hidden**-0.5), decay=not kind.startswith("bias"))
                        self.lstm_names.append(name)
            widths = [2 * hidden, 2 * hidden, base.width]
        else:
            widths = [base.width, hidden, hidden, base.width]
        self.mlp_layers = len(widths) - 1
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            specs[f"mlp{layer}.w_OI"] = TensorSpec((outputs, inputs), uniform((outputs, inputs), inputs**-0.5))
            specs[f"mlp{layer}.b_O"] = TensorSpec((outputs,), uniform((outputs,), inputs**-0.5), decay=False)
        super().__init__(base, classes, seeds, specs)
        self.virtual_tokens = method.virtual_tokens
        self.peft_dims = peft_dims(base, base.heads, base.width)
        self.lstm = None
        if lstm:  # shapes alone; its weights are ours, handed over at each call
            self.lstm = torch.nn.LSTM(
                base.width, hidden, method.lstm_layers, bidirectional=True, batch_first=True, device="meta"
            )

    def embed(self) -> Tensor:
        x_NPJ = self.tensors["embedding_PD"]
        if self.lstm is not None:
            rows = []
            for n in range(self.adapters):
                weights = {name.removeprefix("lstm."): self.tensors[name][n] for name in self.lstm_names}
                rows.append(torch.func.functional_call(self.lstm, weights, (x_NPJ[n],))[0])
            x_NPJ = torch.stack(rows)
        for layer in range(self.mlp_layers):
            x_NPJ = torch.baddbmm(
                self.tensors[f"mlp{layer}.b_O"][:, None], x_NPJ, self.tensors[f"mlp{layer}.w_OI"].transpose(1, 2)
            )
            if layer < self.mlp_layers - 1:
                x_NPJ = torch.relu(x_NPJ)
        return x_NPJ

    def peft_config(self, n: int) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.method.virtual_tokens,
            "encoder_reparameterization_type": self.method.encoder.upper(),
            "encoder_hidden_size": self.method.hidden or self.peft_dims["token_dim"],
            "encoder_num_layers": self.method.lstm_layers,
            **self.peft_dims,
        }

    def peft_tensors(self, n: int) -> dict[str, Tensor]:
        # alone: the last bits of a batched product go by how many are in it
        with torch.no_grad(), self.narrowed(n, n + 1):
            return {"prompt_embeddings": self.embed()[0].clone()}

    def load_peft_(self, n: int, tensors: Mapping[str, Tensor]) -> None:
        raise AssertionError("a saved P-tuning adapter is its vectors alone: `saved_as` reads them as prompt tuning")
