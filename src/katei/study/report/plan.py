"""What `katei plan` prints, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from katei import __version__
from katei.core.errors import RunError
from katei.core.files import write_text
from katei.plan.parts import four_parts
from katei.study.report.page import environment_of
from katei.study.report.words import speaker


def check_page(out: Path) -> None:
    """Raise RunError for what is no name for a page, before anything is planned."""
    if out.is_dir():
        raise RunError("is a folder, and the page is a file", file=out, hint=f"--html {out / 'plan.html'}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise RunError(
            "the page is HTML, and this is no name for it", file=out, hint=f"--html {out.with_suffix('.html')}"
        )


def write_plan(result: dict[str, Any], out: Path, lang: str = "en") -> None:
    """Write the page of what `katei.api.plan` returns. Raises RunError."""
    check_page(out)
    say = speaker(lang)
    plans = [{**plan, "four": four_parts(plan["parts"], plan["device_bytes"])} for plan in result["plans"]]
    fitting = sum(plan["fits"] for plan in plans)
    kind = "plan_answer_all" if fitting == len(plans) else "plan_answer" if fitting else "plan_answer_none"
    page = (
        environment_of(lang)
        .get_template("plan.html")
        .render(
            say=say,
            lang=lang,
            result=result,
            plans=plans,
            widest=max(result["usable_bytes"], *(plan["device_bytes"] for plan in plans)),
            answer=say(kind, plans=len(plans), fitting=fitting),
            version=__version__,
        )
    )
    write_text(out, page)
