"""Classifying a file of texts: katei with a LoRA adapter ÷ transformers' text-classification pipeline with the merged model, rows/s.

    python -m benchmarks.predict [--quick]

The pipeline gets the plain model that `katei merge` writes and the batch size that is fastest for it, among 1, 4, 8, 16 and 32,
chosen on some of the rows. Tokenization is in both sides' time. Two files: the poems (nearly equal lengths), and poems laid
end to end to mixed lengths (log-normal, 8 to 200 tokens). The bound is what the products alone would take at the best rate.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import pipeline
from transformers.utils import logging

from benchmarks.measure import Figures, arguments, pairs, say
from benchmarks.sides import DATA, MODEL, mixed_lengths
from benchmarks.step import roofline
from katei.base.load import load_base
from katei.base.packed import Base
from katei.data import load_dataset
from katei.methods import METHODS
from katei.methods.contract import TrialFacts
from katei.methods.saved import AdapterNote, SavedAdapter, read_adapter, save_adapter
from katei.ship.models import merge_adapter
from katei.ship.predict import predict_texts

LONGEST = 200
TOLERANCE = 1e-4


@dataclass
class Scored:
    seconds: float
    probability_EC: NDArray[np.float64]


def perturbed_lora(base: Base, path: str, folder: Path) -> SavedAdapter:
    """A LoRA adapter away from its start, where it would be the base itself."""
    method = METHODS["lora"]()
    stack = method.build(base, 2, [0], [TrialFacts(1)])
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in stack.tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=rng) * 0.02)
    labels = ("first", "second")
    about = {"base": MODEL, "fingerprint": base.fingerprint, "max_length": LONGEST, "text_column": "poem"}
    note = AdapterNote("lora", "lora", method.settings(), labels, training={}, **about)  # type: ignore[arg-type]
    folder.mkdir()
    save_adapter(folder, stack, 0, method, note, path)
    return read_adapter(folder)


def files(base: Base, poems: int, mixed: int) -> dict[str, list[str]]:
    """Texts by what they are called in the figures."""
    texts = [text for split in load_dataset(DATA).splits.values() for text in split.texts]
    ids = mixed_lengths([list(base.tokenize(text)) for text in texts], mixed, longest=LONGEST - 10)
    return {"poems": (texts * 2)[:poems], "mixed lengths": [base.tokenizer.decode(row) for row in ids]}


def forward_work(base: Base, lengths: Sequence[int]) -> float:
    """Floating-point operations of the frozen products of these rows, forward; in the last layer q, o and the MLP of one token."""
    work = 0.0
    for site in base.sites.values():
        pooled_only = site.layer == base.depth - 1 and site.leaf not in ("k_proj", "v_proj")
        work += 2.0 * site.inputs * site.outputs * (len(lengths) if pooled_only else sum(lengths))
    return work


def main() -> None:
    options = arguments(__doc__).parse_args()
    figures = Figures("predict", quick=options.quick)
    n, poems, mixed, tuning, sizes = (1, 24, 12, 8, (1, 8)) if options.quick else (3, 270, 64, 32, (1, 4, 8, 16, 32))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_base(MODEL)
    base = Base(loaded.model, loaded.tokenizer, name=MODEL, fingerprint=loaded.fingerprint)
    with tempfile.TemporaryDirectory() as temporary:
        saved = perturbed_lora(base, loaded.path, Path(temporary) / "adapter")
        merged = Path(temporary) / "merged"
        sets = files(base, poems, mixed)
        merge_adapter(saved, base, merged, [base.tokenize(text) for text in sets["poems"][:4]], lambda text: None)
        stack = saved.stack(base)
        classify: Any = pipeline("text-classification", model=str(merged), device="cpu", dtype=torch.float32)

        def theirs(texts: Sequence[str], size: int) -> Scored:
            started = time.perf_counter()
            answers = classify(list(texts), batch_size=size, top_k=None, truncation=True, max_length=LONGEST)
            seconds = time.perf_counter() - started
            scores = [{answer["label"]: answer["score"] for answer in row} for row in answers]
            return Scored(seconds, np.array([[row[label] for label in saved.note.labels] for row in scores]))

        def ours(texts: Sequence[str]) -> Scored:
            started = time.perf_counter()
            probability_EC = predict_texts(base, stack, saved.note, texts)
            return Scored(time.perf_counter() - started, probability_EC)

        def check(their_run: Scored, our_run: Scored) -> None:
            change = float(np.abs(their_run.probability_EC - our_run.probability_EC).max())
            if not change <= TOLERANCE:
                sys.exit(f"probabilities differ by {change:.1e}: not timed")

        for name, texts in sets.items():
            check(theirs(texts[:tuning], 1), ours(texts[:tuning]))
            seconds = {size: theirs(texts[:tuning], size).seconds for size in sizes}
            best = min(seconds, key=seconds.__getitem__)
            tuned = ", ".join(f"{size}: {tuning / s:.1f}" for size, s in seconds.items())
            say(f"  {name}: pipeline's rows/s by batch size {tuned}")
            their_runs, our_runs = pairs(lambda t=texts, b=best: theirs(t, b), lambda t=texts: ours(t), n, check)  # type: ignore[misc]
            note = f"{len(texts)} texts; the pipeline's best batch size is {best}"
            figures.add(
                "rows/s", "rows/s", [len(texts) / r.seconds for r in their_runs], case=f"theirs, {name}", note=note
            )
            bound = len(texts) * roofline(base)[0] / forward_work(base, [len(base.tokenize(text)) for text in texts])
            rates = [len(texts) / r.seconds for r in our_runs]
            figures.add("rows/s", "rows/s", rates, case=f"ours, {name}", bound=bound, note=note)
            ratio = [t.seconds / o.seconds for t, o in zip(their_runs, our_runs, strict=True)]
            figures.add("ratio", "×", ratio, case=name, note=note)


if __name__ == "__main__":
    main()
