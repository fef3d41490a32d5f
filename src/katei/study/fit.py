"""How a study is run so that it fits: as asked, else in smaller passes, else fewer trials at once, else not at all.

    planned trials, pool of rows, base's shape  →  the planner  →  Fit: tokens of a pass, trials at once, bytes it will take

A fit is chosen once, before anything is loaded, and kept in RUN/plan.json: a run that goes on takes it from there, so that it ends
with the bytes of one that was not stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from katei.core.errors import RunError
from katei.core.machine import resident_bytes
from katei.engine.lockstep import Tokens
from katei.methods.full import Full
from katei.plan.devices import Device
from katei.plan.plan import Planner, Run
from katei.study.recipe import Recipe
from katei.study.references import JUDGED
from katei.study.trials import Planned, groups_of

SMALLEST_PASS = 64
"""Tokens; below this a pass gains no room, since a row is never cut in two."""


@dataclass(frozen=True)
class Fit:
    """What was decided, and what it will take at its peak."""

    token_budget: int
    most: int
    """Trials at once."""
    planned_bytes: int
    usable_bytes: int
    live_peak_bytes: int
    parts: dict[str, int]
    """Live bytes by owner at that peak, and its place: train or evaluate."""
    where: str
    alone: dict[str, int] = field(default_factory=dict)
    """What one trial of each method would take by itself."""

    @property
    def fits(self) -> bool:
        return self.planned_bytes <= self.usable_bytes

    def groups(self, planned: Sequence[Planned]) -> list[list[Planned]]:
        """Trials that train together, in this order."""
        return [wave for group in groups_of(planned) for wave in _waves(group, self.most)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_fit(file: Path) -> Fit | None:
    """What `to_json` wrote, or None where there is none. Raises RunError for anything else."""
    if not file.exists():
        return None
    try:
        return Fit(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(
            f"the plan of this run cannot be read: {error}", file=file, hint="--overwrite starts again"
        ) from None


def said_of(fit: Fit, recipe: Recipe, planned: Sequence[Planned]) -> str:
    """One line for the reader, before anything is loaded."""
    said = f"plan: {_gib(fit.planned_bytes)} of {_gib(fit.usable_bytes)}"
    if fit.token_budget != recipe.token_budget:
        said += f", in passes of {fit.token_budget} tokens instead of {recipe.token_budget}"
    if len(fit.groups(planned)) > len(groups_of(planned)):
        said += f", at most {fit.most} trials at once"
    return said + ("" if fit.fits else "; it does not fit, and is tried because of --force")


@dataclass(frozen=True)
class Asked:
    """A study as its recipe has it, with all that decides what it takes."""

    planned: tuple[Planned, ...]
    classes: int
    pool: Tokens
    token_budget: int
    precision: str
    checkpointing: bool
    zero_shot: bool = False
    """The base scores the labels as a language model, when all is trained."""

    def run(self, planned: Sequence[Planned], token_budget: int) -> Run:
        trials = tuple(p.trial for p in planned)
        scored = tuple(p.cell.test for p in planned)
        return Run(trials, self.classes, self.pool, scored, token_budget, self.checkpointing)

    @property
    def longest(self) -> int:
        return max(len(ids) for ids in self.pool.ids)


def fit_study(asked: Asked, config: PreTrainedConfig, device: Device, *, force: bool = False) -> Fit:
    """Raises RunError, saying what would fit, where nothing helps and `force` is not given; AdapterError or RecipeError for methods
    that this base cannot have.
    """
    all_at_once = max(map(len, groups_of(asked.planned)))
    with Planner(config, asked.precision, device, resident_bytes()) as planner:
        first = found = _planned(planner, asked, asked.planned, asked.token_budget, all_at_once)
        budget, most = asked.token_budget, all_at_once
        while not found.fits and budget > max(asked.longest, SMALLEST_PASS):
            budget = max(budget // 2, asked.longest, SMALLEST_PASS)
            found = _planned(planner, asked, asked.planned, budget, most)
        while not found.fits and most > 1:
            most = -(-most // 2)
            found = _planned(planner, asked, asked.planned, budget, most)
        after = planner.zero_shot(JUDGED) if asked.zero_shot else 0
        if after > device.usable_bytes and found.fits and not force:
            raise RunError(
                f"zero-shot does not fit: it needs {_gib(after)} of the {_gib(device.usable_bytes)} that {device.name} has free",
                hint="leave zero-shot out of --reference; --force tries it all the same",
            )
        if found.fits or force:
            chosen = found if found.fits else first
            if after > chosen.planned_bytes:
                chosen = replace(chosen, planned_bytes=after)
            one_of_each = {p.method: p for p in reversed(asked.planned)}
            alone = {
                name: _planned(planner, asked, [one_of_each[name]], chosen.token_budget, 1).planned_bytes
                for name in dict.fromkeys(p.method for p in asked.planned)
            }
            return replace(chosen, alone=alone)
        each = [(p, _planned(planner, asked, [p], budget, 1)) for p in _one_of_each(asked)]
    heaviest, need = max(each, key=lambda pair: pair[1].planned_bytes)
    raise RunError(
        f"{heaviest.method} does not fit: it needs {_gib(need.planned_bytes)} of the {_gib(device.usable_bytes)} that "
        f"{device.name} has free",
        hint=_instead(asked, config, device, [p.method for p, fit in each if fit.fits]),
    )


def _waves(group: Sequence[Planned], most: int) -> list[list[Planned]]:
    """At most `most` trials each; the settings of one race stay together where they can, and all in the study's order."""
    if len(group) <= most:
        return [list(group)]
    races: dict[object, list[Planned]] = {}
    for planned in group:
        races.setdefault(planned.race, []).append(planned)
    waves: list[list[Planned]] = [[]]
    for race in races.values():
        for part in (race[k : k + most] for k in range(0, len(race), most)):
            if len(waves[-1]) + len(part) > most:
                waves.append([])
            waves[-1] += part
    place = {planned.trial.name: i for i, planned in enumerate(group)}
    return [sorted(wave, key=lambda planned: place[planned.trial.name]) for wave in waves]


