"""Merging: the plain model answers like the adapter beside its base, how alike is measured, and a bad merge leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from katei import api
from katei.base.quiet import quiet
from katei.core.errors import AdapterError, CannotMerge
from katei.ship import models
from tests.helpers.trained import TEXTS, Trained, katei_logits, plain_classifier, row_by_row


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3", "head"])
def test_transformers_alone_answers_as_the_adapter_did(trained: Trained, name: str, tmp_path: Path) -> None:
    result = api.merge(trained.run, out=tmp_path / "merged", trial=name)
    assert result["agreement"]["labels"] == 1.0
    assert 0 < result["agreement"]["max_probability_change"] < 1e-5
    assert result["agreement"]["rows"] == 8
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert model.config.id2label == {0: "cold", 1: "暖かい"}
    theirs = row_by_row(model, tmp_path / "merged", TEXTS)
    assert np.abs(theirs - katei_logits(trained.trial(name), TEXTS)).max() < 5e-5
    if name != "head":
        with torch.no_grad():
            model.score.weight.copy_(plain_classifier(trained.base).score.weight)
        plain = row_by_row(plain_classifier(trained.base), trained.base, TEXTS)
        assert np.abs(row_by_row(model, trained.base, TEXTS) - plain).max() > 1e-2, "nothing was merged"


def test_a_padded_batch_of_the_merged_model_is_right_too(llama: Trained, tmp_path: Path) -> None:
    """Its config has the pad token that transformers pools by."""
    api.merge(llama.run, out=tmp_path / "merged", trial="lora")
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        batch = model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits.double().numpy()
    assert np.abs(batch - katei_logits(llama.trial("lora"), TEXTS)).max() < 5e-5


def test_the_folder_says_how_well_it_agrees_and_what_it_is(llama: Trained, tmp_path: Path) -> None:
    result = api.merge(llama.run, out=tmp_path / "merged", trial="ia3")
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "agreement.json", "katei.json"} <= names
    written = json.loads((tmp_path / "merged" / "agreement.json").read_text(encoding="utf-8"))
    assert written["max_probability_change"] == result["agreement"]["max_probability_change"]


def test_a_merge_that_answers_otherwise_is_refused_and_leaves_nothing(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = models._plain_probabilities

    def off(folder: Path, rows: object, causal: bool = False) -> object:
        return honest(folder, rows)[:, ::-1]  # type: ignore[arg-type]

    monkeypatch.setattr(models, "_plain_probabilities", off)
    with pytest.raises(AdapterError, match="moves a probability by") as refused:
        api.merge(llama.run, out=tmp_path / "merged", trial="lora")
    assert refused.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_site_would_be_noticed(llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from katei.methods.lora import LoRAStack

    monkeypatch.setattr(LoRAStack, "merge", lambda stack, n, site, w_OI: w_OI)
    with pytest.raises(AdapterError, match="moves a probability by"):
        api.merge(llama.run, out=tmp_path / "merged", trial="lora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["prompt-tuning", "p-tuning", "prefix-tuning", "llama-adapter"])
def test_prompts_have_no_weights_to_merge_into(llama: Trained, name: str, tmp_path: Path) -> None:
    with pytest.raises(CannotMerge, match="no weights to merge into") as refused:
        api.merge(llama.run, out=tmp_path / "merged", trial=name)
    assert "katei export" in (refused.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_its_run_needs_rows(llama: Trained, tmp_path: Path) -> None:
    api.export(llama.run, out=tmp_path / "alone", trial="lora")
    with pytest.raises(AdapterError, match="checked on real rows") as refused:
        api.merge(tmp_path / "alone", out=tmp_path / "merged")
    assert "--data" in (refused.value.hint or "")
    result = api.merge(tmp_path / "alone", out=tmp_path / "merged", data=llama.data / "train.tsv")
    assert result["agreement"]["rows"] == 12


def test_data_may_be_a_folder_with_splits(llama: Trained, tmp_path: Path) -> None:
    assert api.merge(llama.run, out=tmp_path / "merged", trial="lora", data=llama.data)["agreement"]["rows"] == 8


def test_a_merged_model_is_a_base_again(llama: Trained, tmp_path: Path) -> None:
    """Its head is dropped and another trained on it."""
    api.merge(llama.run, out=tmp_path / "merged", trial="lora")
    study = api.train(llama.data, out=tmp_path / "run", method="head", model=str(tmp_path / "merged"), epochs=1)
    assert study.results["trials"][0]["finished"] == "done"


# -------------------------------------------------------------------- as a causal LM, rounded, and its card


def next_token(model: object, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), 0).numpy()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3", "full"])
def test_as_a_causal_lm_it_continues_as_the_adapter_does(trained: Trained, name: str, tmp_path: Path) -> None:
    said: list[str] = []
    result = api.merge(trained.run, out=tmp_path / "merged", trial=name, kind="causal-lm", say=said.append)
    assert result["kind"] == "causal-lm"
    assert any("head is left out" in line for line in said)
    assert result["agreement"]["labels"] == 1.0
    assert result["agreement"]["max_probability_change"] < 1e-4
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        plain = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    moved = [np.abs(np.log(next_token(model, ids)) - np.log(next_token(plain, ids))).max() for ids in rows]
    assert max(moved) > 0.02, "nothing was merged"
    if name != "full":
        theirs = api.generate(TEXTS[:3], model=str(tmp_path / "merged"), new_tokens=8)
        assert theirs == api.generate(TEXTS[:3], run=trained.run, trial=name, new_tokens=8)


def test_a_causal_lm_that_peft_would_give_too(llama: Trained, tmp_path: Path) -> None:
    """An adapter trained for generation: peft's own merge_and_unload is the reference."""
    import peft

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(llama.base, dtype=torch.float32).eval()
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
        tuned = peft.get_peft_model(model, config)
        rng = torch.Generator().manual_seed(0)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=rng) * 0.3
        tuned.save_pretrained(tmp_path / "adapter")
    result = api.merge(tmp_path / "adapter", out=tmp_path / "merged", data=llama.data)
    assert result["kind"] == "causal-lm"
    theirs = tuned.merge_and_unload().state_dict()
    with quiet():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert set(ours) == set(theirs)
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours)
    assert not (tmp_path / "merged" / "katei.json").exists()
    with pytest.raises(AdapterError, match="no head for a classifier"):
        api.merge(tmp_path / "adapter", out=tmp_path / "other", kind="sequence-classification", data=llama.data)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounded_once_at_the_end(llama: Trained, precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    api.merge(llama.run, out=tmp_path / "exact", trial="lora")
    result = api.merge(llama.run, out=tmp_path / "rounded", trial="lora", precision=precision)
    assert 1e-6 < result["agreement"]["max_probability_change"] < models.LARGEST_CHANGE[precision]
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    assert all(torch.equal(exact[name].to(dtype), rounded[name]) for name in exact)
    assert json.loads((tmp_path / "rounded" / "config.json").read_text(encoding="utf-8"))["dtype"] == str(dtype)[6:]


def test_the_card_tells_data_recipe_scores_and_intervals(llama: Trained, tmp_path: Path) -> None:
    result = api.merge(llama.run, out=tmp_path / "merged", trial="lora")
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    test = next(
        t["test"]
        for t in json.loads((llama.run / "results.json").read_text(encoding="utf-8"))["trials"]
        if t["name"] == "lora"
    )
    low, high = test["accuracy_interval"]
    assert f"| accuracy | {test['accuracy']:.3f} | {low:.3f} – {high:.3f} |" in card
    for part in (
        f"data: `{llama.data}`",
        "rows: 12",
        "learning_rate: 0.1",
        "rank: 8",
        "`cold`, `暖かい`",
        "8 test rows",
    ):
        assert part in card, part
    assert f"{result['agreement']['max_probability_change']:.1e}" in card
    api.export(llama.run, out=tmp_path / "alone", trial="lora")
    api.merge(tmp_path / "alone", out=tmp_path / "again", data=llama.data)
    assert "None are known" in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kind": "classifier"}, "cannot merge into"), ({"precision": "q4"}, "no precision 'q4'")],
)
def test_a_merge_into_what_there_is_not_is_refused(
    llama: Trained, arguments: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message) as refused:
        api.merge(llama.run, out=tmp_path / "merged", trial="lora", **arguments)
    assert refused.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_fully_fine_tuned_model_needs_no_merge(llama: Trained, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="fully fine-tuned"):
        api.merge(llama.run, out=tmp_path / "merged", trial="full")
