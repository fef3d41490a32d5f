"""Does an adapter answer the same wherever it goes? Every method × every way out, against what loads it there.

    python -m benchmarks.round_trips            a tiny random model: every cell, a minute
    python -m benchmarks.round_trips --real     and SmolLM2-135M, some minutes more

Writes the tables of docs/round_trips.md between its markers. A cell is the largest difference of a class score (logit) between
katei's adapter on its base and the other side, and the share of rows with the same label. Adapters are far from their start:
trained at a learning rate much too high (tiny), or random (SmolLM2).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tests.helpers.llama_cpp import readable_base, running
from tests.helpers.models import perturb_, settings
from tests.helpers.peft_reference import peft_config
from tests.helpers.serving import serving
from tests.helpers.trained import TEXTS, katei_logits, plain_classifier, row_by_row, train_study
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from katei import api
from katei.base.load import load_base, load_tokenizer
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.core.errors import UserError
from katei.data import load_dataset
from katei.methods import METHODS
from katei.methods.contract import TrialFacts
from katei.methods.saved import AdapterNote, read_adapter, save_adapter
from katei.ship.adapters import note_of, open_adapter
from katei.ship.export import LOW_RANK
from katei.ship.models import save_full
from katei.ship.serve.shelf import load_shelf
from katei.sklearn import PeftClassifier

DOCUMENT = Path(__file__).parent.parent / "docs" / "round_trips.md"
Logits = NDArray[np.float64]
EXITS = (
    "katei → katei",
    "predict → file",
    "serve → HTTP",
    "scikit-learn",
    "katei → peft",
    "peft → katei",
    "merged → transformers",
    "GGUF fp32 → transformers",
    "GGUF fp32 → llama.cpp",
    "GGUF fp16 → llama.cpp",
    "GGUF LoRA → llama.cpp",
)


class Adapter:
    """One saved adapter, its base, and katei's own answer."""

    def __init__(self, run: Path, name: str, base: Path, texts: list[str], scratch: Path, data: Path):
        self.run, self.name, self.base, self.texts, self.data = run, name, base, texts, data
        self.scratch = scratch / name
        self.scratch.mkdir()
        self.folder = run / "trials" / name
        self.method = METHODS[name]
        self.exact = katei_logits(self.folder, texts)

    def again(self) -> tuple[Logits, Logits]:
        base, stack, note = open_adapter(self.folder, say=str)
        target = self.scratch / "again"
        target.mkdir()
        if self.name == "full":
            save_full(target, base, stack, note)
        else:
            method = read_adapter(self.folder).method
            save_adapter(target, stack, 0, method.saved_as(), _as_saved(note, method), str(self.base))
        return self.exact, katei_logits(target, self.texts)

    def predicted(self) -> tuple[Logits, Logits]:
        rows, out = self.scratch / "rows.jsonl", self.scratch / "predicted.jsonl"
        rows.write_text("".join(json.dumps({"poem": text}) + "\n" for text in self.texts), encoding="utf-8")
        api.predict(self.folder, rows, out=out)
        labels = note_of(self.folder).labels
        answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        return self._from_probabilities([[float(row[f"probability_{label}"]) for label in labels] for row in answers])

    def served(self) -> tuple[Logits, Logits]:
        with serving(load_shelf([self.folder], say=str)) as running:
            answers = running.post("/classify", {"texts": self.texts}).json["results"]
        return self._from_probabilities(
            [list(told["probabilities"].values()) for row in answers for told in row.values()]
        )

    def in_sklearn(self) -> tuple[Logits, Logits]:
        """Trained there, and read from its folder."""
        y = [i % 2 for i in range(len(self.texts))]
        classifier = PeftClassifier(
            self.name, str(self.base), settings=note_of(self.folder).settings, epochs=2, learning_rate=0.01
        )
        told_EC = classifier.fit(self.texts, y).predict_proba(self.texts)
        return _centred(katei_logits(classifier.folder_, self.texts)), _centred(np.log(told_EC))

    def _from_probabilities(self, probabilities: list[list[float]]) -> tuple[Logits, Logits]:
        """What probabilities say of the logits: their differences."""
        return _centred(self.exact), _centred(np.log(np.array(probabilities)))

    def to_peft(self) -> tuple[Logits, Logits]:
        out = self.scratch / "peft"
        api.export(self.run, out=out, trial=self.name)
        classifier = plain_classifier(self.base)
        with quiet():
            model = peft.PeftModel.from_pretrained(classifier, out).eval()
        if (out / "head.safetensors").exists():
            classifier.score.weight.data.copy_(load_file(out / "head.safetensors")["score.weight"])
        return self.exact, row_by_row(model, self.base, self.texts)

    def from_peft(self) -> tuple[Logits, Logits]:
        if self.method.peft_type is None:
            raise UserError("peft has no such method")
        out, classifier = self.scratch / "from_peft", plain_classifier(self.base)
        with quiet():
            model = peft.get_peft_model(classifier, peft_config(settings(self.name), 10)).eval()
            classifier.score.weight.requires_grad_(
                self.name == "llama-adapter" or classifier.score.weight.requires_grad
            )
            rng = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn(parameter.shape, generator=rng) * 0.1
            model.save_pretrained(out)
        if self.name == "llama-adapter":
            save_file({"score.weight": classifier.score.weight.detach().clone()}, out / "head.safetensors")
        return katei_logits(out, self.texts, self.base), row_by_row(model, self.base, self.texts)

    def merged(self) -> tuple[Logits, Logits]:
        folder = self.folder
        if self.name != "full":
            folder = self.scratch / "merged"
            api.merge(self.run, out=folder, trial=self.name, data=self.data)
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        return self.exact, row_by_row(model, folder, self.texts)

    def gguf(self, precision: str) -> Path:
        out = self.scratch / precision
        if not out.exists():
            api.export(self.run, out=out, format="gguf", trial=self.name, precision=precision, data=self.data)
        return out

    def gguf_in_transformers(self) -> tuple[Logits, Logits]:
        out = self.gguf("fp32")
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32).eval()
        head_CD = load_file(out / "head.safetensors")["score.weight"]
        with torch.no_grad():
            pooled = [model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in self.rows()]
            return self.exact, (torch.stack(pooled) @ head_CD.T).double().numpy()

    def gguf_in_llama_cpp(self, precision: str) -> tuple[Logits, Logits]:
        return self._embedded(self.gguf(precision), self.gguf(precision) / "model.gguf", None)

    def gguf_lora(self) -> tuple[Logits, Logits]:
        out, base = self.scratch / "lora", self.scratch.parent / "base"
        api.export(self.run, out=out, format="gguf-lora", trial=self.name)
        if not base.exists():
            api.export(out=base, format="gguf", model=str(self.base), precision="fp32")
        return self._embedded(out, base / "model.gguf", out / "adapter.gguf")

    def _embedded(self, out: Path, model: Path, lora: Path | None) -> tuple[Logits, Logits]:
        head_CD = load_file(out / "head.safetensors")["score.weight"].double().numpy()
        with running(model, lora=lora, pooling="last") as runtime:
            rows = []
            for text, ids in zip(self.texts, self.rows(), strict=True):
                assert runtime.tokenize(text)[: len(ids)] == ids, text
                rows.append(runtime.embedding(ids))
        return self.exact, np.stack(rows) @ head_CD.T

    def rows(self) -> list[list[int]]:
        tokenizer: Any = load_tokenizer(str(self.base))
        longest = note_of(self.folder).max_length
        return [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in self.texts]

    def cells(self) -> list[str]:
        ways: list[Callable[[], tuple[Logits, Logits]]] = [
            self.again,
            self.predicted,
            self.served,
            self.in_sklearn,
            self.to_peft,
            self.from_peft,
            self.merged,
            self.gguf_in_transformers,
            lambda: self.gguf_in_llama_cpp("fp32"),
            lambda: self.gguf_in_llama_cpp("fp16"),
            self.gguf_lora,
        ]
        peft_knows, merges, low_rank = self.method.peft_type is not None, self.method.merges, self.name in LOW_RANK
        there = [True, True, True, True, peft_knows, peft_knows, merges, merges, merges, merges, low_rank]
        return [_cell(way, exists) for way, exists in zip(ways, there, strict=True)]


