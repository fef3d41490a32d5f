"""The run folder: whose it is, that one process writes it, and what of it is there after a kill."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from katei.core.errors import RunError, UserError
from katei.study.recipe import Recipe, load_recipe

PARTIAL = "results-partial.json"
"""What a study that was stopped came to so far; gone when it ends."""
WRITTEN = (
    "results.json",
    PARTIAL,
    "results.csv",
    "environment.json",
    "predictions.parquet",
    "recipe.toml",
    "plan.json",
    "report.html",
)


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


def read_recipe(run: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    return load_recipe(run / "recipe.toml", {})


def check_claim(out: Path, recipe: Recipe, identity: str, overwrite: bool) -> None:
    """Raise RunError, naming what differs, if `out` is not free for this study. Writes nothing."""
    if out.exists() and not out.is_dir():
        raise RunError("is a file, and a run needs a folder", file=out, hint="--out another path")
    if not out.is_dir() or not any(p for p in out.iterdir() if not p.name.startswith(".")):
        return
    if not (out / "identity").exists():
        raise RunError("is a folder with other things in it", file=out, hint="--out a new or empty folder")
    if not overwrite and identity_of(out) != identity:
        difference = _difference(out / "recipe.toml", recipe) if (out / "recipe.toml").exists() else ""
        raise RunError(
            f"holds another run ({difference or 'the data have changed'})",
            file=out,
            hint="--out another folder keeps it, --overwrite replaces it",
        )


def identity_of(out: Path) -> str | None:
    file = out / "identity"
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else None


def clear(out: Path) -> None:
    """Remove a run: its results first, its identity last, so that what a kill leaves is still known as a run."""
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    drop_states(out)
    shutil.rmtree(out / "trials", ignore_errors=True)
    (out / "identity").unlink(missing_ok=True)


def drop_states(out: Path) -> None:
    for state in out.glob("state-*.safetensors"):
        state.unlink()
    (out / PARTIAL).unlink(missing_ok=True)


def sweep(out: Path) -> None:
    """Remove what a killed write left unfinished; the caller holds the lock, so nobody is writing."""
    for part in [*out.glob(".*.part"), *out.glob("trials/.*.part")]:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def _difference(old: Path, recipe: Recipe) -> str:
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
def claimed(out: Path) -> Iterator[None]:
    """Make the run folder and hold its lock. A user's mistake found before anything was trained leaves nothing behind."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    fresh = identity_of(out) is None
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
            clear(out)
            (out / ".lock").unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()
        raise
    finally:
        lock.release()
