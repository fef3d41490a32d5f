"""Continuations: greedy ones are transformers' own, prompts do not disturb each other, adapters act, draws are seeded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from katei import api
from katei.base.load import load_causal_lm
from katei.base.packed import Base
from katei.core.errors import RecipeError
from katei.methods.contract import TrialFacts
from katei.ship.generate import Sampling, generate
from tests.helpers.models import perturb_, settings
from tests.helpers.tiny import tiny_base_folder

PROMPTS = ["春の夜の", "hello", "a longer prompt, with 猫 in it"]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_greedy_is_what_transformers_generates(architecture: str, tmp_path: Path) -> None:
    folder = tiny_base_folder(tmp_path, architecture)
    texts = api.generate(PROMPTS, model=str(folder), new_tokens=12)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
        before = tokenizer.decode(ids[0], skip_special_tokens=True)
        # a character whose last bytes were not reached is left out here
        assert before + text == tokenizer.decode(whole, skip_special_tokens=True).rstrip("\ufffd")


def test_an_adapter_changes_what_is_said_and_a_seed_repeats_it(tmp_path: Path) -> None:
    loaded = load_causal_lm(str(tiny_base_folder(tmp_path)))
    base = Base(loaded.model.base_model, loaded.tokenizer)
    head = loaded.model.get_output_embeddings()
    plain = generate(base, head, PROMPTS, Sampling(new_tokens=10))
    for name in ("lora", "prefix-tuning", "prompt-tuning", "llama-adapter"):
        stack = settings(name).build(base, 2, [0], [TrialFacts(1)])
        perturb_(stack, size=1.0)
        assert generate(base, head, PROMPTS, Sampling(new_tokens=10), stack) != plain, name
    drawn = [
        generate(base, head, PROMPTS, Sampling(new_tokens=10, temperature=2.0, top_p=0.95, seed=s)) for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_says_the_same_alone_and_beside_others(tmp_path: Path) -> None:
    folder = str(tiny_base_folder(tmp_path))
    together = api.generate(PROMPTS, model=folder, new_tokens=8)
    assert together == [api.generate([prompt], model=folder, new_tokens=8)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("field", "value"),
    [("new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5)],
)
def test_sampling_that_makes_no_sense_is_refused(field: str, value: float) -> None:
    with pytest.raises(RecipeError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]
