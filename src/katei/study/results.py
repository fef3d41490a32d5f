"""What a study came to: results.json, predictions.parquet, environment.json.

    Ended, references → outcomes on the same rows → compare_outcomes → verdict

Dimensions: S seeds or repeats · E rows · C classes.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from katei import __version__
from katei.core import metrics
from katei.core.files import write_atomic
from katei.data import Dataset
from katei.study.comparison import Comparison, Outcome, Rows
from katei.study.design import SPLITS, Cell, StudyDesign
from katei.study.fit import Fit
from katei.study.intervals import auc_interval, clopper_pearson, macro_auc
from katei.study.recipe import Recipe
from katei.study.references import Reference
from katei.study.spread import over_rows
from katei.study.statistics import compare_outcomes
from katei.study.trials import Ended, by_method
from katei.study.tuning import kept_loss, searched
from katei.study.verdicts import verdict

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TestScores:
    """Scores on one set of rows, with 95 % intervals (Clopper–Pearson; DeLong's variance in Newcombe's)."""

    rows: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    roc_auc: float | None
    roc_auc_interval: tuple[float, float] | None
    loss: float


def test_scores(probability_EC: Floats, labels: Sequence[int]) -> TestScores:
    """Scores with intervals of one set of rows."""
    label_E = np.asarray(labels)
    correct = int((probability_EC.argmax(1) == label_E).sum())
    low, high = clopper_pearson(correct, len(labels))
    area, area_interval = metrics.roc_auc(probability_EC, labels), None
    if area is not None:
        spread = over_rows(*macro_auc(probability_EC[None], label_E), label_E)
        found = auc_interval(spread, np.bincount(label_E, minlength=probability_EC.shape[1]))
        area_interval = (float(found.low), float(found.high))
    return TestScores(
        rows=len(labels),
        accuracy=correct / len(labels),
        accuracy_interval=(float(low), float(high)),
        roc_auc=area,
        roc_auc_interval=area_interval,
        loss=metrics.cross_entropy(probability_EC, labels),
    )


# -------------------------------------------------------------------- answers on the same rows


@dataclass(frozen=True)
class Answers:
    """One method's (or reference point's) probabilities of every cell's test rows, in the cells' order."""

    name: str
    by_cell: Mapping[Cell, Floats]


def answers_of(ended: Sequence[Ended]) -> tuple[list[Answers], list[str]]:
    """Of the chosen trials of each method; and the methods without numbers for every cell."""
    found, left_out = [], []
    for name, mine in by_method([e for e in ended if e.chosen]).items():
        by_cell = {e.planned.cell: e.test_EC for e in mine}
        known = {cell: p_EC for cell, p_EC in by_cell.items() if p_EC is not None}
        if len(known) == len(by_cell):
            found.append(Answers(name, known))
        else:
            left_out.append(name)
    return found, left_out


def reference_answers(references: Sequence[Reference], design: StudyDesign) -> list[Answers]:
    return [
        Answers(r.name, dict(zip(design.cells, r.probabilities, strict=True)))
        for r in references
        if r.probabilities is not None
    ]


def outcome_of(answers: Answers, design: StudyDesign) -> Outcome:
    """Seeds or repeats × rows: with folds every row's answer is that of the cell which tested it."""
    place = {row: e for e, row in enumerate(design.scored)}
    lines = _lines(design)
    classes = next(iter(answers.by_cell.values())).shape[1]
    probability_SEC = np.full((max(lines.values()) + 1, len(place), classes), np.nan)
    for cell, probability_EC in answers.by_cell.items():
        probability_SEC[lines[cell], [place[row] for row in cell.test]] = probability_EC
    assert np.isfinite(probability_SEC).all(), "every row is tested once per repeat"
    return Outcome(answers.name, probability_SEC.argmax(-1), probability_SEC)


def rows_of(design: StudyDesign, labels: Sequence[int], label_names: Sequence[str]) -> Rows:
    scored = design.scored
    place, lines = {row: e for e, row in enumerate(scored)}, _lines(design)
    fold_SE = None
    if design.folds:
        fold_SE = np.zeros((design.repeats, len(scored)), dtype=np.intp)
        for cell in design.cells:
            assert cell.fold is not None
            fold_SE[lines[cell], [place[row] for row in cell.test]] = cell.fold
    return Rows(np.array([labels[row] for row in scored]), tuple(label_names), fold_SE)


