"""What there is to say of a run, from its files: numbers and names, in the page's order. What is missing is None, and its section left out.

    RUN/results.json, environment.json, predictions.parquet, recipe.toml → gather → Facts

A run without a comparison (before there were any, or of one trial) gets one here, by the same statistics.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from katei.core.errors import RunError, UserError
from katei.data import load_dataset
from katei.data.dataset import BUNDLED
from katei.study.comparison import MAJORITY, REFERENCES, Comparison
from katei.study.external import compare_file
from katei.study.scored import Columns, Place, Scored, scored_rows
from katei.study.statistics import compare_outcomes
from katei.study.verdicts import note, verdict

SENTENCE = re.compile(r"(?<=\.)\s+(?!\d)|(?<=。)")
HARD_SHOWN = 50
HARD_LETTERS = 600


@dataclass(frozen=True)
class HardRow:
    """A row that every tuned method gets wrong."""

    split: str
    line: int
    label: str
    answered: str
    right: tuple[str, ...]  # the reference points that know it
    text: str | None


@dataclass(frozen=True)
class Facts:
    """All of the page, before its words."""

    title: str
    lang: str
    verdict: tuple[str, ...]
    """Its sentences."""
    note: str | None
    results: dict[str, Any]
    environment: dict[str, Any]
    comparison: dict[str, Any] | None
    references: tuple[str, ...]
    scored: Scored | None = None
    hard: tuple[HardRow, ...] | None = None
    texts_known: bool = False
    recipe: str | None = None
    recipe_values: dict[str, Any] = field(default_factory=dict)
    diverged: tuple[str, ...] = ()

    @property
    def trials(self) -> list[dict[str, Any]]:
        return list(self.results.get("trials", ()))


def gather(path: Path, lang: str, words: Mapping[str, str]) -> Facts:
    """Of a run folder, or of a table that `compare --from` takes. Raises UserError for anything else."""
    if path.is_file():
        references = reference_names([scores.method for scores in compare_file(path).methods])
        comparison = compare_file(path, references=references)
        said = tuple(SENTENCE.split(verdict(comparison, lang)))
        return Facts(path.name, lang, said, note(comparison, lang), {}, {}, comparison.as_json(), references)
    return _gather_run(path, lang, words)


def _gather_run(run: Path, lang: str, words: Mapping[str, str]) -> Facts:
    results, environment = _read(run)
    labels = results["labels"]
    columns = read_predictions(run)
    scored = scored_rows(columns, labels, results["trials"])
    comparison = compared(results, scored)
    diverged = tuple(t["name"] for t in results["trials"] if t["finished"] == "diverged" and t.get("chosen", True))
    said: tuple[str, ...]
    if results.get("partial"):
        done = sum(t["finished"] is not None for t in results["trials"])
        said = (words["partial"].format(done=done, trials=len(results["trials"])), words["partial_goes_on"])
    elif lang == "en" and results.get("comparison") is not None:
        said = tuple(SENTENCE.split(results["verdict"]))
    else:
        said = (words["diverged"].format(names=", ".join(diverged)),) if diverged else ()
        said += (words["no_test"],) if comparison is None else tuple(SENTENCE.split(verdict(comparison, lang)))
    recipe = (run / "recipe.toml").read_text(encoding="utf-8") if (run / "recipe.toml").exists() else None
    values = {} if recipe is None else tomllib.loads(recipe)
    references = () if comparison is None else comparison.references
    texts = None if recipe is None else _texts(run, recipe, values)
    return Facts(
        title=run.resolve().name,
        lang=lang,
        verdict=tuple(sentence for sentence in said if sentence),
        note=None if comparison is None else note(comparison, lang),
        results=results,
        environment=environment,
        comparison=None if comparison is None else comparison.as_json(),
        references=references,
        scored=scored,
        hard=None if scored is None else hard_rows(scored, references, texts),
        texts_known=texts is not None,
        recipe=recipe,
        recipe_values=values,
        diverged=diverged,
    )


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """results.json and environment.json; of a study that was stopped, what it came to so far."""
    from katei.study.folder import PARTIAL, load_study

    if (run / PARTIAL).exists() and not (run / "results.json").exists():
        try:
            return json.loads((run / PARTIAL).read_text(encoding="utf-8")), {}
        except (OSError, ValueError) as error:
            hint = "the command that began it, typed again, goes on where it stopped"
            raise RunError(f"its results cannot be read: {error}", file=run, hint=hint) from None
    study = load_study(run)
    return study.results, study.environment


def read_predictions(run: Path) -> Columns:
    """predictions.parquet by column; no rows where there is no such file."""
    import pyarrow.parquet as pq

    file = run / "predictions.parquet"
    if not file.exists():
        return {name: [] for name in ("trial", "method", "seed", "split", "line", "label", "prediction")}
    try:
        columns: dict[str, list[Any]] = pq.read_table(file).to_pydict()
    except (OSError, ValueError) as error:
        hint = "the command that made the run, with --overwrite, makes it again"
        raise RunError(f"its predictions cannot be read: {error}", file=file, hint=hint) from None
    return columns


def compared(results: Mapping[str, Any], scored: Scored | None) -> Comparison | None:
    """The comparison in the results, else one of the scored rows; None without test rows."""
    if results.get("comparison") is not None:
        return Comparison.from_json(results["comparison"])
    if scored is None:
        return None
    references = reference_names([o.method for o in scored.outcomes])
    return compare_outcomes(scored.outcomes, scored.rows, references=references)


def reference_names(methods: Sequence[str]) -> tuple[str, ...]:
    """Those that go by a reference point's name; none where there is nothing else, so that nothing refers to them."""
    found = tuple(name for name in methods if name in REFERENCES)
    return found if len(found) < len(methods) else ()


def hard_rows(
    scored: Scored, references: Sequence[str], texts: Mapping[Place, str] | None
) -> tuple[HardRow, ...] | None:
    """Rows that each tuned method gets wrong in more than half of its seeds; None where there is no tuned method."""
    names, labels_E = scored.rows.label_names, scored.rows.labels_E
    right = {o.method: (o.prediction_SE == labels_E).mean(0) >= 0.5 for o in scored.outcomes}
    tuned = [o for o in scored.outcomes if o.method not in references]
    if not tuned:
        return None
    found = []
    for e, (split, line) in enumerate(scored.places):
        if any(right[o.method][e] for o in tuned):
            continue
        answers = np.bincount(np.concatenate([o.prediction_SE[:, e] for o in tuned]), minlength=len(names))
        answers[labels_E[e]] = 0
        knowing = tuple(n for n in references if n != MAJORITY and n in right and right[n][e])
        text = None if texts is None else texts.get((split, line))
        if text is not None and len(text) > HARD_LETTERS:
            text = f"{text[:HARD_LETTERS]} …"
        found.append(HardRow(split, line, names[labels_E[e]], names[int(answers.argmax())], knowing, text))
    return tuple(found)


def _texts(run: Path, recipe: str, values: Mapping[str, Any]) -> dict[Place, str] | None:
    """The data's texts by place, if they are still here and are those of the run. Asks no network."""
    data = str(values.get("data", ""))
    identity = run / "identity"
    if not data or not identity.exists() or not (Path(data).expanduser().exists() or data in BUNDLED):
        return None
    try:
        dataset = load_dataset(data, text=values.get("text"), label=values.get("label"))
    except UserError:
        return None
    if sha256((recipe + dataset.sha256).encode()).hexdigest() != identity.read_text(encoding="utf-8").strip():
        return None
    return {
        (name, line): text
        for name, split in dataset.splits.items()
        for line, text in zip(split.lines, split.texts, strict=True)
    }
