"""GGUF: what we write, transformers and llama.cpp read to the same function, tokens included; what they would not is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from katei import api
from katei.base.quiet import quiet
from katei.core.errors import AdapterError, BaseError
from katei.ship import export, gguf_file
from tests.helpers.llama_cpp import TEMPLATE, readable_base, running
from tests.helpers.tiny import edit_config, tiny_base_folder
from tests.helpers.trained import TEXTS, Trained, katei_logits, train_study

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
METHODS = ("lora", "adalora", "ia3", "head", "full")
PROMPTS = [*TEXTS[:3], "the an 123  in\n\nthe", "café 🦙"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    return train_study(folder, methods=METHODS, base=readable_base(folder, request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("llama")
    return train_study(folder, base=readable_base(folder, "llama"))


def causal_lm(folder: Path, **more: Any) -> tuple[Any, Any]:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
        return model, AutoTokenizer.from_pretrained(folder) if not more else None


def log_probabilities(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), 0).numpy()


def softmax(scores: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.tensor(scores), -1).numpy()


# -------------------------------------------------------------------- read again by transformers


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_transformers_reads_the_merged_model_tensor_by_tensor(study: Trained, precision: str, tmp_path: Path) -> None:
    result = api.export(study.run, out=tmp_path / "gguf", format="gguf", trial="lora", precision=precision)
    assert result["agreement"]["labels"] == 1.0
    api.merge(study.run, out=tmp_path / "merged", trial="lora", kind="causal-lm")
    merged, _ = causal_lm(tmp_path / "merged")
    # transformers takes the head size of a Qwen 3 for 128, and scales a Gemma 3's attention as if it were 256
    given = {"config": merged.config} if merged.config.model_type in ("qwen3", "gemma3_text") else {}
    read, _ = causal_lm(tmp_path / "gguf", gguf_file="model.gguf", **given)
    theirs, ours = read.state_dict(), merged.state_dict()
    assert set(theirs) == set(ours)
    for name, weight in ours.items():
        exact = weight if precision == "fp32" or weight.ndim == 1 else weight.half().float()
        # Gemma's norms are stored as 1 + weight, in fp32 too
        assert (theirs[name] - exact).abs().max() < (2e-7 if "norm" in name else 1e-30), name
    ids = torch.tensor([[5, 40, 50, 60, 70, 80, 90]])
    with torch.no_grad():
        assert (read(ids).logits - merged(ids).logits).abs().max() < (1e-4 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_merges_answers_the_same_from_its_gguf(study: Trained, name: str, tmp_path: Path) -> None:
    result = api.export(study.run, out=tmp_path / "out", format="gguf", trial=name, precision="fp32")
    assert result["agreement"]["labels"] == 1.0
    assert result["agreement"]["max_probability_change"] < 2e-5
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model.gguf", "head.safetensors", "katei.json", "agreement.json", "classify.py"}


def test_a_weight_that_was_not_written_is_noticed(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "neighbours", lambda weight, heads: weight)
    with pytest.raises(AdapterError, match="moves a probability by"):
        api.export(llama.run, out=tmp_path / "out", format="gguf", trial="lora", precision="fp32")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------- read by llama.cpp


def test_llama_cpp_cuts_texts_into_the_same_tokens_and_expects_the_same_next_one(
    study: Trained, tmp_path: Path
) -> None:
    api.export(study.run, out=tmp_path / "out", format="gguf", trial="lora", precision="fp32")
    api.merge(study.run, out=tmp_path / "merged", trial="lora", kind="causal-lm")
    model, tokenizer = causal_lm(tmp_path / "merged")
    plain, _ = causal_lm(study.base)
    said = tokenizer("the", add_special_tokens=False)["input_ids"][0]
    effect = 0.0
    with running(tmp_path / "out" / "model.gguf") as runtime:
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            assert runtime.tokenize(prompt) == ids, prompt
            ours = log_probabilities(model, ids)
            theirs = runtime.log_probabilities(ids, model.config.vocab_size, said)
            assert np.abs(theirs - ours).max() < 0.02, prompt  # llama.cpp looks GELU up in a table of fp16 numbers
            effect = max(effect, np.abs(ours - log_probabilities(plain, ids)).max())
    assert effect > 0.5


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_llama_cpp_applies_the_adapter_beside_the_base(study: Trained, name: str, tmp_path: Path) -> None:
    api.export(out=tmp_path / "base", format="gguf", model=str(study.base), precision="fp32")
    api.export(study.run, out=tmp_path / "out", format="gguf-lora", trial=name)
    api.merge(study.run, out=tmp_path / "merged", trial=name, kind="causal-lm")
    model, tokenizer = causal_lm(tmp_path / "merged")
    plain, _ = causal_lm(study.base)
    said = tokenizer("the", add_special_tokens=False)["input_ids"][0]
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with running(tmp_path / "base" / "model.gguf") as runtime:
        alone = [runtime.log_probabilities(ids, model.config.vocab_size, said) for ids in rows]
    with running(tmp_path / "base" / "model.gguf", lora=tmp_path / "out" / "adapter.gguf") as runtime:
        adapted = [runtime.log_probabilities(ids, model.config.vocab_size, said) for ids in rows]
    for ids, without, with_lora in zip(rows, alone, adapted, strict=True):
        assert np.abs(without - log_probabilities(plain, ids)).max() < 0.02
        assert np.abs(with_lora - log_probabilities(model, ids)).max() < 0.02
    assert max(np.abs(a - b).max() for a, b in zip(alone, adapted, strict=True)) > 0.5


@pytest.mark.parametrize("format", ["gguf", "gguf-lora"])
def test_the_script_beside_the_model_classifies_as_predict_does(study: Trained, format: str, tmp_path: Path) -> None:
    out, lora = tmp_path / "out", None
    api.export(study.run, out=out, format=format, trial="lora", precision="fp32")
    model = out / "model.gguf"
    if format == "gguf-lora":
        api.export(out=tmp_path / "base", format="gguf", model=str(study.base), precision="fp32")
        model, lora = tmp_path / "base" / "model.gguf", out / "adapter.gguf"
    with running(model, lora=lora, pooling="last") as runtime:
        command = [sys.executable, str(out / "classify.py"), runtime.address, *TEXTS]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    ours = softmax(katei_logits(study.trial("lora"), TEXTS))
    assert list(answers[0]) == ["cold", "暖かい"]
    theirs = np.array([list(answer.values()) for answer in answers])
    assert (theirs.argmax(1) == ours.argmax(1)).all()
    assert np.abs(theirs - ours).max() < 5e-3
    assert set(ours.argmax(1)) == {0, 1} or np.ptp(ours[:, 0]) > 1e-3


def test_llama_cpp_classifies_by_itself_where_it_has_a_place_for_the_head(tmp_path: Path) -> None:
    """Qwen 3 alone, of the architectures written here: `--pooling rank` gives the classes' probabilities."""
    study = train_study(tmp_path, methods=("lora",), base=readable_base(tmp_path, "qwen3"))
    api.export(study.run, out=tmp_path / "out", format="gguf", precision="fp32")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["qwen3.classifier.output_labels"].contents() == ["cold", "暖かい"]
    _, tokenizer = causal_lm(study.base)
    ours = softmax(katei_logits(study.trial("lora"), TEXTS))
    with running(tmp_path / "out" / "model.gguf", pooling="rank") as runtime:
        # the server's answer is as wide as the model; its first numbers are the classes'
        theirs = np.stack([runtime.embedding(tokenizer(text)["input_ids"])[:2] for text in TEXTS])
    assert np.abs(theirs - ours).max() < 5e-3


