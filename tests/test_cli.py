"""The commands as a user types them: results on stdout, progress on stderr, and a clear word for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from katei import cli
from tests.helpers.rows import EVERY_METHOD
from tests.helpers.tiny import edit_config
from tests.helpers.trained import Trained, train_study

COMMANDS = (
    "demo",
    "train",
    "compare",
    "evaluate",
    "predict",
    "generate",
    "report",
    "merge",
    "export",
    "serve",
    "models",
    "doctor",
)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_study(tmp_path_factory.mktemp("cli"))


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The JSON object in the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


Katei = Callable[..., Answer]


@pytest.fixture
def katei(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Katei:
    """`katei …` in this process."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["katei", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return Answer(int(end.value.code or 0), said.out, said.err)

    return run


def elsewhere(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`katei …` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "katei.cli", *arguments],
        capture_output=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


# -------------------------------------------------------------------- mistakes

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Mistake:
    """What is typed in a folder `here`, what has been done to it before, and what the error must say."""

    typed: str
    said: str
    before: Change = lambda here: None
    kind: str = ""


def text(name: str, content: str) -> Change:
    return lambda here: (here / name).write_text(content, encoding="utf-8")


def raw(name: str, content: bytes) -> Change:
    return lambda here: (here / name).write_bytes(content)


def adapter_with(name: str, content: bytes | None) -> Change:
    """A copy of the run's LoRA adapter in `adapter`, one of its files replaced or removed."""

    def change(here: Path) -> None:
        shutil.copytree(here.parent.parent / "llama" / "trials" / "lora", here / "adapter", dirs_exist_ok=True)
        (here / "adapter" / name).unlink() if content is None else (here / "adapter" / name).write_bytes(content)

    return change


def base_with(**changes: object) -> Change:
    def change(here: Path) -> None:
        shutil.copytree(here / "base", here / "changed")
        edit_config(here / "changed", **changes)

    return change


def nul_label(here: Path) -> None:
    (here / "new.tsv").write_text("poem\tprediction\n朝\tx\n", encoding="utf-8")


TRAIN = "train data --model base --out out --epochs 1"
COMPARE = "compare data --model base --out out --epochs 1"

