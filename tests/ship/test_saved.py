"""Adapters on disk: what peft saved, katei reads to the same probabilities; what it cannot honour or trust, it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from katei import api
from katei.base.quiet import quiet
from katei.core.errors import AdapterError, UserError
from katei.methods.saved import read_adapter
from tests.helpers.rows import write_tsv
from tests.helpers.tiny import tiny_base_folder
from tests.helpers.trained import TEXTS, Trained, katei_logits, plain_classifier, row_by_row

QV = {"target_modules": ["q_proj", "v_proj"]}
DIMS = {"num_virtual_tokens": 5}
PEFT_CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=7, lora_dropout=0.3, **QV),
    "lora on all linear modules": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"),
    "rslora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=7, use_rslora=True, **QV),
    "lora, gaussian start": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights="gaussian", **QV),
    "adalora": lambda: peft.AdaLoraConfig(task_type="SEQ_CLS", init_r=5, target_r=2, lora_alpha=9, total_step=10, **QV),
    "ia3": lambda: peft.IA3Config(task_type="SEQ_CLS"),
    "ia3, other modules": lambda: peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["o_proj", "k_proj"], feedforward_modules=[]
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", **DIMS),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="SEQ_CLS", encoder_hidden_size=24, **DIMS),
    "p-tuning, lstm": lambda: peft.PromptEncoderConfig(
        task_type="SEQ_CLS", encoder_reparameterization_type="LSTM", encoder_hidden_size=24, **DIMS
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", **DIMS),
}


def perturb_(model: torch.nn.Module, *, std: float = 0.3) -> None:
    """Every trainable number away from its start, as training would have it."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng) * std)