# -------------------------------------------------------------------- what the files say


def test_the_metadata_is_what_llama_cpp_documents(study: Trained, tmp_path: Path) -> None:
    api.export(study.run, out=tmp_path / "out", format="gguf", trial="lora")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    arch = said["general.architecture"]
    config = json.loads((study.base / "config.json").read_text(encoding="utf-8"))
    assert (said["general.type"], said["general.file_type"]) == ("model", 1)
    assert said[f"{arch}.block_count"] == config["num_hidden_layers"]
    assert said[f"{arch}.attention.head_count_kv"] == 2
    assert said["tokenizer.chat_template"] == TEMPLATE
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.add_eos_token"] is False
    assert said["tokenizer.ggml.model"] == ("llama" if arch == "gemma3" else "gpt2")
    assert len(said["tokenizer.ggml.tokens"]) == config["vocab_size"]
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert ("output.weight" in kinds) == (not config.get("tie_word_embeddings", arch == "gemma3"))
    assert {kinds[name] for name in kinds if name.endswith(("norm.weight", ".bias"))} == {"F32"}
    assert kinds["blk.0.attn_q.weight"] == "F16"


def test_the_adapters_metadata_and_tensors(llama: Trained, tmp_path: Path) -> None:
    api.export(llama.run, out=tmp_path / "out", format="gguf-lora", trial="lora")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 8.0
    peft = load_file(llama.trial("lora") / "adapter_model.safetensors")
    found = gguf_file.read_tensors(tmp_path / "out" / "adapter.gguf")
    for layer in range(3):
        for leaf, short, heads in (("q_proj", "attn_q", 4), ("v_proj", "attn_v", 0)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{leaf}"
            a, b = (peft[f"{name}.lora_{x}.weight"].numpy() for x in "AB")
            if heads:  # written out: within a head, row 2i is the i-th of the first half, row 2i + 1 of the second
                rows = [h * 16 + half * 8 + i for h in range(heads) for i in range(8) for half in range(2)]
                b = b[rows]
            np.testing.assert_array_equal(found.pop(f"blk.{layer}.{short}.weight.lora_a"), a)
            np.testing.assert_array_equal(found.pop(f"blk.{layer}.{short}.weight.lora_b"), b)
    assert not found


def test_an_adapter_that_peft_trained_for_generation(llama: Trained, tmp_path: Path) -> None:
    import peft

    model, tokenizer = causal_lm(llama.base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "o_proj"])
    tuned = peft.get_peft_model(model, config).eval()
    rng = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=rng) * 0.3
    with quiet():
        tuned.save_pretrained(tmp_path / "adapter")
    result = api.export(tmp_path / "adapter", out=tmp_path / "whole", format="gguf", precision="fp32", data=llama.data)
    assert result["agreement"]["max_probability_change"] < 1e-4
    api.export(tmp_path / "adapter", out=tmp_path / "out", format="gguf-lora")
    api.export(out=tmp_path / "base", format="gguf", model=str(llama.base), precision="fp32")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter.gguf"}
    said = tokenizer("the", add_special_tokens=False)["input_ids"][0]
    for file, lora in (("whole", None), ("base", tmp_path / "out" / "adapter.gguf")):
        with running(tmp_path / file / "model.gguf", lora=lora) as runtime:
            for prompt in PROMPTS:
                ids = tokenizer(prompt)["input_ids"]
                theirs = runtime.log_probabilities(ids, 300, said)
                assert np.abs(theirs - log_probabilities(tuned, ids)).max() < 0.02


