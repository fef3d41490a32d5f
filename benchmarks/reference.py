"""What people use: peft + transformers.Trainer, one method after another. The other side of every benchmark.

The same base folder, rows, order, initial values, learning rate, weight decay, schedule and clipping as katei's trial, so that
both sides' losses can be compared before anything is timed. Where peft is wrong it is put right by hand, as a careful user
would: LLaMA-Adapter's head is un-frozen, AdaLoRA's `update_and_allocate` is called after each step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from tests.helpers.peft_reference import peft_model, sequence_classifier
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from katei.engine.lockstep import Tokens, Trial
from katei.methods.contract import Stack

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
    test_probabilities: NDArray[np.float64] | None = None


def train(
    backbone: PreTrainedModel,
    trial: Trial,
    stack: Stack,
    n: int,
    train_tokens: Tokens,
    valid: Tokens | None,
    test: Tokens | None,
) -> Reference:
    """Train a peft model that begins as adapter n does."""
    classifier = sequence_classifier(backbone, stack.classes, attention="sdpa")
    return fit(peft_model(classifier, stack, n, trial.method, trial.total_steps), trial, train_tokens, valid, test)


def fit(model: Any, trial: Trial, train_tokens: Tokens, valid: Tokens | None, test: Tokens | None) -> Reference:
    """Train with Trainer as its documentation says: loss, accuracy and ROC AUC each epoch, nothing saved or reported."""
    t = trial.training
    losses: list[float] = []

    def note(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        labels = prediction.label_ids
        losses.append(cross_entropy(logits, labels))
        scores = {"accuracy": float((logits.argmax(1) == labels).mean())}
        if len(set(labels.tolist())) == 2:
            scores["roc_auc"] = float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
        return scores

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=t.epochs,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        learning_rate=t.learning_rate,
        weight_decay=t.weight_decay,
        max_grad_norm=t.clip_norm,
        adam_beta1=t.beta1,
        adam_beta2=t.beta2,
        adam_epsilon=t.epsilon,
        lr_scheduler_type="linear",
        eval_strategy="epoch" if valid is not None else "no",
        save_strategy="no",
        logging_strategy="epoch",
        report_to=[],
        use_cpu=next(model.parameters()).device.type == "cpu",
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
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    probabilities = None
    if test is not None:
        logits = trainer.predict(Rows(test)).predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), 1).numpy()
        losses.pop()
    return Reference(time.perf_counter() - started, losses, probabilities)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded to the longest row of the batch, with a mask, as DataCollatorWithPadding does."""
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
