"""transformers' chatter, held back while it works for us and put back afterwards; and what it leaves in its objects."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, reports or warnings of transformers inside the block; what it raises still comes out."""
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def forget_how_loaded(tokenizer: Any) -> None:
    """Drop the arguments of `from_pretrained` that a tokenizer would write into the next tokenizer_config.json."""
    for key in ("local_files_only", "is_local", "trust_remote_code"):
        tokenizer.init_kwargs.pop(key, None)
