"""Plain `transformers` folders: a fine-tuned model, or an adapter merged into its base.

    merged W = base W with the adapter folded in, computed in float32        then the same rows through both, compared

Dimensions: C classes · D width · O outputs · I inputs · E rows · V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from katei.base.packed import Base
from katei.base.quiet import forget_how_loaded, quiet
from katei.base.stream import PackedRow
from katei.core.errors import AdapterError, CannotMerge
from katei.core.files import folder_atomic, write_json, write_text
from katei.engine.lockstep import score_rows
from katei.methods.contract import HEAD, Stack, merged_weights
from katei.methods.saved import AdapterNote, SavedAdapter
from katei.ship.card import model_card, run_of

KINDS = ("sequence-classification", "causal-lm")
"""What a merged model may be: with the adapter's head, or with the base's own language-model head."""

LARGEST_CHANGE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}
"""A model that was merged or written in another format may move a probability by this much; beyond it it is refused."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Agreement:
    """How a merged model answers beside its adapter, on the same rows."""

    rows: int
    labels: float
    """Share of rows with the same label."""
    max_probability_change: float
    mean_probability_change: float


def save_full(folder: Path, base: Base, stack: Stack, note: AdapterNote) -> None:
    """Write a fully fine-tuned base with its head as an `AutoModelForSequenceClassification` folder."""
    weights = {name: parameter.detach() for name, parameter in base.model.named_parameters()}
    _save_classifier(folder, base, weights, stack.tensors[HEAD][0].detach(), note)


def merged_kind(saved: SavedAdapter, kind: str | None) -> str:
    """What to merge into: what the adapter was trained for, unless the user says. Raises AdapterError."""
    kind = kind or ("causal-lm" if saved.generates else KINDS[0])
    if kind not in KINDS:
        raise AdapterError(f"cannot merge into '{kind}'", hint=f"--as {' or --as '.join(KINDS)}")
    if saved.generates and kind != "causal-lm":
        raise AdapterError(
            "was trained for generation, so there is no head for a classifier", file=saved.folder, hint="--as causal-lm"
        )
    return kind


def check_mergeable(saved: SavedAdapter, out: Path, precision: str = "fp32") -> None:
    """Raise, before any base is loaded, for a method without weights to merge into or a folder that is taken."""
    if not saved.method.merges:
        raise CannotMerge(
            f"{saved.method.name} has no weights to merge into: it changes what the layers read, not what they are",
            file=saved.folder,
            hint="`katei predict` uses it as it is, and `katei export RUN --format peft` keeps it beside the base for others; "
            "LoRA, AdaLoRA and (IA)³ merge",
        )
    if precision not in DTYPES:
        raise AdapterError(f"no precision '{precision}'", hint=f"--precision {', '.join(DTYPES)}")
    check_free(out)


def check_free(out: Path) -> None:
    if out.exists():
        raise AdapterError("already exists", file=out, hint="--out a new folder")


def merge_adapter(
    saved: SavedAdapter,
    base: Base,
    out: Path,
    rows: Sequence[Sequence[int]],
    say: Callable[[str], None],
    *,
    causal_lm: Any = None,
    precision: str = "fp32",
) -> Agreement:
    """Fold an adapter into its base's weights, write the plain model to `out`, and compare both on `rows` of token ids.

    With `causal_lm`, the model `base` is the backbone of, the result is an `AutoModelForCausalLM` and the adapter's head is left
    out; else an `AutoModelForSequenceClassification`. The weights are rounded once, at the end, to `precision`.
    Raises CannotMerge for a method without weights to merge into, and AdapterError (nothing is left at `out`) where the merged
    model moves a probability by more than `LARGEST_CHANGE`.
    """
    check_mergeable(saved, out, precision)
    stack = saved.stack(base)
    weights, dtype = merged_weights(base, stack), DTYPES[precision]
    if causal_lm is None:
        before = score_rows(base, [stack], [(0, 0, ids) for ids in rows], token_budget=1024)
    else:
        before = next_token_probabilities(base, stack, causal_lm.get_output_embeddings(), rows)
    with folder_atomic(out) as folder:
        if causal_lm is None:
            _save_classifier(folder, base, weights, stack.tensors[HEAD][0].detach(), saved.note, dtype)
        else:
            _save_causal_lm(folder, base, weights, causal_lm, saved.note, dtype)
        say(f"comparing {len(rows)} rows")
        agreement = compared(before, _plain_probabilities(folder, rows, causal_lm is not None))
        refuse_if_moved(agreement, precision, saved)
        write_json(folder / "agreement.json", asdict(agreement))
        kind = KINDS[0] if causal_lm is None else KINDS[1]
        card = model_card(saved.note, kind, asdict(agreement), run_of(saved.folder), precision)
        write_text(folder / "README.md", card)
    return agreement