MISTAKES: dict[str, Mistake] = {
    # --- data
    "no such data": Mistake("train dta --method lora --model base --out out", "no such file or folder", kind="data"),
    "empty table": Mistake(f"{TRAIN} --method lora", "the file is empty", raw("data/train.tsv", b""), "data"),
    "ragged row": Mistake(f"{TRAIN} --method lora", "3 fields where", text("data/train.tsv", "a\tb\nx\t0\ny\t1\tz\n")),
    "one class": Mistake(f"{TRAIN} --method lora", "all 2 rows", text("data/train.tsv", "poem\tlabel\nx\t1\ny\t1\n")),
    "empty text": Mistake(f"{TRAIN} --method lora", "is empty", text("data/train.tsv", "poem\tlabel\nx\t1\n\t0\n")),
    "unknown label in test": Mistake(
        f"{TRAIN} --method lora", "the label 'hot' is not in", text("data/test.tsv", "poem\tlabel\nx\thot\n"), "data"
    ),
    "not UTF-8": Mistake(
        f"{TRAIN} --method lora", "not UTF-8", raw("data/valid.tsv", "poem\tlabel\n春\t0\n".encode("cp932"))
    ),
    "no such column": Mistake(f"{TRAIN} --method lora --text poet", "no column 'poet'", kind="data"),
    "text and label the same": Mistake(f"{TRAIN} --method lora --text poem --label poem", "both text and label"),
    "a folder without tables": Mistake(
        "train base --method lora --model base --out out", "no train, valid or test table"
    ),
    # --- base
    "no such base": Mistake(
        "train data --method lora --model ./nowhere --out out", "no such file or folder", kind="base"
    ),
    "a base by a name with a typo": Mistake(
        "train data --method lora --model smolm2 --out out", "no base model 'smolm2'"
    ),
    "base without weights": Mistake(
        f"{TRAIN} --method lora", "no model.safetensors", lambda h: (h / "base/model.safetensors").unlink(), "base"
    ),
    "base cut short": Mistake(
        f"{TRAIN} --method lora", "cut short", lambda h: os.truncate(h / "base/model.safetensors", 9000), "base"
    ),
    "base without tokenizer": Mistake(
        f"{TRAIN} --method lora", "no tokenizer", lambda h: (h / "base/tokenizer.json").unlink(), "base"
    ),
    "base that is an encoder": Mistake(
        "train data --method lora --model changed --out out", "bert", base_with(model_type="bert", architectures=None)
    ),
    "base with code of its own": Mistake(
        "train data --method lora --model changed --out out",
        "own code",
        base_with(model_type="mine", auto_map={"AutoModel": "x.y"}),
    ),
    "an adapter given for a base": Mistake(
        "train data --method lora --model run/trials/lora --out out", "adapter, not a base"
    ),
    # --- recipes and flags
    "no method": Mistake("train data --model base --out out", "no method given", kind="recipe"),
    "no data": Mistake("compare --model base --out out", "no data given", kind="recipe"),
    "unknown method": Mistake(f"{TRAIN} --method lorra", "no method is named 'lorra'", kind="recipe"),
    "unknown method in a list": Mistake(f"{COMPARE} --method lora,ia4", "no method is named 'ia4'", kind="recipe"),
    "an empty place in a list": Mistake(f"{COMPARE} --method lora,,ia3", "no method is named ''", kind="recipe"),
    "a method twice": Mistake(f"{COMPARE} --method lora,lora", "twice", kind="recipe"),
    "all and one more": Mistake(f"{COMPARE} --method all,lora", "no method is named 'all'", kind="recipe"),
    "unknown precision": Mistake(f"{TRAIN} --method lora --precision fp8", "precision", kind="recipe"),
    "unknown device": Mistake(f"{TRAIN} --method lora --device gpu", "no device 'gpu'", kind="base"),
    "a device that is not here": Mistake(f"{TRAIN} --method lora --device cuda:7", "not available here", kind="base"),
    "full in half precision": Mistake(f"{TRAIN} --method full --precision bf16", "full fine-tuning of a base held"),
    "0 epochs": Mistake("train data --model base --out out --method lora --epochs 0", "epochs is 0", kind="recipe"),
    "epochs below 0": Mistake("train data --model base --out out --method lora --epochs -3", "epochs is -3"),
    "epochs a word": Mistake(
        "train data --model base --out out --method lora --epochs ten", "Invalid value for '--epochs'", kind="usage"
    ),
    "epochs beyond every number": Mistake(
        "train data --model base --out out --method lora --epochs 99999999999999999999", "epochs", kind="recipe"
    ),
    "learning rate nan": Mistake(f"{TRAIN} --method lora --lr nan", "learning_rate", kind="recipe"),
    "learning rate infinite": Mistake(f"{TRAIN} --method lora --lr inf", "learning_rate", kind="recipe"),
    "learning rate below 0": Mistake(f"{TRAIN} --method lora --lr -1e-4", "learning_rate is -0.0001", kind="recipe"),
    "learning rate 0": Mistake(f"{TRAIN} --method lora --lr 0", "learning_rate is 0", kind="recipe"),
    "batch size 0": Mistake(f"{TRAIN} --method lora --batch-size 0", "batch_size is 0", kind="recipe"),
    "accumulation 0": Mistake(f"{TRAIN} --method lora --accumulation 0", "accumulation is 0", kind="recipe"),
    "decay below 0": Mistake(f"{TRAIN} --method lora --weight-decay -1", "weight_decay is -1", kind="recipe"),
    "decay nan": Mistake(f"{TRAIN} --method lora --weight-decay nan", "weight_decay", kind="recipe"),
    "warm-up of more than everything": Mistake(f"{TRAIN} --method lora --warmup 2", "warmup is 2", kind="recipe"),
    "patience below 0": Mistake(f"{TRAIN} --method lora --patience -1", "patience is -1", kind="recipe"),
    "keep the middle": Mistake(f"{TRAIN} --method lora --keep middle", "keep", kind="recipe"),
    "max length 0": Mistake(f"{TRAIN} --method lora --max-length 0", "max_length is 0", kind="recipe"),
    "token budget 0": Mistake(f"{TRAIN} --method lora --token-budget 0", "token_budget is 0", kind="recipe"),
    "seed below 0": Mistake(f"{TRAIN} --method lora --seed -1", "seeds is [-1]", kind="recipe"),
    "a huge seed": Mistake(f"{TRAIN} --method lora --seed 99999999999999999999999", "seeds", kind="recipe"),
    "0 seeds": Mistake(f"{COMPARE} --method lora --seeds 0", "seeds is []", kind="recipe"),
    "seeds below 0": Mistake(f"{COMPARE} --method lora --seeds -2", "seeds", kind="recipe"),
    "save seconds nan": Mistake(f"{TRAIN} --method lora --save-seconds nan", "save_seconds is nan", kind="recipe"),
    "save seconds below 0": Mistake(f"{TRAIN} --method lora --save-seconds -5", "save_seconds is -5", kind="recipe"),
    "keep best without valid rows": Mistake(
        f"{TRAIN} --method lora --keep best", "no valid rows", lambda h: (h / "data/valid.tsv").unlink(), "recipe"
    ),
    "patience without valid rows": Mistake(
        f"{TRAIN} --method lora --patience 2", "no valid rows", lambda h: (h / "data/valid.tsv").unlink(), "recipe"
    ),
    "more layers than there are": Mistake(
        f"{TRAIN} --method llama-adapter --set layers=9", "layers is 9, but the base has 4"
    ),
    "a target that is nowhere": Mistake(f"{TRAIN} --method lora --set targets=['query']", "query"),
    "targets empty": Mistake(f"{TRAIN} --method lora --set targets=[]", "(none given)"),
    "nothing to prune": Mistake(
        f"{TRAIN} --method adalora --set target_rank=12", "nothing could be pruned", kind="recipe"
    ),
    "set without a value": Mistake(f"{TRAIN} --method lora --set rank", "--set rank", kind="recipe"),
    "set without a key": Mistake(f"{TRAIN} --method lora --set =3", "--set =3", kind="recipe"),
    "set an unknown key": Mistake(f"{TRAIN} --method lora --set rnak=3", "unknown key 'rnak'", kind="recipe"),
    "set a wrong type": Mistake(f"{TRAIN} --method lora --set rank=big", "rank", kind="recipe"),
    "set half a number": Mistake(f"{TRAIN} --method lora --set rank=1.5", "rank", kind="recipe"),
    "set rank 0": Mistake(f"{TRAIN} --method lora --set rank=0", "rank is 0", kind="recipe"),
    "set alpha nan": Mistake(f"{TRAIN} --method lora --set alpha=nan", "alpha", kind="recipe"),
    "set a dropout of 1": Mistake(f"{TRAIN} --method lora --set dropout=1.0", "dropout is 1", kind="recipe"),
    "set a date": Mistake(f"{TRAIN} --method lora --set rank=2024-01-01", "rank", kind="recipe"),
    "set TOML that goes on": Mistake(f"{TRAIN} --method lora --set rank=1\nalpha=2", "rank", kind="recipe"),
    "set an unknown encoder": Mistake(f"{TRAIN} --method p-tuning --set encoder=gru", "encoder", kind="recipe"),
    "no such recipe": Mistake(f"{TRAIN} --method lora --recipe no.toml", "the recipe cannot be read", kind="recipe"),
    "recipe that is a folder": Mistake(
        f"{TRAIN} --method lora --recipe data", "the recipe cannot be read", kind="recipe"
    ),
    "recipe not TOML": Mistake(f"{COMPARE} --recipe r.toml", "not TOML", text("r.toml", "epochs: 3\n"), "recipe"),
    "recipe not UTF-8": Mistake(f"{COMPARE} --recipe r.toml", "not UTF-8", raw("r.toml", b'x = "\xff"'), "recipe"),
    "recipe with an unknown key": Mistake(
        f"{COMPARE} --recipe r.toml", "unknown key 'epohcs'", text("r.toml", "epohcs = 3\n")
    ),
    "recipe with an unknown table": Mistake(
        f"{COMPARE} --recipe r.toml", "unknown key 'loar'", text("r.toml", "[loar]\nrank = 1\n")
    ),
    "recipe with an unknown training key": Mistake(
        f"{COMPARE} --recipe r.toml", "unknown key 'epoch'", text("r.toml", "[training]\nepoch = 3\n")
    ),
    "recipe with an unknown setting": Mistake(
        f"{COMPARE} --recipe r.toml", "unknown key 'ranks'", text("r.toml", 'methods = ["lora"]\n[lora]\nranks = 3\n')
    ),
    "recipe with an unknown setting of a method not used": Mistake(
        f"{COMPARE} --method ia3 --recipe r.toml", "unknown key 'ranks'", text("r.toml", "[lora]\nranks = 3\n")
    ),
    "recipe with a number for a string": Mistake(
        f"{COMPARE} --recipe r.toml", "device", text("r.toml", "device = 3\n")
    ),
    "recipe with a string for a number": Mistake(
        f"{COMPARE} --recipe r.toml", "max_length", text("r.toml", 'max_length = "9"\n')
    ),
    "recipe with true for a number": Mistake(
        f"{COMPARE} --recipe r.toml", "batch_size", text("r.toml", "[training]\nbatch_size = true\n")
    ),
    "recipe with a number for a table": Mistake(
        f"{COMPARE} --recipe r.toml", "it is a table", text("r.toml", "lora = 3\n")
    ),
    "recipe with a word for the methods": Mistake(
        f"{COMPARE} --recipe r.toml", "methods", text("r.toml", 'methods = "lora"\n')
    ),
    "recipe with a number for the methods": Mistake(
        f"{COMPARE} --recipe r.toml", "methods", text("r.toml", "methods = 3\n")
    ),
    "recipe with no methods": Mistake(
        f"{COMPARE} --recipe r.toml", "methods is empty", text("r.toml", "methods = []\n")
    ),
    "recipe with a number for the seeds": Mistake(f"{COMPARE} --recipe r.toml", "seeds", text("r.toml", "seeds = 3\n")),
    "recipe with a date": Mistake(
        f"{COMPARE} --recipe r.toml", "max_length", text("r.toml", "max_length = 2020-01-01\n")
    ),
    "recipe with an infinite rate": Mistake(
        f"{COMPARE} --recipe r.toml", "learning_rate", text("r.toml", "[training]\nlearning_rate = inf\n")
    ),
    "settings for several methods": Mistake(
        "train data --model base --out out --recipe r.toml --set rank=2",
        "several",
        text("r.toml", 'methods = ["lora", "ia3"]\n'),
        "recipe",
    ),
    # --- out
    "out is a file": Mistake(f"{TRAIN} --method lora --out data/train.tsv", "is a file", kind="run"),
    "out is below a file": Mistake(f"{TRAIN} --method lora --out data/train.tsv/run", "ot a directory"),
    "out is somebody's folder": Mistake(f"{TRAIN} --method lora --out data", "other things in it", kind="run"),
    "out is another run": Mistake(f"{TRAIN} --method lora --out run", "holds another run", kind="run"),
    # --- runs and adapters
    "no such run": Mistake("predict nowhere new.tsv", "no such run or adapter folder", kind="run"),
    "a run that is no run": Mistake("predict data new.tsv", "neither a finished run nor an adapter folder", kind="run"),
    "a run that is a file": Mistake("predict new.tsv new.tsv", "neither a finished run nor", kind="run"),
    "which of the trials": Mistake("predict run new.tsv", "has 9 trials", kind="run"),
    "no such trial": Mistake("predict run new.tsv --trial lor", "no trial named 'lor'", kind="run"),
    "a trial outside the run": Mistake("predict run new.tsv --trial ../../data", "no trial named", kind="run"),
    "adapter cut short": Mistake(
        "predict adapter new.tsv", "not a whole", adapter_with("adapter_model.safetensors", b"x")
    ),
    "adapter without config": Mistake(
        "predict adapter new.tsv", "is missing", adapter_with("adapter_config.json", None)
    ),
    "adapter without weights": Mistake(
        "predict adapter new.tsv", "is missing", adapter_with("adapter_model.safetensors", None)
    ),
    "adapter with a note of a wrong type": Mistake(
        "predict adapter new.tsv", "not a note katei wrote", adapter_with("katei.json", b'{"labels": 3}'), "adapter"
    ),
    "adapter on another base": Mistake(
        "predict run/trials/lora new.tsv --model other", "other weights", kind="adapter"
    ),
    "evaluate on a base that is not there": Mistake(
        "evaluate run data --trial lora --model nope/", "no such file or folder"
    ),
    # --- prediction
    "no such rows": Mistake("predict run nwe.tsv --trial lora", "no such file", kind="data"),
    "rows without the text column": Mistake(
        "predict run a.tsv --trial lora", "which is the text", text("a.tsv", "a\tb\tc\n1\t2\t3\n"), "data"
    ),
    "rows with a text column named wrongly": Mistake(
        "predict run new.tsv --trial lora --text x", "no column 'x'", kind="data"
    ),
    "rows with an empty text": Mistake(
        "predict run a.tsv --trial lora", "is empty", text("a.tsv", "poem\n朝\n \nx\n"), "data"
    ),
    "rows that have a prediction": Mistake(
        "predict run new.tsv --trial lora", "already has a column", nul_label, "data"
    ),
    "predictions over their own input": Mistake(
        "predict run new.tsv --trial lora --out new.tsv", "overwritten", kind="data"
    ),
    "predictions in a format nobody knows": Mistake(
        "predict run new.tsv --trial lora --out o.xlsx", "cannot write '.xlsx'"
    ),
    "predictions into a folder": Mistake(
        "predict run new.tsv --trial lora --out d.tsv", "is a folder", lambda h: (h / "d.tsv").mkdir()
    ),
    "predictions below a file": Mistake(
        "predict run new.tsv --trial lora --out new.tsv/o.tsv", "new.tsv is a file", kind="data"
    ),
    "evaluate without labels": Mistake("evaluate run new.tsv --trial lora", "only one column", kind="data"),
    "evaluate labels it never saw": Mistake(
        "evaluate run a.tsv --trial lora", "the label 'hot' is not", text("a.tsv", "poem\tlabel\nx\thot\n"), "data"
    ),
    "evaluate in a precision nobody knows": Mistake(
        "evaluate run data --trial lora --precision fp99", "no precision 'fp99'"
    ),
    # --- generation
    "no prompt": Mistake("generate run", "no prompt given", kind="recipe"),
    "empty prompt": Mistake("generate --model base ''", "a prompt is empty", kind="recipe"),
    "one empty prompt of two": Mistake("generate --model base x ''", "a prompt is empty", kind="recipe"),
    "a run with a typo": Mistake("generate rnu 春の", "'rnu' is no folder", kind="recipe"),
    "0 new tokens": Mistake("generate --model base x --new-tokens 0", "new_tokens is 0", kind="recipe"),
    "temperature below 0": Mistake("generate --model base x --temperature -1", "temperature is -1", kind="recipe"),
    "temperature nan": Mistake("generate --model base x --temperature nan", "temperature is nan", kind="recipe"),
    "temperature infinite": Mistake("generate --model base x --temperature inf", "temperature is inf", kind="recipe"),
    "top-p 0": Mistake("generate --model base x --top-p 0", "top_p is 0", kind="recipe"),
    "top-p nan": Mistake("generate --model base x --top-p nan", "top_p is nan", kind="recipe"),
    "a seed below 0": Mistake("generate --model base x --temperature 1 --seed -1", "seed is -1", kind="recipe"),
    "generate with a classifier": Mistake("generate run 春の --trial full", "fully fine-tuned", kind="adapter"),
    # --- report
    "report of nothing": Mistake("report nothing", "no such run folder", kind="run"),
    "report of a folder of data": Mistake("report data", "is not a run folder", kind="run"),
    "report in a language nobody wrote": Mistake("report run --lang de", "no language 'de'", kind="recipe"),
    "report over a file that is none": Mistake("report run --out data/train.tsv", "the report is HTML", kind="run"),
    "report into a folder": Mistake("report run --out data", "is a folder", kind="run"),
    "report of a table without results": Mistake("report data/train.tsv", "no column 'method'", kind="data"),
    # --- merge and export
    "merge of prompts": Mistake("merge run --trial prompt-tuning --out m", "no weights to merge into", kind="merge"),
    "merge of a full model": Mistake("merge run --trial full --out m", "fully fine-tuned model", kind="adapter"),
    "merge into a folder that is there": Mistake("merge run --trial lora --out data", "already exists", kind="adapter"),
    "merge checked on rows that are not there": Mistake("merge run --trial lora --out m --data no.tsv", "no such file"),
    "merge without an out": Mistake("merge run --trial lora", "--out", kind="usage"),
    "export to a format nobody knows": Mistake("export run --trial lora --out e --format onnx", "no export to 'onnx'"),
    "export of the head": Mistake("export run --trial head --out e", "no format for the method 'head'", kind="adapter"),
    "export into a folder that is there": Mistake(
        "export run --trial lora --out data", "already exists", kind="adapter"
    ),
    # --- usage
    "unknown command": Mistake("trian data", "No such command 'trian'", kind="usage"),
    "unknown flag": Mistake("train data --mehtod lora", "No such option", kind="usage"),
    "a flag without its value": Mistake("train data --lr", "Invalid value for '--lr'", kind="usage"),
    "an argument too many": Mistake("export run x --out e", "unexpected extra argument", kind="usage"),
    "no arguments where some are needed": Mistake("predict", "Missing argument", kind="usage"),
}


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if not p.is_dir()} | {
        str(p.relative_to(folder)): 0 for p in folder.rglob("*") if p.is_dir()
    }