def _centred(x_EC: Logits) -> Logits:
    centred: Logits = x_EC - x_EC.mean(1, keepdims=True)
    return centred


def _as_saved(note: Any, method: Any) -> Any:
    """P-tuning is loaded as prompt tuning: its vectors are all that is left of it."""
    saved = method.saved_as()
    return replace(note, method=saved.name, settings=saved.settings())


def _cell(way: Callable[[], tuple[Logits, Logits]], exists: bool) -> str:
    """A way that should be there and is not, or the other way round, stops the benchmark."""
    try:
        ours, theirs = way()
    except UserError:
        if exists:
            raise
        return "–"
    assert exists
    same = float((ours.argmax(1) == theirs.argmax(1)).mean())
    difference = np.abs(ours - theirs).max()
    return f"{difference:.0e}, {same:.0%}" if difference else f"0, {same:.0%}"


def table(names: list[str], make: Callable[[str], Adapter]) -> list[str]:
    lines = ["| method | " + " | ".join(EXITS) + " |", "|---" * (len(EXITS) + 1) + "|"]
    for name in names:
        lines.append(f"| `{name}` | " + " | ".join(make(name).cells()) + " |")
        print(lines[-1], flush=True)
    return lines


def tiny(scratch: Path) -> list[str]:
    study = train_study(scratch, base=readable_base(scratch, "llama"))
    rows = table(list(METHODS), lambda name: Adapter(study.run, name, study.base, TEXTS, scratch, study.data))
    return [f"A tiny random Llama (3 layers, width 64), {len(TEXTS)} rows of 1 to 40 tokens.", "", *rows]


