"""How well a text is continued: the numbers are transformers' own log_softmax, and the longest run is what greedy decoding writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from katei import api
from katei.base.load import load_causal_lm
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.core.errors import RecipeError
from katei.methods.head_only import HeadOnlyStack
from katei.methods.saved import read_adapter
from katei.ship import memorised
from katei.ship.models import next_token_probabilities
from tests.helpers.tiny import edit_config, tiny_base_folder
from tests.helpers.trained import Trained

TEXT = "the iron gate, 春の風がやさしい朝に an iron in the morning"


@pytest.fixture(params=["llama", "gemma3", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_base_folder(tmp_path, request.param)


@pytest.mark.parametrize("chunk", [256, 5])
def test_log_probabilities_and_ranks_are_those_of_transformers(
    base: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memorised, "CHUNK", chunk)
    judged = api.memorised(TEXT, model=str(base))
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_p = torch.log_softmax(model(ids).logits[0].double(), 1)
    assert len(judged["tokens"]) == ids.shape[1] - 1
    for t, token in enumerate(judged["tokens"]):
        own = log_p[t, ids[0, t + 1]]
        assert token["log_probability"] == pytest.approx(own.item(), abs=1e-4)
        assert (
            abs(token["rank"] - (int((log_p[t] > own).sum()) + 1)) <= 1
        )  # two tokens may be equally likely, to rounding
    mean = -sum(t["log_probability"] for t in judged["tokens"]) / len(judged["tokens"])
    assert judged["nats_per_token"] == pytest.approx(mean)


@pytest.mark.parametrize("name", [None, "lora", "prompt-tuning", "prefix-tuning", "llama-adapter"])
def test_what_greedy_decoding_wrote_is_known_by_heart(llama: Trained, name: str | None) -> None:
    """With its adapter too, where there is one."""
    saved = None if name is None else read_adapter(llama.trial(name))
    loaded = load_causal_lm(str(llama.base))
    whole: Any = loaded.model
    base = Base(whole.base_model, loaded.tokenizer, fingerprint=loaded.fingerprint)
    lm_head, voice = whole.get_output_embeddings(), saved.stack(base) if saved else None
    row = base.tokenize("the iron gate")
    start = len(row)
    for _ in range(9):
        p_V = next_token_probabilities(base, voice or HeadOnlyStack(base, 2, [0]), lm_head, [row])[0]
        row.append(int(p_V.argmax()))
    other = int(p_V.argmin())
    judged = memorised.judge(base, lm_head, [*row, other, other], voice)
    assert all(t.greedy and t.rank == 1 for t in judged.tokens[start - 1 : -2])
    assert not judged.tokens[-2].greedy
    assert judged.longest_tokens >= 9
    assert judged.tokens[start + 7].log_probability == pytest.approx(float(np.log(p_V.max())), abs=1e-4)


def test_the_longest_run_is_the_first_of_the_longest() -> None:
    t, f = True, False
    assert memorised._longest([f, t, t, f, t, t]) == (1, 2)
    assert memorised._longest([t, f, t, t, t]) == (2, 3)
    assert memorised._longest([f, f]) == (0, 0)
    assert memorised._longest([t, t]) == (0, 2)


def test_a_text_too_short_or_too_long_is_refused(tmp_path: Path) -> None:
    base = tiny_base_folder(tmp_path, "llama")
    with pytest.raises(RecipeError, match="one token says nothing"):
        api.memorised("", model=str(base))
    edit_config(base, max_position_embeddings=8)
    with pytest.raises(RecipeError, match="this base takes 8"):
        api.memorised(TEXT, model=str(base))
