"""Generation: greedy equals transformers' own, prompts together equal one at a time, adapters act, draws are seeded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from katei import api
from katei.base.quiet import quiet
from katei.core.errors import RecipeError
from tests.helpers.tiny import tiny_base_folder
from tests.helpers.trained import Trained

PROMPTS = ["the iron gate", "春の風がやさしい朝に、影が走る", "a"]


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base_folder(tmp_path_factory.mktemp("generate"), request.param)


def test_greedy_is_what_transformers_generates(base: Path) -> None:
    ours = api.generate(PROMPTS, model=str(base), new_tokens=12)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(base)
    for prompt, continuation in zip(PROMPTS, ours, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad(), quiet():
            whole = model.generate(**ids, max_new_tokens=12, do_sample=False)[0]
        before = tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True)
        after = tokenizer.decode(whole, skip_special_tokens=True)
        assert continuation == after[len(before) :].rstrip("\N{REPLACEMENT CHARACTER}")
    assert max(map(len, ours)) > 3


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_prompts_together_equal_one_at_a_time(base: Path, temperature: float) -> None:
    settings = {"model": str(base), "new_tokens": 8, "temperature": temperature, "seed": 3}
    together = api.generate(PROMPTS, **settings)
    assert together[0] == api.generate(PROMPTS[:1], **settings)[0]
    if not temperature:  # each prompt draws from a generator of its own place
        assert together == [api.generate([prompt], **settings)[0] for prompt in PROMPTS]


def test_draws_come_from_the_seed(base: Path) -> None:
    def draw(seed: int, **more: float) -> list[str]:
        return api.generate(["the"], model=str(base), new_tokens=12, temperature=30.0, seed=seed, **more)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    greedy = api.generate(["the"], model=str(base), new_tokens=12)
    assert draw(1, top_p=1e-6) == greedy


@pytest.mark.parametrize(
    "name", ["lora", "adalora", "ia3", "prompt-tuning", "p-tuning", "prefix-tuning", "llama-adapter"]
)
def test_every_adapter_acts(llama: Trained, name: str) -> None:
    plain = api.generate(PROMPTS, model=str(llama.base), new_tokens=10)
    assert api.generate(PROMPTS, run=llama.run, trial=name, new_tokens=10) != plain


def test_the_head_alone_changes_no_continuation(llama: Trained) -> None:
    plain = api.generate(PROMPTS, model=str(llama.base), new_tokens=10)
    assert api.generate(PROMPTS, run=llama.run, trial="head", new_tokens=10) == plain


def test_an_adapter_continues_as_peft_does(llama: Trained) -> None:
    """The LoRA of the classifier, put into peft's causal model by hand."""
    import peft

    from katei.methods.saved import read_adapter

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(llama.base, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(llama.base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, config).eval()
    tensors = read_adapter(llama.trial("lora")).tensors
    named = {f"base_model.model.model.{name}": value for name, value in tensors.items()}
    peft.set_peft_model_state_dict(model, named)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    with torch.no_grad(), quiet():
        whole = model.generate(**ids, max_new_tokens=10, do_sample=False)[0]
    expected = tokenizer.decode(whole, skip_special_tokens=True)[len(PROMPTS[0]) :]
    ours = api.generate(PROMPTS[:1], run=llama.run, trial="lora", new_tokens=10)[0]
    assert ours == expected.rstrip("\N{REPLACEMENT CHARACTER}")


def test_no_half_character_at_the_end(base: Path) -> None:
    """The tiny tokenizer writes Japanese byte by byte, so most cuts fall inside a character."""
    for tokens in range(1, 9):
        for text in api.generate(PROMPTS, model=str(base), new_tokens=tokens):
            assert not text.endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("prompts", [[], [""], ["a", ""]])
def test_an_empty_prompt_is_refused(prompts: list[str], base: Path) -> None:
    with pytest.raises(RecipeError, match="prompt"):
        api.generate(prompts, model=str(base))
