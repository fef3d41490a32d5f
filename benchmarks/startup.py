"""How long the first word takes: `katei --help` and `import katei`, beside a Python that does nothing.

python -m benchmarks.startup [--quick]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import Figures, arguments, quantile


def wall_seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    options = arguments(__doc__).parse_args()
    figures = Figures("startup", quick=options.quick)
    python = [sys.executable, "-c"]
    commands = {
        "bare Python": [*python, "pass"],
        "katei --help": [str(Path(sys.executable).with_name("katei")), "--help"],
        "import katei": [*python, "import katei"],
    }
    answer = subprocess.run(commands["katei --help"], capture_output=True, text=True)
    if answer.returncode or "compare" not in answer.stdout:
        sys.exit(f"`katei --help` does not list its commands: {answer.stderr}")
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(3 if options.quick else 11):
        for name, command in commands.items():
            seconds[name].append(wall_seconds(command))
    bare = quantile(seconds["bare Python"], 0.5)
    figures.add("wall", "s", seconds["bare Python"], case="bare Python")
    figures.add("katei --help", "s", seconds["katei --help"], bound=bare)
    figures.add("wall", "s", seconds["import katei"], case="import katei", bound=bare)
    figures.add("import katei", "s", [s - bare for s in seconds["import katei"]], note="beyond bare Python's median")


if __name__ == "__main__":
    main()