def made_in_peft(config: Any, base: Path, folder: Path, classes: int = 2) -> Any:
    """An adapter perturbed in peft and saved there; the model that saved it."""
    with quiet():
        model = peft.get_peft_model(plain_classifier(base, classes), config).eval()
        perturb_(model)
        model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny_base_folder(folder, name) for name in ("llama", "qwen2", "gemma3")}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_what_peft_saved_answers_the_same_in_katei(
    name: str, architecture: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[architecture]
    model = made_in_peft(PEFT_CONFIGS[name](), base, tmp_path / "adapter")
    theirs = row_by_row(model, base, TEXTS)
    effect = np.abs(theirs - row_by_row(plain_classifier(base), base, TEXTS)).max()
    assert effect > 0.02
    exact = row_by_row(model.double(), base, TEXTS)
    error, own = (np.abs(x - exact).max() for x in (katei_logits(tmp_path / "adapter", TEXTS, base), theirs))
    # two draws of the same rounding noise, amplified by an adapter far from its start: their largest of 14 numbers
    # may differ by a few times (2.2 was seen); an adapter read wrongly is off by about its whole effect
    assert error <= 5 * own + 1e-6, f"error {error:.1e}, peft's own {own:.1e}"
    assert error < 0.01 * effect


def test_an_adalora_adapter_that_peft_has_pruned(bases: dict[str, Path], tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=6, target_r=2, lora_alpha=9, tinit=1, tfinal=2, deltaT=1, total_step=12, **QV
    )
    model = peft.get_peft_model(plain_classifier(bases["llama"]), config)
    perturb_(model, std=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, labels = torch.tensor([[1, 30, 60, 90], [1, 40, 50, 80]]), torch.tensor([0, 1])
    for step in range(1, 13):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval()
    with quiet():
        model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    kept = [sum(pattern) for pattern in written["rank_pattern"].values()]
    assert sum(kept) < 6 * len(kept)
    # a whole rank pattern is what peft writes; its own reader is the reference
    theirs = row_by_row(
        peft.PeftModel.from_pretrained(plain_classifier(bases["llama"]), tmp_path / "adapter").eval(),
        bases["llama"],
        TEXTS,
    )
    assert np.abs(theirs - row_by_row(model, bases["llama"], TEXTS)).max() < 5e-5
    assert np.abs(katei_logits(tmp_path / "adapter", TEXTS, bases["llama"]) - theirs).max() < 5e-5


def test_llama_adapter_of_peft_needs_its_head_beside_it(bases: dict[str, Path], tmp_path: Path) -> None:
    base, folder = bases["llama"], tmp_path / "adapter"
    config = peft.AdaptionPromptConfig(task_type="SEQ_CLS", adapter_len=6, adapter_layers=3)
    model = made_in_peft(config, base, folder)
    with pytest.raises(AdapterError, match="no score head") as refused:
        read_adapter(folder)
    assert "head.safetensors" in (refused.value.hint or "")
    save_file({"score.weight": model.score.weight.detach().clone()}, folder / "head.safetensors")
    theirs = row_by_row(model, base, TEXTS)
    assert np.abs(theirs - row_by_row(plain_classifier(base), base, TEXTS)).max() > 0.01
    assert np.abs(katei_logits(folder, TEXTS, base) - theirs).max() < 5e-5


def test_predict_and_evaluate_take_a_peft_folder_with_three_classes(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    model = made_in_peft(PEFT_CONFIGS["lora"](), base, tmp_path / "adapter", classes=3)
    theirs = torch.softmax(torch.tensor(row_by_row(model, base, TEXTS)), 1).numpy()
    labels = theirs.argmax(1)
    rows = write_tsv(tmp_path / "rows.tsv", list(zip(TEXTS, labels.tolist(), strict=True)), ("0", "1", "2"))
    result = api.predict(tmp_path / "adapter", rows, out=tmp_path / "out.jsonl", model=str(base))
    assert result["rows"] == len(TEXTS)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    ours = np.array([[float(row[f"probability_{c}"]) for c in range(3)] for row in written])
    assert np.abs(ours - theirs).max() < 2e-5
    assert [row["prediction"] for row in written] == [str(c) for c in labels]
    assert api.evaluate(tmp_path / "adapter", rows, model=str(base))["accuracy"] == 1.0


def test_the_base_that_peft_names_is_found_without_model(bases: dict[str, Path], tmp_path: Path) -> None:
    model = made_in_peft(PEFT_CONFIGS["ia3"](), bases["llama"], tmp_path / "adapter")
    ours = katei_logits(tmp_path / "adapter", TEXTS)
    assert np.abs(ours - row_by_row(model, bases["llama"], TEXTS)).max() < 5e-5


# -------------------------------------------------------------------- options katei does not implement

UNKNOWN_OPTIONS: dict[str, tuple[str, Callable[[], Any]]] = {
    "dora": ("use_dora", lambda: peft.LoraConfig(task_type="SEQ_CLS", use_dora=True, **QV)),
    "bias all": ("bias", lambda: peft.LoraConfig(task_type="SEQ_CLS", bias="all", **QV)),
    "bias lora_only": ("bias", lambda: peft.LoraConfig(task_type="SEQ_CLS", bias="lora_only", **QV)),
    "some layers": ("layers_to_transform", lambda: peft.LoraConfig(task_type="SEQ_CLS", layers_to_transform=[1], **QV)),
    "layer 0": ("layers_to_transform", lambda: peft.LoraConfig(task_type="SEQ_CLS", layers_to_transform=0, **QV)),
    "alpha pattern": ("alpha_pattern", lambda: peft.LoraConfig(task_type="SEQ_CLS", alpha_pattern={"q_proj": 3}, **QV)),
    "rank pattern": ("rank_pattern", lambda: peft.LoraConfig(task_type="SEQ_CLS", rank_pattern={"q_proj": 3}, **QV)),
    "lora bias": ("lora_bias", lambda: peft.LoraConfig(task_type="SEQ_CLS", lora_bias=True, **QV)),
    "replicated layers": (
        "layer_replication",
        lambda: peft.LoraConfig(task_type="SEQ_CLS", layer_replication=[(0, 3), (2, 4)], **QV),
    ),
    "trained tokens": (
        "trainable_token_indices",
        lambda: peft.LoraConfig(task_type="SEQ_CLS", trainable_token_indices=[3, 4], **QV),
    ),
    "pissa": ("init_lora_weights", lambda: peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights="pissa", **QV)),
    "olora": ("init_lora_weights", lambda: peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights="olora", **QV)),
    "whole modules": (
        "embed_tokens",
        lambda: peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["embed_tokens"], **QV),
    ),
    "a regular expression": ("target_modules", lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=".*q_proj")),
    "one layer's modules": (
        "missing layers.0",
        lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=["layers.1.self_attn.q_proj"]),
    ),
    "adalora on some layers": (
        "layers_to_transform",
        lambda: peft.AdaLoraConfig(task_type="SEQ_CLS", layers_to_transform=[1], total_step=9, **QV),
    ),
    "ia3 with another scaled input": (
        "scales the inputs of",
        lambda: peft.IA3Config(task_type="SEQ_CLS", target_modules=["o_proj"], feedforward_modules=["o_proj"]),
    ),
    "a method katei lacks": ("VERA", lambda: peft.VeraConfig(task_type="SEQ_CLS", **QV)),
}


