"""Settings: frozen dataclasses built from what a user wrote, with errors that name the nearest key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from katei.core.errors import RecipeError, nearest

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """`cls(**values)` with every key and type checked. `where` begins the message: a file, a table or a flag.

    Raises RecipeError for an unknown key (naming the nearest), a missing one or a wrong type ("10" is no number).
    """
    from pydantic import TypeAdapter, ValidationError

    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: unknown key '{key}'", hint=nearest(key, known))
    try:
        # as JSON: strict about types, yet a list is a tuple and 1 is a float, as in the TOML it came from
        return TypeAdapter(cls).validate_json(json.dumps(dict(values), default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(all)"
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise RecipeError(f"{where}: {key}: {_lower(first['msg'])}{got}", hint=_example(key)) from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}", hint=_example("(all)")) from None


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _example(key: str) -> str:
    return f"`katei train --help` lists the settings; recipes/book.toml shows {key.split('.')[0]} and the others in use"
