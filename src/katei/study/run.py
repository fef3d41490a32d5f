"""A study from recipe to run folder.

    recipe → data, checked → tokens → base → lockstep (and, for full fine-tuning, one run each) → test scores → RUN

    RUN/recipe.toml            every setting, resolved          RUN/results.json         every trial, epoch and score
    RUN/environment.json       machine, versions, seconds       RUN/predictions.parquet  every scored row of every trial
    RUN/trials/NAME/           the adapter, peft's format       RUN/state-*.safetensors  while it is running

What a result *is* goes into results.json, how long it took into environment.json: so a run that was killed and went on ends
with the same bytes as one that was not.
"""

from __future__ import annotations

import json
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from katei import __version__
from katei.base.device import pick_device
from katei.base.load import load_base, load_config, load_tokenizer, resolve_base
from katei.base.packed import Base, check_ids
from katei.core import metrics
from katei.core.errors import BaseError, DataError, RecipeError, RunError, UserError
from katei.core.files import folder_atomic, write_atomic, write_json, write_text
from katei.core.machine import forget_peak_memory, peak_memory_bytes, return_freed_memory
from katei.data import Dataset, Split, cut_warnings, load_dataset
from katei.engine.checkpoint import is_state_of, load_state, save_state
from katei.engine.lockstep import Lockstep, Tokens, Trial, TrialState, score_rows
from katei.methods.adalora import AdaLoRAStack
from katei.methods.full import Full
from katei.methods.saved import AdapterNote, load_into_, read_adapter, save_adapter
from katei.plan.devices import this_device
from katei.study.fit import Asked, Fit, fit_study, read_fit, said_of
from katei.study.recipe import Recipe, load_recipe

SAVE_SECONDS = 60.0
"""How much work a kill can cost, at most."""


class Watcher(Protocol):
    """Sees a study go by; the terminal's progress is one."""

    def say(self, text: str) -> None: ...
    def begin(self, lockstep: Lockstep) -> None: ...
    def tick(self, lockstep: Lockstep, ended: list[TrialState]) -> None: ...
    def end(self) -> None: ...


class Quiet:
    """Watches without a word."""

    def say(self, text: str) -> None:
        pass

    def begin(self, lockstep: Lockstep) -> None:
        pass

    def tick(self, lockstep: Lockstep, ended: list[TrialState]) -> None:
        pass

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class TestScores:
    """Scores on one set of rows, with 95 % intervals (Wilson; bootstrap within classes)."""

    rows: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    roc_auc: float | None
    roc_auc_interval: tuple[float, float] | None
    loss: float


@dataclass
class Study:
    """A finished study, as the commands print it and the API returns it."""

    run: Path
    results: dict[str, Any]
    environment: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            **self.results,
            "seconds": self.environment["seconds"],
            "memory": self.environment["memory"],
        }


