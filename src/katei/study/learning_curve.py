"""Would more labels help? The chosen setting of every cell trained on 1/8, 1/4 and 1/2 of its training rows, and judged by the same rows.

    chosen Ended → subset_trials → training.py → learning_curve: points with intervals, and one sentence

Subsets are stratified and nested: the rows of a smaller one are in every larger one. All are trained for equally many epochs, so
fewer rows are fewer steps as well; the validation rows are the cell's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from katei.study.comparison import Outcome, Rows
from katei.study.design import StudyDesign
from katei.study.recipe import Recipe
from katei.study.results import answers_of, outcome_of, rows_of
from katei.study.statistics import compare_outcomes
from katei.study.trials import Ended, Planned, on_share
from katei.study.verdicts import more_labels

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
    """`points`, `last_doubling` and `verdict`; None without test rows. `ended` holds the whole trials as well as the subsets'."""
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
    doubled = _last_doubling(points, outcomes, rows, recipe)
    return {"points": points, "last_doubling": doubled, "verdict": more_labels(doubled)}


def _last_doubling(
    points: Sequence[dict[str, Any]], outcomes: Mapping[tuple[str, float], Outcome], rows: Rows, recipe: Recipe
) -> dict[str, Any]:
    """What the method with the highest accuracy gained by it; `answer` says whether more labels would help: yes, hardly, unknown."""
    whole = [p for p in points if p["share"] == 1 and p["method"] not in recipe.references]
    if not whole:
        return {"answer": "untrained"}
    best = max(whole, key=lambda p: p["accuracy"])
    name, all_rows = best["method"], best["train_rows"]
    half = next((p for p in points if p["method"] == name and p["share"] == 0.5), None)
    found = {"method": name, "all_rows": all_rows, "margin": recipe.margin}
    if half is None:
        return {**found, "answer": "too few"}
    sizes = f"{all_rows} rows", f"{half['train_rows']} rows"
    pair = [replace(outcomes[name, share], method=size) for share, size in zip((1.0, 0.5), sizes, strict=True)]
    difference = compare_outcomes(pair, rows, margin=recipe.margin).of("accuracy")[0]
    sign = 1 if difference.first == sizes[0] else -1
    gain, interval = sign * difference.value, sorted(sign * bound for bound in difference.interval)
    helps = difference.different and gain > 0
    answer = "yes" if helps else "hardly" if difference.equivalent(recipe.margin) else "unknown"
    return {**found, "half_rows": half["train_rows"], "gain": gain, "interval": interval, "answer": answer}
