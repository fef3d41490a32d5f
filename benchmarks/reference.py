"""What people use: peft + transformers.Trainer, one method after another. The other side of every benchmark.

The same base folder, rows, order, initial values, learning rate, weight decay, schedule and clipping as katei's trial, so that
both sides' losses can be compared before anything is timed. Where peft is wrong it is put right by hand, as a careful user
would: LLaMA-Adapter's head is un-frozen, AdaLoRA's `update_and_allocate` is called after each step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.utils.data import Dataset, Sampler
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from katei.engine.lockstep import Tokens, Trial
from katei.methods.contract import HEAD, Stack

logging.set_verbosity_error()
logging.disable_progress_bar()


class Rows(Dataset[dict[str, Any]]):
    def __init__(self, tokens: Tokens):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": list(self.tokens.ids[i]), "labels": self.tokens.labels[i]}


class Order(Sampler[int]):
    """Katei's own order of each epoch."""

    def __init__(self, trial: Trial):
        self.trial, self.epoch = trial, 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(self.trial.order(self.epoch - 1))

    def __len__(self) -> int:
        return len(self.trial.rows)


class OrderedTrainer(Trainer):
    order: Order

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Order:
        return self.order


class Allocate(TrainerCallback):
    """AdaLoRA's pruning, which Trainer does not do by itself."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


@dataclass
class Reference:
    """One run. `valid_losses` are cross-entropies of the predictions after each epoch; seconds leave loading out."""

    seconds: float
    valid_losses: list[float] = field(default_factory=list)
    test_logits: np.ndarray | None = None
    peak_bytes: int | None = None


def peft_config(trial: Trial) -> Any:
    m: Any = trial.method
    kind = {"task_type": "SEQ_CLS"}
    match m.name:
        case "lora":
            return LoraConfig(
                **kind, r=m.rank, lora_alpha=m.alpha, target_modules=list(m.targets), lora_dropout=m.dropout
            )
        case "adalora":
            return AdaLoraConfig(
                **kind,
                init_r=m.rank,
                target_r=m.target_rank,
                lora_alpha=m.alpha,
                target_modules=list(m.targets),
                total_step=trial.total_steps,
                tinit=int(m.warmup * trial.total_steps),
                tfinal=int(m.final * trial.total_steps),
                deltaT=m.interval,
            )
        case "prompt-tuning":
            return PromptTuningConfig(**kind, num_virtual_tokens=m.virtual_tokens)
        case "p-tuning":
            return PromptEncoderConfig(
                **kind,
                num_virtual_tokens=m.virtual_tokens,
                encoder_reparameterization_type="MLP",
                encoder_hidden_size=m.hidden,
            )
        case "ia3":
            return IA3Config(**kind)
        case "llama-adapter":
            return AdaptionPromptConfig(**kind, adapter_layers=m.layers, adapter_len=m.length)
    raise ValueError(m.name)


def build(folder: Path, trial: Trial, stack: Stack, n: int) -> Any:
    """The peft model with katei's initial values copied in."""
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=stack.classes, dtype=torch.float32)
    base.config.pad_token_id = base.config.pad_token_id or base.config.eos_token_id or 0
    model = get_peft_model(base, peft_config(trial))
    values = {name: tensor[n].detach() for name, tensor in stack.tensors.items()}
    ours: Mapping[str, torch.Tensor]
    if trial.method.name == "p-tuning":
        ours = {"embedding.weight": values["embedding_PD"]}
        for layer in range(3):
            ours |= {
                f"mlp_head.{2 * layer}.weight": values[f"mlp{layer}.w_OI"],
                f"mlp_head.{2 * layer}.bias": values[f"mlp{layer}.b_O"],
            }
    elif trial.method.name == "prompt-tuning":
        ours = {"embedding.weight": values["prompt_PD"]}
    else:
        ours = stack.peft_tensors(n)
    copied = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = name.replace(".default", "").replace(".modules_to_save", "")
            for key, value in ours.items():
                if plain.endswith(key):
                    parameter.copy_(value.reshape(parameter.shape))
                    copied.add(key)
            if plain.endswith("score.weight"):
                parameter.copy_(values[HEAD])
                if trial.method.name == "llama-adapter":
                    parameter.requires_grad_(True)
    assert copied == set(ours), f"not copied: {sorted(set(ours) - copied)[:3]}"
    return model


def train(
    folder: Path,
    trial: Trial,
    stack: Stack,
    n: int,
    train_tokens: Tokens,
    valid: Tokens | None,
    test: Tokens | None,
    *,
    epochs: int | None = None,
) -> Reference:
    """Train with Trainer as its documentation says: evaluation each epoch, nothing saved, nothing reported."""
    model = build(folder, trial, stack, n)
    t = trial.training
    losses: list[float] = []

    def note(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        losses.append(cross_entropy(logits, prediction.label_ids))
        return {"accuracy": float((logits.argmax(1) == prediction.label_ids).mean())}

    arguments = TrainingArguments(
        output_dir="/tmp/katei-reference",
        num_train_epochs=t.epochs,
        max_steps=-1 if epochs is None else epochs * trial.steps_per_epoch,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        learning_rate=t.learning_rate,
        weight_decay=t.weight_decay,
        max_grad_norm=t.clip_norm,
        lr_scheduler_type="linear",
        eval_strategy="epoch" if valid is not None else "no",
        save_strategy="no",
        logging_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = OrderedTrainer(
        model=model,
        args=arguments,
        train_dataset=Rows(train_tokens),
        eval_dataset=None if valid is None else Rows(valid),
        compute_metrics=note,
        data_collator=collate,
        callbacks=[Allocate()] if trial.method.name == "adalora" else [],
    )
    trainer.order = Order(trial)
    started = time.perf_counter()
    trainer.train()
    logits = None
    if test is not None:
        logits = trainer.predict(Rows(test)).predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        losses.pop()
    return Reference(time.perf_counter() - started, losses, logits)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded, with a mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    log_p = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 1)
    return float(-log_p[torch.arange(len(labels)), torch.tensor(labels)].mean())
