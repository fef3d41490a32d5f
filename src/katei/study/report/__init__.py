"""RUN → report.html: one page, self-contained, the verdict first.

run folder → gather.py: what there is to say → draw.py, page.py: where it stands → page.html (jinja2) → one file
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from katei.core.errors import RunError
from katei.core.files import write_text
from katei.study.report.gather import Facts, gather, read_predictions
from katei.study.report.page import render
from katei.study.report.words import words_of
from katei.study.tidy import write_tidy

__all__ = ["Report", "write_report"]


@dataclass(frozen=True)
class Report:
    """What was written. `tidy`: the same run's results.csv, None for a table of results from elsewhere."""

    out: Path
    tidy: Path | None
    facts: Facts


def write_report(run: Path, out: Path | None = None, lang: str = "en") -> Report:
    """Write the page of a finished run folder (RUN/report.html, and RUN/results.csv), or of a table that `compare --from` takes.

    Raises UserError for anything else, before anything is written.
    """
    words = words_of(lang)
    out = out or (run / "report.html" if run.is_dir() else run.with_name(f"{run.stem}.report.html"))
    if out.is_dir():
        raise RunError("is a folder, and the report is a file", file=out, hint=f"--out {out / 'report.html'}")
    if out.suffix.lower() not in (".html", ".htm"):  # a slip must not cost a results.json
        raise RunError(
            "the report is HTML, and this is no name for it", file=out, hint=f"--out {out.with_suffix('.html')}"
        )
    facts = gather(run, lang, words)
    write_text(out, render(facts))
    tidy = None
    if run.is_dir():
        tidy = write_tidy(run, {**facts.results, "comparison": facts.comparison}, read_predictions(run))
    return Report(out, tidy, facts)
