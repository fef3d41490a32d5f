"""What can go wrong, as the user sees it.

KateiError
├── UserError            something the user can fix: exit code 2, message, hint, no traceback
│   ├── DataError        a table: carries file and row
│   ├── RecipeError      a setting, flag or recipe key
│   ├── BaseError        a base model that cannot be found, read or used
│   ├── AdapterError     an adapter folder or file
│   │   └── CannotMerge  a method whose adapter has no place in the weights
│   └── RunError         a run folder
└── (anything else is our own mistake and keeps its traceback)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class KateiError(Exception):
    """Base of every error katei raises on purpose."""


class UserError(KateiError):
    """A mistake of the user's: says what happened, where, and what to type next.

    Attributes: `message`, and optionally `file`, `row` (1-based line of the file, header included) and `hint`.
    """

    kind = "user"

    def __init__(
        self, message: str, *, file: str | Path | None = None, row: int | None = None, hint: str | None = None
    ):
        super().__init__(message)
        self.message = message
        self.file = str(file) if file is not None else None
        self.row = row
        self.hint = hint

    def __str__(self) -> str:
        where = self.file or ""
        if self.row is not None:
            where += f", row {self.row}" if where else f"row {self.row}"
        text = f"{where}: {self.message}" if where else self.message
        return f"{text}\n  → {self.hint}" if self.hint else text

    def as_dict(self) -> dict[str, object]:
        """The `error` object of `--json` (DESIGN: kind, message, file, row, hint)."""
        return {"kind": self.kind, "message": self.message, "file": self.file, "row": self.row, "hint": self.hint}


class DataError(UserError):
    kind = "data"


class RecipeError(UserError):
    kind = "recipe"


class BaseError(UserError):
    kind = "base"


class AdapterError(UserError):
    kind = "adapter"


class CannotMerge(AdapterError):
    kind = "merge"


class RunError(UserError):
    kind = "run"


def nearest(word: str, known: Iterable[str]) -> str:
    """`"did you mean 'lora'? known: …"`, for an error's hint."""
    names = list(known)
    close = difflib.get_close_matches(word.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    guess = f"did you mean '{next(n for n in names if n.lower() == close[0])}'? " if close else ""
    return f"{guess}known: {', '.join(names)}"
