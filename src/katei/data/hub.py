"""A data set of the Hugging Face hub → Records of each of its splits."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from katei.core.errors import DataError
from katei.data.tables import Records

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?::[\w.-]+)?")  # owner/name, or owner/name:configuration

ELSE = "give a folder with train.tsv (valid.tsv, test.tsv), one .tsv, .csv, .jsonl or .parquet file, or the bundled poems or poems-en"

_SECONDS = 6.0  # how long the hub may take to answer at all; `datasets` alone retries for 23 s without a network


def load_hub(name: str) -> dict[str, Records]:
    """Its splits by name, downloaded where not in the cache. Without a network a DataError within seconds."""
    repository, _, configuration = name.partition(":")
    if not _offline_by_choice():
        _probe(repository)
    try:
        import datasets

        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # many kinds, from several libraries: none of them is ours
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        hint = f"with several configurations, name one: {repository}:CONFIGURATION; else {ELSE}"
        raise DataError(f"the hub's data set could not be loaded: {reason}", file=name, hint=hint) from None
    return {split: _records(f"{name} ({split})", table) for split, table in loaded.items()}


def _records(file: str, table: Any) -> Records:
    def column(name: str) -> Sequence[object]:
        values: list[object] = list(table[name])
        names = getattr(table.features[name], "names", None)  # a ClassLabel: numbers, which stand for these
        if not names:
            return values
        return [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values]

    return Records(file, tuple(table.column_names), range(1, len(table) + 1), column)


def _offline_by_choice() -> bool:
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _probe(repository: str) -> None:
    """Ask the hub once whether it has the data set, in a thread, since looking up a name cannot be timed out."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    error = _within(_SECONDS, lambda: HfApi().dataset_info(repository, timeout=_SECONDS - 1))
    if error is None:
        return
    if isinstance(error, GatedRepoError):
        what, hint = (
            "this data set asks for a permission",
            f"ask at https://huggingface.co/datasets/{repository}, then: hf auth login",
        )
    elif isinstance(error, RepositoryNotFoundError | HFValidationError):
        what, hint = "no such file or folder, and no such public data set on the hub", ELSE
    else:
        cached = "; if it was downloaded before, HF_HUB_OFFLINE=1 takes it from the cache"
        what, hint = f"no such file or folder, and the hub cannot be reached ({_reason(error)})", ELSE + cached
    raise DataError(what, file=repository, hint=hint) from None


def _within(seconds: float, ask: Callable[[], object]) -> Exception | None:
    """What `ask` raised, if anything; a TimeoutError when it has not answered by then."""
    raised: list[Exception | None] = [TimeoutError("no answer")]

    def run() -> None:
        try:
            ask()
            raised[0] = None
        except Exception as error:
            raised[0] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return raised[0]


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:150] if text else type(error).__name__
