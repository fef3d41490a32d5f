"""A study from recipe to run folder.

    recipe → data, checked → design → tokens → base → lockstep (and, for full fine-tuning, one run each) → the chosen trials'
    answers → comparison → RUN

    RUN/recipe.toml            every setting, resolved          RUN/results.json         every trial, epoch and score
    RUN/environment.json       machine, versions, seconds       RUN/predictions.parquet  every scored row of every trial
    RUN/trials/NAME/           the adapter, peft's format       RUN/state-*.safetensors  while it is running

What a result *is* goes into results.json, how long it took into environment.json: so a run that was killed and went on ends
with the same bytes as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from katei.base.device import pick_device
from katei.base.load import load_base, load_causal_lm, load_config, load_tokenizer, resolve_base
from katei.base.packed import Base, check_ids
from katei.core.errors import BaseError, DataError, RunError
from katei.core.files import write_json, write_text
from katei.core.machine import forget_peak_memory, give_back, peak_memory_bytes, return_freed_memory
from katei.data import Dataset, Split, cut_warnings, load_dataset
from katei.engine.lockstep import Tokens
from katei.methods.full import Full
from katei.plan.devices import this_device
from katei.study.comparison import TFIDF, ZERO_SHOT
from katei.study.design import design_study
from katei.study.fit import Asked, fit_study, read_fit, said_of
from katei.study.folder import (
    PARTIAL,
    Study,
    check_claim,
    claimed,
    clear,
    drop_states,
    identity_of,
    load_study,
    sweep,
)
from katei.study.learning_curve import learning_curve, subset_trials
from katei.study.recipe import Recipe
from katei.study.references import LanguageModel, Part, Reference, mute_labels, reference_outcomes
from katei.study.results import environment_of, partial_results, results_of, write_predictions
from katei.study.training import Job, Quiet, Watcher, ended_of, train_group
from katei.study.trials import Ended, Planned, planned_trials
from katei.study.tuning import chosen_of

SAVE_SECONDS = 60.0
"""How much work a kill can cost, at most."""


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
    design = design_study(recipe, {name: split.labels for name, split in dataset.splits.items()}, dataset.label_names)
    planned = planned_trials(recipe, design)
    path = resolve_base(recipe.model, say=watcher.say)
    config, tokenizer = load_config(str(path)), load_tokenizer(str(path))
    pool = Tokens((), ())
    for split in dataset.splits.values():
        pool += encode(tokenizer, split, recipe.max_length, config.vocab_size)
    device = this_device(pick_device(recipe.device))
    identity = sha256((recipe.to_toml() + dataset.sha256).encode()).hexdigest()
    check_claim(out, recipe, identity, overwrite)
    over = (out / "results.json").exists()
    try:
        fit = read_fit(out / "plan.json") if identity_of(out) == identity and not (over and overwrite) else None
    except RunError:
        if not overwrite:
            raise
        fit = None
    if fit is None and (overwrite or not over):
        asked = _asked(planned, pool, dataset.label_names, recipe, scored=bool(design.rows))
        fit = fit_study(asked, config, device, force=force)
    with claimed(out):
        sweep(out)
        # an unfinished run of the same study goes on, also with --overwrite: it ends with the same bytes
        if overwrite and ((out / "results.json").exists() or identity_of(out) != identity):
            clear(out)
        if (out / "results.json").exists():
            drop_states(out)  # a kill may have come between the results and this
            watcher.say(f"{out} is finished; these are its results (--overwrite trains again)")
            return load_study(out)
        warnings = [*dataset.warnings, *_cuts(tokenizer, dataset, recipe.max_length)]
        for warning in warnings:
            watcher.say(f"warning: {warning}")
        assert fit is not None
        watcher.say(design.text)
        watcher.say(said_of(fit, recipe, planned))
        write_json(out / "plan.json", fit.to_json())
        write_text(out / "identity", identity + "\n")
        write_text(out / "recipe.toml", recipe.to_toml())
        job = Job(recipe, fit, tokenizer, design, dataset, pool, out, identity, overwrite, watcher, save_seconds)
        job.seconds["load"] += time.perf_counter() - started
        ended = _train(planned, job)
        evaluating = time.perf_counter()
        give_back()  # zero-shot loads a base again, with its language-model head
        references = _references(job)
        curve = (
            learning_curve(ended, recipe, design, pool.labels, dataset.label_names) if recipe.learning_curve else None
        )
        results = results_of(ended, references, recipe, design, dataset, curve)
        write_predictions(out / "predictions.parquet", ended, references, design, dataset)
        job.seconds["evaluate"] += time.perf_counter() - evaluating
        peak = torch.cuda.max_memory_reserved() if device.kind == "cuda" else peak_memory_bytes()
        seconds = {**job.seconds, "total": job.before + time.perf_counter() - started}
        environment = environment_of(recipe, seconds, fit, peak, warnings)
        write_json(out / "environment.json", environment)
        write_json(out / "results.json", results)  # last: its presence says that the run is whole
        drop_states(out)
    return Study(out, results, environment, tuple(warnings))


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


def _cuts(tokenizer: Any, dataset: Dataset, max_length: int) -> list[str]:
    lengths = {
        name: [len(row) for row in tokenizer(list(split.texts))["input_ids"]] for name, split in dataset.splits.items()
    }
    return list(cut_warnings(lengths, max_length))


def _asked(planned: Sequence[Planned], pool: Tokens, names: Sequence[str], recipe: Recipe, scored: bool) -> Asked:
    zero_shot = scored and ZERO_SHOT in recipe.references and not mute_labels(names)
    how = (recipe.token_budget, recipe.precision, recipe.checkpointing)
    return Asked(tuple(planned), len(names), pool, *how, zero_shot=zero_shot)


def _train(planned: Sequence[Planned], job: Job) -> list[Ended]:
    """All of them, and the learning curve's. A Ctrl-C leaves RUN/results-partial.json behind."""
    ended: list[Ended] = []
    try:
        base = _train_groups(job.fit.groups(planned), None, job, ended)
        _choose(ended)
        if job.recipe.learning_curve:
            subsets = subset_trials([e for e in ended if e.chosen], job.pool.labels)
            _train_groups(job.fit.groups(subsets), base, job, ended)
    except KeyboardInterrupt:
        so_far = [*ended, *_begun(planned, job)]
        write_json(job.out / PARTIAL, partial_results(so_far, job.recipe, job.design, job.dataset, len(planned)))
        raise
    return ended


