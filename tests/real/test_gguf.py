"""The built-in bases in llama.cpp, for real: alone and with a LoRA adapter away from zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from katei import api
from katei.base.load import load_causal_lm
from katei.base.packed import Base
from katei.base.stream import PackedRow
from katei.methods import HeadOnly, LoRA
from katei.methods.contract import TrialFacts
from katei.methods.saved import AdapterNote, save_adapter
from tests.helpers.llama_cpp import running
from tests.helpers.models import perturb_

pytestmark = pytest.mark.real
PROMPTS = ["The quick brown fox", "古池や蛙飛びこむ水の音。ーー2024年！", "Hello   world\n\n 12345 it's we'LL \n x"]


@pytest.mark.parametrize(("name", "tolerance"), [("smollm2", 1e-3), ("gemma3-270m", 0.1)])
def test_llama_cpp_expects_the_same_next_token(name: str, tolerance: float, tmp_path: Path) -> None:
    loaded = load_causal_lm(name, device="cpu")
    whole: Any = loaded.model
    base = Base(whole.base_model, loaded.tokenizer)
    adapter = LoRA().build(base, 2, [0], [TrialFacts(1)])
    perturb_(adapter, size=0.02)
    note = AdapterNote("lora", "lora", LoRA().settings(), ("0", "1"), loaded.path, "", 64, "poem", {})
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", adapter, 0, LoRA(), note, loaded.path)
    api.export(tmp_path / "adapter", out=tmp_path / "lora", format="gguf-lora")
    api.export(out=tmp_path / "base", format="gguf", model=name, precision="fp32")
    alone = HeadOnly().build(base, 2, [0], [TrialFacts(1)])
    said = base.tokenize("the")[-1]
    answers = []
    for stack, lora in ((alone, None), (adapter, tmp_path / "lora" / "adapter.gguf")):
        with running(tmp_path / "base" / "model.gguf", lora=lora) as runtime:
            for prompt in PROMPTS:
                ids = base.tokenize(prompt)
                assert runtime.tokenize(prompt) == ids
                stream = base.stream([PackedRow(0, 0, ids)], [stack])
                with torch.no_grad(), base.running(stream, [stack]):
                    scores_1V = whole.get_output_embeddings()(base.pooled(stream, [stack]))
                ours = torch.log_softmax(scores_1V[0].double(), 0).numpy()
                theirs = runtime.log_probabilities(ids, base.vocabulary, said, likeliest=2000)
                known = ~np.isnan(theirs)
                assert known.sum() == 2000
                difference = np.abs(theirs[known] - ours[known]).max()
                print(json.dumps({"base": name, "lora": lora is not None, "prompt": prompt, "difference": difference}))
                assert difference < tolerance
                answers.append(ours)
    without, with_lora = np.split(np.stack(answers), 2)
    assert np.abs(without - with_lora).max() > 0.5
