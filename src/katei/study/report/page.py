"""Facts → the page: tables and plots as the template wants them, every number beside its rounded text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from katei import __version__
from katei.plan.parts import four_parts
from katei.study.comparison import MAJORITY, REFERENCES
from katei.study.report.draw import UNIT, Axis, Band, Bin, axis, band, calibration_bins, polyline, roc_curve, thinned
from katei.study.report.gather import HARD_SHOWN, Facts
from katei.study.report.words import speaker
from katei.study.verdicts import more_labels

METRICS = ("accuracy", "roc_auc", "macro_f1", "log_loss", "brier", "calibration_error")
BETTER_LOW = ("log_loss", "brier", "calibration_error")
FINISHED = ("done", "early", "diverged", "racing")
NOT_VERSIONS = ("seconds", "memory", "methods", "warnings", "model")


def environment_of(lang: str) -> jinja2.Environment:
    """The pages' templates with the filters they use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "n3": lambda x: f"{x:.3f}",
        "signed": lambda x: f"{x:+.3f}",
        "share": lambda x: f"{x:.3%}",
    }
    environment.filters |= {
        "p": lambda p: f"{p:.3f}" if p >= 0.0005 else "< 0.001",
        "gib": lambda b: f"{b / 2**30:.2f}",
    }
    environment.filters["duration"] = lambda seconds: duration(seconds, lang)
    return environment


def render(facts: Facts) -> str:
    environment = environment_of(facts.lang)
    say = speaker(facts.lang)
    page = environment.get_template("page.html")
    return page.render(
        say=say,
        facts=facts,
        lang=facts.lang,
        version=__version__,
        known_references=REFERENCES,
        design=facts.results.get("design") or {},
        subtitle=_subtitle(facts, say),
        scores=_scores(facts),
        forest=_forest(facts),
        curves=_curves(facts),
        rocs=_rocs(facts),
        calibrations=_calibrations(facts),
        cost=_cost(facts),
        tuning=_tuning(facts),
        learning=_learning(facts),
        hard=_hard(facts),
        trials=_trials(facts),
        repeat=_repeat(facts),
        UNIT=UNIT,
        calibration_x=_confidence_axis(facts),
        polyline=polyline,
    )


def duration(seconds: float, lang: str) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    h, m, s = ("h", "min", "s") if lang == "en" else ("時間", "分", "秒")
    if not hours and not minutes:
        return f"{seconds:.1f} {s}" if seconds < 10 else f"{rest} {s}"
    return f"{hours} {h} {minutes:02d} {m}" if hours else f"{minutes} {m} {rest:02d} {s}"


def _subtitle(facts: Facts, say: Any) -> str:
    """What was compared, in one line."""
    values = facts.recipe_values
    found = [say("data", data=Path(values["data"]).name)] if values.get("data") else []
    found += [say("on_base", model=values["model"])] if values.get("model") else []
    c = facts.comparison
    if c is not None:
        tuned = len(c["methods"]) - len(facts.references)
        methods = say("one_method") if tuned == 1 else say("n_methods", n=tuned)
        kind = {"rows": "facts"}.get(c["design"]["kind"], f"facts_{c['design']['kind']}")
        found.append(say(kind, methods=methods, **{k: f"{c['design'][k]:,}" for k in ("rows", "seeds", "folds")}))
    return " · ".join(found)


# -------------------------------------------------------------------- scores and differences


@dataclass(frozen=True)
class Strip:
    """A value and its interval in a frame, in per cent."""

    at: float
    low: float
    high: float


def _strip(value: float, interval: Sequence[float], x: Axis) -> Strip:
    return Strip(x.at(value), x.at(interval[0]), x.at(interval[1]))


def _scores(facts: Facts) -> dict[str, Any] | None:
    if facts.comparison is None:
        return None
    methods = facts.comparison["methods"]
    metrics = [m for m in METRICS if any(m in scores for scores in methods)]
    bounded = [s["accuracy_interval"] for s in methods if s.get("accuracy_interval")]
    ends = [*(end for interval in bounded for end in interval), *(s["accuracy"] for s in methods)]
    commonest = facts.comparison["commonest_class"]
    if commonest is not None and any(s["method"] == MAJORITY for s in methods):
        commonest = None  # the same thing, fitted
    if commonest is not None:
        ends.append(commonest["accuracy"])
    x = axis(min(ends), max(ends), most=3)
    rows = [
        {
            "method": s["method"],
            "reference": s["method"] in facts.references,
            "cells": {m: (s[m], s.get(f"{m}_interval")) if m in s else None for m in metrics},
            "strip": _strip(s["accuracy"], s["accuracy_interval"], x) if s.get("accuracy_interval") else None,
        }
        for s in methods
    ]
    if commonest is not None:
        here = commonest["accuracy"]
        commonest = {**commonest, "strip": _strip(here, (here, here), x)}
    return {"metrics": metrics, "low": BETTER_LOW, "rows": rows, "commonest": commonest, "x": x}