def run_study(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    save_seconds: float = SAVE_SECONDS,
    force: bool = False,
) -> Study:
    """Train every trial of the recipe and write the run folder; goes on where an earlier call was killed.

    Raises UserError for bad data, recipe or base, or for what does not fit this machine (but for `force`), before anything is
    trained; RunError where `out` holds another run.
    """
    watcher = watcher or Quiet()
    started = time.perf_counter()
    forget_peak_memory()
    if recipe.checkpointing:
        return_freed_memory()  # memory counts more than time here
    dataset = load_dataset(recipe.data, text=recipe.text, label=recipe.label)
    path = resolve_base(recipe.model, say=watcher.say)
    config, tokenizer = load_config(str(path)), load_tokenizer(str(path))
    tokens = {
        name: encode(tokenizer, split, recipe.max_length, config.vocab_size) for name, split in dataset.splits.items()
    }
    groups = _groups(recipe, len(dataset.train.texts))
    if dataset.valid is None:
        _check_no_valid([trial for group in groups for trial in group])
    device = this_device(pick_device(recipe.device))
    identity = sha256((recipe.to_toml() + dataset.sha256).encode()).hexdigest()
    _check_claim(out, recipe, identity, overwrite)
    ended = (out / "results.json").exists()
    fit = read_fit(out / "plan.json") if _identity(out) == identity and not (ended and overwrite) else None
    if fit is None and (overwrite or not ended):
        fit = fit_study(_asked(recipe, groups, tokens, dataset), config, device, force=force)
    with _claimed(out):
        _sweep(out)
        # an unfinished run of the same study goes on, also with --overwrite: it ends with the same bytes
        if overwrite and ((out / "results.json").exists() or _identity(out) != identity):
            _clear(out)
        if (out / "results.json").exists():
            _drop_states(out)  # a kill may have come between the results and this
            watcher.say(f"{out} is finished; these are its results (--overwrite trains again)")
            return load_study(out)
        warnings = [*dataset.warnings, *_cuts(tokenizer, dataset, recipe.max_length)]
        for warning in warnings:
            watcher.say(f"warning: {warning}")
        assert fit is not None
        watcher.say(said_of(fit, recipe.token_budget))
        write_json(out / "plan.json", fit.to_json())
        write_text(out / "identity", identity + "\n")
        write_text(out / "recipe.toml", recipe.to_toml())
        finished: list[_Finished] = []
        seconds = {"load": time.perf_counter() - started, "train": 0.0, "evaluate": 0.0}
        base: Base | None = None
        for group in fit.groups([trial for together in groups for trial in together]):
            own = isinstance(group[0].method, Full)
            loading = time.perf_counter()
            if base is None or own:
                base = None  # never two in memory
                base = open_base(recipe.model, recipe.precision, recipe.device, watcher.say, tokenizer)
            seconds["load"] += time.perf_counter() - loading
            finished += _train_group(
                group, base, recipe, fit, dataset, tokens, out, identity, watcher, seconds, save_seconds, overwrite
            )
            if own:
                base = None  # its weights are trained: nobody else's base any more
        results = _results(finished, dataset)
        _write_predictions(out / "predictions.parquet", finished, dataset)
        peak = torch.cuda.max_memory_reserved() if device.kind == "cuda" else peak_memory_bytes()
        seconds["total"] = time.perf_counter() - started
        environment = _environment(recipe, seconds, fit, peak, warnings)
        write_json(out / "environment.json", environment)
        write_json(out / "results.json", results)  # last: its presence says that the run is whole
        _drop_states(out)
    return Study(out, results, environment, tuple(warnings))


def load_study(run: Path) -> Study:
    """A finished run folder. Raises RunError for anything else."""
    if not run.is_dir():
        raise RunError("no such run folder", file=run, hint="`katei train` or `katei compare` makes one")
    if not (run / "results.json").exists():
        if (run / "recipe.toml").exists():
            raise RunError(
                "this run has not finished",
                file=run,
                hint="the command that began it, typed again, goes on where it stopped",
            )
        raise RunError(
            "is not a run folder: no results.json", file=run, hint="`katei train` or `katei compare` makes one"
        )
    try:
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"its results cannot be read: {error}",
            file=run,
            hint="the command that made it, with --overwrite, makes it again",
        ) from None
    return Study(run, results, environment, tuple(environment.get("warnings", ())))


def open_base(name: str, precision: str, device: str, say: Callable[[str], None], tokenizer: Any = None) -> Base:
    loaded = load_base(name, precision=precision, device=device, tokenizer=tokenizer, say=say)
    return Base(loaded.model, loaded.tokenizer, name=name, fingerprint=loaded.fingerprint)


def encode(tokenizer: Any, split: Split, max_length: int, vocabulary: int) -> Tokens:
    """Token ids of every text, cut to `max_length`. Raises DataError for a token the base does not know."""
    ids = tokenizer(list(split.texts), truncation=True, max_length=max_length)["input_ids"]
    for line, row in zip(split.lines, ids, strict=True):
        try:
            check_ids(row, vocabulary, tokenizer)
        except BaseError as error:
            raise DataError(error.message, file=split.file, row=line, hint=error.hint) from None
    return Tokens(tuple(tuple(row) for row in ids), split.labels)


# -------------------------------------------------------------------- the run folder's owner


def _check_claim(out: Path, recipe: Recipe, identity: str, overwrite: bool) -> None:
    """Raise RunError, naming what differs, if `out` is not free for this study. Writes nothing."""
    if out.exists() and not out.is_dir():
        raise RunError("is a file, and a run needs a folder", file=out, hint="--out another path")
    if not out.is_dir() or not any(p for p in out.iterdir() if not p.name.startswith(".")):
        return
    if not (out / "identity").exists():
        raise RunError("is a folder with other things in it", file=out, hint="--out a new or empty folder")
    if not overwrite and _identity(out) != identity:
        difference = _difference(out / "recipe.toml", recipe) if (out / "recipe.toml").exists() else ""
        raise RunError(
            f"holds another run ({difference or 'the data have changed'})",
            file=out,
            hint="--out another folder keeps it, --overwrite replaces it",
        )


