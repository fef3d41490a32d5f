"""The real study: six methods and the reference points, tuned, in repeated folds, raced; and what the same grid costs elsewhere.

    python -m benchmarks.tuned_study poems-en --out runs/tuned-poems        hours; goes on where it was cut off
    python -m benchmarks.tuned_study topics --out runs/tuned-topics         Japanese questions by topic (chatterbot-corpus, BSD-3-Clause)
    python -m benchmarks.tuned_study topics --folds 0 --check --out runs/check      one cell of the grid twice, raced and whole: the same
                                                                            choices, the same verdict? And what it costs elsewhere
    … --quick                                                               does it run?

Then peft + Trainer is timed on a part of the grid: each method's own setting, one epoch of a few rows of the first fold, in the
proportion of training to validation rows that the study has. Extrapolated: × rows × epochs × settings × folds × repeats; their
trials share nothing, so they cost as many times as much. Scoring the test rows is left out on their side.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import SCRATCH, Figures, arguments, say
from benchmarks.sides import Sides, Task
from katei import api
from katei.data import load_dataset
from katei.engine.lockstep import Tokens, Trial
from katei.methods import BOOK
from katei.study.folder import PARTIAL, Study, read_recipe

MODEL = "smollm2"
TOPICS = ("ai", "emotion", "psychology")


def topics() -> dict[str, str]:
    """A labelled set that nobody here wrote: questions by topic."""
    import yaml

    spec = importlib.util.find_spec("chatterbot_corpus")
    assert spec is not None
    assert spec.submodule_search_locations
    corpus = Path(spec.submodule_search_locations[0]) / "data" / "japanese"
    lines: dict[str, str] = {}
    for name in TOPICS:
        conversations = yaml.safe_load((corpus / f"{name}.yml").read_text(encoding="utf-8"))["conversations"]
        for conversation in conversations:
            text = " ".join(str(conversation[0]).split())
            if text:
                lines.setdefault(text, name)
    return lines


def poems(name: str, rows: int) -> dict[str, str]:
    """Of the bundled poems' training and validation rows so many, each voice's share as it is there."""
    from sklearn.model_selection import train_test_split

    dataset = load_dataset(name)
    splits = [split for part, split in dataset.splits.items() if part != "test"]
    lines = {
        text: dataset.label_names[label]
        for split in splits
        for text, label in zip(split.texts, split.labels, strict=True)
    }
    labels = list(lines.values())
    some = (
        train_test_split(list(lines), train_size=rows, stratify=labels, random_state=0)[0]
        if rows < len(lines)
        else list(lines)
    )
    return {text: lines[text] for text in some}


def write_rows(lines: dict[str, str], folder: Path, *, parts: bool) -> Path:
    """One file of training rows, or split as one cell of the study is."""
    from sklearn.model_selection import train_test_split

    folder.mkdir(parents=True, exist_ok=True)
    rows, labels = [f"{text}\t{name}" for text, name in lines.items()], list(lines.values())
    files = {"train": rows}
    if parts:
        rest, files["test"], labels, _ = train_test_split(rows, labels, test_size=0.2, stratify=labels, random_state=0)
        files["train"], files["valid"] = train_test_split(rest, test_size=0.2, stratify=labels, random_state=0)
    for name, some in files.items():
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *some]) + "\n", encoding="utf-8")
    return folder


class Saying:
    """What `compare` tells, a line an epoch."""

    def say(self, text: str) -> None:
        say(f"  {text}")

    def begin(self, lockstep: Any, left: int) -> None:
        say(f"  {len(lockstep.states)} trials, {left} later")

    def tick(self, lockstep: Any, ended: list[Any]) -> None:
        if ended:
            running = sum(state.finished is None for state in lockstep.states)
            say(
                f"  epoch {max(len(s.epochs) for s in ended)}: {running} running, {lockstep.trained_rows:,} rows trained"
            )

    def end(self) -> None:
        pass


def theirs(study: Study, data: str, rows: int) -> dict[str, float]:
    """Seconds of one epoch of each method with peft + Trainer, per training row (its share of validation rows included)."""
    recipe, design = read_recipe(study.run), study.results["design"]
    sides = Sides(recipe.model, recipe.precision)
    valid_rows = max(1, round(rows * design["valid_rows"] / design["train_rows"]))
    split = load_dataset(data).train
    ids = tuple(tuple(sides.base.tokenize(text, recipe.max_length)) for text in split.texts[: rows + valid_rows])
    train, valid = Tokens(ids[:rows], split.labels[:rows]), Tokens(ids[rows:], split.labels[rows : rows + valid_rows])
    found = {}
    for name in recipe.methods:
        method, training = recipe.resolved(name)
        one = replace(training, epochs=1, patience=0, keep="last")
        trial = Trial(name, method, 0, one, tuple(range(rows)))
        try:
            found[name] = sides.theirs(Task((trial,), train, valid)).seconds_of[name] / rows
        except ValueError as error:  # LLaMA-Adapter knows Llama and Mistral alone there; ours still counts it
            say(f"  peft: {error}")
    return found


def grid_rows(study: Study) -> int:
    """Training rows of one method over all settings, cells and epochs of the whole grid."""
    trials = [
        t for t in study.results["trials"] if t["share"] == 1 and t["method"] == study.results["trials"][0]["method"]
    ]
    epochs = study.results["tuning"]["epochs_full"] // sum(t["share"] == 1 for t in study.results["trials"])
    return len(trials) * epochs * int(study.results["design"]["train_rows"])


def report(figures: Figures, study: Study, case: str) -> None:
    tuning, seconds = study.results["tuning"], study.environment["seconds"]
    figures.add(
        "seconds", "s", [seconds["total"]], case=f"{case}, ours", note="loading, reference points and scoring included"
    )
    figures.add("epochs saved by racing and patience", "share", [tuning["share_saved"]], case=case)
    say(f"  {study.results['verdict']}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("data", nargs="?", default="poems-en", help="poems-en, topics, or what katei compare takes")
    parser.add_argument("--rows", type=int, default=0, help="so many of the bundled poems alone")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tune", type=int, default=8)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--methods", default=",".join(BOOK))
    parser.add_argument("--max-length", type=int, default=200)
    parser.add_argument("--precision", default="fp32", help="of the base, on both sides")
    parser.add_argument(
        "--part", type=int, default=20, help="training rows on which peft + Trainer is timed; 0: not at all"
    )
    parser.add_argument("--check", action="store_true", help="the grid twice, raced and whole")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.tune, options.folds, options.repeats, options.part = 2, 2, 2, 1, 3
        options.methods, options.batch_size, options.max_length = "ia3,prompt-tuning", 8, 24
    figures = Figures("tuned_study", quick=options.quick)
    data = options.data
    if data == "topics" or options.rows:
        lines = topics() if data == "topics" else poems(data, options.rows)
        folder = write_rows(lines, SCRATCH / f"{data}-{options.rows or 'all'}-{options.folds}", parts=not options.folds)
        data = str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    how: dict[str, Any] = {
        "model": options.model,
        "methods": options.methods.split(","),
        "folds": options.folds,
        "repeats": options.repeats if options.folds else 1,
        "tune": options.tune,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "token_budget": options.token_budget,
        "precision": options.precision,
        "watcher": Saying(),
    }
    cells = f"{options.folds} folds × {options.repeats}" if options.folds else "one cell"
    case = f"{options.data}, {cells}, {options.tune} settings, {options.epochs} epochs, {options.precision}"
    raced = api.compare(data, out=options.out, **how)
    assert not (options.out / PARTIAL).exists()
    report(figures, raced, case)
    if options.check:
        whole = api.compare(
            data, out=options.out.with_name(f"{options.out.name}-whole"), racing=False, patience=0, **how
        )
        report(figures, whole, f"{case}, whole grid")
        both = [
            {(c["method"], c["repeat"], c["fold"]): c["setting"] for c in s.results["tuning"]["chosen"]}
            for s in (raced, whole)
        ]
        same = sum(both[0][key] == both[1][key] for key in both[0]) / len(both[0])
        figures.add("same setting chosen", "share", [same], case=case)
        say(f"  the same verdict: {raced.results['verdict'] == whole.results['verdict']}")
    if not options.part:
        return
    per_row = theirs(raced, data, options.part)
    rows = grid_rows(raced)
    extrapolated = sum(seconds * rows for seconds in per_row.values())
    note = f"one epoch of {options.part} rows of each method measured, × {rows:,} rows of the grid; head and reference points left out"
    for name, seconds in per_row.items():
        figures.add("seconds per training row", "s", [seconds], case=f"theirs, {name}", note=note)
    figures.add("seconds", "s", [extrapolated], case=f"{case}, theirs, extrapolated", note=note)
    spent = raced.environment["seconds"]
    figures.add("ratio, training against all of ours", "×", [extrapolated / spent["total"]], case=case, note=note)
    figures.add("ratio, training against training", "×", [extrapolated / spent["train"]], case=case, note=note)
    summary = options.out / "cost.json"
    summary.write_text(json.dumps({"theirs_seconds_per_row": per_row, "grid_rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