def _forest(facts: Facts) -> dict[str, Any] | None:
    if facts.comparison is None or not facts.comparison["differences"]:
        return None
    margin, pairs = facts.comparison["margin"], facts.comparison["differences"]
    names = [s["method"] for s in facts.comparison["methods"]]
    best = next((name for name in names if name not in facts.references), names[0])
    of_accuracy = [d for d in pairs if d["metric"] == "accuracy"]
    shown = [d for d in of_accuracy if best in (d["first"], d["second"])]
    bounds = [b for d in of_accuracy for b in d["interval"]]
    x = axis(min(*bounds, -margin), max(*bounds, margin), most=5)

    def row(d: dict[str, Any]) -> dict[str, Any]:
        says = "different" if d["different"] else "equivalent" if d["equivalent"] else "open"
        return {**d, "says": says, "strip": _strip(d["difference"], d["interval"], x)}

    others = [d for d in pairs if d["metric"] != "accuracy"]
    return {
        "x": x,
        "best": best,
        "margin": f"{margin:g}",
        "band": (x.at(-margin), x.at(margin)),
        "zero": x.at(0),
        "shown": [row(d) for d in shown],
        "rest": [row(d) for d in of_accuracy if d not in shown],
        "all": [row(d) for d in [*of_accuracy, *others]],
        "pairs": len(of_accuracy),
    }


# -------------------------------------------------------------------- curves


def _counting(facts: Facts) -> dict[str, list[dict[str, Any]]]:
    """Trials of the comparison, by method; before there is one, all."""
    partial = facts.results.get("partial", False)
    found: dict[str, list[dict[str, Any]]] = {}
    for trial in facts.trials:
        if (trial.get("chosen", True) or partial) and trial.get("share", 1.0) == 1.0:
            found.setdefault(trial["method"], []).append(trial)
    return found


def _curves(facts: Facts) -> dict[str, Any] | None:
    panels: list[dict[str, Any]] = []
    for method, trials in sorted(_counting(facts).items(), key=lambda item: _place(item[0], facts)):
        bands: dict[str, Band] = {}
        for split in ("train", "valid"):
            curves = [
                {e["epoch"]: e[f"{split}_loss"] for e in t["epochs"] if _finite(e[f"{split}_loss"])} for t in trials
            ]
            curves = [curve for curve in curves if curve]
            if curves:
                bands[split] = band(curves)
        if bands:
            panels.append({"method": method, "bands": bands, "trials": len(trials)})
    if not panels:
        return None
    chance = math.log(len(facts.results["labels"]))
    every = [y for p in panels for b in p["bands"].values() for _, y in (*b.high, *b.median)]
    top = min(max(every), 3 * chance)
    epochs = [x for p in panels for b in p["bands"].values() for x, _ in b.median]
    last = int(max(epochs))
    step = max(1, math.ceil(last / 5))
    for p in panels:  # the same numbers as a table
        medians = {split: dict(b.median) for split, b in p["bands"].items()}
        p["table"] = {split: [m.get(e) for e in range(1, last + 1)] for split, m in medians.items()}
    x = Axis(min(0.5, min(epochs) - 0.5), last + 0.5, tuple(range(step, last + 1, step)))
    y = axis(0.0, max(top, chance), most=4)
    return {
        "panels": panels,
        "x": x,
        "y": y,
        "chance": chance,
        "epochs": range(1, last + 1),
        "clipped": y.label(y.high) if max(every) > y.high else None,
        "bands": any(b.curves > 1 for p in panels for b in p["bands"].values()),
    }


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _rocs(facts: Facts) -> list[dict[str, Any]] | None:
    if facts.scored is None or facts.comparison is None:
        return None
    labels_E = facts.scored.rows.labels_E
    if len(np.unique(labels_E)) < len(facts.scored.rows.label_names):
        return None
    by_method = {s["method"]: s for s in facts.comparison["methods"]}
    panels = []
    for o in facts.scored.outcomes:
        if o.probability_SEC is None or o.method not in by_method:
            continue
        points = [polyline(thinned(roc_curve(p_EC, labels_E)), UNIT, UNIT) for p_EC in o.probability_SEC]
        area = by_method[o.method].get("roc_auc")
        reference = o.method in facts.references
        panels.append({"method": o.method, "curves": points, "auc": area, "reference": reference})
    return _in_order(panels, facts)


def _calibrations(facts: Facts) -> list[dict[str, Any]] | None:
    if facts.scored is None:
        return None
    panels = []
    for o in facts.scored.outcomes:
        if o.probability_SEC is not None:
            bins = calibration_bins(o.probability_SEC, facts.scored.rows.labels_E)
            most = max(b.rows for b in bins)
            dots = [(b, _dot(b, most)) for b in bins]
            panels.append({"method": o.method, "bins": dots, "reference": o.method in facts.references})
    return _in_order(panels, facts)


