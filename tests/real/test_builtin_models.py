"""The built-in models, for real: the packed forward against transformers, and learning on texts nobody here wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from katei import api
from katei.base.load import load_base
from katei.base.packed import Base
from katei.base.stream import PackedRow
from katei.data import load_dataset
from katei.methods import HeadOnly
from katei.methods.contract import TrialFacts

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_packed_poems_equal_transformers_a_row_at_a_time(name: str) -> None:
    loaded = load_base(name)
    texts = load_dataset("poems").train.texts[:6]
    ids = [loaded.tokenizer(text)["input_ids"] for text in texts]
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs_BD = torch.stack([loaded.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ids])
    base = Base(loaded.model, loaded.tokenizer)
    stack = HeadOnly().build(base, 2, [0], [TrialFacts(1)])
    stream = base.stream([PackedRow(0, 0, row) for row in ids], [stack])
    with torch.no_grad(), base.running(stream, [stack]):
        ours_BD = stream.unsort(base.pooled(stream, [stack]))
    assert (ours_BD - theirs_BD).abs().max() / theirs_BD.abs().max() < 1e-4


def topics(folder: Path, names: tuple[str, ...]) -> Path:
    """A data folder of questions by topic, from the package chatterbot-corpus (BSD-3-Clause), Japanese."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    assert spec is not None
    assert spec.submodule_search_locations
    corpus = Path(spec.submodule_search_locations[0]) / "data" / "japanese"
    rows: dict[str, list[str]] = {"train": [], "test": []}
    seen: set[str] = set()
    for name in names:
        conversations = yaml.safe_load((corpus / f"{name}.yml").read_text(encoding="utf-8"))["conversations"]
        for i, conversation in enumerate(conversations):
            text = " ".join(str(conversation[0]).split())
            if text and text not in seen:
                seen.add(text)
                rows["test" if i % 3 == 2 else "train"].append(f"{text}\t{name}")
    for split, lines in rows.items():
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    return folder


def test_lora_learns_topics_that_nobody_here_wrote(tmp_path: Path) -> None:
    data = topics(tmp_path, ("ai", "emotion", "psychology"))
    study = api.train(
        data, method="lora", model="gemma3-270m", epochs=3, batch_size=4, max_length=64, out=tmp_path / "run"
    )
    test = study.results["trials"][0]["test"]
    assert test["rows"] > 60
    assert test["accuracy_interval"][0] > study.results["majority_accuracy"], test
