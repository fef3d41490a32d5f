"""Merged folders: plain transformers gives the adapter's answers, and a merge that does not is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from katei import api
from katei.core.errors import AdapterError, CannotMerge
from katei.ship import models
from tests.helpers.trained import TEXTS, Trained

MERGE = ("lora", "adalora", "ia3", "head")
CANNOT = ("prompt-tuning", "p-tuning", "prefix-tuning", "llama-adapter")


@pytest.mark.parametrize("name", MERGE)
def test_the_merged_model_answers_as_the_adapter_does(name: str, trained: Trained, tmp_path: Path) -> None:
    result = api.merge(trained.run, trial=name, out=tmp_path / "merged")
    assert result["agreement"]["labels"] == 1.0
    assert result["agreement"]["max_probability_change"] < 1e-5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert set(model.config.id2label.values()) == {"暖かい", "cold"}
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS), encoding="utf-8")
    api.predict(trained.run, tmp_path / "rows.jsonl", out=tmp_path / "out.parquet", trial=name)
    import pyarrow.parquet as pq

    predicted = pq.read_table(tmp_path / "out.parquet").to_pylist()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")  # the merged folder can pad: its owner need not care
    with torch.no_grad():
        theirs = torch.softmax(model(**batch).logits.double(), 1).numpy()
    for row, p_C in zip(predicted, theirs, strict=True):
        assert row["prediction"] == model.config.id2label[int(p_C.argmax())]
        own = [float(row[f"probability_{model.config.id2label[c]}"]) for c in range(2)]
        np.testing.assert_allclose(own, p_C, atol=1e-4)


@pytest.mark.parametrize("name", CANNOT)
def test_prompts_cannot_be_merged_and_the_error_says_why(name: str, llama: Trained, tmp_path: Path) -> None:
    with pytest.raises(CannotMerge, match="no weights to merge into") as caught:
        api.merge(llama.run, trial=name, out=tmp_path / "merged")
    assert "export" in str(caught.value.hint)
    assert not any(tmp_path.iterdir())


def test_a_merge_that_moved_is_refused_and_leaves_nothing(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "LARGEST_CHANGE", 0.0)
    with pytest.raises(AdapterError, match="moves a probability"):
        api.merge(llama.run, trial="lora", out=tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_a_taken_folder_is_left_alone(llama: Trained, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(AdapterError, match="already exists"):
        api.merge(llama.run, trial="lora", out=tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
