"""Step by step against peft + torch's AdamW + the Trainer's schedule, where peft is right; and where it is wrong, that we are not.

The exact reference is peft in float64; our error may be at most twice that of peft in float32 (STYLE section 3).
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaModel, Trainer, TrainingArguments, get_linear_schedule_with_warmup

from katei.base import ops
from katei.base.packed import Base
from katei.base.stream import PackedRow
from katei.engine.lockstep import Lockstep, Trial
from katei.engine.optimizer import Training
from katei.methods import BOOK
from katei.methods.adalora import AdaLoRAStack, Budget
from katei.methods.contract import HEAD, Method, Stack, TrialFacts
from katei.study.recipe import load_recipe
from tests.helpers.models import perturb_, random_tokens, settings, tiny_model
from tests.helpers.peft_reference import pairs, peft_config, peft_model, sequence_classifier

warnings.filterwarnings("ignore")

TOKENS = random_tokens(12, shortest=3)
STEPS = 12

CASES: list[tuple[str, str, Method, int]] = [
    ("llama", "lora", settings("lora"), 1),
    ("llama", "lora in batches", settings("lora"), 4),
    ("llama", "rslora on all", settings("lora", rslora=True, targets=("q_proj", "k_proj", "o_proj", "down_proj")), 4),
    ("qwen2", "lora", settings("lora"), 4),
    ("gemma3", "lora", settings("lora"), 1),
    ("llama", "adalora", settings("adalora", warmup=0.2, final=0.2), 1),
    ("llama", "adalora by default", settings("adalora"), 4),
    ("llama", "ia3", settings("ia3"), 1),
    ("qwen2", "ia3", settings("ia3"), 4),
    ("gemma3", "ia3", settings("ia3"), 1),
    ("llama", "prompt tuning", settings("prompt-tuning"), 1),
    ("llama", "p-tuning", settings("p-tuning"), 1),
    ("llama", "p-tuning, lstm", settings("p-tuning", encoder="lstm"), 1),
    ("gemma3", "prompt tuning", settings("prompt-tuning"), 1),
    ("qwen3", "p-tuning", settings("p-tuning"), 1),
    ("llama", "prefix tuning", settings("prefix-tuning"), 1),
    ("llama", "prefix tuning in batches", settings("prefix-tuning"), 4),
    ("gemma2", "prefix tuning", settings("prefix-tuning"), 1),
    ("llama", "llama-adapter", settings("llama-adapter"), 1),
    ("llama", "llama-adapter in batches", settings("llama-adapter"), 4),
    ("mistral", "llama-adapter", settings("llama-adapter"), 1),
]


def started(architecture: str, method: Method, batch_size: int) -> tuple[Any, Lockstep]:
    """Our engine at a perturbed start, and the backbone it runs on."""
    backbone = tiny_model(architecture)
    training = Training(
        learning_rate=3e-3, epochs=STEPS * batch_size // 12, batch_size=batch_size, weight_decay=0.3, warmup=0.2
    )
    engine = Lockstep.on_split(
        Base(copy.deepcopy(backbone)), [Trial("t", method, 0, training, tuple(range(12)))], 3, TOKENS, None
    )
    perturb_(engine.stacks[0], size=0.05)
    return backbone, engine


def theirs(backbone: Any, engine: Lockstep, dtype: torch.dtype) -> tuple[list[float], Any]:
    """The losses of each step, and the model after the last, as a plain loop over peft gives them."""
    trial = engine.states[0].trial
    model = peft_model(sequence_classifier(backbone, 3), engine.stacks[0], 0, trial.method, trial.total_steps).to(dtype)
    return plain_loop(model, trial), model


def plain_loop(model: Any, trial: Trial) -> list[float]:
    t = trial.training
    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": t.weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=t.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, -(-trial.total_steps // 5), trial.total_steps)
    losses = []
    for step in range(trial.total_steps):
        epoch, place = divmod(step, trial.steps_per_epoch)
        rows = trial.order(epoch)[place * t.batch_size : (place + 1) * t.batch_size]
        longest = max(len(TOKENS.ids[i]) for i in rows)
        ids = torch.tensor([[*TOKENS.ids[i], *[0] * (longest - len(TOKENS.ids[i]))] for i in rows])
        labels = torch.tensor([TOKENS.labels[i] for i in rows])
        out = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
        losses.append(float(F.cross_entropy(out.logits, labels).detach()))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], t.clip_norm)
        optimizer.step()
        schedule.step()
        if trial.method.name == "adalora":
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    return losses


def ours(engine: Lockstep) -> list[float]:
    losses = []
    state = engine.states[0]
    while state.finished is None:
        before = float(state.nats)
        rows = len(state.batch())
        ended = engine.tick()
        total = state.epochs[-1].train_loss * 12 if ended else float(state.nats)
        losses.append((total - before) / rows)
    return losses


@pytest.mark.parametrize(
    ("architecture", "name", "method", "batch_size"), CASES, ids=[f"{a}: {n}" for a, n, *_ in CASES]
)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_losses_and_updates_are_pefts(architecture: str, name: str, method: Method, batch_size: int, kind: str) -> None:
    """In the way of each kind of device, on this one."""
    backbone, engine = started(architecture, method, batch_size)
    exact_losses, exact = theirs(backbone, engine, torch.float64)
    peft_losses, peft = theirs(backbone, engine, torch.float32)
    with ops.planned(kind):
        our_losses = ours(engine)
    assert len(our_losses) == STEPS
    as_good_as(torch.tensor(our_losses), torch.tensor(peft_losses), torch.tensor(exact_losses))
    exact_values = torch.cat([p.detach().flatten() for p, _ in pairs(exact, engine.stacks[0], 0)])
    peft_values = torch.cat([p.detach().flatten() for p, _ in pairs(peft, engine.stacks[0], 0)])
    our_values = torch.cat([q.flatten() for _, q in pairs(exact, engine.stacks[0], 0)])
    as_good_as(our_values, peft_values, exact_values)


def as_good_as(mine: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor) -> None:
    """Our root-mean-square error against float64 is at most twice the reference's, beyond one rounding of float32."""
    scale = exact.double().square().mean().sqrt()
    error, allowed = ((x.double() - exact.double()).square().mean().sqrt() / scale for x in (mine, reference))
    assert error <= 2 * allowed + 2e-7, f"error {error:.2e}, the reference has {allowed:.2e}"


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_adalora_prunes_the_triplets_that_peft_prunes(warmup: float) -> None:
    method = settings("adalora", warmup=warmup, final=0.2)
    backbone, engine = started("llama", method, 1)
    stack = engine.stacks[0]
    assert isinstance(stack, AdaLoRAStack)
    _, model = theirs(backbone, engine, torch.float32)
    ours(engine)
    kept = {
        name.removesuffix(".lora_E"): (tensor != 0).flatten().tolist()
        for name, tensor in stack.peft_tensors(0).items()
        if name.endswith("lora_E")
    }
    peft_kept = {
        name.split("base_model.model.model.")[1].split(".lora_E")[0]: (p != 0).flatten().tolist()
        for name, p in model.named_parameters()
        if "lora_E" in name
    }
    assert kept == peft_kept
    assert sum(map(sum, kept.values())) == 2 * 8  # the target


