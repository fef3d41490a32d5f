"""The run folder: what is in it, who owns it, and that it ends with the same bytes however often it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from katei import api
from katei.core.errors import BaseError, RecipeError, RunError, UserError
from katei.engine.lockstep import Lockstep
from katei.methods.p_tuning import PTuningStack
from katei.study import training
from katei.study.folder import load_study
from tests.helpers.rows import EVERY_METHOD, data_folder
from tests.helpers.tiny import tiny_base_folder
from tests.helpers.trained import Trained

RESULT_FILES = ("recipe.toml", "results.json", "predictions.parquet")


def result_bytes(run: Path) -> dict[str, bytes]:
    """All that must not depend on when or how often a run was started."""
    files = [run / name for name in RESULT_FILES] + [p for p in (run / "trials").rglob("*") if p.is_file()]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# -------------------------------------------------------------------- what is in it


def test_the_layout_is_the_one_in_the_design(llama: Trained) -> None:
    names = {p.name for p in llama.run.iterdir() if not p.name.startswith(".")}
    assert names == {"recipe.toml", "environment.json", "results.json", "predictions.parquet", "trials", "identity"} | {
        "plan.json",
        "report.html",
        "results.csv",
    }
    assert {p.name for p in (llama.run / "trials").iterdir()} == set(EVERY_METHOD)
    peft = {"adapter_config.json", "adapter_model.safetensors", "katei.json"}
    files = {name: {p.name for p in llama.trial(name).iterdir()} for name in EVERY_METHOD}
    for name in ("lora", "adalora", "ia3", "prompt-tuning", "p-tuning", "prefix-tuning"):
        assert files[name] == peft
    assert files["llama-adapter"] == {*peft, "head.safetensors"}
    assert files["head"] == {"katei.json", "head.safetensors"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "katei.json"} <= files["full"]


def test_the_keys_of_the_results(llama: Trained) -> None:
    study = load_study(llama.run).as_json()
    assert {"run", "trials", "seconds", "memory", "verdict"} <= set(study)
    assert set(study["seconds"]) == {"load", "train", "evaluate", "total"}
    assert {"planned_bytes", "peak_bytes", "parts", "where"} <= set(study["memory"])
    assert 0 < study["memory"]["peak_bytes"] < 2**36
    assert [t["name"] for t in study["trials"]] == list(EVERY_METHOD)
    for trial in study["trials"]:
        assert {"name", "method", "seed", "fold", "trainable", "total", "epochs", "test"} <= set(trial)
        assert 0 < trial["trainable"] <= trial["total"]
        assert [e["epoch"] for e in trial["epochs"]] == [1, 2]
        for epoch in trial["epochs"]:
            assert set(epoch) == {"epoch", "train_loss", "valid_loss", "valid_roc_auc", "valid_accuracy"}
        test = trial["test"]
        assert set(test) == {"rows", "accuracy", "accuracy_interval", "roc_auc", "roc_auc_interval", "loss"}
        assert test["rows"] == 8
        assert test["accuracy_interval"][0] <= test["accuracy"] <= test["accuracy_interval"][1]
        assert test["roc_auc_interval"][0] <= test["roc_auc"] <= test["roc_auc_interval"][1]
    assert json.loads((llama.run / "results.json").read_text(encoding="utf-8"))["trials"] == study["trials"]


def test_predictions_hold_every_scored_row_and_agree_with_the_results(llama: Trained) -> None:
    table = pq.read_table(llama.run / "predictions.parquet").to_pandas()
    assert list(table.columns[:10]) == "trial method seed repeat fold role split line label prediction".split()
    results = load_study(llama.run).results
    for trial in results["trials"]:
        for split, rows, accuracy in (
            ("test", 8, trial["test"]["accuracy"]),
            ("valid", 6, trial["epochs"][-1]["valid_accuracy"]),
        ):
            mine = table[(table.trial == trial["name"]) & (table.split == split)]
            assert list(mine.line) == list(range(2, rows + 2))
            assert (mine.label == mine.prediction).mean() == accuracy
            probabilities = mine[["probability_cold", "probability_暖かい"]].to_numpy()
            assert np.abs(probabilities.sum(1) - 1).max() < 1e-9
            own = probabilities[np.arange(rows), (mine.label == "暖かい").to_numpy().astype(int)]
            loss = trial["test"]["loss"] if split == "test" else trial["epochs"][-1]["valid_loss"]
            assert -np.log(own).mean() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_a_saved_adapter_predicts_what_the_study_scored(llama: Trained, name: str, tmp_path: Path) -> None:
    """Alone, in another pass, without the companions' cache: equal to float rounding."""
    api.predict(llama.run, llama.data / "test.tsv", out=tmp_path / "out.parquet", trial=name)
    again = pq.read_table(tmp_path / "out.parquet").to_pandas()
    first = pq.read_table(llama.run / "predictions.parquet").to_pandas()
    first = first[(first.trial == name) & (first.split == "test")]
    assert list(again.prediction) == list(first.prediction)
    for column in ("probability_cold", "probability_暖かい"):
        assert np.abs(again[column].astype(float).to_numpy() - first[column].to_numpy()).max() < 1e-5


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_save_load_predict_is_bitwise(llama: Trained, name: str, tmp_path: Path) -> None:
    """Two processes' worth of reading the same files, and the numbers in them, bit for bit (promise 4)."""
    outs = [tmp_path / f"{i}.tsv" for i in range(2)]
    for out in outs:
        api.predict(llama.run, llama.data / "valid.tsv", out=out, trial=name)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_the_check_at_the_end_of_a_run_notices_a_lost_bit(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = training.save_adapter

    def careless(folder: Path, stack: Any, *rest: Any) -> None:
        honest(folder, stack, *rest)
        stack.tensors["score"].data += 1e-3  # what is in memory is not what was written

    monkeypatch.setattr(training, "save_adapter", careless)
    with pytest.raises(AssertionError, match="scores rows differently"):
        api.train(llama.data, out=tmp_path / "run", model=str(llama.base), method="lora", epochs=1)


# -------------------------------------------------------------------- one seed


def small(base: Path, data: Path, out: Path, **more: Any) -> Any:
    given: dict[str, Any] = {"methods": ["lora", "adalora", "ia3"], "epochs": 1, "batch_size": 4, "seeds": [3]}
    given["references"] = []  # they are test_references' and test_study's
    return api.compare(data, out=out, model=str(base), **(given | more))


def test_an_adapter_scores_as_it_is_saved_whatever_trained_beside_it(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bits of a batched product may go by how many are in it, here for certain; a run checks what it saves."""
    honest = PTuningStack.embed
    monkeypatch.setattr(PTuningStack, "embed", lambda stack: honest(stack) + 1e-5 * stack.adapters)
    study = small(llama.base, llama.data, tmp_path / "run", methods=["p-tuning"], seeds=10)
    assert len(study.results["trials"]) == 10


def test_the_same_seed_gives_the_same_bytes(llama: Trained, tmp_path: Path) -> None:
    again = train_again(llama, tmp_path / "again")
    assert result_bytes(again) == result_bytes(llama.run)


def train_again(trained: Trained, out: Path, **more: Any) -> Path:
    api.compare(
        trained.data,
        out=out,
        model=str(trained.base),
        methods=EVERY_METHOD,
        recipe=trained.data.parent / "recipe.toml",
        references=[],
        **more,
    )
    return out


def test_the_recipe_in_the_run_folder_gives_the_same_run(llama: Trained, tmp_path: Path) -> None:
    api.compare(out=tmp_path / "run", recipe=llama.run / "recipe.toml")
    assert result_bytes(tmp_path / "run") == result_bytes(llama.run)


def test_another_seed_gives_another_adapter_and_seeds_are_trials(llama: Trained, tmp_path: Path) -> None:
    study = small(llama.base, llama.data, tmp_path / "run", methods=["lora", "ia3"], seeds=2)
    assert [t["name"] for t in study.results["trials"]] == ["lora-seed0", "lora-seed1", "ia3-seed0", "ia3-seed1"]
    one, other = (tmp_path / "run" / "trials" / f"lora-seed{s}" / "adapter_model.safetensors" for s in (0, 1))
    assert one.read_bytes() != other.read_bytes()


# -------------------------------------------------------------------- whose folder it is


def test_a_finished_run_is_returned_without_training(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small(llama.base, llama.data, tmp_path / "run")
    before = result_bytes(tmp_path / "run")
    monkeypatch.setattr(training, "Lockstep", None)
    (tmp_path / "run" / "state-lora.safetensors").write_text("left by a kill after the results were written")
    again = small(llama.base, llama.data, tmp_path / "run")
    assert not (tmp_path / "run" / "state-lora.safetensors").exists()
    assert json.dumps(again.as_json()) == json.dumps(first.as_json())
    assert result_bytes(tmp_path / "run") == before


def test_another_recipe_is_refused_and_the_difference_named(llama: Trained, tmp_path: Path) -> None:
    small(llama.base, llama.data, tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(RunError, match="lora: epochs = 1 there, 2 now") as refused:
        small(llama.base, llama.data, tmp_path / "run", epochs=2)
    assert "--overwrite" in (refused.value.hint or "")
    with pytest.raises(RunError, match=r"methods = .*there"):
        small(llama.base, llama.data, tmp_path / "run", methods=["lora"])
    assert tree(tmp_path) == before


def test_other_rows_under_the_same_name_are_refused(llama: Trained, tmp_path: Path) -> None:
    data = Path(shutil.copytree(llama.data, tmp_path / "data"))
    small(llama.base, data, tmp_path / "run")
    with (data / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("one more row\tcold\n")
    with pytest.raises(RunError, match="the data have changed"):
        small(llama.base, data, tmp_path / "run")


def test_overwrite_trains_again(llama: Trained, tmp_path: Path) -> None:
    small(llama.base, llama.data, tmp_path / "run")
    study = small(llama.base, llama.data, tmp_path / "run", methods=["head"], overwrite=True)
    assert [t["name"] for t in study.results["trials"]] == ["head"]
    assert tree(tmp_path / "run" / "trials") == ["head", "head/head.safetensors", "head/katei.json"]


def test_a_folder_of_somebody_else_is_not_touched(llama: Trained, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="other things in it"):
            small(llama.base, llama.data, tmp_path, overwrite=overwrite)
    assert tree(tmp_path) == ["thesis.txt"]
    with pytest.raises(RunError, match="is a file"):
        small(llama.base, llama.data, tmp_path / "thesis.txt")


def test_overwrite_keeps_what_katei_did_not_write(llama: Trained, tmp_path: Path) -> None:
    small(llama.base, llama.data, tmp_path / "run")
    (tmp_path / "run" / "notes.md").write_text("mine")
    small(llama.base, llama.data, tmp_path / "run", epochs=2, overwrite=True)
    assert (tmp_path / "run" / "notes.md").read_text() == "mine"


def test_an_empty_folder_is_fine(llama: Trained, tmp_path: Path) -> None:
    small(llama.base, llama.data, tmp_path, methods=["head"])
    assert (tmp_path / "results.json").exists()


def test_a_second_process_is_locked_out(llama: Trained, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="another katei is training"):
        small(llama.base, llama.data, tmp_path)
    assert tree(tmp_path) in ([], [".lock"])


def test_a_base_that_turns_out_bad_leaves_nothing(llama: Trained, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base, tmp_path / "base"))
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError, match="not numbers"):
        small(base, llama.data, tmp_path / "deep" / "down" / "run")
    assert not (tmp_path / "deep").exists()


def test_full_fine_tuning_in_half_precision_is_refused_before_the_others_train(llama: Trained, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="full fine-tuning of a base held in bfloat16"):
        small(llama.base, llama.data, tmp_path / "run", methods=["lora", "full"], precision="bf16")
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_says_so(llama: Trained, tmp_path: Path) -> None:
    small(llama.base, llama.data, tmp_path / "run", methods=["head"])
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(RunError, match="has not finished"):
        load_study(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read") as refused:
        load_study(tmp_path / "run")
    assert refused.value.hint


def test_without_valid_and_test_rows_a_study_still_ends(llama: Trained, tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", valid=0, test=0)
    study = small(llama.base, data, tmp_path / "run", methods=["lora", "head"])
    assert [t["test"] for t in study.results["trials"]] == [None, None]
    assert study.results["trials"][0]["epochs"][0]["valid_loss"] is None
    assert "No test rows" in study.results["verdict"]
    assert pq.read_table(tmp_path / "run" / "predictions.parquet").num_rows == 0


def test_a_trial_that_diverges_is_named_and_the_others_end(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Lockstep.tick

    def tick(engine: Any) -> Any:
        ended = honest(engine)
        lora = engine.states[0]
        if lora.step == 2:
            engine.stacks[lora.stack].theta_NM[lora.n].fill_(float("nan"))
        return ended

    monkeypatch.setattr(Lockstep, "tick", tick)
    study = small(llama.base, llama.data, tmp_path / "run", methods=["lora", "head"], epochs=3)
    lora, head = study.results["trials"]
    assert (lora["finished"], head["finished"]) == ("diverged", "done")
    assert lora["test"] is None
    assert "lora diverged: try a smaller learning rate" in study.results["verdict"]
    json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    with pytest.raises(UserError, match="not numbers") as refused:
        api.predict(tmp_path / "run", llama.data / "test.tsv", out=tmp_path / "out.tsv", trial="lora")
    assert "smaller learning rate" in (refused.value.hint or "")


# -------------------------------------------------------------------- killed anywhere, nothing lost

RECIPE = """
methods = ["lora", "adalora", "p-tuning", "llama-adapter", "full"]
references = []
[training]
epochs = 4
batch_size = 2
keep = "best"
patience = 2
[lora]
dropout = 0.3
learning_rate = 0.03
[llama-adapter]
layers = 2
learning_rate = 0.1
"""

# One interpreter imports once (only what starts no thread: then forking is safe) and forks a fresh `katei compare` for each
# attempt, so ten kills take seconds.
DRIVER = """
import faulthandler, json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from katei import api, cli
import katei.study.run, katei.ship.models
rng = random.Random(5)
assert len(os.listdir("/proc/self/task")) == 1
out, kills, command = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]

def attempt(kill):
    def seen():
        if isinstance(kill, str):
            return {str(p) for p in out.glob(kill)}
        return {(p.name, p.stat().st_mtime_ns) for p in out.glob("state-*.safetensors")}
    before, saves = seen(), set()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(60, exit=True)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        sys.argv = ["katei", *command]
        try:
            cli.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(99)
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic() - began
        try:
            saves |= seen() - before
        except FileNotFoundError:
            pass
        if kill is not None and (now > kill if isinstance(kill, float) else len(saves) >= (1 if isinstance(kill, str) else kill)):
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -9
        time.sleep(0.0005)

print(json.dumps([attempt(kill) for kill in [*kills, None]]))
"""


def killed(out: Path, kills: list[Any], command: list[str]) -> list[int]:
    """Exit codes of `katei …` started once per entry: killed after so many seconds (a float) or saves of
    the state (an int), or when such a file appears; the last time not."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(out), json.dumps(kills), *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes[-1] == 0, done.stderr
    assert set(codes) <= {0, -9}, done.stderr
    return list(codes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A command, without its --out, and the folder it makes when nobody kills it."""
    folder = tmp_path_factory.mktemp("killed")
    base, data = tiny_base_folder(folder, layers=3), data_folder(folder / "data", labels=("暖", "冷"))
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    command = ["compare", str(data), "--model", str(base), "--recipe", str(folder / "recipe.toml"), "--json"]
    out = folder / "whole"
    assert killed(out, [], [*command, "--out", str(out), "--save-seconds", "1000"]) == [0]
    return command, out


def test_killed_anywhere_it_ends_with_the_same_bytes(uninterrupted: tuple[list[str], Path], tmp_path: Path) -> None:
    command, whole = uninterrupted
    out = tmp_path / "run"
    rng = np.random.default_rng(20240)
    moments: list[Any] = [0.05, "identity", ".state-lora*.part", *rng.integers(1, 7, 4).tolist(), 0.4]
    moments += ["trials/lora", "trials/.adalora*.part", "trials/llama-adapter", "state-full.safetensors"]
    moments += [int(rng.integers(1, 7)), "trials/full", "predictions.parquet", "environment.json"]
    codes = killed(out, moments, [*command, "--out", str(out), "--save-seconds", "0"])
    assert codes.count(-9) >= 10, codes
    assert result_bytes(out) == result_bytes(whole)
    assert [name for name in tree(out) if ".part" in name or "state-" in name] == []


def test_killed_with_overwrite_it_goes_on_too(uninterrupted: tuple[list[str], Path], tmp_path: Path) -> None:
    command, whole = uninterrupted
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "results.json").write_text("{}")  # a finished run to be replaced
    arguments = [*command, "--out", str(out), "--save-seconds", "0", "--overwrite"]
    codes = killed(out, ["identity", 3, 2, "trials/adalora"], arguments)
    assert codes.count(-9) >= 3, codes
    assert result_bytes(out) == result_bytes(whole)


def test_a_state_that_is_no_state_is_an_error_and_overwrite_starts_again(
    uninterrupted: tuple[list[str], Path], tmp_path: Path
) -> None:
    command, whole = uninterrupted
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "results.json").unlink()
    (out / "state-lora.safetensors").write_bytes(b"half a st")
    data, recipe = command[1], command[5]
    with pytest.raises(RunError, match="state of this run cannot be read") as refused:
        api.compare(data, out=out, model=command[3], recipe=recipe)
    assert "--overwrite" in (refused.value.hint or "")
    api.compare(data, out=out, model=command[3], recipe=recipe, overwrite=True)
    assert result_bytes(out) == result_bytes(whole)


def test_ctrl_c_saves_says_so_and_the_same_command_goes_on(llama: Trained, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "katei.cli", "compare", str(llama.data), "--model", str(llama.base), "--out"]
    rest = ["--method", "lora,adalora,ia3", "--epochs", "20", "--save-seconds", "1000", "--reference", "none"]
    started = subprocess.Popen(
        [*command, str(out), *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert started.stderr is not None
    for line in started.stderr:
        if line.startswith("epoch 2/20"):
            started.send_signal(signal.SIGINT)
            break
    said, printed = started.stderr.read(), started.stdout.read() if started.stdout else ""
    assert started.wait(60) == 130
    assert "katei: stopped. The same command goes on" in said
    assert "Traceback" not in said
    assert printed == ""
    assert (out / "state-lora.safetensors").exists()
    partial = json.loads((out / "results-partial.json").read_text(encoding="utf-8"))
    assert partial["partial"] is True
    assert partial["comparison"] is None
    assert [(t["finished"], len(t["epochs"]) >= 2, t["test"]) for t in partial["trials"]] == [(None, True, None)] * 3
    again = subprocess.run(
        [*command, str(out), *rest],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stderr
    assert "epoch 1/20" not in again.stderr
    assert not (out / "results-partial.json").exists()
    small(llama.base, llama.data, tmp_path / "whole", epochs=20, seeds=None, batch_size=None)
    assert result_bytes(out) == result_bytes(tmp_path / "whole")


def test_a_failure_while_writing_leaves_the_older_state(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from katei.core.files import folder_atomic, write_text

    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    with pytest.raises(OSError, match="space"), folder_atomic(tmp_path / "folder") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise OSError(28, "no space left")
    assert tree(tmp_path) == ["file"]


def test_time_spent_is_counted_over_restarts(llama: Trained, tmp_path: Path) -> None:
    began = time.perf_counter()
    study = small(llama.base, llama.data, tmp_path / "run", methods=["lora"])
    seconds = study.environment["seconds"]
    assert 0 < seconds["train"] <= seconds["total"] <= time.perf_counter() - began
