"""What goes out: JSON, and errors in the shape that `--json` gives them."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class Answer(JSONResponse):
    """JSON in UTF-8. Half a surrogate pair in a name goes out as its escape, which is what JSON calls it."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def problem(status: int, kind: str, message: str, *, hint: str | None = None) -> Answer:
    return Answer({"error": {"kind": kind, "message": message, "hint": hint}}, status_code=status)
