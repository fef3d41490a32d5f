"""Answers over HTTP: many adapters over one base, whatever arrives together in one packed pass.

    shelf     which adapters there are, on their one base
    engine    jobs, the bounded queue, and the thread that packs their rows into passes
    explain   which parts of a text mattered: the text again without each of them
    app       the endpoints (FastAPI), `guard` what comes before them: Host, Origin, token, size
    server    binding, signals, a graceful stop

Only `app` and `server` need the extra `katei[serve]`.
"""

from __future__ import annotations

from importlib.util import find_spec

from katei.core.errors import UserError


def require_extra() -> None:
    """Raise UserError where the libraries of the extra are missing."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {' and '.join(missing)}", hint="pip install 'katei[serve]'")
