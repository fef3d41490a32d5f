"""The model card of a merged model: README.md with what it is, what it was trained on, how, and what its scores can say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from katei.methods.saved import AdapterNote


def model_card(note: AdapterNote, kind: str, agreement: Mapping[str, Any], run: Path | None, precision: str) -> str:
    """Markdown for the folder of a merged model; `run` is the run folder its scores are read from, if there is one."""
    results, recipe = _read(run)
    trial: dict[str, Any] = next((t for t in results.get("trials", []) if t["name"] == note.name), {})
    classifies = kind == "sequence-classification"
    task = "text-classification" if classifies else "text-generation"
    data = [f"- data: `{recipe['data']}`"] if recipe.get("data") else []
    a = agreement
    lines = [
        *("---", "library_name: transformers", f"pipeline_tag: {task}", "tags:", "- katei", f"- {note.method}", "---"),
        *("", f"# {note.name}", ""),
        f"`{note.base or 'A base'}` and what {note.method} trained on it, in one: merged by katei {note.katei}.",
        "",
        f"It classifies texts of up to {note.max_length} tokens: {', '.join(f'`{label}`' for label in note.labels)}."
        if classifies
        else "It continues texts." + (" The classifier's head was left out." if note.labels else ""),
        *(
            "",
            "```python",
            "from transformers import pipeline",
            "",
            f'model = pipeline("{task}", "THIS FOLDER")',
            "```",
        ),
        *("", "## Data and recipe", "", *data),
        *(f"- {key}: {_value(value)}" for key, value in {**note.settings, **note.training}.items()),
        *("", "## Scores", "", *_scores(trial, results, classifies)),
        *("", "## Merged against adapter", ""),
        f"Weights in {precision}, computed in fp32 and rounded once. Of {a['rows']} rows, {a['labels']:.1%} get the same "
        f"{'label' if classifies else 'likeliest next token'} from this model as from the adapter beside its base;",
        f"the largest change of a probability is {a['max_probability_change']:.1e}, the mean {a['mean_probability_change']:.1e}.",
        "",
    ]
    return "\n".join(lines)


def run_of(folder: Path) -> Path | None:
    """The run folder a trial's folder is in."""
    run = folder.parent.parent
    return run if folder.parent.name == "trials" and (run / "results.json").exists() else None


def _scores(trial: Mapping[str, Any], results: Mapping[str, Any], classifies: bool) -> list[str]:
    test = trial.get("test") or {}
    if not test:
        return ["None are known: the run that trained it is not beside it, or had no test rows."]
    lines = [
        f"On {test['rows']} test rows that were not trained on"
        + ("" if classifies else ", with the head that this folder leaves out")
        + ":",
        "",
        "| score | value | 95 % interval |",
        "|---|---|---|",
    ]
    for key, name in (("accuracy", "accuracy"), ("roc_auc", "ROC AUC"), ("loss", "loss, nats")):
        if test.get(key) is not None:
            interval = test.get(f"{key}_interval")
            lines.append(
                f"| {name} | {test[key]:.3f} | {f'{interval[0]:.3f} – {interval[1]:.3f}' if interval else ''} |"
            )
    if results.get("majority_accuracy") is not None:
        lines += [
            "",
            f"Always answering the commonest class would have an accuracy of {results['majority_accuracy']:.3f}.",
        ]
    return lines


def _read(run: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """results.json and recipe.toml; what is not there or not readable is left out of the card."""
    import tomllib

    results: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    if run is not None:
        try:
            results = json.loads((run / "results.json").read_text(encoding="utf-8"))
            recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass
    return results, recipe


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
