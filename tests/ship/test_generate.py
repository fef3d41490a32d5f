"""Generation: greedy equals transformers' own, prompts together equal one at a time, adapters act, draws are seeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from katei import api
from katei.base.load import load_causal_lm
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.core.errors import RecipeError
from katei.ship.generate import Sampling
from katei.ship.generate import generate as continue_
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


# -------------------------------------------------------------------- as it comes, stop words, chat


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_what_is_given_out_as_it_comes_is_the_continuation(base: Path, tokens: int) -> None:
    given: dict[int, list[str]] = {i: [] for i in range(len(PROMPTS))}

    def hear(trial: str | None, prompt: int, text: str) -> None:
        assert trial is None
        assert text
        given[prompt].append(text)

    whole = api.generate(
        PROMPTS, model=str(base), new_tokens=tokens, on_text=hear, stop=["zq", "\N{REPLACEMENT CHARACTER}q"]
    )
    assert ["".join(given[i]) for i in range(len(PROMPTS))] == whole
    assert tokens < 16 or max(map(len, given.values())) > 3, "it came at once"


def test_text_comes_before_the_end(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from katei.ship import generate

    events: list[str] = []
    choose = generate.choose_token

    def watched(*arguments: object) -> int:
        events.append("token")
        return choose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "choose_token", watched)
    api.generate(["the"], model=str(base), new_tokens=12, on_text=lambda trial, prompt, text: events.append("text"))
    assert events.index("text") < len(events) - 1 - events[::-1].index("token")


def test_a_stop_word_ends_it_wherever_its_letters_lie_among_the_tokens(base: Path) -> None:
    loaded = load_causal_lm(str(base))
    whole_model: Any = loaded.model
    packed, lm_head = Base(whole_model.base_model, loaded.tokenizer), whole_model.get_output_embeddings()

    def tell(prompt: str, *stop: str) -> tuple[str, str]:
        given: list[str] = []

        def hear(voice: int, n: int, more: str) -> None:
            given.append(more)

        texts = continue_(packed, lm_head, [prompt], Sampling(new_tokens=14), stop=stop, on_text=hear)
        return texts[0][0], "".join(given)

    for prompt in PROMPTS:
        text, given = tell(prompt)
        assert text == given
        words = [text[i : i + n] for n in (1, 2, 5) for i in range(0, len(text) - n + 1, 3)]
        for word in words:
            expected = text[: text.find(word)].rstrip("\N{REPLACEMENT CHARACTER}")
            assert tell(prompt, "never there", word) == (expected, expected)
    assert words


def test_an_empty_stop_word_is_refused(base: Path) -> None:
    with pytest.raises(RecipeError, match="stop word is empty"):
        api.generate(["a"], model=str(base), stop=[""])


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_a_chat_is_what_transformers_makes_of_the_template(tmp_path: Path) -> None:
    base = tiny_base_folder(tmp_path, "llama")
    with pytest.raises(RecipeError, match="no chat template") as refused:
        api.generate(["a"], model=str(base), chat=True)
    assert "--chat" in (refused.value.hint or "")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ours = api.generate([prompt], model=str(base), chat=True, new_tokens=10)[0]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad(), quiet():
            whole = model.generate(**ids, max_new_tokens=10, do_sample=False, eos_token_id=[2, 0])[0]
        new = tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert ours == new.rstrip("\N{REPLACEMENT CHARACTER}")
        assert ours != api.generate([prompt], model=str(base), new_tokens=10)[0]


def test_what_the_template_puts_behind_an_answer_ends_it(tmp_path: Path) -> None:
    from katei.base.load import load_base
    from katei.base.packed import Base
    from katei.ship.generate import _ends

    loaded = load_base(str(tiny_base_folder(tmp_path, "llama")))
    base = Base(loaded.model, loaded.tokenizer)
    assert _ends(base, False) == {2}
    base.tokenizer.chat_template = TEMPLATE
    assert _ends(base, True) == {2, 0}


# -------------------------------------------------------------------- several adapters side by side


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_adapters_side_by_side_continue_as_each_does_alone(llama: Trained, temperature: float) -> None:
    trials = ["base", "lora", "ia3", "prompt-tuning", "prefix-tuning", "llama-adapter", "adalora", "head"]
    how = {"new_tokens": 8, "temperature": temperature, "seed": 5}
    together = api.continuations(PROMPTS, run=llama.run, trials=trials, **how)
    assert [pair["trial"] for pair in together[:: len(PROMPTS)]] == trials
    for place, name in enumerate(trials):
        own = [pair["continuation"] for pair in together[place * len(PROMPTS) : (place + 1) * len(PROMPTS)]]
        alone = {"model": str(llama.base)} if name == "base" else {"run": llama.run, "trial": name}
        assert own == api.generate(PROMPTS, **alone, **how), name
    assert len({pair["continuation"] for pair in together[:: len(PROMPTS)]}) > 4


def test_all_means_every_trial_and_the_base(llama: Trained) -> None:
    pairs = api.continuations(["a"], run=llama.run, trials=["all"], new_tokens=2)
    assert {pair["trial"] for pair in pairs} == {*(p.name for p in (llama.run / "trials").iterdir()), "base"} - {"full"}


def test_trials_without_a_run_are_refused(base: Path) -> None:
    with pytest.raises(RecipeError, match="there is no run"):
        api.continuations(["a"], model=str(base), trials=["lora"])


# -------------------------------------------------------------------- adapters that peft trained for generation


def _peft_configs() -> dict[str, object]:
    import peft

    kind = {"task_type": "CAUSAL_LM"}
    return {
        "lora": peft.LoraConfig(**kind, r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"]),
        "adalora": peft.AdaLoraConfig(**kind, init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"]),
        "ia3": peft.IA3Config(**kind),
        "prompt tuning": peft.PromptTuningConfig(**kind, num_virtual_tokens=4),
        "p-tuning": peft.PromptEncoderConfig(**kind, num_virtual_tokens=4, encoder_hidden_size=24),
        "prefix tuning": peft.PrefixTuningConfig(**kind, num_virtual_tokens=4),
        "llama-adapter": peft.AdaptionPromptConfig(**kind, adapter_len=4, adapter_layers=2),
    }


@pytest.mark.parametrize(
    "name", ["lora", "adalora", "ia3", "prompt tuning", "p-tuning", "prefix tuning", "llama-adapter"]
)
def test_what_peft_trained_for_generation_continues_as_in_peft(name: str, llama: Trained, tmp_path: Path) -> None:
    import peft

    from katei.core.errors import AdapterError

    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(llama.base, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(llama.base)
        model = peft.get_peft_model(plain, _peft_configs()[name]).eval()
        rng = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=rng) * 0.3
        model.save_pretrained(tmp_path / "adapter")
    ours = api.generate(PROMPTS, run=tmp_path / "adapter", new_tokens=8)
    for prompt, text in zip(PROMPTS, ours, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        added: list[int] = []
        for _ in range(8):  # without a cache: peft's prompts and generate's cache do not always agree
            with torch.no_grad(), quiet():
                scores = model(
                    input_ids=torch.cat([ids, torch.tensor([added], dtype=torch.long)], 1), use_cache=False
                ).logits
            added.append(int(scores[0, -1].argmax()))
            if added[-1] == 2:
                break
        whole = tokenizer.decode([*ids[0].tolist(), *added], skip_special_tokens=True)
        assert text == whole[len(prompt) :].rstrip("\N{REPLACEMENT CHARACTER}")
    assert ours != api.generate(PROMPTS, model=str(llama.base), new_tokens=8)
    with pytest.raises(AdapterError, match="trained for generation") as refused:
        api.predict(tmp_path / "adapter", llama.data / "test.tsv", out=tmp_path / "o.tsv")
    assert "katei generate" in (refused.value.hint or "")


@pytest.mark.parametrize("prompts", [[], [""], ["a", ""]])
def test_an_empty_prompt_is_refused(prompts: list[str], base: Path) -> None:
    with pytest.raises(RecipeError, match="prompt"):
        api.generate(prompts, model=str(base))