def _train_groups(groups: list[list[Planned]], base: Base | None, job: Job, ended: list[Ended]) -> Base | None:
    """Adds to `ended`. Returns the shared base, if it is still loaded."""
    for i, group in enumerate(groups):
        own = isinstance(group[0].trial.method, Full)
        loading = time.perf_counter()
        if base is None or own:
            base = None  # never two in memory
            base = open_base(job.recipe.model, job.recipe.precision, job.recipe.device, job.watcher.say, job.tokenizer)
        job.seconds["load"] += time.perf_counter() - loading
        ended += train_group(group, base, job, left=sum(len(later) for later in groups[i + 1 :]))
        if own:
            base = None  # its weights are trained: nobody else's base any more
    return base


def _choose(ended: Sequence[Ended]) -> None:
    """Settings that trained each by itself (full fine-tuning) meet here."""
    races: dict[object, list[Ended]] = {}
    for e in ended:
        if e.chosen:
            races.setdefault(e.planned.race, []).append(e)
    for race in races.values():
        best = chosen_of(race)
        for e in race:
            if e is not best:
                e.chosen, e.probabilities = False, {}


def _begun(planned: Sequence[Planned], job: Job) -> list[Ended]:
    """What the trials that were training when the study was stopped came to."""
    if job.running is None:
        return []
    by_name = {p.trial.name: p for p in planned}
    states = [s for s in job.running.states if s.trial.name in by_name]
    return [ended_of(by_name[s.trial.name], s, job.running) for s in states]


def _references(job: Job) -> list[Reference]:
    """The reference points that are no methods: of every cell, on the rows that the methods are judged by."""
    recipe, dataset, names = job.recipe, job.dataset, job.dataset.label_names
    if not job.design.rows:
        return []
    texts = [text for split in dataset.splits.values() for text in split.texts]
    labels = job.pool.labels
    parts = [Part(c.repeat, c.fold, c.seed, c.train, c.test) for c in job.design.cells]

    def open_model() -> LanguageModel:
        job.watcher.say("reference points: zero-shot with the base")
        loaded = load_causal_lm(recipe.model, precision=recipe.precision, device=recipe.device, tokenizer=job.tokenizer)
        whole: Any = loaded.model
        base = Base(whole.base_model, loaded.tokenizer, name=recipe.model, fingerprint=loaded.fingerprint)
        return LanguageModel(base, whole.get_output_embeddings())

    if TFIDF in recipe.references:
        job.watcher.say("reference points: TF-IDF with logistic regression")
    return reference_outcomes(
        recipe.references,
        texts,
        labels,
        names,
        parts,
        open_model,
        max_length=recipe.max_length,
        token_budget=recipe.token_budget,
    )
