"""Every benchmark in turn, each in a process of its own; then the table and the pictures.

    python -m benchmarks [--quick] [--minutes 38] [NAME …]

Rows are written as they are measured. What has not begun when the minutes are over is left out, and named.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.measure import ROOT, arguments, commit, machine, say, versions

IN_TURN = ("startup", "step", "memory", "book", "folds", "top_layers", "batches", "predict")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=38, help="stop after so long (default 38)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of: {', '.join(IN_TURN)}")
    options = parser.parse_args()
    if unknown := set(options.names) - set(IN_TURN):
        parser.error(f"no benchmark is named {', '.join(sorted(unknown))}; there are: {', '.join(IN_TURN)}")
    quick = ["--quick"] if options.quick else []
    say(f"{machine()}; {versions()}; commit {commit()}")
    started = time.monotonic()
    failed = []
    names = options.names or IN_TURN
    for number, name in enumerate(names, 1):
        spent = time.monotonic() - started
        say(f"[{number}/{len(names)}] {name}, after {spent / 60:.1f} of at most {options.minutes:g} minutes")
        try:
            left = max(1.0, options.minutes * 60 - spent)
            command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *quick]
            code = subprocess.run(command, cwd=ROOT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        if code:
            failed.append(f"{name} ({code})")
        say(f"  {name}: {time.monotonic() - started - spent:.0f} s")
    code = subprocess.run([sys.executable, "-m", "benchmarks.report", *quick], cwd=ROOT).returncode
    say(f"{(time.monotonic() - started) / 60:.1f} minutes")
    if failed or code:
        sys.exit(f"not measured: {', '.join(failed) or 'the report'}")


if __name__ == "__main__":
    main()
