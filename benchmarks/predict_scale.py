"""`katei predict` on a file of a million short rows: is its memory flat, how fast is it, and does a killed call end with the same bytes?

    python -m benchmarks.predict_scale [--quick]

The model is tiny and random (two layers of width 64), so that what is measured is everything around it: reading, checking, tokens,
packing, writing. One call goes through undisturbed, its resident memory noted on the way; another is killed (SIGKILL) at random
moments and typed again each time. Stops with an error where a byte of the two outputs differs, or where memory grew by more
than 5 % after the first quarter.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.measure import ROOT, Figures, arguments, say

WORDS = "朝 夜 灰 影 春の風 ひかり 氷の塔 やさしい手 the sea iron gate rain light way back stone song".split()
MOST_GROWTH = 1.05
KILLS = 6


def write_rows(path: Path, rows: int) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("id\tpoem\n")
        for i in range(rows):
            file.write(f"{i}\t{' '.join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))}\n")


def child(run: Path, file: Path, out: Path) -> None:
    """One call; a line of JSON on stdout per window: rows done, resident bytes, seconds."""
    from katei import api

    process = psutil.Process()

    def tick(done: int, rows: int) -> None:
        print(json.dumps([done, process.memory_info().rss, time.perf_counter()]), flush=True)

    api.predict(run, file, out=out, device="cpu", tick=tick)


def call(run: Path, file: Path, out: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.predict_scale",
        "--call",
        str(run),
        str(file),
        str(out),
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def undisturbed(run: Path, file: Path, out: Path) -> list[tuple[int, int, float]]:
    process = call(run, file, out)
    assert process.stdout is not None
    marks = [tuple(json.loads(line)) for line in process.stdout]
    if process.wait():
        sys.exit("the call failed")
    return marks  # type: ignore[return-value]


def killed(run: Path, file: Path, out: Path, rows: int, rng: random.Random) -> tuple[int, int]:
    """Type the call until it ends, killing it at random places. Returns the kills, and the rows that were done twice."""
    places = sorted(rng.sample(range(rows), KILLS))
    kills = again = reached = 0
    while True:
        process = call(run, file, out)
        assert process.stdout is not None
        began = None
        for line in process.stdout:
            done = json.loads(line)[0]
            if began is None:
                began = done
                again += reached - done
            reached = done
            if places and done >= places[0]:
                places = [place for place in places if place > done]
                time.sleep(rng.random() * 0.05)  # into the middle of whatever it does next
                process.kill()
                kills += 1
                break
        if out.exists():
            if process.wait() not in (0, -9):
                sys.exit("the call failed")
            return kills, again
        if process.wait() != -9:
            sys.exit("the call ended without its output")


def main() -> None:
    if sys.argv[1:2] == ["--call"]:
        child(*map(Path, sys.argv[2:5]))
        return
    from tests.helpers.rows import data_folder
    from tests.helpers.tiny import tiny_base_folder

    from katei import api

    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed (default 0)")
    options = parser.parse_args()
    figures = Figures("predict_scale", quick=options.quick)
    rows = 20_000 if options.quick else 1_000_000
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        base, data, run = tiny_base_folder(here, layers=2), data_folder(here / "data"), here / "run"
        api.train(data, out=run, method="lora", model=str(base), epochs=1)
        write_rows(here / "rows.tsv", rows)
        size = (here / "rows.tsv").stat().st_size
        say(f"  {rows:,} rows, {size / 1e6:.0f} MB")
        marks = undisturbed(run, here / "rows.tsv", here / "once.tsv")
        quarters = [min(marks, key=lambda m, q=q: abs(m[0] - q * rows / 4)) for q in range(5)]  # type: ignore[misc]
        memory = ", ".join(f"{done:,} rows {rss / 2**20:.1f}" for done, rss, _ in quarters)
        say(f"  resident MiB: {memory}")
        # the first window warms up: kernels, tokenizer
        rate = (marks[-1][0] - marks[1][0]) / (marks[-1][2] - marks[1][2])
        say(f"  {rate:,.0f} rows/s")
        growth = marks[-1][1] / quarters[1][1]
        figures.add("rows/s", "rows/s", [rate], case="tiny model", note=f"{rows} rows of {size / rows:.0f} bytes")
        figures.add("growth of memory", "×", [growth], case="first quarter to end", note=f"MiB at quarters: {memory}")
        kills, again = killed(run, here / "rows.tsv", here / "killed.tsv", rows, random.Random(options.seed))
        digests = [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in ("once.tsv", "killed.tsv")]
        say(f"  killed {kills} times, {again:,} rows done twice; sha256 {digests[0][:16]} and {digests[1][:16]}")
        left = [path.name for path in here.iterdir() if "partial" in path.name]
        if digests[0] != digests[1] or left:
            sys.exit(f"the killed call ended with other bytes, or left something behind: {left}")
        if growth > MOST_GROWTH:
            sys.exit(f"memory grew by {growth:.2f} after the first quarter")


if __name__ == "__main__":
    main()
