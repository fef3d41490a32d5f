"""How a study is run so that it fits: as asked, else in smaller passes, else fewer trials at once, else not at all.

    groups of trials, rows, base's shape  →  the planner, for each  →  Fit: tokens of a pass, trials of each wave, bytes it will take

A fit is chosen once, before anything is loaded, and kept in RUN/plan.json: a run that goes on takes it from there, so that it ends
with the bytes of one that was not stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from katei.core.errors import RunError
from katei.engine.lockstep import Tokens, Trial
from katei.methods.full import Full
from katei.plan.devices import Device
from katei.plan.plan import Planner, Run
from katei.plan.process import resident_bytes

SMALLEST_PASS = 64
"""Tokens; below this a pass gains no room, since a row is never cut in two."""


@dataclass(frozen=True)
class Fit:
    """What was decided, and what it will take at its peak."""

    token_budget: int
    waves: tuple[tuple[str, ...], ...]
    """Names of the trials that train together, in this order."""
    planned_bytes: int
    usable_bytes: int
    live_peak_bytes: int
    parts: dict[str, int]
    """Of the heaviest wave: live bytes by owner, and where they are the most."""
    where: str

    @property
    def fits(self) -> bool:
        return self.planned_bytes <= self.usable_bytes

    def groups(self, trials: Sequence[Trial]) -> list[list[Trial]]:
        named = {trial.name: trial for trial in trials}
        return [[named[name] for name in wave] for wave in self.waves]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_fit(file: Path) -> Fit | None:
    """What `to_json` wrote, or None where there is none."""
    if not file.exists():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    return Fit(**{**values, "waves": tuple(map(tuple, values["waves"]))})


def said_of(fit: Fit, asked_budget: int) -> str:
    """One line for the reader, before anything is loaded."""
    said = f"plan: {_gib(fit.planned_bytes)} of {_gib(fit.usable_bytes)}"
    if fit.token_budget != asked_budget:
        said += f", in passes of {fit.token_budget} tokens instead of {asked_budget}"
    if len(fit.waves) > 1:
        said += f", at most {max(map(len, fit.waves))} trials at once"
    return said + ("" if fit.fits else "; it does not fit, and is tried because of --force")


@dataclass(frozen=True)
class Asked:
    """A study as its recipe has it, with all that decides what it takes."""

    groups: tuple[tuple[Trial, ...], ...]
    classes: int
    train: Tokens
    valid: Tokens | None
    test: Tokens | None
    token_budget: int
    precision: str
    checkpointing: bool

    def run(self, trials: Sequence[Trial], token_budget: int) -> Run:
        return Run(tuple(trials), self.classes, self.train, self.valid, token_budget, self.checkpointing, self.test)

    @property
    def longest(self) -> int:
        return max(len(ids) for tokens in (self.train, self.valid, self.test) if tokens for ids in tokens.ids)


def fit_study(asked: Asked, config: PreTrainedConfig, device: Device, *, force: bool) -> Fit:
    """Raises RunError, saying what would fit, where nothing helps and `force` is not given; AdapterError or RecipeError for methods
    that this base cannot have.
    """
    with Planner(config, asked.precision, device, resident_bytes()) as planner:
        first = found = _planned(planner, asked, asked.groups, asked.token_budget)
        budget, groups = asked.token_budget, asked.groups
        while not found.fits and budget > max(asked.longest, SMALLEST_PASS):
            budget = max(budget // 2, asked.longest, SMALLEST_PASS)
            found = _planned(planner, asked, groups, budget)
        most = max(len(group) for group in groups)
        while not found.fits and most > 1:
            most = -(-most // 2)
            groups = tuple(group[k : k + most] for group in asked.groups for k in range(0, len(group), most))
            found = _planned(planner, asked, groups, budget)
        if found.fits or force:
            return found if found.fits else first
        alone = [(trial, _planned(planner, asked, ((trial,),), budget)) for trial in _one_of_each(asked)]
    heaviest = max(alone, key=lambda pair: pair[1].planned_bytes)
    raise RunError(
        f"{heaviest[0].method.name} does not fit: it needs {_gib(heaviest[1].planned_bytes)} of the "
        f"{_gib(device.usable_bytes)} that {device.name} has free",
        hint=_instead(asked, config, device, [trial.method.name for trial, fit in alone if fit.fits]),
    )


def _planned(planner: Planner, asked: Asked, groups: Sequence[Sequence[Trial]], token_budget: int) -> Fit:
    """What the heaviest group takes; of groups that are alike up to seeds and names one is run."""
    needs = {}
    for group in groups:
        alike = tuple((trial.method, trial.training, len(trial.rows)) for trial in group)
        if alike not in needs:
            trace = planner.trace(asked.run(group, token_budget))
            needs[alike] = (planner.need(trace), trace)
    need, trace = max(needs.values(), key=lambda pair: pair[0])
    return Fit(
        token_budget=token_budget,
        waves=tuple(tuple(trial.name for trial in group) for group in groups),
        planned_bytes=need,
        usable_bytes=planner.device.usable_bytes,
        live_peak_bytes=trace.live_peak_bytes,
        parts=trace.parts,
        where=trace.where,
    )


def _one_of_each(asked: Asked) -> list[Trial]:
    return list({trial.method: trial for group in asked.groups for trial in group}.values())


def _instead(asked: Asked, config: PreTrainedConfig, device: Device, fitting: list[str]) -> str:
    """What to type: each way by itself, tried on one trial of the heaviest method."""
    trials = _one_of_each(asked)
    half = "bf16" if device.bf16 else "fp16"
    ways = {
        "--checkpointing": replace(asked, checkpointing=True),
        f"--precision {half}": replace(asked, precision=half),
        f"--precision {half} --checkpointing": replace(asked, precision=half, checkpointing=True),
    }
    said = []
    for flags, way in ways.items():
        if way == asked or (way.precision != "fp32" and any(isinstance(trial.method, Full) for trial in trials)):
            continue
        with Planner(config, way.precision, device, resident_bytes()) as planner:
            budget = max(way.longest, SMALLEST_PASS)
            if all(_planned(planner, way, ((trial,),), budget).fits for trial in trials):
                said.append(flags)
                break
    with Planner(config, asked.precision, device, resident_bytes()) as planner:
        longest = min(planner.longest_text(asked.run((trial,), asked.token_budget)) for trial in trials)
    if 0 < longest < asked.longest:
        said.append(f"--max-length {longest}")
    if fitting:
        said.append(f"--method {','.join(fitting)}")
    return f"{' or '.join(said) or 'a smaller base'} fits; --force tries it all the same"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
