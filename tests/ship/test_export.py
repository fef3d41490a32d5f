"""What katei exports, peft loads and answers with the same logits (promise 4): after training, on rows of many lengths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from katei import api
from katei.core.errors import AdapterError
from tests.helpers.trained import TEXTS, Trained, katei_logits, plain_classifier, row_by_row

IN_PEFT = ("lora", "adalora", "ia3", "prompt-tuning", "p-tuning", "prefix-tuning")


def exported(trained: Trained, name: str, tmp_path: Path) -> Path:
    out = tmp_path / "exported"
    api.export(trained.run, out=out, trial=name)
    (out / "katei.json").unlink()  # peft must not need it
    return out


@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_loads_the_exported_adapter_and_gives_the_same_logits(trained: Trained, name: str, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(plain_classifier(trained.base), exported(trained, name, tmp_path)).eval()
    theirs = row_by_row(model, trained.base, TEXTS)
    ours = katei_logits(trained.trial(name), TEXTS)
    assert np.abs(ours - theirs).max() < 5e-5
    assert np.abs(theirs - row_by_row(plain_classifier(trained.base), trained.base, TEXTS)).max() > 0.05


def test_peft_loads_llama_adapter_and_its_head_is_put_in_by_hand(llama: Trained, tmp_path: Path) -> None:
    folder = exported(llama, "llama-adapter", tmp_path)
    classifier = plain_classifier(llama.base)
    model = peft.PeftModel.from_pretrained(classifier, folder).eval()
    gates = [p for name, p in model.named_parameters() if name.endswith("adaption_gate")]
    assert gates
    assert all(gate.abs() > 1e-3 for gate in gates)
    classifier.score.weight.data.copy_(load_file(folder / "head.safetensors")["score.weight"])
    ours = katei_logits(llama.trial("llama-adapter"), TEXTS)
    assert np.abs(ours - row_by_row(model, llama.base, TEXTS)).max() < 5e-5


def test_the_exported_folder_holds_only_what_peft_and_katei_read(llama: Trained, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    assert api.export(llama.run, out=out, trial="lora")["format"] == "peft"
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "katei.json"]
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "SEQ_CLS", 8)
    assert config["base_model_name_or_path"] == str(llama.base)
    assert all(t.dtype == torch.float32 for t in load_file(out / "adapter_model.safetensors").values())


def test_rslora_and_other_targets_keep_their_meaning_in_peft(llama: Trained, tmp_path: Path) -> None:
    settings = {"rank": 3, "alpha": 5.0, "rslora": True, "targets": ["k_proj", "down_proj", "o_proj"]}
    api.train(
        llama.data, out=tmp_path / "run", method="lora", model=str(llama.base), settings=settings, epochs=2, seed=4
    )
    api.export(tmp_path / "run", out=tmp_path / "out")
    model = peft.PeftModel.from_pretrained(plain_classifier(llama.base), tmp_path / "out").eval()
    ours = katei_logits(tmp_path / "run" / "trials" / "lora", TEXTS)
    assert np.abs(ours - row_by_row(model, llama.base, TEXTS)).max() < 5e-5


def test_peft_counts_the_same_trainable_numbers(trained: Trained) -> None:
    results = json.loads((trained.run / "results.json").read_text(encoding="utf-8"))
    counts = {t["name"]: t["trainable"] for t in results["trials"]}
    for name in ("lora", "adalora", "ia3"):
        model = peft.PeftModel.from_pretrained(plain_classifier(trained.base), trained.trial(name), is_trainable=True)
        assert model.get_nb_trainable_parameters()[0] == counts[name], name


@pytest.mark.parametrize("name", ["head", "full"])
def test_what_peft_has_no_format_for_is_refused(llama: Trained, name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as refused:
        api.export(llama.run, out=tmp_path / "out", trial=name)
    assert refused.value.hint
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(llama: Trained, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(AdapterError, match="already exists"):
        api.export(llama.run, out=tmp_path, trial="lora")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