@pytest.mark.parametrize("name", UNKNOWN_OPTIONS)
def test_an_option_that_changes_the_function_is_refused_by_name(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    option, config = UNKNOWN_OPTIONS[name]
    made_in_peft(config(), bases["llama"], tmp_path / "adapter")
    with pytest.raises(AdapterError) as refused:
        katei_logits(tmp_path / "adapter", TEXTS, bases["llama"])
    assert option in refused.value.message
    assert refused.value.hint


def test_an_option_peft_may_invent_tomorrow_is_refused_unless_off(bases: dict[str, Path], tmp_path: Path) -> None:
    made_in_peft(PEFT_CONFIGS["lora"](), bases["llama"], tmp_path)
    edit_json(tmp_path / "adapter_config.json", use_tomorrow=False)
    read_adapter(tmp_path)
    edit_json(tmp_path / "adapter_config.json", use_tomorrow=True)
    with pytest.raises(AdapterError, match="use_tomorrow"):
        read_adapter(tmp_path)


def test_every_field_of_pefts_configs_is_accounted_for() -> None:
    """A new peft with a new field makes this fail, and somebody decides whether it changes the function."""
    from katei.methods.saved import NO_MATTER, PROMPT_SHAPE, PROMPT_TYPES, READ

    refused_unless_off = {
        "LORA": "alora_invocation_tokens alpha_pattern arrow_config bias kasa_config layer_replication layers_to_transform "
        "lora_bias monteclora_config rank_pattern target_parameters trainable_token_indices use_bdlora use_dora use_qalora",
        "ADALORA": "alora_invocation_tokens alpha_pattern arrow_config bias kasa_config layer_replication "
        "layers_to_transform lora_bias monteclora_config target_parameters trainable_token_indices use_bdlora use_dora "
        "use_qalora",
        "PREFIX_TUNING": "prefix_projection",
    }
    for kind, cls in {
        "LORA": peft.LoraConfig,
        "ADALORA": peft.AdaLoraConfig,
        "IA3": peft.IA3Config,
        "PROMPT_TUNING": peft.PromptTuningConfig,
        "P_TUNING": peft.PromptEncoderConfig,
        "PREFIX_TUNING": peft.PrefixTuningConfig,
        "ADAPTION_PROMPT": peft.AdaptionPromptConfig,
    }.items():
        known = {
            *READ[kind],
            *NO_MATTER[""].split(),
            *NO_MATTER[kind].split(),
            *refused_unless_off.get(kind, "").split(),
        }
        known |= set(PROMPT_SHAPE) if kind in PROMPT_TYPES else set()
        assert set(cls.__dataclass_fields__) - known == set(), kind


# -------------------------------------------------------------------- damaged folders


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickled_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


WEIGHTS, CONFIG, NOTE = "adapter_model.safetensors", "adapter_config.json", "katei.json"
SOME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
SCORE = "base_model.model.score.weight"
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights cut short": ("not a whole safetensors file", lambda f: cut(f / WEIGHTS)),
    "weights empty": ("not a whole safetensors file", lambda f: (f / WEIGHTS).write_bytes(b"")),
    "weights missing": ("adapter_model.safetensors is missing", lambda f: (f / WEIGHTS).unlink()),
    "pickled weights only": ("does not read pickled weights", pickled_only),
    "config missing": ("adapter_config.json is missing", lambda f: (f / CONFIG).unlink()),
    "config not JSON": ("cannot be read", lambda f: (f / CONFIG).write_text("{")),
    "config a list": ("not a JSON object", lambda f: (f / CONFIG).write_text("[]")),
    "config nested too deep": ("cannot be read", lambda f: (f / CONFIG).write_text("[" * 100_000)),
    "config not UTF-8": ("cannot be read", lambda f: (f / CONFIG).write_bytes(b'{"r": "\xff"}')),
    "config without rank": ("has no 'r'", lambda f: (f / CONFIG).write_text('{"peft_type": "LORA"}')),
    "config of no type": ("does not know peft's None", lambda f: (f / CONFIG).write_text("{}")),
    "rank is a word": ("r", lambda f: edit_json(f / CONFIG, r="eight")),
    "rank is 0": ("rank is 0", lambda f: edit_json(f / CONFIG, r=0)),
    "alpha is a word": ("alpha", lambda f: edit_json(f / CONFIG, lora_alpha="x")),
    "targets is a number": ("target_modules", lambda f: edit_json(f / CONFIG, target_modules=3)),
    "config and note disagree": ("says alpha", lambda f: edit_json(f / CONFIG, lora_alpha=16)),
    "config of another method": ("says method", lambda f: edit_json(f / NOTE, method="ia3", settings={})),
    "note not JSON": ("cannot be read", lambda f: (f / NOTE).write_text("labels")),
    "note without labels": ("not a note katei wrote", lambda f: (f / NOTE).write_text('{"name": "x"}')),
    "note with numbers for labels": (
        "labels.0: input should be a valid string",
        lambda f: edit_json(f / NOTE, labels=[0, 1]),
    ),
    "note with one label": ("labels must be", lambda f: edit_json(f / NOTE, labels=["a"])),
    "note with labels as a word": ("labels: input should be a valid array", lambda f: edit_json(f / NOTE, labels="ab")),
    "note with a label twice": ("labels must be", lambda f: edit_json(f / NOTE, labels=["a", "a"])),
    "note with a method unknown": ("no method is named", lambda f: edit_json(f / NOTE, method="lorra")),
    "note with a setting unknown": ("unknown key 'rnk'", lambda f: edit_json(f / NOTE, settings={"rnk": 8})),
    "note with settings a list": ("not a note katei wrote", lambda f: edit_json(f / NOTE, settings=[1])),
    "note with max_length a word": ("not a note katei wrote", lambda f: edit_json(f / NOTE, max_length="long")),
    "note with max_length 0": ("max_length is 0", lambda f: edit_json(f / NOTE, max_length=0)),
    "note with base a number": ("not a note katei wrote", lambda f: edit_json(f / NOTE, base=3)),
    "note with a text column null": ("not a note katei wrote", lambda f: edit_json(f / NOTE, text_column=None)),
    "three labels, two rows in the head": ("the head has shape", lambda f: edit_json(f / NOTE, labels=["a", "b", "c"])),
    "a tensor missing": ("missing layers.1", lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(SOME))),
    "a tensor too many": ("unexpected", lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update(x=torch.ones(2)))),
    "a tensor of another shape": (
        "has shape (8, 3)",
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({SOME: torch.ones(8, 3)})),
    ),
    "a tensor that is transposed": (
        "has shape",
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({SOME: t[SOME].T.contiguous()})),
    ),
    "not a number": ("not numbers", lambda f: edit_tensors(f / WEIGHTS, lambda t: t[SOME].fill_(float("nan")))),
    "infinite head": ("not numbers", lambda f: edit_tensors(f / WEIGHTS, lambda t: t[SCORE].fill_(float("inf")))),
    "no head": ("no score head", lambda f: edit_tensors(f / WEIGHTS, lambda t: t.pop(SCORE))),
    "two heads": ("2 score heads", lambda f: save_file({"score.weight": torch.ones(2, 64)}, f / "head.safetensors")),
    "head of one dimension": (
        "the head has shape",
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({SCORE: torch.ones(64)})),
    ),
    "head of another width": (
        "the head has shape",
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({SCORE: torch.ones(2, 32)})),
    ),
    "whole numbers for weights": (
        "whole numbers",
        lambda f: edit_tensors(f / WEIGHTS, lambda t: t.update({SOME: torch.ones(8, 64, dtype=torch.int8)})),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_adapter_says_what_is_wrong(name: str, llama: Trained, tmp_path: Path) -> None:
    message, damage = DAMAGE[name]
    folder = tmp_path / "lora"
    shutil.copytree(llama.trial("lora"), folder)
    damage(folder)
    with pytest.raises(UserError) as refused:
        katei_logits(folder, ["x"])
    assert message in refused.value.message
    assert refused.value.hint
    assert str(folder) in str(refused.value)


def test_another_base_is_refused_by_its_fingerprint(llama: Trained, tmp_path: Path) -> None:
    other = tiny_base_folder(tmp_path, "llama", seed=1)
    with pytest.raises(AdapterError, match="other weights"):
        katei_logits(llama.trial("lora"), ["x"], other)


def test_another_shape_of_base_is_refused_where_peft_gave_no_fingerprint(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    made_in_peft(PEFT_CONFIGS["lora"](), bases["llama"], tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"missing layers\.4"):
        katei_logits(tmp_path / "adapter", ["x"], tiny_base_folder(tmp_path, "llama", layers=5))


def test_prefix_projection_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with quiet():
        config = peft.PrefixTuningConfig(task_type="SEQ_CLS", prefix_projection=True, encoder_hidden_size=16, **DIMS)
        made_in_peft(config, bases["llama"], tmp_path / "adapter")
    with pytest.raises(AdapterError, match="prefix_projection"):
        read_adapter(tmp_path / "adapter")