def _identity(out: Path) -> str | None:
    file = out / "identity"
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else None


def _clear(out: Path) -> None:
    """Remove a run: its results first, its identity last, so that what a kill leaves is still known as a run."""
    for name in ("results.json", "environment.json", "predictions.parquet", "recipe.toml", "plan.json"):
        (out / name).unlink(missing_ok=True)
    _drop_states(out)
    shutil.rmtree(out / "trials", ignore_errors=True)
    (out / "identity").unlink(missing_ok=True)


def _drop_states(out: Path) -> None:
    for state in out.glob("state-*.safetensors"):
        state.unlink()


def _sweep(out: Path) -> None:
    """Remove what a killed write left unfinished; the caller holds the lock, so nobody is writing."""
    for part in [*out.glob(".*.part"), *out.glob("trials/.*.part")]:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def _difference(old: Path, recipe: Recipe) -> str:
    import tomllib

    before, now = tomllib.loads(old.read_text(encoding="utf-8")), tomllib.loads(recipe.to_toml())
    said = []
    for key in [*before, *(key for key in now if key not in before)]:
        old_value, new_value = before.get(key), now.get(key)
        if isinstance(old_value, dict) and isinstance(new_value, dict):
            for inner in sorted(set(old_value) | set(new_value)):
                if old_value.get(inner) != new_value.get(inner):
                    said.append(f"{key}: {inner} = {old_value.get(inner)} there, {new_value.get(inner)} now")
        elif old_value != new_value and not isinstance(old_value or new_value, dict):
            said.append(f"{key} = {old_value} there, {new_value} now")
    return "; ".join(said[:3])


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Make the run folder and hold its lock. A user's mistake found before anything was trained leaves nothing behind."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    fresh = _identity(out) is None
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(
            "another katei is training into this folder", file=out, hint="wait for it, or --out another folder"
        ) from None
    try:
        yield
    except UserError:
        if fresh and not any(out.glob("state-*.safetensors")):
            _clear(out)
            (out / ".lock").unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
        raise
    finally:
        lock.release()


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is a question answered after the step; a second one interrupts at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


# -------------------------------------------------------------------- training


@dataclass
class _Finished:
    """One trial's outcome, and all its scored rows by split."""

    state: TrialState
    trainable: int
    total: int
    probabilities: dict[str, NDArray[np.float64]]
    ranks: dict[str, int] | None


def _cuts(tokenizer: Any, dataset: Dataset, max_length: int) -> list[str]:
    lengths = {
        name: [len(row) for row in tokenizer(list(split.texts))["input_ids"]] for name, split in dataset.splits.items()
    }
    return list(cut_warnings(lengths, max_length))


def _groups(recipe: Recipe, rows: int) -> list[list[Trial]]:
    """Trials that train together: all over the shared base, then each full fine-tuning by itself."""
    shared: list[Trial] = []
    alone: list[list[Trial]] = []
    for name in recipe.methods:
        method, training = recipe.resolved(name)
        for seed in recipe.seeds:
            label = name if len(recipe.seeds) == 1 else f"{name}-seed{seed}"
            trial = Trial(label, method, seed, training, tuple(range(rows)))
            if isinstance(method, Full):
                alone.append([trial])
            else:
                shared.append(trial)
    return ([shared] if shared else []) + alone


def _check_no_valid(trials: list[Trial]) -> None:
    for trial in trials:
        if trial.training.keep == "best" or trial.training.patience:
            setting = 'keep = "best"' if trial.training.keep == "best" else f"patience = {trial.training.patience}"
            raise RecipeError(
                f"{trial.name}: {setting} needs a validation loss, and there are no valid rows",
                hint="add valid.tsv to the data, or leave the setting out",
            )


def _asked(recipe: Recipe, groups: list[list[Trial]], tokens: dict[str, Tokens], dataset: Dataset) -> Asked:
    return Asked(
        groups=tuple(map(tuple, groups)),
        classes=len(dataset.label_names),
        train=tokens["train"],
        valid=tokens.get("valid"),
        test=tokens.get("test"),
        token_budget=recipe.token_budget,
        precision=recipe.precision,
        checkpointing=recipe.checkpointing,
    )