def _lines(design: StudyDesign) -> dict[Cell, int]:
    """The repeat, or the place of the seed, of each cell."""
    return {cell: i if cell.repeat is None else cell.repeat for i, cell in enumerate(design.cells)}


# -------------------------------------------------------------------- results.json


def results_of(
    ended: Sequence[Ended],
    references: Sequence[Reference],
    recipe: Recipe,
    design: StudyDesign,
    dataset: Dataset,
    learning_curve: dict[str, Any] | None,
) -> dict[str, Any]:
    labels = [label for split in dataset.splits.values() for label in split.labels]
    whole = [e for e in ended if e.planned.share == 1]
    comparison, left_out = compared(whole, references, recipe, design, labels, dataset.label_names)
    return {
        "labels": list(dataset.label_names),
        "majority_accuracy": _majority(design, labels, len(dataset.label_names)),
        "trials": [_trial_json(e, labels) for e in ended],
        "design": design.as_json(recipe.tune),
        "comparison": None if comparison is None else comparison.as_json(),
        "references": [{"name": r.name, "note": r.note} for r in references],
        "tuning": _tuning_json(whole, recipe) if recipe.tune else None,
        "learning_curve": learning_curve,
        "verdict": _said(comparison, whole, left_out),
    }


def partial_results(
    ended: Sequence[Ended], recipe: Recipe, design: StudyDesign, dataset: Dataset, planned: int
) -> dict[str, Any]:
    """What a study that was stopped came to so far: epochs, and nothing that compares half-trained methods."""
    labels = [label for split in dataset.splits.values() for label in split.labels]
    done = sum(e.finished is not None for e in ended)
    return {
        "partial": True,
        "labels": list(dataset.label_names),
        "trials": [_trial_json(e, labels) for e in ended],
        "design": design.as_json(recipe.tune),
        "comparison": None,
        "verdict": f"Stopped when {done} of {planned} trials had ended: nothing is compared yet. The same command goes on.",
    }


def compared(
    whole: Sequence[Ended],
    references: Sequence[Reference],
    recipe: Recipe,
    design: StudyDesign,
    labels: Sequence[int],
    label_names: Sequence[str],
) -> tuple[Comparison | None, list[str]]:
    """The comparison, None without test rows; and the methods that could not be part of it."""
    if not design.rows:
        return None, []
    found, left_out = answers_of(whole)
    outcomes = [outcome_of(answers, design) for answers in (*found, *reference_answers(references, design))]
    if not outcomes:
        return None, left_out
    named = [o.method for o in outcomes if o.method in recipe.references]
    named = named if len(named) < len(outcomes) else []  # nothing else is there to beat them
    rows = rows_of(design, labels, label_names)
    return compare_outcomes(outcomes, rows, margin=recipe.margin, references=named), left_out


def _said(comparison: Comparison | None, whole: Sequence[Ended], left_out: Sequence[str]) -> str:
    diverged = [e.trial.name for e in whole if e.finished == "diverged" and e.chosen]
    said = [f"{', '.join(diverged)} diverged: try a smaller learning rate."] if diverged else []
    if left_out and comparison is not None:
        said.append(f"Not compared: {', '.join(left_out)}.")
    none = "No test rows, so nothing can be said about accuracy." if not left_out else ""
    return " ".join([*said, verdict(comparison) if comparison is not None else none]).strip()


def _majority(design: StudyDesign, labels: Sequence[int], classes: int) -> float | None:
    """Accuracy of always answering the commonest class of the training rows."""
    if not design.rows:
        return None
    label_E = np.asarray(labels)
    right = []
    for cell in design.cells:
        commonest = np.bincount(label_E[list(cell.train)], minlength=classes).argmax()
        right.append(label_E[list(cell.test)] == commonest)
    return float(np.concatenate(right).mean())