def _confidence_axis(facts: Facts) -> Axis:
    """From the least confident answer there can be, 1 / classes."""
    classes = len(facts.results.get("labels", ())) or 2
    return Axis(0.5, 1.0, (0.5, 0.75, 1.0)) if classes == 2 else UNIT


def _dot(b: Bin, most: int) -> float:
    """Its diameter in pixels: area goes by rows."""
    return round(4 + 9 * math.sqrt(b.rows / most), 1)


def _place(method: str, facts: Facts) -> int:
    """In the table of scores; methods without scores come last."""
    order = [] if facts.comparison is None else [s["method"] for s in facts.comparison["methods"]]
    return order.index(method) if method in order else len(order)


def _in_order(panels: list[dict[str, Any]], facts: Facts) -> list[dict[str, Any]] | None:
    """As in the table of scores."""
    return sorted(panels, key=lambda p: _place(p["method"], facts)) or None


# -------------------------------------------------------------------- cost, tuning, learning curve


def _cost(facts: Facts) -> dict[str, Any] | None:
    memory, seconds = facts.environment.get("memory"), facts.environment.get("seconds")
    if memory is None or seconds is None:
        return None
    known = facts.environment.get("methods") or {}
    rows = []
    for method, trials in sorted(_counting(facts).items(), key=lambda item: _place(item[0], facts)):
        own = known.get(method, {})
        rows.append(
            {
                "method": method,
                "trainable": trials[0]["trainable"],
                "share": trials[0]["trainable"] / trials[0]["total"],
                "planned_bytes": own.get("planned_bytes"),
                "seconds": own.get("seconds"),
            }
        )
    longest = max((row["seconds"] or 0 for row in rows), default=0)
    largest = max(
        [row["planned_bytes"] or 0 for row in rows] + [memory.get("planned_bytes") or 0, memory.get("peak_bytes") or 0]
    )
    return {
        "rows": rows,
        "planned": any(row["planned_bytes"] for row in rows),
        "timed": any(row["seconds"] for row in rows),
        "longest": longest,
        "largest": largest,
        "memory": memory,
        "parts": four_parts(memory["parts"], memory["planned_bytes"]) if memory.get("parts") else None,
        "seconds": seconds,
    }


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {f'{v:.2g}' if isinstance(v, float) else v}" for key, v in settings.items())


def _tuning(facts: Facts) -> dict[str, Any] | None:
    tuning = facts.results.get("tuning")
    if not tuning:
        return None
    searched = [
        (method, name, [f"{v:g}" if isinstance(v, float) else str(v) for v in values], name == "learning_rate")
        for method, settings in tuning["searched"].items()
        for name, values in settings.items()
    ]
    chosen = [{**c, "settings": _settings(c["settings"])} for c in tuning["chosen"]]
    keys = [key for key in ("repeat", "fold") if any(c.get(key) is not None for c in chosen)]
    return {**tuning, "searched": searched, "chosen": chosen, "keys": keys}


def _learning(facts: Facts) -> dict[str, Any] | None:
    curve = facts.results.get("learning_curve")
    if not curve or not curve["points"]:
        return None
    points = curve["points"]
    rows = [p["train_rows"] for p in points]
    bounds = [b for p in points for b in (p["accuracy_interval"] or [p["accuracy"]])]
    x, y = axis(0, max(rows), most=4), axis(min(bounds), max(bounds), most=4)
    panels: dict[str, list[dict[str, Any]]] = {}
    for p in sorted(points, key=lambda p: p["train_rows"]):
        panels.setdefault(p["method"], []).append(p)
    said = more_labels(curve["last_doubling"], facts.lang)
    return {"panels": panels, "x": x, "y": y, "verdict": said, "points": points}


# -------------------------------------------------------------------- rows, trials, recipe


def _hard(facts: Facts) -> dict[str, Any] | None:
    if facts.hard is None:
        return None
    return {"rows": facts.hard[:HARD_SHOWN], "more": max(0, len(facts.hard) - HARD_SHOWN), "texts": facts.texts_known}


def _trials(facts: Facts) -> dict[str, Any] | None:
    shown = [t for trials in _counting(facts).values() for t in trials]
    if not shown:
        return None
    keys = [key for key in ("seed", "repeat", "fold") if len({t.get(key) for t in shown}) > 1]
    return {"rows": shown, "keys": keys, "finished": FINISHED, "tested": any(t["test"] for t in shown)}


def _repeat(facts: Facts) -> dict[str, Any] | None:
    if facts.recipe is None:
        return None
    out = f"runs/{facts.title}-again"
    versions = {
        k: v for k, v in facts.environment.items() if k not in NOT_VERSIONS and isinstance(v, str | int | float)
    }
    return {"command": f"katei compare --recipe recipe.toml --out {shlex.quote(out)}", "versions": versions}