def refuse_if_moved(agreement: Agreement, precision: str, saved: SavedAdapter) -> None:
    """Raise AdapterError where a model in another form answers otherwise than its adapter."""
    if not agreement.max_probability_change <= LARGEST_CHANGE[precision]:  # "not <=" refuses NaN too
        raise AdapterError(
            f"the merged model moves a probability by {agreement.max_probability_change:.2g}, "
            f"more than {LARGEST_CHANGE[precision]:g}; nothing was written",
            file=saved.folder,
            hint=("--precision fp32, or " if precision != "fp32" else "")
            + "use the adapter beside its base: `katei predict`, or `katei export --format peft`",
        )


def next_token_probabilities(
    base: Base, stack: Stack, lm_head: Any, rows: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """What the adapter beside its base expects after each row, (rows, V)."""
    out = []
    for ids in rows:
        stream = base.stream([PackedRow(0, 0, ids)], [stack])
        with torch.no_grad(), base.running(stream, [stack]):
            scores_1V = capped(base.config, lm_head(base.pooled(stream, [stack])).float())
        out.append(torch.softmax(scores_1V[0].double(), 0).cpu().numpy())
    return np.stack(out)


def capped(config: Any, scores: Tensor) -> Tensor:
    """A language-model head's scores as the model means them: Gemma 2 bounds them."""
    softcap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def _save_classifier(
    folder: Path,
    base: Base,
    weights: Mapping[str, Tensor],
    head_CD: Tensor,
    note: AdapterNote,
    dtype: torch.dtype = torch.float32,
) -> None:
    config, tokenizer = _config_and_tokenizer(base)
    config.num_labels = len(note.labels)
    config.id2label = dict(enumerate(note.labels))
    config.label2id = {label: i for i, label in enumerate(note.labels)}
    _save(folder, AutoModelForSequenceClassification, config, weights, {"score.weight": head_CD}, dtype)
    _save_tokenizer(folder, tokenizer, note)


def _save_causal_lm(
    folder: Path, base: Base, weights: Mapping[str, Tensor], causal_lm: Any, note: AdapterNote, dtype: torch.dtype
) -> None:
    config, tokenizer = _config_and_tokenizer(base)
    output = causal_lm.get_output_embeddings().weight.detach()
    more = {} if config.tie_word_embeddings else {"lm_head.weight": output}
    _save(folder, AutoModelForCausalLM, config, weights, more, dtype, causal_lm.generation_config)
    _save_tokenizer(folder, tokenizer, note)


def _config_and_tokenizer(base: Base) -> tuple[Any, Any]:
    config = plain_config(base.config)
    tokenizer = copy.deepcopy(base.tokenizer)
    if tokenizer.pad_token is None:  # the plain model pools the last token that is not padding, so it needs one
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    return config, tokenizer


def plain_config(config: Any) -> Any:
    """A copy that does not ask for katei's attention."""
    config = copy.deepcopy(config)
    config._attn_implementation = None
    return config


def _save(
    folder: Path,
    kind: Any,
    config: Any,
    weights: Mapping[str, Tensor],
    more: Mapping[str, Tensor],
    dtype: torch.dtype,
    generation_config: Any = None,
) -> None:
    """The backbone's `weights` and those around it (`more`), rounded once to `dtype`, as a folder of the class `kind`."""
    config.dtype = dtype
    with quiet(), torch.device("meta"):
        model = kind.from_config(config)
    named = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in weights.items()} | dict(more)
    expected = {name for name, _ in model.named_parameters()}
    if "lm_head.weight" not in more:
        expected.discard("lm_head.weight")
    assert set(named) == expected, f"{sorted(set(named) ^ expected)[:5]}"
    rounded = {name: tensor.to(dtype).cpu().contiguous() for name, tensor in named.items()}
    for name, tensor in rounded.items():
        least, most = tensor.aminmax()  # torch.isfinite makes copies, and an embedding is most of some models
        if not (least.isfinite() and most.isfinite()):
            raise AdapterError(f"{name} is not finite once rounded", hint="--precision fp32")
    if generation_config is not None:
        model.generation_config = generation_config
    with quiet():
        model.save_pretrained(folder, state_dict=rounded)


def _save_tokenizer(folder: Path, tokenizer: Any, note: AdapterNote) -> None:
    forget_how_loaded(tokenizer)
    with quiet():
        tokenizer.save_pretrained(folder)
    if note.labels:
        write_json(folder / "katei.json", asdict(note))


def _plain_probabilities(folder: Path, rows: Sequence[Sequence[int]], causal: bool = False) -> NDArray[np.float64]:
    """What `transformers` alone makes of the folder, a row at a time: of the classes, or of the next token."""
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    with quiet():
        model: Any = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return plain_probabilities(model, rows)


def plain_probabilities(model: Any, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """A `transformers` model's answers, a row at a time, (rows, C); a causal LM's are of the token after each row."""
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([list(ids)])).logits[0].double() for ids in rows]
    return np.stack([torch.softmax(x if x.ndim == 1 else x[-1], 0).numpy() for x in logits])


def compared(before_EC: NDArray[np.float64], after_EC: NDArray[np.float64]) -> Agreement:
    change = np.abs(before_EC - after_EC)
    same = float((before_EC.argmax(1) == after_EC.argmax(1)).mean())
    return Agreement(len(before_EC), same, float(change.max()), float(change.mean()))