def real(scratch: Path) -> list[str]:
    """Random adapters on SmolLM2: training them first would show nothing more."""
    loaded = load_base("smollm2", device="cpu", say=print)
    base, names = Base(loaded.model, loaded.tokenizer), ["lora", "adalora", "ia3", "prompt-tuning", "prefix-tuning"]
    for name in names:
        method = METHODS[name]()
        stack = method.build(base, 2, [0], [TrialFacts(10**4)])
        perturb_(stack, size=0.02)
        folder = scratch / "run" / "trials" / name
        folder.mkdir(parents=True)
        note = AdapterNote(name, name, method.settings(), ("0", "1"), loaded.path, "", 64, "poem", {})
        save_adapter(folder, stack, 0, method, note, loaded.path)
    texts = [text for poems in ("poems", "poems-en") for text in load_dataset(poems).train.texts[:8]]
    data = scratch / "rows.jsonl"
    data.write_text("".join(json.dumps({"poem": text}) + "\n" for text in texts), encoding="utf-8")
    place = Path(loaded.path)
    rows = table(names, lambda name: Adapter(scratch / "run", name, place, texts, scratch, data))
    return [f"SmolLM2-135M, {len(texts)} poems of 64 tokens at most.", "", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="also SmolLM2-135M")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _replace("tiny", tiny(Path(folder)))
    if asked.real:
        with tempfile.TemporaryDirectory() as folder:
            _replace("real", real(Path(folder)))
    packages = ("torch", "transformers", "peft", "gguf", "xllamacpp")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    _replace("versions", [f"Python {platform.python_version()}, {versions}; CPU, one thread."])


def _replace(marker: str, lines: list[str]) -> None:
    begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
    text = DOCUMENT.read_text(encoding="utf-8")
    front, rest = text.split(begin)
    DOCUMENT.write_text(f"{front}{begin}\n" + "\n".join(lines) + f"\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