def _planned(planner: Planner, asked: Asked, planned: Sequence[Planned], token_budget: int, most: int) -> Fit:
    """What the heaviest wave takes; of waves that are alike up to seeds and names one is run."""
    needs = {}
    for group in groups_of(planned):
        for wave in _waves(group, most):
            alike = tuple((p.trial.method, p.trial.training, p.trial.rows, p.trial.valid, p.cell.test) for p in wave)
            if alike not in needs:
                trace = planner.trace(asked.run(wave, token_budget))
                needs[alike] = (planner.need(trace), trace)
    need, trace = max(needs.values(), key=lambda pair: pair[0])
    return Fit(
        token_budget=token_budget,
        most=most,
        planned_bytes=need,
        usable_bytes=planner.device.usable_bytes,
        live_peak_bytes=trace.live_peak_bytes,
        parts=trace.parts,
        where=trace.where,
    )


def _one_of_each(asked: Asked) -> list[Planned]:
    return list({p.trial.method: p for p in asked.planned}.values())


def _instead(asked: Asked, config: PreTrainedConfig, device: Device, fitting: Sequence[str]) -> str:
    """What to type: each way by itself, tried on one trial of every method."""
    one_of_each = _one_of_each(asked)
    half = "bf16" if device.bf16 else "fp16"
    ways = {
        "--checkpointing": replace(asked, checkpointing=True),
        f"--precision {half}": replace(asked, precision=half),
        f"--precision {half} --checkpointing": replace(asked, precision=half, checkpointing=True),
    }
    said = []
    for flags, way in ways.items():
        if way == asked or (way.precision != "fp32" and any(isinstance(p.trial.method, Full) for p in one_of_each)):
            continue
        with Planner(config, way.precision, device, resident_bytes()) as planner:
            if _planned(planner, way, one_of_each, max(way.longest, SMALLEST_PASS), 1).fits:
                said.append(flags)
                break
    with Planner(config, asked.precision, device, resident_bytes()) as planner:
        longest = min(planner.longest_text(asked.run([p], asked.token_budget)) for p in one_of_each)
    if 0 < longest < asked.longest:
        said.append(f"--max-length {longest}")
    if fitting:
        said.append(f"--method {','.join(dict.fromkeys(fitting))}")
    return f"{' or '.join(said) or 'a smaller base'} fits; --force tries it all the same"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