def _train_group(
    group: list[Trial],
    base: Base,
    recipe: Recipe,
    fit: Fit,
    dataset: Dataset,
    tokens: dict[str, Tokens],
    out: Path,
    identity: str,
    watcher: Watcher,
    seconds: dict[str, float],
    save_seconds: float,
    overwrite: bool,
) -> list[_Finished]:
    lockstep = Lockstep(
        base,
        group,
        len(dataset.label_names),
        tokens["train"],
        tokens.get("valid"),
        token_budget=fit.token_budget,
        checkpointing=recipe.checkpointing,
    )
    state_file = out / f"state-{group[0].name}.safetensors"
    fingerprint = f"{identity}/{base.fingerprint}"
    if state_file.exists() and (not overwrite or is_state_of(state_file, fingerprint)):
        load_state(state_file, lockstep, fingerprint)
        watcher.say(
            f"going on from step {max(s.step for s in lockstep.states)} of {max(s.trial.total_steps for s in lockstep.states)}"
        )
    saved_at = time.monotonic()
    watcher.begin(lockstep)
    try:
        with _asked_to_stop() as asked:

            def watch(engine: Lockstep, ended: list[TrialState]) -> None:
                nonlocal saved_at
                watcher.tick(engine, ended)
                stop = asked()
                if stop or time.monotonic() - saved_at >= save_seconds:
                    save_state(state_file, engine, fingerprint)
                    saved_at = time.monotonic()
                if stop:
                    raise KeyboardInterrupt

            lockstep.run(watch)
    finally:
        watcher.end()
    save_state(state_file, lockstep, fingerprint)  # the scoring below may be killed too

    evaluating = time.perf_counter()
    scored = {name: split for name, split in tokens.items() if name in ("valid", "test")}
    probabilities = {
        name: lockstep.probabilities([(state, split) for state in lockstep.states]) for name, split in scored.items()
    }
    finished = []
    for i, state in enumerate(lockstep.states):
        stack = lockstep.stacks[state.stack]
        ranks = stack.ranks(state.n) if isinstance(stack, AdaLoRAStack) else None
        finished.append(
            _Finished(state, stack.trainable, stack.total(base), {k: v[i] for k, v in probabilities.items()}, ranks)
        )
    _save_trials(lockstep, finished, base, recipe, dataset, tokens, out)
    lockstep.seconds["evaluate"] += time.perf_counter() - evaluating
    for name, value in lockstep.seconds.items():
        seconds[name] += value
    return finished


def _save_trials(
    lockstep: Lockstep,
    finished: list[_Finished],
    base: Base,
    recipe: Recipe,
    dataset: Dataset,
    tokens: dict[str, Tokens],
    out: Path,
) -> None:
    """Write each adapter, read it back from the disk, and check that it scores rows to the same bits."""
    from katei.ship.models import save_full

    for done in finished:
        state, trial = done.state, done.state.trial
        note = AdapterNote(
            name=trial.name,
            method=trial.method.name,
            settings=trial.method.settings(),
            labels=dataset.label_names,
            base=recipe.model,
            fingerprint=base.fingerprint,
            max_length=recipe.max_length,
            text_column=dataset.text_column,
            training={
                **asdict(trial.training),
                "seed": trial.seed,
                "rows": len(trial.rows),
                "epochs_run": len(state.epochs),
            },
        )
        with folder_atomic(out / "trials" / trial.name) as folder:
            stack = lockstep.stacks[state.stack]
            if isinstance(trial.method, Full):
                save_full(folder, base, stack, note)
                continue
            save_adapter(
                folder, stack, state.n, trial.method, note, str(base.model.config._name_or_path or recipe.model)
            )
            saved = read_adapter(folder, diverged=state.finished == "diverged")
            check = tokens.get("test", tokens["train"]).ids[:4]
            mine = [(state.stack, state.n, ids) for ids in check]
            before = score_rows(base, lockstep.stacks, mine, token_budget=lockstep.token_budget)
            if trial.method.saved_as() == trial.method:
                load_into_(stack, state.n, saved)
                after = score_rows(base, lockstep.stacks, mine, token_budget=lockstep.token_budget)
            else:  # read as another method: its own stack, of the same number of adapters
                other = [
                    trial.method.saved_as().build(base, stack.classes, [0] * stack.adapters, [])
                    if s == state.stack
                    else k
                    for s, k in enumerate(lockstep.stacks)
                ]
                load_into_(other[state.stack], state.n, saved)
                after = score_rows(base, other, mine, token_budget=lockstep.token_budget)
            if before.tobytes() != after.tobytes() and state.finished != "diverged":
                raise AssertionError(
                    f"{trial.name}: the saved adapter scores rows differently by {np.abs(before - after).max():.2e}"
                )


# -------------------------------------------------------------------- results


