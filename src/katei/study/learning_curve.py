"""Would more labels help? The chosen setting of every cell trained on 1/8, 1/4 and 1/2 of its training rows, and judged by the same rows.

    chosen Ended → subset_trials → training.py → learning_curve: points with intervals, and one sentence

Subsets are stratified and nested: the rows of a smaller one are in every larger one. All are trained for equally many epochs, so
fewer rows are fewer steps as well; the validation rows are the cell's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from katei.study.design import StudyDesign
from katei.study.recipe import Recipe
from katei.study.results import answers_of, outcome_of, rows_of
from katei.study.statistics import compare_outcomes
from katei.study.trials import Ended, Planned, on_share

SHARES = (0.125, 0.25, 0.5)


def subset_trials(chosen: Sequence[Ended], labels: Sequence[int]) -> list[Planned]:
    """Of every chosen trial one on each share of its rows; a share that takes nothing away from the next larger one is left out."""
    planned = []
    before = [len(ended.trial.rows) for ended in chosen]
    for share in reversed(SHARES):
        subsets = [nested_subset(ended.trial.rows, labels, share, ended.trial.seed) for ended in chosen]
        sizes = [len(rows) for rows in subsets]
        if sizes != before:  # in all cells or none, so that every row is judged at every size
            for ended, rows in zip(chosen, subsets, strict=True):
                planned.append(on_share(ended.planned, f"{ended.trial.name}-1of{round(1 / share)}", rows, share))
            before = sizes
    return planned


def nested_subset(rows: Sequence[int], labels: Sequence[int], share: float, seed: int) -> tuple[int, ...]:
    """A stratified `share` of the rows, one of each class at least, inside that of any larger share with the same seed."""
    rng = np.random.default_rng(seed)
    label_E, taken = np.array([labels[row] for row in rows]), []
    for c in np.unique(label_E):
        mine = rng.permutation(np.flatnonzero(label_E == c))
        taken += mine[: max(1, round(share * len(mine)))].tolist()
    return tuple(rows[i] for i in sorted(taken))


def learning_curve(
    ended: Sequence[Ended], recipe: Recipe, design: StudyDesign, labels: Sequence[int], label_names: Sequence[str]
) -> dict[str, Any] | None:
    """`points` and `verdict`; None without test rows. `ended` holds the whole trials as well as the subsets'."""
    if not design.rows:
        return None
    rows, points, outcomes = rows_of(design, labels, label_names), [], {}
    for share in (*SHARES, 1.0):
        mine = [e for e in ended if e.planned.share == share]
        for answers in answers_of(mine)[0]:
            outcome = outcomes[answers.name, share] = outcome_of(answers, design)
            estimates = compare_outcomes([outcome], rows).methods[0].estimates
            point: dict[str, Any] = {"method": answers.name, "share": share}
            point["train_rows"] = next(len(e.trial.rows) for e in mine if e.planned.method == answers.name)
            for metric in ("accuracy", "roc_auc"):
                estimate = estimates.get(metric)
                point |= {metric: estimate and estimate.value, f"{metric}_interval": estimate and estimate.interval}
            points.append(point)
    whole = [p for p in points if p["share"] == 1 and p["method"] not in recipe.references]
    if not whole:
        return {"points": points, "verdict": "No method was trained to its end on all rows."}
    best = max(whole, key=lambda p: p["accuracy"])
    return {"points": points, "verdict": _verdict(best, points, outcomes, rows, recipe.margin)}


def _verdict(best: dict[str, Any], points: Sequence[dict[str, Any]], outcomes: Any, rows: Any, margin: float) -> str:
    """Of the method with the highest accuracy: what its last doubling gained."""
    name, all_rows = best["method"], best["train_rows"]
    half = next((p for p in points if p["method"] == name and p["share"] == 0.5), None)
    if half is None:
        return f"{name} has too few training rows to take half of them away."
    sizes = f"{all_rows} rows", f"{half['train_rows']} rows"
    pair = [replace(outcomes[name, share], method=size) for share, size in zip((1.0, 0.5), sizes, strict=True)]
    difference = compare_outcomes(pair, rows, margin=margin).of("accuracy")[0]
    sign = 1 if difference.first == sizes[0] else -1
    gain, (low, high) = sign * difference.value, sorted(sign * bound for bound in difference.interval)
    seen = f"from {half['train_rows']} to {all_rows} training rows {name} changed by {gain:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
    if difference.different and gain > 0:
        return (
            f"More labels would help: {seen}; another doubling can be expected to gain something, and less than that."
        )
    if difference.equivalent(margin):
        return f"More labels of this kind would hardly help: {seen}, which is within ±{margin:g}."
    return f"Whether more labels would help cannot be told: {seen}."
