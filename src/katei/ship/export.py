"""Adapters in other tools' formats.

    peft         the format they are kept in: a copy
    gguf         for llama.cpp: the adapter merged into a causal LM, the head beside it, and a script that classifies with both
    gguf-lora    for llama.cpp: LoRA (or AdaLoRA) alone, for `--lora` beside the base's own GGUF; head and script too

Dimensions: R rank · I inputs · O outputs · C classes · D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from katei.base.load import load_causal_lm
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.core.errors import AdapterError
from katei.core.files import folder_atomic, write_json, write_text
from katei.engine.lockstep import score_rows
from katei.methods.adalora import AdaLoRAStack
from katei.methods.contract import HEAD, Stack, merged_weights
from katei.methods.lora import LoRAStack
from katei.methods.saved import SavedAdapter, read_adapter
from katei.ship.gguf_file import check_written, lora_tensors, model_tensors, write_lora, write_model
from katei.ship.models import (
    Agreement,
    check_free,
    compared,
    next_token_probabilities,
    plain_config,
    plain_probabilities,
    refuse_if_moved,
)

FORMATS = ("peft", "gguf", "gguf-lora")
LOW_RANK = ("lora", "adalora")
ASSUMED_HEAD_SIZES = {"qwen3": 128, "gemma3_text": 256}
"""transformers 5 takes these for granted when it reads a GGUF (of Gemma 3 in attention's scale): others need the config beside it."""
PRECISIONS = ("fp32", "fp16")
"""A GGUF's weights; smaller ones are llama.cpp's `llama-quantize`'s."""


def export_peft(folder: Path, out: Path) -> None:
    """Copy the adapter to `out` for `PeftModel.from_pretrained`. Raises AdapterError for what peft has no format for.

    LLaMA-Adapter's head goes along as head.safetensors: peft's file has no place for it, so it is loaded by hand
    (docs/methods.md shows the three lines).
    """
    saved = read_adapter(folder, headless=True)
    if saved.method.peft_type is None:
        raise AdapterError(
            f"peft has no format for the method '{saved.method.name}'",
            file=folder,
            hint="`katei merge` writes a plain transformers model of it",
        )
    check_free(out)
    with folder_atomic(out) as temporary:
        for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "katei.json"):
            if (folder / name).exists():
                shutil.copyfile(folder / name, temporary / name)


def check_gguf(saved: SavedAdapter, format: str, precision: str, out: Path) -> None:
    """Raise, before any base is loaded, for what has no place in this format."""
    if precision not in PRECISIONS:
        hint = f"--precision {' or '.join(PRECISIONS)}; llama.cpp's llama-quantize makes smaller ones of them"
        raise AdapterError(f"a GGUF is not written in '{precision}'", hint=hint)
    if not saved.method.merges:
        raise AdapterError(
            f"llama.cpp has nothing that {saved.method.name} could be written as",
            file=saved.folder,
            hint="`katei predict` uses it as it is, `--format peft` keeps it for others; lora, adalora, ia3, head and full have a GGUF",
        )
    if format == "gguf-lora" and saved.method.name not in LOW_RANK:
        raise AdapterError(
            f"llama.cpp's adapters are low-rank, and {saved.method.name} is not",
            file=saved.folder,
            hint="--format gguf, which merges it",
        )
    check_free(out)


def export_gguf(
    saved: SavedAdapter,
    base: Base,
    causal_lm: Any,
    out: Path,
    rows: Sequence[Sequence[int]],
    say: Callable[[str], None],
    *,
    precision: str = "fp16",
) -> Agreement:
    """Merge in fp32, write `model.gguf` rounded once, and compare what transformers reads from it with the adapter, on `rows`.

    `base` is the backbone of `causal_lm`. Raises AdapterError (nothing is left at `out`) where a probability moves too far.
    """
    check_gguf(saved, "gguf", precision, out)
    stack = saved.stack(base)
    weights, output_VD = merged_weights(base, stack), _untied_output(causal_lm)
    head_CD = None if saved.generates else stack.tensors[HEAD][0].detach()
    if head_CD is None:
        before = next_token_probabilities(base, stack, causal_lm.get_output_embeddings(), rows)
    else:
        before = score_rows(base, [stack], [(0, 0, ids) for ids in rows], token_budget=1024)
    with folder_atomic(out) as folder:
        file = folder / "model.gguf"
        write_model(
            file,
            config=base.config,
            tokenizer=base.tokenizer,
            weights=weights,
            output_VD=output_VD,
            precision=precision,
            name=saved.note.name,
            head_CD=head_CD,
            labels=saved.note.labels,
        )
        check_written(file, model_tensors(base.config, weights, output_VD, precision))
        say(f"comparing {len(rows)} rows")
        agreement = compared(before, _read_again(file, base.config, head_CD, rows))
        refuse_if_moved(agreement, precision, saved)
        write_json(folder / "agreement.json", asdict(agreement))
        _write_head(folder, saved, head_CD, "-m model.gguf")
    return agreement


