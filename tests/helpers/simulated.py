"""Run folders that no base was trained for: every key of results.json filled, answers drawn at random with a known skill.

simulated_run(folder, design="folds")   two repeats of five folds, tuned, with reference points and a learning curve
simulated_run(folder, design="given")   one test set, one seed
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from katei.data import load_dataset
from katei.methods import BOOK
from katei.study.comparison import REFERENCES, Outcome, Rows
from katei.study.recipe import Recipe
from katei.study.results import test_scores
from katei.study.statistics import compare_outcomes
from katei.study.verdicts import more_labels, verdict
from tests.helpers.rows import some_texts

HOSTILE = "<script>alert('詩')</script> & <img src=https://example.invalid/x.png> \"引用\""
SKILL = {"lora": 2.2, "adalora": 1.9, "prompt-tuning": 0.8, "p-tuning": 1.0, "ia3": 1.9, "llama-adapter": 2.1}
SKILL |= {"majority class": 0.0, "tf-idf": 1.1, "head": 1.2, "zero-shot": 0.3}
TOTAL = 134_515_008


@dataclass
class _Table:
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)


def simulated_run(
    folder: Path, *, design: str = "folds", labels: tuple[str, ...] = ("冷たい", "warm"), rows: int = 80, seed: int = 0
) -> Path:
    """Write data and run; returns the run folder. The first row's text is hostile, and every method gets it wrong."""
    rng = np.random.default_rng(seed)
    data, run = folder / "data", folder / "run"
    texts = [(HOSTILE, 0), *some_texts(rows - 1, seed=seed, classes=len(labels))]
    data.mkdir(parents=True)
    split = "train" if design == "folds" else "test"
    for name in {"train", split}:
        lines = [json.dumps({"poem": text, "label": labels[c]}, ensure_ascii=False) + "\n" for text, c in texts]
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    dataset = load_dataset(data)
    own = dataset.splits[split]
    label_E = np.array(own.labels)
    repeats, folds = (2, 5) if design == "folds" else (1, 1)
    fold_SE = np.zeros((repeats, rows), dtype=int)
    for s, c in np.ndindex(repeats, len(labels)):  # stratified
        inside = np.flatnonzero(label_E == c)
        fold_SE[s, inside] = rng.permutation(np.arange(len(inside)) % folds)

    references = REFERENCES if design == "folds" else ()
    outcomes, trials, table = [], [], _Table()
    for method in (*BOOK, *references):
        margin_SE = rng.normal(SKILL[method], 1.0, (repeats, rows))
        margin_SE[:, 0] = -3.0
        score_SEC = np.where(np.arange(len(labels)) == label_E[:, None], margin_SE[..., None], 0.0)
        if method == "majority class":
            score_SEC = np.broadcast_to(np.log(np.bincount(label_E)), score_SEC.shape)
        probability_SEC = np.exp(score_SEC) / np.exp(score_SEC).sum(-1, keepdims=True)
        outcomes.append(Outcome(method, probability_SEC.argmax(-1), probability_SEC))
        for s in range(repeats):
            for fold in range(folds):
                part = f"-r{s}f{fold}" if design == "folds" else ""
                inside = np.flatnonzero(fold_SE[s] == fold)
                where = {"seed": 0, "repeat": s, "fold": fold} if part else {"seed": 0, "repeat": None, "fold": None}
                if method in BOOK:
                    scores = test_scores(probability_SEC[s, inside], tuple(label_E[inside]))
                    trials.append(_trial(method, part, where, vars(scores), rng, chosen=True))
                    if part:
                        trials.append(_trial(method, f"{part}-s1", where, None, rng, chosen=False))
                for e in inside:
                    p_C = probability_SEC[s, e]
                    answer = {f"probability_{name}": float(p) for name, p in zip(labels_of(dataset), p_C, strict=True)}
                    table.add(
                        trial=f"{method}{part}",
                        method=method,
                        **where,
                        split=split,
                        line=own.lines[e],
                        role="test",
                        label=labels_of(dataset)[label_E[e]],
                        prediction=labels_of(dataset)[int(p_C.argmax())],
                        **answer,
                    )
    rows_ = Rows(label_E, dataset.label_names, fold_SE if design == "folds" else None)
    comparison = compare_outcomes(outcomes, rows_, references=references)
    recipe = Recipe(model="smollm2", data=str(data), methods=BOOK).to_toml()
    results = {
        "labels": list(dataset.label_names),
        "majority_accuracy": 0.5,
        "verdict": verdict(comparison),
        "trials": trials,
        "design": {
            "kind": design, "rows": rows, "folds": folds, "repeats": repeats, "seeds": 1, "tune": 8 if references else 0,
            "train_rows": rows, "valid_rows": 0, "test_rows": 0, "minimum_detectable_difference": 0.17,
            "text": f"{repeats} repeats of {folds} folds.",
        },
        "comparison": comparison.as_json(),
        "references": [{"name": name, "note": f"note of {name}"} for name in references],
        "tuning": _tuning(trials) if references else None,
        "learning_curve": _learning_curve(rng) if references else None,
    }  # fmt: skip
    environment = {
        "katei": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "machine": "a laptop", "model": "smollm2",
        "seconds": {"load": 3.2, "train": 4210.0, "evaluate": 97.5, "total": 4311.0},
        "memory": {"planned_bytes": 2_950_000_000, "peak_bytes": 2_871_234_560},
        "methods": {m: {"planned_bytes": 900_000_000 + 90_000_000 * i, "seconds": 400.0 + 90 * i} for i, m in enumerate(BOOK)},
        "warnings": ["2 texts of train are cut to 200 tokens."],
    }  # fmt: skip
    run.mkdir()
    (run / "recipe.toml").write_text(recipe, encoding="utf-8")
    (run / "identity").write_text(sha256((recipe + dataset.sha256).encode()).hexdigest() + "\n", encoding="utf-8")
    (run / "results.json").write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    pq.write_table(pa.table(table.columns), run / "predictions.parquet")
    return run