def test_scores(probability_EC: NDArray[np.float64], labels: tuple[int, ...]) -> TestScores:
    """Scores with intervals of one set of rows."""
    correct = int((probability_EC.argmax(1) == np.asarray(labels)).sum())
    return TestScores(
        rows=len(labels),
        accuracy=correct / len(labels),
        accuracy_interval=metrics.wilson_interval(correct, len(labels)),
        roc_auc=metrics.roc_auc(probability_EC, labels),
        roc_auc_interval=metrics.roc_auc_interval(probability_EC, labels),
        loss=metrics.cross_entropy(probability_EC, labels),
    )


def _results(finished: list[_Finished], dataset: Dataset) -> dict[str, Any]:
    trials = []
    for done in finished:
        trial, state = done.state.trial, done.state
        test = None
        if dataset.test is not None and np.isfinite(done.probabilities["test"]).all():
            test = asdict(test_scores(done.probabilities["test"], dataset.test.labels))
        trials.append(
            {
                "name": trial.name,
                "method": trial.method.name,
                "seed": trial.seed,
                "fold": None,
                "trainable": done.trainable,
                "total": done.total,
                "finished": state.finished,
                "best_epoch": state.best_epoch,
                "ranks": done.ranks,
                "epochs": [asdict(epoch) for epoch in state.epochs],
                "test": test,
            }
        )
    labels = list(dataset.label_names)
    majority = None
    if dataset.test is not None:
        counts = np.bincount(dataset.train.labels, minlength=len(labels))
        majority = float((np.asarray(dataset.test.labels) == counts.argmax()).mean())
    return {"labels": labels, "majority_accuracy": majority, "trials": trials, "verdict": verdict(trials, majority)}


def verdict(trials: list[dict[str, Any]], majority: float | None) -> str:
    """What may be said of these scores, and no more."""
    diverged = [t["name"] for t in trials if t["finished"] == "diverged"]
    said = [f"{', '.join(diverged)} diverged: try a smaller learning rate."] if diverged else []
    scored = [t for t in trials if t["test"]]
    if majority is None or not scored:
        return " ".join([*said, "No test rows, so nothing can be said about accuracy."])
    above = [t for t in scored if t["test"]["accuracy_interval"][0] > majority]
    if len(scored) == 1:
        who, verb = "This trial", "beats" if above else "is not shown to beat"
    else:
        who, verb = f"{len(above)} of {len(scored)} trials", "beat"
    said.append(
        f"{who} {verb} always answering the commonest class ({majority:.3f}) "
        f"by more than {'its' if len(scored) == 1 else 'their'} 95 % interval on {scored[0]['test']['rows']} test rows."
    )
    below = [t["name"] for t in scored if t not in above]
    if below and above:
        said.append(f"Not shown to beat it: {', '.join(below)}.")
    if len(scored) > 1:
        best = max(scored, key=lambda t: t["test"]["accuracy"])
        low = best["test"]["accuracy_interval"][0]
        overlapping = [t for t in scored if t is not best and t["test"]["accuracy_interval"][1] >= low]
        if overlapping and len(scored) == 2:
            said.append("The two intervals overlap: this table does not rank them.")
        elif overlapping:
            said.append(
                f"{len(overlapping)} of the other {len(scored) - 1} have intervals that overlap the best one's: "
                "this table does not rank them."
            )
    return " ".join(said)


def _write_predictions(path: Path, finished: list[_Finished], dataset: Dataset) -> None:
    columns: dict[str, list[Any]] = {
        name: [] for name in ("trial", "method", "seed", "split", "line", "label", "prediction")
    }
    names = dataset.label_names
    columns |= {f"probability_{name}": [] for name in names}
    splits = dataset.splits
    for done in finished:
        for name, probability_EC in done.probabilities.items():
            split = splits[name]
            for line, label, p_C in zip(split.lines, split.labels, probability_EC, strict=True):
                row = (
                    done.state.trial.name,
                    done.state.trial.method.name,
                    done.state.trial.seed,
                    name,
                    line,
                    names[label],
                    names[int(p_C.argmax())],
                )
                for column, value in zip(columns, (*row, *p_C.tolist()), strict=True):
                    columns[column].append(value)
    table = pa.table(columns)
    write_atomic(path, lambda temporary: pq.write_table(table, temporary))


def _environment(recipe: Recipe, seconds: dict[str, float], fit: Fit, peak: int, warnings: list[str]) -> dict[str, Any]:
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
            "waves": len(fit.waves),
        },
        "warnings": warnings,
    }


def read_recipe(run: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    return load_recipe(run / "recipe.toml", {})
