"""Whole studies in folds, tuned, raced, with reference points and a learning curve, on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from katei import api
from katei.core.calibration import fit_temperature
from katei.core.errors import RecipeError
from katei.engine.lockstep import Lockstep
from katei.study import training
from katei.study.comparison import REFERENCES
from katei.study.folder import Study
from tests.helpers.rows import data_folder
from tests.helpers.tiny import tiny_base_folder
from tests.study.test_run import killed, result_bytes

METHODS = ("lora", "ia3", "prompt-tuning")
RECIPE = """
methods = ["lora", "ia3", "prompt-tuning"]
folds = 3
repeats = 2
tune = 3
references = ["majority class", "tf-idf", "head"]
[training]
epochs = 5
batch_size = 3
learning_rate = 0.02
"""


def curves(results: dict[str, Any]) -> dict[str, list[float]]:
    return {t["name"]: [e["valid_loss"] for e in t["epochs"]] for t in results["trials"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, data and recipe."""
    folder = tmp_path_factory.mktemp("folds")
    data = data_folder(folder / "data", train=26, valid=10, test=6, labels=("暖かい", "cold"))
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return tiny_base_folder(folder, layers=3), data, folder / "recipe.toml"


def run(place: tuple[Path, Path, Path], out: Path, **more: Any) -> Study:
    base, data, recipe = place
    return api.compare(data, out=out, model=str(base), recipe=recipe, **more)


