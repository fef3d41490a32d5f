"""Merging: the plain model answers like the adapter beside its base, how alike is measured, and a bad merge leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

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
