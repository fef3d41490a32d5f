"""The page at `/`: one file, without anything from elsewhere, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path


@cache
def page_html() -> str:
    return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


@cache
def page_policy() -> str:
    """Content-Security-Policy: the page's own script by its hash, requests to this server alone."""
    script = re.search(r"<script>(.*?)</script>", page_html(), re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