@pytest.fixture(scope="module")
def tuned(place: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Study:
    return run(place, tmp_path_factory.mktemp("tuned") / "run", learning_curve=True)


def test_every_setting_of_every_method_is_tried_in_every_cell_and_the_best_by_validation_counts(tuned: Study) -> None:
    trials = [t for t in tuned.results["trials"] if t["share"] == 1]
    assert len(trials) == 4 * 3 * 6
    for method in (*METHODS, "head"):
        for repeat in range(2):
            for fold in range(3):
                race = [t for t in trials if (t["method"], t["repeat"], t["fold"]) == (method, repeat, fold)]
                assert [t["setting"] for t in race] == [0, 1, 2]
                assert len({t["seed"] for t in race}) == 1
                losses = [min(e["valid_loss"] for e in t["epochs"]) for t in race]
                (chosen,) = [t for t in race if t["chosen"]]
                assert losses[race.index(chosen)] == min(losses)
                assert chosen["best_epoch"] == 1 + [e["valid_loss"] for e in chosen["epochs"]].index(min(losses))
                assert all((t["test"] is not None) == t["chosen"] for t in race)
    tuning = tuned.results["tuning"]
    assert tuning["epochs_run"] == sum(len(t["epochs"]) for t in trials) < tuning["epochs_full"] == 5 * len(trials)
    assert tuning["stopped_early"] == sum(t["finished"] in ("racing", "early") for t in trials) > 0
    assert len(tuning["chosen"]) == 4 * 6
    assert {p.name for p in (tuned.run / "trials").iterdir()} == {t["name"] for t in trials if t["chosen"]}


def test_the_answers_are_out_of_fold_and_those_that_are_compared(tuned: Study) -> None:
    table = pq.read_table(tuned.run / "predictions.parquet").to_pandas()
    tested = table[table.role == "test"]
    chosen = {t["name"]: t for t in tuned.results["trials"] if t["chosen"] and t["share"] == 1}
    for method in (*METHODS, "head", "majority class", "tf-idf"):
        mine = tested[tested.method == method]
        for repeat in range(2):
            once = mine[mine.repeat == repeat]
            assert len(once) == len({(s, n) for s, n in zip(once.split, once.line, strict=True)}) == 36
        scores = next(m for m in tuned.results["comparison"]["methods"] if m["method"] == method)
        by_cell = (mine.label == mine.prediction).groupby([mine.repeat, mine.fold]).mean()
        assert scores["accuracy"] == pytest.approx(by_cell.mean())
    assert set(tested.split) == {"train", "valid"}, "the data's own test rows are left alone"
    for name, trial in chosen.items():
        rows = table[table.trial == name]
        assert set(rows.role) == {"valid", "test"}
        valid = rows[rows.role == "valid"]
        own = np.where(valid.label == "cold", valid.probability_cold, valid["probability_暖かい"])
        assert -np.log(own).mean() == pytest.approx(min(e["valid_loss"] for e in trial["epochs"]), rel=1e-6)
    of_folds = tested[["method", "repeat", "fold", "split", "line"]].groupby("method")
    places = [sorted(rows.drop(columns="method").itertuples(index=False)) for _, rows in of_folds]
    assert all(rows == places[0] for rows in places), "every method in the same folds"
    again = api.compare_from(tuned.run / "predictions.parquet", references=["head", "majority class", "tf-idf"])
    assert again["verdict"] == tuned.results["verdict"]


def test_references_are_compared_with_methods_and_not_with_each_other(tuned: Study) -> None:
    comparison = tuned.results["comparison"]
    assert set(comparison["references"]) == {"head", "majority class", "tf-idf"}
    pairs = [{d["first"], d["second"]} for d in comparison["differences"] if d["metric"] == "accuracy"]
    assert len(pairs) == 3 + 3 * 3
    assert all(pair & set(METHODS) for pair in pairs)
    assert [r["name"] for r in tuned.results["references"]] == ["majority class", "tf-idf"]


def test_the_learning_curve_is_of_the_chosen_setting_on_the_same_rows(tuned: Study) -> None:
    curve = tuned.results["learning_curve"]
    of_lora = [p for p in curve["points"] if p["method"] == "lora"]
    assert [p["share"] for p in of_lora] == [0.125, 0.25, 0.5, 1.0]
    assert [p["train_rows"] for p in of_lora] == sorted({p["train_rows"] for p in of_lora})
    whole = next(m for m in tuned.results["comparison"]["methods"] if m["method"] == "lora")
    assert (of_lora[-1]["accuracy"], of_lora[-1]["accuracy_interval"]) == (
        whole["accuracy"],
        whole["accuracy_interval"],
    )
    chosen = {
        (t["method"], t["repeat"], t["fold"]): t for t in tuned.results["trials"] if t["share"] == 1 and t["chosen"]
    }
    subsets = [t for t in tuned.results["trials"] if t["share"] < 1]
    assert len(subsets) == 3 * len(chosen)
    assert all(chosen[t["method"], t["repeat"], t["fold"]]["settings"] == t["settings"] for t in subsets)
    assert "more labels" in curve["verdict"].lower()
    doubled = curve["last_doubling"]
    best = max((p for p in curve["points"] if p["share"] == 1), key=lambda p: p["accuracy"])
    half = next(p for p in curve["points"] if (p["method"], p["share"]) == (doubled["method"], 0.5))
    assert doubled["method"] == best["method"]
    assert doubled["gain"] == pytest.approx(best["accuracy"] - half["accuracy"])
    assert doubled["interval"][0] <= doubled["gain"] <= doubled["interval"][1]


def test_an_adapter_has_the_temperature_of_its_validation_rows(tuned: Study) -> None:
    rows = [r for r in pq.read_table(tuned.run / "predictions.parquet").to_pylist() if r["role"] == "valid"]
    names = tuned.results["labels"]
    found = []
    for trial in (t for t in tuned.results["trials"] if t["chosen"] and t["share"] == 1):
        mine = [r for r in rows if r["trial"] == trial["name"]]
        probability_EC = np.array([[r[f"probability_{name}"] for name in names] for r in mine])
        note = json.loads((tuned.run / "trials" / trial["name"] / "katei.json").read_text(encoding="utf-8"))
        found.append(note["temperature"])
        assert note["temperature"] == fit_temperature(probability_EC, [names.index(r["label"]) for r in mine])
    assert any(t is not None for t in found)


def test_racing_changes_no_choice_here_and_no_racing_trains_on(place: Any, tuned: Study, tmp_path: Path) -> None:
    full = run(place, tmp_path / "run", racing=False)
    assert full.results["tuning"]["stopped_by_racing"] == 0
    assert tuned.results["tuning"]["stopped_by_racing"] > 0
    raced = curves(tuned.results)
    for name, losses in curves(full.results).items():
        shorter = raced[name]
        assert losses[: len(shorter)] == pytest.approx(shorter, rel=1e-3)
    same = [
        a["setting"] == b["setting"]
        for a, b in zip(full.results["tuning"]["chosen"], tuned.results["tuning"]["chosen"], strict=True)
    ]
    assert np.mean(same) > 0.9
    assert full.results["verdict"].split(":")[0] == tuned.results["verdict"].split(":")[0]


def test_a_fold_trained_alone_is_the_fold_in_lockstep(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[Lockstep] = []
    honest = training._score

    def spy(group: Any, lockstep: Lockstep, base: Any) -> Any:
        engines.append(lockstep)
        return honest(group, lockstep, base)

    monkeypatch.setattr(training, "_score", spy)
    run(place, tmp_path / "run", tune=0, references=[], epochs=2)
    (together,) = engines
    assert len(together.states) == 3 * 6
    for state in together.states[::4]:
        alone = Lockstep(together.base, [state.trial], 2, together.pool, token_budget=60)
        alone.run()
        for mine, other in zip(state.epochs, alone.states[0].epochs, strict=True):
            assert mine.valid_loss == pytest.approx(other.valid_loss, rel=1e-3)
            assert mine.train_loss == pytest.approx(other.train_loss, rel=1e-3)


def test_killed_anywhere_a_tuned_study_ends_with_the_same_bytes(place: Any, tmp_path: Path) -> None:
    base, data, recipe = place
    command = ["compare", str(data), "--model", str(base), "--recipe", str(recipe), "--learning-curve", "--json"]
    command += ["--reference", "majority class,head", "--epochs", "3"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert killed(whole, [], [*command, "--out", str(whole), "--save-seconds", "1000"]) == [0]
    kills: list[Any] = ["state-lora*", 3, 5, 9, "trials/ia3-r1*", "state-*-1of*", 4, "predictions.parquet"]
    codes = killed(out, kills, [*command, "--out", str(out), "--save-seconds", "0"])
    assert codes.count(-9) >= 6, codes
    assert result_bytes(out) == result_bytes(whole)
    finished = {t["finished"] for t in json.loads((out / "results.json").read_text(encoding="utf-8"))["trials"]}
    assert "racing" in finished


def test_seeds_are_compared_as_seeds(place: Any, tmp_path: Path) -> None:
    base, data, _ = place
    study = api.compare(data, out=tmp_path / "run", model=str(base), methods=["lora", "ia3"], seeds=3, epochs=1)
    design = study.results["comparison"]["design"]
    assert (design["kind"], design["rows"], design["seeds"]) == ("seeds", 6, 3)
    names = [t["name"] for t in study.results["trials"]]
    assert names == [f"{m}-seed{s}" for m in ("lora", "ia3", "head") for s in range(3)]
    assert {m["method"] for m in study.results["comparison"]["methods"]} == {"lora", "ia3", *REFERENCES}
    assert study.results["references"][-1]["name"] == "zero-shot"


def test_tuning_without_validation_rows_says_what_to_do(place: Any, tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", valid=0)
    with pytest.raises(RecipeError, match="tuning chooses by validation rows") as caught:
        api.compare(data, out=tmp_path / "run", model=str(place[0]), tune=3)
    assert "--folds 5" in (caught.value.hint or "")
    assert not (tmp_path / "run").exists()


def test_full_fine_tuning_in_folds_trains_each_over_a_fresh_base(place: Any, tmp_path: Path) -> None:
    base, data, _ = place
    study = api.compare(
        data, out=tmp_path / "run", model=str(base), methods=["full", "ia3"], folds=2, epochs=1, references=[]
    )
    one, other = (t for t in study.results["trials"] if t["method"] == "full")
    assert one["epochs"][0]["train_loss"] == pytest.approx(other["epochs"][0]["train_loss"], rel=0.5)
    assert one["epochs"] != other["epochs"]
    assert one["test"] != other["test"]
    assert {p.name for p in (tmp_path / "run" / "trials").iterdir()} == {"ia3-r0f0", "ia3-r0f1"}
    assert {m["method"] for m in study.results["comparison"]["methods"]} == {"full", "ia3"}


def test_killed_between_full_fine_tunings_the_ended_ones_are_not_trained_again(place: Any, tmp_path: Path) -> None:
    base, data, _ = place
    command = ["compare", str(data), "--model", str(base), "--method", "full", "--folds", "2", "--epochs", "3"]
    command += ["--lr", "0.001", "--reference", "none"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert killed(whole, [], [*command, "--out", str(whole), "--save-seconds", "1000"]) == [0]
    killed(out, ["state-full-r0f1*"], [*command, "--out", str(out), "--save-seconds", "0"])
    assert result_bytes(out) == result_bytes(whole)
