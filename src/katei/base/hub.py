"""A hub id → the folder it has in Hugging Face's own cache, downloading at most once and failing within seconds.

A snapshot that is already there whole is used as it is, without asking the hub for a newer one: a study stays
repeatable, and works offline.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from katei.base.builtin import BUILTINS, WHAT_MODEL_MAY_BE
from katei.base.folder import Say, check_folder, silent
from katei.core.errors import BaseError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL = ["*.json", "tokenizer.model", "*.txt", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]
TIMEOUT_SECONDS = 5.0
DEADLINE_SECONDS = 6.0


def hub_folder(name: str, say: Say = silent, *, weights: bool = True) -> Path:
    """The snapshot's folder; `weights=False` fetches config and tokenizer only.

    Raises BaseError: no network, no such id, a gated base, no safetensors.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return check_folder(Path(snapshot_download(name, local_files_only=True)), weights=weights)
    except (LocalEntryNotFoundError, BaseError):
        pass  # not there, or not whole: ask the hub
    except HFValidationError as error:
        raise BaseError(f"'{name}' is no folder here and cannot be a hub id", hint=WHAT_MODEL_MAY_BE) from error
    try:
        info = _within(DEADLINE_SECONDS, lambda: HfApi().model_info(name, timeout=TIMEOUT_SECONDS, files_metadata=True))
        files = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
        if not any(file.endswith(".safetensors") for file in files):
            raise BaseError(
                f"'{name}' has no safetensors weights on the hub",
                hint="katei opens no pickles; choose a base with .safetensors files, or convert it to a folder",
            )
        if weights:
            size = sum(size for file, size in files.items() if file.endswith(".safetensors"))
            say(f"downloading {name}, {size / 1e9:.1f} GB, once")
        wanted = [*SMALL, "*.safetensors"] if weights else SMALL
        folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns=UNWANTED, etag_timeout=TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise BaseError(
            f"'{name}' is gated: its owner asks you to accept terms first",
            hint=f"accept them at https://huggingface.co/{name}, then `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseError(
            f"the hub has no '{name}' (or it is private), and there is no such folder here",
            hint=f"check the spelling, or `hf auth login`; {WHAT_MODEL_MAY_BE}",
        ) from error
    except BaseError:
        raise
    except HfHubHTTPError as error:
        raise BaseError(f"the hub refuses '{name}': {_first_line(error)}", hint=_instead()) from error
    except Exception as error:  # whatever the HTTP library of the day raises when there is no network
        raise BaseError(
            f"'{name}' is not on this machine, and the hub cannot be reached ({_first_line(error)})", hint=_instead()
        ) from error
    return check_folder(Path(folder), weights=weights)


def _instead() -> str:
    return f"without a network give a folder, a GGUF file, or a built-in: {', '.join(BUILTINS)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _within(seconds: float, call: Any) -> Any:
    """`call()`, given up after `seconds`: looking a name up can hang far longer than any HTTP timeout."""
    outcome: list[Any] = []
    failure: list[Exception] = []

    def work() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return outcome[0]
