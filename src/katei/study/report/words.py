"""The pages' words: en.toml and ja.toml, the same keys with the same places to fill in."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from katei.study.verdicts import check_language


@cache
def words_of(lang: str) -> Mapping[str, str]:
    """Raises RecipeError for a language there is not."""
    file = Path(__file__).parent / f"{check_language(lang)}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def speaker(lang: str) -> Callable[..., str]:
    """`say(key, …)`: the words with their places filled in."""
    words = words_of(lang)

    def say(key: str, **values: Any) -> str:
        return words[key].format(**values) if values else words[key]

    return say