def test_llama_3s_rotary_table_is_written_out(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    base = readable_base(tmp_path, "llama", rope_parameters={**rope, "original_max_position_embeddings": 64})
    api.export(out=tmp_path / "out", format="gguf", model=str(base), precision="fp32")
    factors = gguf_file.read_tensors(tmp_path / "out" / "model.gguf")["rope_freqs.weight"]
    model, tokenizer = causal_lm(base)
    plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(factors, (plain / model.model.rotary_emb.inv_freq).numpy(), rtol=1e-5)
    ids = tokenizer("the iron gate " * 12)["input_ids"]
    with running(tmp_path / "out" / "model.gguf") as runtime:
        theirs = runtime.log_probabilities(ids, 300, tokenizer("the", add_special_tokens=False)["input_ids"][0])
    assert np.abs(theirs - log_probabilities(model, ids)).max() < 0.02


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("format", ["gguf", "gguf-lora"])
@pytest.mark.parametrize("name", ["prompt-tuning", "p-tuning", "prefix-tuning", "llama-adapter"])
def test_prompts_have_no_gguf(llama: Trained, name: str, format: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"llama\.cpp has nothing") as refused:
        api.export(llama.run, out=tmp_path / "out", format=format, trial=name)
    assert "katei predict" in (refused.value.hint or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ia3", "head", "full"])
def test_what_is_not_low_rank_has_no_adapter_file(llama: Trained, name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="low-rank") as refused:
        api.export(llama.run, out=tmp_path / "out", format="gguf-lora", trial=name)
    assert "--format gguf" in (refused.value.hint or "")


UNREADABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "another architecture": ("mistral", "the architecture 'mistral'", {}),
    "full attention in other layers": ("gemma3", "every sixth layer", {"layer_types": ["full_attention"] * 7}),
    "attention scaled otherwise": ("gemma3", "scaled otherwise", {"query_pre_attn_scalar": 99}),
    "biases": ("llama", "biases", {"attention_bias": True}),
    "a window": ("qwen2", "sliding window", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_base_llama_cpp_would_run_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    architecture, message, changes = UNREADABLE[what]
    base = readable_base(tmp_path, architecture)
    edit_config(base, **changes)
    if "max_window_layers" in changes:
        edit_config(base, layer_types=None)
    with pytest.raises(BaseError, match=message) as refused:
        gguf_file.architecture(AutoConfig.from_pretrained(base))
    assert refused.value.hint


def test_a_rule_of_cutting_words_that_has_no_name_is_refused(tmp_path: Path) -> None:
    base = tiny_base_folder(tmp_path, "llama")
    with pytest.raises(BaseError, match="cuts words by a rule"):
        api.export(out=tmp_path / "out", format="gguf", model=str(base))
    assert not (tmp_path / "out").exists()


def test_a_weight_too_large_for_fp16_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = readable_base(tmp_path, "llama")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match="too large for fp16") as refused:
        api.export(out=tmp_path / "out", format="gguf", model=str(base))
    assert refused.value.hint == "--precision fp32"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "onnx"}, "no export to"),
        ({"format": "gguf", "precision": "q4"}, "not written in"),
        ({"format": "peft"}, "no run given"),
        ({"format": "gguf-lora", "model": "x"}, "no run given"),
    ],
)
def test_what_makes_no_sense_is_refused_first(
    llama: Trained, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = llama.trial("lora") if arguments.get("precision") or arguments["format"] == "onnx" else None
    with pytest.raises(AdapterError, match=message) as refused:
        api.export(run, out=tmp_path / "out", **arguments)
    assert refused.value.hint


def test_low_rank_factors_are_the_merge(llama: Trained) -> None:
    from katei.ship.adapters import open_adapter

    for name in ("lora", "adalora"):
        base, stack, _ = open_adapter(llama.trial(name), say=lambda text: None)
        factors, scaling = export.low_rank_factors(stack)
        for site, (a_RI, b_OR) in factors.items():
            w_OI = base.weight(site).weight
            torch.testing.assert_close(w_OI + scaling * b_OR @ a_RI, stack.merge(0, site, w_OI))
