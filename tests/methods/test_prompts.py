"""How virtual tokens start, and what P-tuning's encoder leaves behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from katei.core.errors import RecipeError
from katei.methods.contract import TrialFacts
from tests.helpers.models import perturb_, settings, tiny_base


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # Gemma scales what its embedding table holds
def test_vectors_start_from_random_words(architecture: str) -> None:
    base = tiny_base(architecture)
    method = settings("prompt-tuning", virtual_tokens=9, init="vocabulary")
    stack = method.build(base, 2, [0, 0, 1], [TrialFacts(1)] * 3)
    words_VD = base.embedding(torch.arange(base.vocabulary))
    prompt_NPD = stack.tensors["prompt_PD"].detach()
    assert (prompt_NPD.flatten(0, 1)[:, None] == words_VD).all(-1).any(1).all()
    assert torch.equal(prompt_NPD[0], prompt_NPD[1])
    assert not torch.equal(prompt_NPD[0], prompt_NPD[2])
    assert len(prompt_NPD[0].unique(dim=0)) > 5


@pytest.mark.parametrize(("length", "expected"), [(2, [7, 8]), (3, [7, 8, 9]), (7, [7, 8, 9, 7, 8, 9, 7])])
def test_vectors_start_from_a_text_repeated_or_cut(length: int, expected: list[int]) -> None:
    base = tiny_base()
    base.tokenizer = lambda text, **_: {"input_ids": [7, 8, 9]}
    method = settings("prompt-tuning", virtual_tokens=length, init="text", init_text="この詩の声は")
    stack = method.build(base, 2, [0], [TrialFacts(1)])
    assert torch.equal(stack.tensors["prompt_PD"][0], base.embedding(torch.tensor(expected)))


@pytest.mark.parametrize("more", [{"init": "text"}, {"init_text": "a"}, {"init": "zeros"}, {"virtual_tokens": 0}])
def test_starts_that_make_no_sense_are_refused(more: dict[str, object]) -> None:
    with pytest.raises(RecipeError) as refused:
        settings("prompt-tuning", **more)
    assert refused.value.hint


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_each_trials_encoder_writes_its_own_vectors(encoder: str) -> None:
    base = tiny_base()
    both, one = (
        settings("p-tuning", encoder=encoder).build(base, 2, s, [TrialFacts(1)] * len(s)) for s in ([3, 4], [4])
    )
    perturb_(both, size=0.2)
    with torch.no_grad():
        one.theta_NM[0] = both.theta_NM[1]
        vectors = both.embed()
        torch.testing.assert_close(one.embed()[0], vectors[1], rtol=1e-5, atol=1e-6)
        assert (vectors[0] - vectors[1]).abs().max() > 0.1
    assert torch.equal(both.peft_tensors(1)["prompt_embeddings"], vectors[1])
    assert both.method.saved_as() == settings("prompt-tuning")  # type: ignore[attr-defined]


def test_a_tokenizer_is_not_asked_without_need() -> None:
    base = tiny_base()
    base.tokenizer = SimpleNamespace()
    settings("prompt-tuning").build(base, 2, [0], [TrialFacts(1)])
