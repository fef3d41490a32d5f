"""What a comparison is: the answers it starts from, and every number it ends with. Dimensions: S seeds · E rows · C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from katei.study import differences as tests
from katei.study.intervals import Interval
from katei.study.power import Needed
from katei.study.spread import Floats

Labels = NDArray[np.intp]
ALPHA = 0.05
COMMONEST = "commonest class"

MAJORITY, TFIDF, HEAD, ZERO_SHOT = "majority class", "tf-idf", "head", "zero-shot"
REFERENCES = (MAJORITY, TFIDF, HEAD, ZERO_SHOT)
"""Reference points, as they stand in results, tables and verdicts; see references.py."""


@dataclass(frozen=True)
class Outcome:
    """What one method answered, each seed on each row."""

    method: str
    prediction_SE: Labels  # class index
    probability_SEC: Floats | None = None


@dataclass(frozen=True)
class Counts:
    """All that a table of published scores tells of a method."""

    method: str
    correct: int
    rows: int


@dataclass(frozen=True)
class Rows:
    """What every method was scored on. `fold_SE`: the fold each repeat tested a row in, where it was k-fold."""

    labels_E: Labels
    label_names: tuple[str, ...]
    fold_SE: Labels | None = None

    @property
    def class_rows(self) -> Labels:
        counts = np.bincount(self.labels_E, minlength=len(self.label_names))
        return counts[counts > 0]


@dataclass(frozen=True)
class Estimate:
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Scores:
    """One method's estimates, by metric: accuracy, roc_auc, macro_f1, log_loss, brier, calibration_error."""

    method: str
    rows: int
    estimates: dict[str, Estimate]

    @property
    def accuracy(self) -> float:
        return self.estimates["accuracy"].value


@dataclass(frozen=True)
class Difference:
    """`first` − `second` in one metric, with a 95 % interval of its own; `p_adjusted` by Holm over this metric's pairs."""

    metric: str
    first: str
    second: str
    value: float
    interval: tuple[float, float]
    p: float
    p_adjusted: float
    test: str
    row_variance: float  # of one row's difference: what it would take goes by this
    needed: Needed | None

    @property
    def different(self) -> bool:
        return self.p_adjusted < ALPHA

    def equivalent(self, margin: float) -> bool:
        return tests.equivalent(Interval(np.asarray(self.interval[0]), np.asarray(self.interval[1])), margin)


@dataclass(frozen=True)
class Comparison:
    """Everything `katei compare --from` prints."""

    kind: str  # rows, seeds, folds or counts
    rows: int
    seeds: int
    folds: int
    methods: tuple[Scores, ...]  # best accuracy first
    differences: tuple[Difference, ...]
    commonest: tuple[str, float] | None  # of these rows: its label and accuracy
    against_commonest: tuple[Difference, ...]
    margin: float
    references: tuple[str, ...] = ()
    detectable: float | None = None  # difference in accuracy that such a study sees in 8 of 10 cases
    rows_for_equivalence: int | None = None

    def of(self, metric: str) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if d.metric == metric)

    def as_json(self) -> dict[str, Any]:
        return {
            "design": {"kind": self.kind, "rows": self.rows, "seeds": self.seeds, "folds": self.folds},
            "methods": [_scores_json(scores) for scores in self.methods],
            "differences": [_difference_json(d, self.margin) for d in self.differences],
            "commonest_class": None
            if self.commonest is None
            else {
                "label": self.commonest[0],
                "accuracy": self.commonest[1],
                "differences": [_difference_json(d, self.margin) for d in self.against_commonest],
            },
            "references": list(self.references),
            "margin": self.margin,
            "minimum_detectable_difference": self.detectable,
            "rows_for_equivalence": self.rows_for_equivalence,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Comparison:
        """What `as_json` wrote, and all that a verdict needs of it; `row_variance` alone is not kept."""
        design, commonest = values["design"], values["commonest_class"]
        return cls(
            **{key: design[key] for key in ("kind", "rows", "seeds", "folds")},
            methods=tuple(_scores_from(scores) for scores in values["methods"]),
            differences=tuple(_difference_from(d) for d in values["differences"]),
            commonest=None if commonest is None else (commonest["label"], commonest["accuracy"]),
            against_commonest=() if commonest is None else tuple(_difference_from(d) for d in commonest["differences"]),
            margin=values["margin"],
            references=tuple(values["references"]),
            detectable=values["minimum_detectable_difference"],
            rows_for_equivalence=values["rows_for_equivalence"],
        )


def _scores_from(values: Mapping[str, Any]) -> Scores:
    metrics = [key.removesuffix("_interval") for key in values if key.endswith("_interval")]
    estimates = {m: Estimate(values[m], _pair(values[f"{m}_interval"])) for m in metrics}
    return Scores(values["method"], values["rows"], estimates)


def _difference_from(d: Mapping[str, Any]) -> Difference:
    low, high = d["interval"]
    more = Needed(d["rows_needed"], d["seeds_needed"])
    names = d["metric"], d["first"], d["second"]
    return Difference(*names, d["difference"], (low, high), d["p"], d["p_adjusted"], d["test"], float("nan"), more)


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])


def _scores_json(scores: Scores) -> dict[str, Any]:
    values: dict[str, Any] = {"method": scores.method, "rows": scores.rows}
    for metric, estimate in scores.estimates.items():
        values |= {metric: estimate.value, f"{metric}_interval": estimate.interval}
    return values


def _difference_json(d: Difference, margin: float) -> dict[str, Any]:
    return {
        "metric": d.metric,
        "first": d.first,
        "second": d.second,
        "difference": d.value,
        "interval": d.interval,
        "p": d.p,
        "p_adjusted": d.p_adjusted,
        "test": d.test,
        "different": d.different,
        "equivalent": d.equivalent(margin),
        "rows_needed": d.needed and d.needed.rows,
        "seeds_needed": d.needed and d.needed.seeds,
    }
