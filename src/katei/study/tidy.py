"""results.json and predictions.parquet → results.csv: one number a line, for pandas, R or a spreadsheet.

    trial, method, seed, repeat, fold, setting, share, split, epoch, metric, value, low, high

A line with a trial is that trial's own: `split` train or valid with an epoch, or test without. Without a trial it is the
method's over all its trials, as compared, or with a `share` a point of the learning curve. `low` and `high` bound the 95 %
interval, where there is one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from katei.core.files import write_text
from katei.study.results import test_scores
from katei.study.scored import PROBABILITY, Columns, role_of

COLUMNS = "trial method seed repeat fold setting share split epoch metric value low high".split()
TRIAL_KEYS = ("method", "seed", "repeat", "fold", "setting", "share")
EPOCH_KEYS = {
    "train_loss": ("train", "loss"),
    "valid_loss": ("valid", "loss"),
    "valid_roc_auc": ("valid", "roc_auc"),
    "valid_accuracy": ("valid", "accuracy"),
}
TEST_KEYS = ("accuracy", "roc_auc", "loss")

Line = dict[str, Any]


def write_tidy(run: Path, results: Mapping[str, Any], columns: Columns) -> Path:
    """Write RUN/results.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(tidy_lines(results, columns))
    write_text(run / "results.csv", text.getvalue())
    return run / "results.csv"


def tidy_lines(results: Mapping[str, Any], columns: Columns) -> Iterator[Line]:
    """Every number of a run; what is None or not a number is left out."""
    trials = results["trials"]
    for trial in trials:
        mine = {"trial": trial["name"], **{key: trial.get(key) for key in TRIAL_KEYS}}
        for epoch in trial["epochs"]:
            for key, (split, metric) in EPOCH_KEYS.items():
                yield from _line({**mine, "split": split, "epoch": epoch["epoch"]}, metric, epoch[key])
        if trial["test"]:
            for metric in TEST_KEYS:
                interval = trial["test"].get(f"{metric}_interval")
                yield from _line({**mine, "split": "test"}, metric, trial["test"][metric], interval)
    yield from _reference_lines(columns, results["labels"], {t["name"] for t in trials})
    for scores in (results.get("comparison") or {}).get("methods", []):
        for metric in [key.removesuffix("_interval") for key in scores if key.endswith("_interval")]:
            yield from _line(
                {"method": scores["method"], "split": "test"}, metric, scores[metric], scores[f"{metric}_interval"]
            )
    for point in (results.get("learning_curve") or {}).get("points", []):
        for metric in ("accuracy", "roc_auc"):
            mine = {"method": point["method"], "share": point["share"], "split": "test"}
            yield from _line(mine, metric, point.get(metric), point.get(f"{metric}_interval"))


def _reference_lines(columns: Columns, label_names: Sequence[str], trained: set[str]) -> Iterator[Line]:
    """Scores of the parts of each reference point, of which results.json holds no trial."""

    role, by_trial = role_of(columns), dict[str, list[int]]()
    for i, name in enumerate(columns["trial"]):
        if name not in trained and role[i] == "test":
            by_trial.setdefault(name, []).append(i)
    for name, picked in by_trial.items():
        labels = [label_names.index(columns["label"][i]) for i in picked]
        probability_EC = np.array([[columns[f"{PROBABILITY}{c}"][i] for c in label_names] for i in picked])
        mine = {"trial": name, "split": "test"}
        mine |= {key: columns[key][picked[0]] for key in ("method", "seed", "repeat", "fold") if key in columns}
        scores = test_scores(probability_EC, labels)
        yield from _line(mine, "accuracy", scores.accuracy, scores.accuracy_interval)
        yield from _line(mine, "roc_auc", scores.roc_auc, scores.roc_auc_interval)
        yield from _line(mine, "loss", scores.loss)


def _line(mine: Line, metric: str, value: float | None, interval: Sequence[float] | None = None) -> Iterator[Line]:
    if value is None or not np.isfinite(value):
        return
    low, high = interval or (None, None)
    filled = {**mine, "metric": metric, "value": value, "low": low, "high": high}
    yield {key: "" if field is None else field for key, field in filled.items()}