def export_gguf_lora(saved: SavedAdapter, base: Base, out: Path) -> None:
    """Write `adapter.gguf`: `scaling` · B A at each site, checked to the bit."""
    check_gguf(saved, "gguf-lora", "fp32", out)
    stack = saved.stack(base)
    factors, scaling = low_rank_factors(stack)
    with folder_atomic(out) as folder:
        file = folder / "adapter.gguf"
        write_lora(file, config=base.config, factors=factors, scaling=scaling, name=saved.note.name)
        check_written(file, lora_tensors(base.config, factors))
        head_CD = None if saved.generates else stack.tensors[HEAD][0].detach()
        _write_head(folder, saved, head_CD, "-m BASE.gguf --lora adapter.gguf")


def export_base_gguf(model: str, out: Path, say: Callable[[str], None], *, precision: str = "fp16") -> None:
    """A base alone as `model.gguf`: what an adapter of `gguf-lora` goes beside."""
    if precision not in PRECISIONS:
        raise AdapterError(f"a GGUF is not written in '{precision}'", hint=f"--precision {' or '.join(PRECISIONS)}")
    check_free(out)
    loaded = load_causal_lm(model, device="cpu", say=say)
    causal_lm: Any = loaded.model
    weights = {name: parameter.detach() for name, parameter in causal_lm.base_model.named_parameters()}
    config, output_VD = causal_lm.config, _untied_output(causal_lm)
    with folder_atomic(out) as folder:
        file = folder / "model.gguf"
        write_model(
            file,
            config=config,
            tokenizer=loaded.tokenizer,
            weights=weights,
            output_VD=output_VD,
            precision=precision,
            name=Path(model).name,
        )
        check_written(file, model_tensors(config, weights, output_VD, precision))


def low_rank_factors(stack: Stack) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """A (R, I) and B (O, R) of adapter 0 at each site, and the scale of their product; AdaLoRA's E is folded into A."""
    assert isinstance(stack, LoRAStack | AdaLoRAStack)
    factors = {}
    for site in stack.sites:
        a_RI, b_RO = (stack.tensors[f"{site.name}.{name}"][0].detach() for name in ("A_RI", "B_RO"))
        if isinstance(stack, AdaLoRAStack):
            a_RI = a_RI * stack.tensors[f"{site.name}.E_R"][0].detach()[:, None]
        factors[site.name] = (a_RI, b_RO.T)
    return factors, stack.scaling if isinstance(stack, AdaLoRAStack) else stack.method.scaling


def _untied_output(causal_lm: Any) -> Tensor | None:
    return None if causal_lm.config.tie_word_embeddings else causal_lm.get_output_embeddings().weight.detach()


def _read_again(file: Path, config: Any, head_CD: Tensor | None, rows: Sequence[Sequence[int]]) -> Any:
    """What transformers makes of a GGUF, a row at a time: the head's classes, or the next token."""
    from contextlib import redirect_stderr
    from io import StringIO

    from transformers import AutoModelForCausalLM

    assumed = ASSUMED_HEAD_SIZES.get(config.model_type)
    given = {"config": plain_config(config)} if assumed is not None and config.head_dim != assumed else {}
    with quiet(), redirect_stderr(StringIO()):  # the GGUF reader draws a bar of its own
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True, **given
        ).eval()
    if head_CD is None:
        return plain_probabilities(model, rows)
    with torch.no_grad():
        pooled = [model.base_model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0, -1] for ids in rows]
        return torch.softmax((torch.stack(pooled) @ head_CD.float().cpu().T).double(), 1).numpy()


def _write_head(folder: Path, saved: SavedAdapter, head_CD: Tensor | None, files: str) -> None:
    """head.safetensors, and a script that classifies with it and a running llama-server."""
    if head_CD is None:
        return
    save_file(
        {"score.weight": head_CD.float().cpu().contiguous()}, folder / "head.safetensors", metadata={"format": "pt"}
    )
    write_json(folder / "katei.json", asdict(saved.note))
    script = (Path(__file__).parent / "gguf_classify.py").read_text(encoding="utf-8")
    write_text(folder / "classify.py", script.replace("-m MODEL.gguf", files))