def labels_of(dataset: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = dataset.label_names
    return names


def _trial(
    method: str,
    part: str,
    where: dict[str, Any],
    test: dict[str, Any] | None,
    rng: np.random.Generator,
    *,
    chosen: bool,
) -> dict[str, Any]:
    fall = np.exp(-np.arange(8) / (1.2 + rng.random()))
    epochs = [
        {
            "epoch": e + 1,
            "train_loss": float(0.05 + 0.9 * fall[e]),
            "valid_loss": float(0.35 + 0.5 * fall[e] + 0.03 * max(0, e - 4) + 0.04 * rng.random()),
            "valid_roc_auc": float(0.9 - 0.3 * fall[e]),
            "valid_accuracy": float(0.85 - 0.3 * fall[e]),
        }
        for e in range(8 if chosen else 3)
    ]
    return {
        "name": f"{method}{part}", "method": method, **where, "trainable": 1000 * (1 + BOOK.index(method)), "total": TOTAL,
        "finished": "done" if chosen else "racing", "best_epoch": None, "ranks": None, "epochs": epochs, "test": test,
        "setting": 0 if chosen else 1, "settings": {"learning_rate": 0.001 if chosen else 0.03}, "chosen": chosen, "share": 1.0,
    }  # fmt: skip


def _tuning(trials: list[dict[str, Any]]) -> dict[str, Any]:
    chosen = [t for t in trials if t["chosen"]]
    return {
        "settings_per_method": 8,
        "searched": {m: {"learning_rate": [1e-5, 1e-2], "rank": [1, 2, 4, 8]} for m in BOOK},
        "stopped_early": 140,
        "stopped_by_racing": 131,
        "epochs_run": 1212,
        "epochs_full": 3840,
        "share_saved": 0.684,
        "chosen": [
            {
                **{key: t[key] for key in ("method", "repeat", "fold", "setting", "settings")},
                "valid_loss": min(e["valid_loss"] for e in t["epochs"]),
            }
            for t in chosen
        ],
    }


def _learning_curve(rng: np.random.Generator) -> dict[str, Any]:
    points = []
    for method in ("lora", "ia3", "head"):
        for share in (0.25, 0.5, 1.0):
            accuracy = 0.7 + 0.2 * share**0.5 - 0.03 * rng.random()
            point = {"method": method, "share": share, "train_rows": int(40 * share), "accuracy": accuracy}
            point |= {"accuracy_interval": [accuracy - 0.09, min(accuracy + 0.08, 1.0)]}
            points.append(point | {"roc_auc": accuracy + 0.03, "roc_auc_interval": [accuracy - 0.05, 0.99]})
    doubled = {"method": "lora", "half_rows": 20, "all_rows": 40, "margin": 0.05, "answer": "yes"}
    doubled |= {"gain": 0.06, "interval": [0.01, 0.11]}
    return {"points": points, "last_doubling": doubled, "verdict": more_labels(doubled)}
