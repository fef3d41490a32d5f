"""A study that would not fit: smaller passes, fewer trials at once, or a refusal that says what would; and what it came to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from katei import api
from katei.base.load import load_config, load_tokenizer
from katei.core.errors import RunError
from katei.core.machine import forget_peak_memory, peak_memory_bytes
from katei.data import load_dataset
from katei.engine.lockstep import Lockstep, Tokens
from katei.plan.devices import Device, find_device
from katei.plan.plan import Planner
from katei.study import fit as fitting
from katei.study import run
from katei.study.design import design_study
from katei.study.fit import Asked, Fit, fit_study
from katei.study.recipe import load_recipe
from katei.study.trials import planned_trials
from tests.helpers.rows import data_folder
from tests.helpers.tiny import tiny_base_folder

CPU = find_device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base_folder(tmp_path_factory.mktemp("fit"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_folder(tmp_path_factory.mktemp("fit-data") / "data")


@pytest.fixture(autouse=True)
def _an_empty_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "resident_bytes", lambda: 0)  # so that bytes are the same each time


def asked(data: Path, base: Path, *methods: str, **flags: Any) -> Asked:
    recipe = load_recipe(
        None, {"data": str(data), "model": str(base), "methods": list(methods), "references": [], **flags}
    )
    dataset = load_dataset(str(data))
    design = design_study(recipe, {name: split.labels for name, split in dataset.splits.items()}, dataset.label_names)
    tokenizer, pool = load_tokenizer(str(base)), Tokens((), ())
    for split in dataset.splits.values():
        pool += Tokens(tuple(map(tuple, tokenizer(list(split.texts))["input_ids"])), split.labels)
    planned = tuple(planned_trials(recipe, design))
    return Asked(planned, 2, pool, recipe.token_budget, recipe.precision, recipe.checkpointing)


def having(usable: int) -> Device:
    return replace(CPU, usable_bytes=usable)


def need(study: Asked, base: Path, token_budget: int, most: int) -> int:
    with Planner(load_config(str(base)), "fp32", CPU) as planner:
        return fitting._planned(planner, study, study.planned, token_budget, most).planned_bytes


def test_what_fits_is_left_as_it_was_asked(data: Path, base: Path) -> None:
    study = asked(data, base, "lora", "ia3", batch_size=4)
    fit = fit_study(study, load_config(str(base)), having(1 << 40))
    assert (fit.token_budget, fit.most, fit.fits) == (1024, 2, True)


def test_smaller_passes_come_first_and_then_fewer_trials(data: Path, base: Path) -> None:
    study = asked(data, base, "prefix-tuning", seeds=list(range(12)), batch_size=8)
    config = load_config(str(base))
    shortest = max(64, study.longest)
    whole, small, few = (need(study, base, *how) for how in ((1024, 12), (shortest, 12), (shortest, 3)))
    assert few < small < whole
    halved = fit_study(study, config, having(whole - 1))
    assert halved.token_budget < 1024
    assert halved.most == 12
    waves = fit_study(study, config, having(few))
    assert (waves.token_budget, waves.most) == (shortest, 3)
    assert [len(wave) for wave in waves.groups(study.planned)] == [3, 3, 3, 3]
    for fit in (halved, waves):
        assert fit.planned_bytes <= fit.usable_bytes


def test_zero_shot_counts_where_it_takes_more_than_training(
    data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "JUDGED", 1_000_000)
    config = load_config(str(base))
    study = asked(data, base, "ia3")
    training = fit_study(study, config, having(1 << 40)).planned_bytes
    with_scores = replace(study, zero_shot=True)
    planned = fit_study(with_scores, config, having(1 << 40)).planned_bytes
    scores = 4 * 1_000_000 * config.vocab_size
    assert planned - training == pytest.approx(scores, rel=0.05)
    with pytest.raises(RunError, match=r"^zero-shot does not fit: it needs .* GiB") as refused:
        fit_study(with_scores, config, having(planned - scores // 2))
    assert "--reference" in (refused.value.hint or "")
    forced = fit_study(with_scores, config, having(planned - scores // 2), force=True)
    assert forced.planned_bytes == pytest.approx(planned, rel=0.05)


def test_waves_keep_races_together_and_every_trial_once(data: Path, base: Path) -> None:
    study = asked(data, base, "lora", "ia3", tune=2, folds=3)
    for most in range(1, len(study.planned) + 1):
        waves = Fit(64, most, 0, 0, 0, {}, "train").groups(study.planned)
        assert sorted(p.trial.name for wave in waves for p in wave) == sorted(p.trial.name for p in study.planned)
        assert max(map(len, waves)) <= most
        if most >= 2:
            where = {p.trial.name: i for i, wave in enumerate(waves) for p in wave}
            races: dict[object, set[int]] = {}
            for p in study.planned:
                races.setdefault(p.race, set()).add(where[p.trial.name])
            assert all(len(found) == 1 for found in races.values())


def test_what_cannot_fit_is_refused_with_what_would(data: Path, base: Path) -> None:
    study = asked(data, base, "lora", "full")
    config = load_config(str(base))
    alone = need(asked(data, base, "lora"), base, max(64, study.longest), 1)
    with pytest.raises(
        RunError, match=r"^full does not fit: it needs .* GiB of the .* GiB that cpu has free"
    ) as refused:
        fit_study(study, config, having(alone))
    assert "--method lora" in (refused.value.hint or "")
    assert "--force" in (refused.value.hint or "")
    forced = fit_study(study, config, having(alone), force=True)
    assert (forced.token_budget, forced.fits) == (1024, False)


def limit(monkeypatch: pytest.MonkeyPatch, usable: int) -> None:
    monkeypatch.setattr(run, "this_device", lambda device: having(usable))


def scores(folder: Path) -> Any:
    table = pq.read_table(folder / "predictions.parquet").to_pydict()
    return np.array([table[name] for name in table if name.startswith("probability_")])


def train(data: Path, base: Path, out: Path, **more: Any) -> Any:
    flags = {"methods": ["lora", "ia3"], "epochs": 2, "batch_size": 8, "references": [], "learning_rate": 0.01}
    return api.compare(data, out=out, model=str(base), **{**flags, **more})


def test_a_study_in_small_passes_and_waves_has_the_same_answers(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(data, base, tmp_path / "whole")
    study = asked(data, base, "lora", "ia3", epochs=2, batch_size=8)
    limit(monkeypatch, need(study, base, 64, 1))
    waves = train(data, base, tmp_path / "waves")
    memory = waves.environment["memory"]
    assert memory["trials_at_once"] == 1
    assert memory["token_budget"] < whole.environment["memory"]["token_budget"]
    np.testing.assert_allclose(scores(tmp_path / "waves"), scores(tmp_path / "whole"), atol=2e-5)


def test_a_run_that_goes_on_keeps_its_plan(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    ticks = 0
    tick = Lockstep.tick

    def stop(self: Lockstep) -> Any:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            raise KeyboardInterrupt
        return tick(self)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Lockstep, "tick", stop)
        with pytest.raises(KeyboardInterrupt):
            train(data, base, out, save_seconds=0)
    kept = (out / "plan.json").read_bytes()
    limit(monkeypatch, 1)  # now nothing would fit
    study = train(data, base, out)
    assert (out / "plan.json").read_bytes() == kept
    assert study.environment["memory"]["planned_bytes"] == json.loads(kept)["planned_bytes"]
    with pytest.raises(RunError, match="does not fit"):
        train(data, base, out, overwrite=True)
    assert (out / "results.json").exists()  # a refusal costs nothing


def test_a_refusal_leaves_nothing_and_force_trains(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 1)
    with pytest.raises(RunError, match="does not fit"):
        train(data, base, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    study = train(data, base, tmp_path / "yes", force=True)
    assert study.environment["memory"]["planned_bytes"] > 1


def test_a_damaged_plan_is_named(data: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(data, base, out)
    (out / "results.json").unlink()
    (out / "plan.json").write_text('{"token_budget": 12', encoding="utf-8")
    with pytest.raises(RunError, match="the plan of this run cannot be read"):
        train(data, base, out)
    train(data, base, out, overwrite=True)


def test_checkpointing_trains_to_the_same_answers(data: Path, base: Path, tmp_path: Path) -> None:
    train(data, base, tmp_path / "kept")
    train(data, base, tmp_path / "recomputed", checkpointing=True)
    np.testing.assert_allclose(scores(tmp_path / "recomputed"), scores(tmp_path / "kept"), atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_the_peak_is_counted_from_where_it_was_forgotten() -> None:
    block = np.ones(64 << 20, np.uint8)
    assert peak_memory_bytes() >= block.nbytes
    del block
    forget_peak_memory()
    before = peak_memory_bytes()
    block = np.ones(128 << 20, np.uint8)
    risen = peak_memory_bytes() - before
    assert 100 << 20 < risen < 160 << 20
    del block


def test_the_parts_are_the_whole(data: Path, base: Path, tmp_path: Path) -> None:
    memory = train(data, base, tmp_path / "run").environment["memory"]
    assert memory["planned_bytes"] > 0
    assert memory["live_peak_bytes"] == sum(memory["parts"].values())