@pytest.fixture
def here(llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder a user works in: data, base, other (another base), run, new.tsv."""
    from tests.helpers.tiny import tiny_base_folder

    folder = tmp_path / "work" / "here"
    folder.mkdir(parents=True)
    (tmp_path / "llama").symlink_to(llama.run)
    shutil.copytree(llama.data, folder / "data")
    shutil.copytree(llama.base, folder / "base")
    (folder / "run").symlink_to(llama.run)
    (folder / "other").symlink_to(tiny_base_folder(llama.base.parent, seed=7))
    (folder / "new.tsv").write_text("poem\n春の風\nthe iron gate\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def words(typed: str) -> list[str]:
    return [word.strip("'") for word in re.split(" (?=[^\n]*)", typed)]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_clear_word_and_leaves_nothing_behind(
    name: str, here: Path, llama: Trained, katei: Katei
) -> None:
    mistake = MISTAKES[name]
    mistake.before(here)
    before, run_before = tree(here), tree(llama.run)
    answer = katei(*words(mistake.typed), "--json")
    assert "a mistake of katei's own" not in answer.err
    assert "Traceback" not in answer.err
    assert answer.code == 2, answer.err
    error = answer.result["error"]
    assert set(error) == {"kind", "message", "file", "row", "hint"}
    assert mistake.said in error["message"], error
    assert mistake.said in answer.err
    assert error["hint"], error
    assert error["hint"] in answer.err
    if mistake.kind:
        assert error["kind"] == mistake.kind
    assert len(answer.out.splitlines()) == 1
    assert tree(here) == before
    assert tree(llama.run) == run_before


def test_the_table_is_long_enough_and_every_command_with_input_is_in_it() -> None:
    assert len(MISTAKES) > 100
    typed = {mistake.typed.split()[0] for mistake in MISTAKES.values()}
    assert {"train", "compare", "evaluate", "predict", "generate", "report", "merge", "export"} <= typed


def test_a_data_error_carries_file_and_row(here: Path, katei: Katei) -> None:
    (here / "data" / "valid.tsv").write_text("poem\tlabel\nx\tcold\ny\tcold\t\n", encoding="utf-8")
    error = katei(*words(f"{TRAIN} --method lora"), "--json").result["error"]
    assert (error["file"], error["row"]) == ("data/valid.tsv", 3)


def test_without_json_the_error_is_on_stderr_alone(here: Path, katei: Katei) -> None:
    answer = katei("train", "nothing.tsv", "--method", "lora", "--model", "base")
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("katei: nothing.tsv: no such file or folder\n  → ")


def test_debug_shows_where(here: Path, katei: Katei, monkeypatch: pytest.MonkeyPatch) -> None:
    from katei.core.errors import DataError

    monkeypatch.setattr(
        sys, "argv", ["katei", "--debug", "train", "nothing.tsv", "--method", "lora", "--model", "base"]
    )
    with pytest.raises(DataError):
        cli.main()


def test_a_mistake_of_our_own_says_so_and_asks_for_debug(katei: Katei, monkeypatch: pytest.MonkeyPatch) -> None:
    from katei import api

    def broken() -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(api, "doctor", broken)
    answer = katei("doctor", "--json")
    assert answer.code == 1
    assert "a mistake of katei's own: ZeroDivisionError: oh" in answer.err
    assert "--debug" in answer.err
    assert answer.result["error"]["kind"] == "bug"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (PermissionError(13, "Permission denied", "out/run"), "out/run: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(
    raised: Exception, said: str, katei: Katei, monkeypatch: pytest.MonkeyPatch
) -> None:
    from katei import api

    def refuse() -> None:
        raise raised

    monkeypatch.setattr(api, "doctor", refuse)
    answer = katei("doctor", "--json")
    assert answer.code == 2
    assert said in answer.err
    assert answer.result["error"]["kind"] == "system"
    assert answer.result["error"]["hint"]


# -------------------------------------------------------------------- results


def test_the_whole_way_from_train_to_predictions(here: Path, katei: Katei) -> None:
    trained = katei(*words(f"{TRAIN} --method lora --set rank=2 --seed 5 --keep best"), "--json")
    assert trained.code == 0, trained.err
    study = trained.result
    assert {"run", "trials", "seconds", "memory", "verdict"} <= set(study)
    assert (study["run"], len(study["trials"]), study["trials"][0]["seed"]) == ("out", 1, 5)
    assert "training 1 trial in lockstep" in trained.err
    assert "epoch 1/1" in trained.err
    assert "epoch" not in trained.out.splitlines()[-2]
    predicted = katei("predict", "out", "new.tsv", "--json")
    assert predicted.code == 0, predicted.err
    assert set(predicted.result) == {"rows", "out", "seconds"}
    lines = (here / "new.predictions.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "poem\tprediction\tprobability_cold\tprobability_暖かい"
    assert len(lines) == 3
    scored = katei("evaluate", "out", "data", "--json")
    assert set(scored.result) == {"rows", "accuracy", "accuracy_interval", "roc_auc", "roc_auc_interval", "loss"}
    assert scored.result["accuracy"] == study["trials"][0]["test"]["accuracy"]
    merged = katei("merge", "out", "--out", "merged", "--json")
    assert {"out", "format", "agreement"} <= set(merged.result)
    assert {"labels", "max_probability_change"} <= set(merged.result["agreement"])
    assert katei("export", "out", "--out", "exported", "--json").result["format"] == "peft"
    again = katei(*words(f"{TRAIN} --method lora --set rank=2 --seed 5 --keep best"), "--json")
    assert "is finished" in again.err
    assert again.result == study


def test_nothing_but_katei_speaks_and_no_control_characters_in_a_pipe(here: Path) -> None:
    done = elsewhere(
        *"compare data --model base --method lora,full --epochs 1 --out out".split(), cwd=here, FORCE_COLOR="", LANG="C"
    )
    assert done.returncode == 0, done.stderr
    for stream in (done.stdout, done.stderr):
        said = stream.decode("utf-8")
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", said), said
    assert "lora" in done.stdout.decode()
    for line in done.stderr.decode().splitlines():
        said = ("warning: ", "training ", "epoch ", "The split as given", "reference points: ", "plan: ")
        assert line.startswith(said) or "rows/s" in line, line
    merged = elsewhere(*"merge out --trial lora --out m".split(), cwd=here)
    assert merged.returncode == 0, merged.stderr
    assert [line for line in merged.stderr.decode().splitlines() if not line.startswith("comparing")] == []


def test_compare_prints_each_trial_and_the_verdict(here: Path, katei: Katei) -> None:
    answer = katei(*words(f"{COMPARE} --method ia3,head --seeds 2"))
    assert answer.code == 0, answer.err
    for name in ("ia3-seed0", "ia3-seed1", "head-seed0", "head-seed1"):
        assert re.search(rf"^.*\b{name}\b", answer.out, re.MULTILINE), name
    for name in ("ia3", "head", "tf-idf", "majority class"):
        assert re.search(rf"^ {name} ", answer.out, re.MULTILINE), name
    assert "8 rows × 2 seeds" in answer.out
    assert "ia3 − head" in answer.out
    assert "is not shown to beat" in answer.out
    assert "katei predict out" in answer.out


def test_the_verdict_of_a_study_is_said_in_japanese_too(here: Path, katei: Katei) -> None:
    command = words(f"{COMPARE} --method ia3,lora --reference none")
    english, japanese = katei(*command), katei(*command, "--lang", "ja")
    assert "cannot be told apart on 8 rows" in english.out
    assert "8 行では" in japanese.out
    assert katei(*command, "--lang", "de").code == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--folds 10", "--folds 9"),
        ("--folds 1", "--folds 5"),
        ("--folds 3 --seeds 2", "--folds 3 --repeats 2"),
        ("--repeats 2", "--seeds 2"),
        ("--tune 1", "--tune 8"),
        ("--margin 2", "--margin 0.05"),
        ("--reference tfidf", "tf-idf"),
    ],
)
def test_designs_that_cannot_be_say_what_to_type(flags: str, says: str, here: Path, katei: Katei) -> None:
    answer = katei(*words(COMPARE.replace("--out out", "--out another")), *flags.split(), "--json")
    assert answer.code == 2
    assert says in f"{answer.result['error']['message']} {answer.result['error']['hint']}"
    assert not (here / "another").exists()


def test_report_writes_one_page_and_opens_it(here: Path, katei: Katei, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    answer = katei("report", "run", "--out", "pages/r.html", "--lang", "ja", "--open", "--json")
    assert answer.code == 0, answer.err
    page = here / "pages" / "r.html"
    assert opened == [page.as_uri()]
    assert answer.result["bytes"] == page.stat().st_size
    assert (here / answer.result["tidy"]).read_text().startswith("trial,method,seed")
    shown, page_says = answer.out.splitlines()[0], page.read_text(encoding="utf-8")
    assert shown == answer.result["verdict"]
    assert '<html lang="ja">' in page_says


def test_generate_prints_prompt_and_continuation(here: Path, katei: Katei) -> None:
    answer = katei("generate", "run", "春の", "the gate", "--trial", "lora", "--new-tokens", "5", "--json")
    assert answer.code == 0, answer.err
    pairs = answer.result["continuations"]
    assert [pair["prompt"] for pair in pairs] == ["春の", "the gate"]
    assert answer.out.startswith(f"春の{pairs[0]['continuation']}")


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_every_method_trains_from_the_command_line_by_its_defaults(name: str, here: Path, katei: Katei) -> None:
    more = ["--set", "layers=2"] if name == "llama-adapter" else []
    answer = katei(*words(f"{TRAIN} --method {name}"), *more, "--json")
    assert answer.code == 0, answer.err
    assert answer.result["trials"][0]["method"] == name


# -------------------------------------------------------------------- the program itself


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers(command: str, katei: Katei) -> None:
    answer = katei(*command.split(), "--help")
    assert answer.code == 0
    assert "Usage: katei" in answer.out
    if command:
        assert "--json" in answer.out
    else:
        assert all(name in answer.out for name in COMMANDS)


def test_version(katei: Katei) -> None:
    assert re.fullmatch(r"katei \d+\.\d+\.\d+\n", katei("--version").out)


HEAVY = {"torch", "transformers", "numpy", "pandas", "datasets", "sklearn", "scipy", "pydantic", "pyarrow", "peft"}


@pytest.mark.parametrize(
    "code", ["import katei", "import katei.api", "sys.argv = ['katei', '--help']; katei.cli.main()"]
)
def test_nothing_heavy_is_imported_before_a_command_runs(code: str) -> None:
    program = f"import sys, katei, katei.cli, atexit\natexit.register(lambda: print('HEAVY', sorted(set(sys.modules) & {HEAVY})))\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout + done.stderr


def test_a_closed_pipe_is_no_error(here: Path) -> None:
    program = f"{sys.executable} -m katei.cli models --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1, 141)  # 1 is what click ends a broken pipe with
    assert done.stderr == ""