@pytest.mark.parametrize(("architecture", "batch_size"), [("llama", 1), ("qwen2", 4), ("gemma3", 1)])
def test_full_fine_tuning_is_the_plain_librarys(architecture: str, batch_size: int) -> None:
    backbone, engine = started(architecture, settings("full"), batch_size)
    models = {}
    for dtype in (torch.float64, torch.float32):
        model = sequence_classifier(backbone, 3)
        with torch.no_grad():
            model.score.weight.copy_(engine.stacks[0].tensors[HEAD][0])
        models[dtype] = model.to(dtype).requires_grad_(True)
    exact_losses, their_losses = (torch.tensor(plain_loop(m, engine.states[0].trial)) for m in models.values())
    as_good_as(torch.tensor(ours(engine)), their_losses, exact_losses)
    mine = {f"model.{name}": tensor for name, tensor in engine.stacks[0].peft_tensors(0).items()}
    mine["score.weight"] = engine.stacks[0].tensors[HEAD][0].detach()
    exact, reference = (dict(m.named_parameters()) for m in models.values())
    assert set(mine) == set(exact)
    flat = [torch.cat([v[name].detach().flatten() for name in sorted(mine)]) for v in (mine, reference, exact)]
    as_good_as(*flat)


class InOrder(Trainer):
    """The Trainer, with the data set's own order, and each step's loss kept."""

    losses: list[float]

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss


@pytest.mark.parametrize("weight_decay", [0.3, 1.0])
def test_the_trainer_itself_gives_these_losses(weight_decay: float, tmp_path: Path) -> None:
    """peft under transformers.Trainer, with nothing rebuilt by hand: order, decay groups, schedule and clipping are its own."""
    backbone, engine = started("llama", settings("lora"), 1)
    trial = engine.states[0].trial
    training = replace(trial.training, weight_decay=weight_decay, warmup=0.0)
    engine = Lockstep.on_split(engine.base, [replace(trial, training=training)], 3, TOKENS, None)
    perturb_(engine.stacks[0], size=0.05)
    state = engine.states[0]
    model = peft_model(sequence_classifier(backbone, 3), engine.stacks[0], 0, trial.method, trial.total_steps)
    rows = [{"input_ids": TOKENS.ids[i], "labels": TOKENS.labels[i]} for i in state.trial.order(0)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=training.learning_rate,
        weight_decay=weight_decay,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )

    def one_row(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([rows[0]["input_ids"]]), "labels": torch.tensor([rows[0]["labels"]])}

    trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=one_row)  # type: ignore[arg-type]
    trainer.train()
    assert ours(engine) == pytest.approx(trainer.losses, rel=2e-5)
    assert len(trainer.losses) == STEPS
    for theirs_p, ours_p in pairs(model, engine.stacks[0], 0):
        torch.testing.assert_close(ours_p.reshape(theirs_p.shape), theirs_p.detach(), rtol=1e-4, atol=2e-5)


