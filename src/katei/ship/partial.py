"""A long file of answers that is written bit by bit: killed at any moment, the same command goes on, and ends with the same bytes.

    OUT.partial/rows           the lines so far, appended to
    OUT.partial/journal.json   of what they are the answers, how many rows are done, how many bytes of `rows` they are
    OUT                        appears whole, by a rename, when the last row is done

The journal is written after the bytes it speaks of have reached the disk; bytes beyond it are cut off when the command goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from katei.core.errors import RunError, UserError
from katei.core.files import write_json

SAVE_SECONDS = 1.0
"""How much work a kill can cost, beyond the window at hand."""


@dataclass
class Done:
    """How far the answers are."""

    rows: int = 0
    size: int = 0
    abstained: int = 0


class Partial:
    """The answers so far; made by `resumed`."""

    def __init__(self, folder: Path, identity: Mapping[str, str], save_seconds: float):
        self.folder, self.identity, self.save_seconds = folder, dict(identity), save_seconds
        self.done = Done()
        self.saved = False
        """There is a journal: work worth keeping."""
        self._saved_at = time.monotonic()
        self._file: IO[bytes] | None = None

    def go_on(self, say: Callable[[str], None]) -> None:
        """Take up what an earlier call left, if it answered the same."""
        left = _journal(self.folder / "journal.json")
        rows = self.folder / "rows"
        if left is not None:
            identity, done = left
            differs = [name for name in self.identity if identity.get(name) != self.identity[name]]
            if not differs and rows.exists() and rows.stat().st_size >= done.size:
                self.done, self.saved = done, True
                say(f"going on after {done.rows:,} rows that are done")
            else:
                why = f"with another {' and '.join(differs)}" if differs else "not whole"
                say(f"{self.folder} holds {done.rows:,} rows answered {why}: beginning again")
                (self.folder / "journal.json").unlink()
        self._file = rows.open("r+b" if self.done.size else "wb")
        self._file.truncate(self.done.size)
        self._file.seek(self.done.size)

    def write(self, content: str) -> None:
        assert self._file is not None
        self.done.size += self._file.write(content.encode())

    def step(self, rows: int, abstained: int) -> None:
        """`rows` more are done; from time to time that is put on record."""
        self.done.rows += rows
        self.done.abstained += abstained
        if time.monotonic() - self._saved_at >= self.save_seconds:
            self.save()

    def save(self) -> None:
        self.flush()
        write_json(self.folder / "journal.json", {"identity": self.identity, **asdict(self.done)})
        self.saved, self._saved_at = True, time.monotonic()

    def flush(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@contextmanager
def resumed(
    out: Path, identity: Mapping[str, str], *, save_seconds: float, say: Callable[[str], None]
) -> Iterator[Partial]:
    """The partial answers of `out`. A block that ends well removes them, having moved them to `out` itself; what a kill, Ctrl-C or
    a full disk interrupts stays for the next call, and a user's mistake leaves nothing.
    """
    folder = partial_folder(out)
    if folder.exists() and not (folder.is_dir() and all(_is_ours(entry.name) for entry in folder.iterdir())):
        what = "is in the way: katei keeps unfinished answers there"
        raise RunError(what, file=folder, hint="move it, or --out another")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError("another katei is writing this file", file=out, hint="wait for it, or --out another") from None
    partial = Partial(folder, identity, save_seconds)
    try:
        partial.go_on(say)
        yield partial
    except UserError:
        partial.saved = False
        raise
    except KeyboardInterrupt:
        if partial.done.rows:
            partial.save()
        raise
    else:
        partial.saved = False
    finally:
        partial.close()
        if not partial.saved:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def partial_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _is_ours(name: str) -> bool:
    return name.lstrip(".").split(".")[0] in ("rows", "journal", "lock")


def _journal(file: Path) -> tuple[dict[str, str], Done] | None:
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        identity = written.pop("identity")
        return dict(identity), Done(**{name: int(value) for name, value in written.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
