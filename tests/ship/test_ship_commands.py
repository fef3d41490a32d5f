"""What comes after training, typed: generate side by side, as it comes and by heart; merge and export to GGUF."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katei import api, cli
from tests.helpers.llama_cpp import readable_base
from tests.helpers.trained import Trained, train_study

Katei = Callable[..., tuple[int, str, Any]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("typed")
    return train_study(folder, methods=("lora", "ia3", "prompt-tuning"), base=readable_base(folder, "llama"))


@pytest.fixture
def katei(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Katei:
    def run(*arguments: object) -> tuple[int, str, Any]:
        monkeypatch.setattr(sys, "argv", ["katei", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out = capsys.readouterr().out
        return int(end.value.code or 0), out, json.loads(out.splitlines()[-1])

    return run


def test_generate_side_by_side(small: Trained, katei: Katei) -> None:
    code, out, said = katei("generate", small.run, "the", "an", "--trial", "base,lora,ia3", "--new-tokens", 4)
    assert code == 0
    assert said["continuations"] == api.continuations(
        ["the", "an"], run=small.run, trials=["base", "lora", "ia3"], new_tokens=4
    )
    assert [line.split()[0] for line in out.splitlines()[:-1] if line[:4] in ("base", "lora", "ia3 ")] == [
        *("base", "lora", "ia3") * 2
    ]


def test_one_continuation_flows_and_is_printed_once(small: Trained, katei: Katei) -> None:
    _, out, said = katei("generate", small.run, "the iron", "--trial", "lora", "--new-tokens", 6, "--stop", "qqq")
    assert out.startswith("the iron" + said["continuations"][0]["continuation"])
    assert out.split("\n{")[0].count("the iron") == 1


def test_memorised_prints_a_table(small: Trained, katei: Katei) -> None:
    code, out, said = katei("generate", "--model", small.base, "--memorised", "the iron gate")
    assert code == 0
    assert said == api.memorised("the iron gate", model=str(small.base))
    assert "rank" in out
    assert "nats per token" in out
    assert (
        katei("generate", small.run, "--trial", "lora", "--memorised", "the iron gate")[2]["tokens"] != said["tokens"]
    )


def test_merge_and_export_to_gguf(small: Trained, katei: Katei, tmp_path: Path) -> None:
    code, out, said = katei("merge", small.run, "--trial", "lora", "--as", "causal-lm", "--out", tmp_path / "merged")
    assert (code, said["kind"]) == (0, "causal-lm")
    assert "likeliest next token" in out
    code, out, said = katei("export", small.run, "--trial", "ia3", "--format", "gguf", "--out", tmp_path / "gguf")
    assert code == 0
    assert "same label" in out
    assert said["agreement"]["rows"] == 8
    code, _, said = katei("export", "--model", small.base, "--format", "gguf", "--out", tmp_path / "base")
    assert (code, said["agreement"]) == (0, None)
    code, _, said = katei("export", small.run, "--trial", "lora", "--format", "gguf-lora", "--out", tmp_path / "lora")
    assert code == 0
    assert {p.name for p in tmp_path.rglob("*.gguf")} == {"model.gguf", "adapter.gguf"}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("generate",), "no prompt given"),
        (("generate", "x"), "neither a run nor a base"),
        (("generate", "RUN"), "no prompt given"),
        (("generate", "RUN", "x", "--memorised", "y", "--trial", "lora"), "has no meaning"),
        (("generate", "RUN", "x", "--trial", "lora,lorra"), "no trial named"),
        (("generate", "RUN", "x", "--trial", "lora", "--stop", ""), "stop word is empty"),
        (("merge", "RUN", "--trial", "lora", "--as", "x", "--out", "o"), "cannot merge into"),
        (("export", "--out", "o"), "no run given"),
        (("export", "RUN", "--trial", "prompt-tuning", "--format", "gguf", "--out", "o"), "nothing that prompt-tuning"),
    ],
)
def test_mistakes(
    small: Trained, katei: Katei, typed: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, said = katei(*(small.run if word == "RUN" else word for word in typed))
    assert code == 2
    assert message in said["error"]["message"]
    assert said["error"]["hint"]
    assert not (tmp_path / "o").exists()