def _trial_json(ended: Ended, labels: Sequence[int]) -> dict[str, Any]:
    planned, trial = ended.planned, ended.trial
    test = None
    if ended.test_EC is not None:
        test = asdict(test_scores(ended.test_EC, [labels[row] for row in planned.cell.test]))
    return {
        "name": trial.name,
        "method": planned.method,
        "seed": trial.seed,
        "repeat": planned.cell.repeat,
        "fold": planned.cell.fold,
        "setting": planned.setting.number,
        "settings": dict(planned.setting.values),
        "chosen": ended.chosen,
        "share": planned.share,
        "trainable": ended.trainable,
        "total": ended.total,
        "finished": ended.finished,
        "best_epoch": ended.best_epoch,
        "ranks": ended.ranks,
        "epochs": [asdict(epoch) for epoch in ended.epochs],
        "test": test,
    }


def _tuning_json(whole: Sequence[Ended], recipe: Recipe) -> dict[str, Any]:
    run = sum(len(e.epochs) for e in whole)
    full = sum(e.trial.training.epochs for e in whole)
    return {
        "settings_per_method": recipe.tune,
        "searched": {name: searched(recipe, name) for name in recipe.trained},
        "stopped_early": sum(e.finished in ("racing", "early") for e in whole),
        "stopped_by_racing": sum(e.finished == "racing" for e in whole),
        "epochs_run": run,
        "epochs_full": full,
        "share_saved": 1 - run / full,
        "chosen": [
            {
                "method": e.planned.method,
                "repeat": e.planned.cell.repeat,
                "fold": e.planned.cell.fold,
                "setting": e.planned.setting.number,
                "settings": dict(e.planned.setting.values),
                "valid_loss": kept_loss(e),
            }
            for e in whole
            if e.chosen
        ],
    }


# -------------------------------------------------------------------- predictions.parquet, environment.json

COLUMNS = "trial method seed repeat fold role split line label prediction".split()


def write_predictions(
    path: Path, ended: Sequence[Ended], references: Sequence[Reference], design: StudyDesign, dataset: Dataset
) -> None:
    """Every scored row of the trials that count, and of the reference points. A learning curve's answers are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dataset.label_names
    splits = dataset.splits
    places = [
        (s, line, label)
        for s in SPLITS
        if s in splits
        for line, label in zip(splits[s].lines, splits[s].labels, strict=True)
    ]
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *(f"probability_{name}" for name in names))}

    def add(trial: str, method: str, seed: int, cell: Cell, role: str, probability_EC: Floats) -> None:
        for row, p_C in zip(getattr(cell, role), probability_EC, strict=True):
            split, line, label = places[row]
            place = (trial, method, seed, cell.repeat, cell.fold, role, split, line)
            answer = (names[label], names[int(p_C.argmax())], *p_C.tolist())
            for column, value in zip(columns, (*place, *answer), strict=True):
                columns[column].append(value)

    for e in ended:
        if e.planned.share == 1:
            for role, probability_EC in e.probabilities.items():
                add(e.trial.name, e.planned.method, e.trial.seed, e.planned.cell, role, probability_EC)
    for reference in references:
        for cell, p_EC in zip(design.cells, reference.probabilities or (), strict=False):
            add(f"{reference.name}{design.suffix(cell)}", reference.name, cell.seed, cell, "test", p_EC)
    schema = pa.schema(
        [(n, pa.int64() if n in ("seed", "repeat", "fold", "line") else pa.string()) for n in COLUMNS]
        + [(f"probability_{name}", pa.float64()) for name in names]
    )
    table = pa.table(columns, schema=schema)
    write_atomic(path, lambda temporary: pq.write_table(table, temporary))


def environment_of(
    recipe: Recipe, seconds: Mapping[str, float], fit: Fit, peak: int, warnings: Sequence[str]
) -> dict[str, Any]:
    import safetensors
    import transformers

    return {
        "katei": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "model": recipe.model,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "memory": {
            "planned_bytes": fit.planned_bytes,
            "peak_bytes": peak,
            "live_peak_bytes": fit.live_peak_bytes,
            "parts": fit.parts,
            "where": fit.where,
            "token_budget": fit.token_budget,
            "trials_at_once": fit.most,
        },
        "methods": {name: {"planned_bytes": size} for name, size in fit.alone.items()},
        "warnings": list(warnings),
    }