def scores_of(base: Base, stack: Stack, rows: list[int]) -> torch.Tensor:
    stream = base.stream([PackedRow(0, 0, TOKENS.ids[i]) for i in rows], [stack])
    with torch.no_grad(), base.running(stream, [stack]):
        return stream.unsort(stack.scores(base.pooled(stream, [stack]), stream.parts[0]))


@pytest.mark.parametrize("name", ["prompt-tuning", "p-tuning"])
def test_in_batches_peft_scores_a_pad_token_and_we_do_not(name: str) -> None:
    backbone, method = tiny_model(), settings(name)
    base = Base(copy.deepcopy(backbone))
    stack = method.build(base, 3, [0], [TrialFacts(10)])
    perturb_(stack)
    model = peft_model(sequence_classifier(backbone, 3), stack, 0, method, 10).eval()
    rows = [0, 1, 2]
    longest = max(len(TOKENS.ids[i]) for i in rows)
    ids = torch.tensor([[*TOKENS.ids[i], *[0] * (longest - len(TOKENS.ids[i]))] for i in rows])
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([TOKENS.ids[i]])).logits for i in rows])
        batched = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(scores_of(base, stack, rows), alone, rtol=1e-4, atol=1e-4)
    assert (batched - alone).abs().max() > 0.1, "peft has been mended: say so in docs/methods.md"


def test_pefts_llama_adapter_leaves_its_head_at_random() -> None:
    from peft import get_peft_model

    model = get_peft_model(sequence_classifier(tiny_model(), 3), peft_config(settings("llama-adapter"), 10))
    assert not any("score" in name for name, p in model.named_parameters() if p.requires_grad)


def test_adaloras_budget_is_pefts() -> None:
    from peft.tuners.adalora.layer import RankAllocator

    for first, final, interval in ((0, 0, 1), (5, 7, 1), (5, 7, 3), (0, 10, 4)):
        config = peft_config(settings("adalora"), 50)
        config.tinit, config.tfinal, config.deltaT = first, final, interval
        allocator = object.__new__(RankAllocator)
        allocator.peft_config, allocator.init_bgt, allocator.target_bgt = config, 96, 40
        budget = Budget(96, 40, first, 50 - final, interval)
        for step in range(1, 51):
            expected, masks = allocator.budget_schedule(step)
            if step == 50 - final:  # peft forces the mask here
                assert budget.at(step) == int(expected)
            elif step < 50 - final:
                assert budget.at(step) == (int(expected) if masks else None), step
            else:
                assert budget.at(step) is None


def test_adalora_under_a_loop_that_forgets_never_prunes_and_ours_cannot_forget() -> None:
    backbone, engine = started("llama", settings("adalora"), 1)
    ours(engine)
    stack = engine.stacks[0]
    assert isinstance(stack, AdaLoRAStack)
    assert sum(stack.ranks(0).values()) == 2 * 8
    model = peft_model(sequence_classifier(backbone, 3), stack, 0, settings("adalora"), 10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for i in range(10):
        model(input_ids=torch.tensor([TOKENS.ids[i]]), labels=torch.tensor([TOKENS.labels[i]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    left = sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)
    assert left == 4 * 8, "peft has been mended: say so in docs/methods.md"


def book_shape() -> Any:
    config = LlamaConfig(
        vocab_size=99584,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        intermediate_size=7168,
        num_labels=2,
        pad_token_id=4,
    )
    with torch.device("meta"):
        return LlamaModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("name", BOOK)
def test_the_books_counts(name: str) -> None:
    """The recipe's trainable and total numbers for llm-jp-3-1.8b's shape, without its weights, are those peft prints."""
    from peft import get_peft_model

    recipe = load_recipe("recipes/book.toml", {})
    method, training = recipe.resolved(name)
    base = Base(book_shape())
    stack = method.build(base, 2, [0], [TrialFacts(162 * training.epochs)])
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(base.config)
        trainable, total = get_peft_model(model, peft_config(method, 1620)).get_nb_trainable_parameters()
    if name == "llama-adapter":  # peft leaves the head out of what it trains
        trainable += 2 * 2048
    assert stack.trainable == trainable
    assert stack.total(base) == total
    if name == "lora":
        assert (stack.trainable, total) == (200_704, 1_663_870_976)
