"""`katei serve` under load, on loopback: rows/s and latency for 1, 8 and 64 clients × 1, 3 and 10 adapters.

    python -m benchmarks.serve_load [--quick]

Each client sends one text for one adapter, waits for the answer and sends the next; the adapters, of several methods, take turns, so
that a pass without mixing would serve one of them alone. Beside it the same model one request at a time, in this process, without
HTTP (what a server without batching could reach at best). Every answer is compared with the offline one, and a wrong or a missing one
ends the program. Then overload (429, and what was taken is still right), and memory over 10,000 requests to a tiny model.

The server is a process of its own; client and server share this machine's cores.
"""

from __future__ import annotations

import http.client
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measure import Figures, arguments, quantile, say
from benchmarks.sides import DATA, MODEL
from katei.base.load import load_base
from katei.base.packed import Base
from katei.base.quiet import quiet
from katei.data import load_dataset
from katei.methods import METHODS
from katei.methods.contract import TrialFacts
from katei.methods.saved import AdapterNote, read_adapter, save_adapter
from katei.ship.predict import predict_texts

TOLERANCE = 1e-5
"""Of a probability, between the served answer and the offline one; or, where that is more, `SLACK` times what the offline answer
itself moves by between a text alone and the same text among others. (A prefix drawn at random amplifies rounding: 1.2e-5.)"""
SLACK = 4
CLIENTS = (1, 8, 64)
ADAPTERS = (1, 3, 10)
METHOD_OF = (
    "lora",
    "ia3",
    "prompt-tuning",
    "adalora",
    "llama-adapter",
    "lora",
    "prefix-tuning",
    "p-tuning",
    "head",
    "lora",
)
"""Of the ten adapters, in the order they are added."""
OVERLOAD_ROWS = 8

Asked = tuple[str, int]
"""(adapter, text)"""


def make_adapters(base: Base, name: str, path: str, folder: Path) -> list[Path]:
    """One adapter a method, each away from its start, where it would be the base itself."""
    folders = []
    for number, method_name in enumerate(METHOD_OF):
        method = METHODS[method_name]()
        stack = method.build(base, 2, [number], [TrialFacts(1)])
        rng = torch.Generator().manual_seed(number)
        with torch.no_grad():
            stack.theta_NM.add_(torch.randn(stack.theta_NM.shape, generator=rng) * 0.02)
        about = {"base": name, "fingerprint": base.fingerprint, "max_length": 200, "text_column": "poem"}
        note = AdapterNote(method_name, method_name, method.settings(), ("first", "second"), training={}, **about)  # type: ignore[arg-type]
        folders.append(folder / f"{number}-{method_name}")
        folders[-1].mkdir(parents=True)
        save_adapter(folders[-1], stack, 0, method, note, path)
    return folders


def make_tiny(loaded: Any, folder: Path) -> str:
    """A model of eight small layers that reads what the real one reads."""
    vocabulary = loaded.model.config.vocab_size
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2}
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(LlamaConfig(**shape, vocab_size=vocabulary)).save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return str(folder)


class Offline:
    """What `predict_texts` answers, and how long it takes one request at a time."""

    def __init__(self, base: Base, folders: Sequence[Path], texts: Sequence[str]):
        self.base, self.texts = base, texts
        saved = [read_adapter(folder) for folder in folders]
        self.stacks = {folder.name: (one.stack(base), one.note) for folder, one in zip(folders, saved, strict=True)}
        self.probabilities = {
            name: predict_texts(base, stack, note, texts) for name, (stack, note) in self.stacks.items()
        }
        self.tolerance = {name: max(TOLERANCE, SLACK * self._rounding(name)) for name in self.stacks}
        self.worst = 0.0
        """The largest difference seen."""

    def _rounding(self, name: str, texts: int = 4) -> float:
        stack, note = self.stacks[name]
        alone = [predict_texts(self.base, stack, note, [text])[0] for text in self.texts[:texts]]
        return float(np.abs(np.stack(alone) - self.probabilities[name][:texts]).max())

    def seconds_each(self, adapters: Sequence[str], requests: int) -> list[float]:
        seconds = []
        for adapter, text in itertools.islice(in_turn(adapters, len(self.texts)), requests):
            stack, note = self.stacks[adapter]
            started = time.perf_counter()
            predict_texts(self.base, stack, note, [self.texts[text]])
            seconds.append(time.perf_counter() - started)
        return seconds

    def check(self, asked: Asked, answer: bytes) -> None:
        """End the program where an answer is not the offline one."""
        adapter, text = asked
        (result,) = json.loads(answer)["results"]
        told, expected_C = result[adapter], self.probabilities[adapter][text]
        change = float(np.abs(np.array(list(told["probabilities"].values())) - expected_C).max())
        label = self.stacks[adapter][1].labels[int(expected_C.argmax())]
        # a tie to within rounding has no label of its own
        same = told["prediction"] == label or abs(float(np.ptp(expected_C))) < self.tolerance[adapter]
        self.worst = max(self.worst, change)
        if list(result) != [adapter] or not change <= self.tolerance[adapter] or not same:
            sys.exit(f"{adapter}, text {text}: probabilities differ by {change:.1e}: not timed")


def in_turn(adapters: Sequence[str], texts: int) -> Iterator[Asked]:
    """Adapter after adapter, and for each of them text after text."""
    count = len(adapters)
    return ((adapters[i % count], (i // count + 5 * (i % count)) % texts) for i in itertools.count())


# -------------------------------------------------------------------- the server and its clients


@contextmanager
def server(folders: Sequence[Path], *flags: str) -> Iterator[int]:
    """`katei serve` on a free port, stopped as a user would."""
    command = [sys.executable, "-c", "from katei.cli import main; main()", "serve", *map(str, folders), "--port", "0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *flags], **pipes) as process:
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told += line
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            sys.exit(f"the server did not start:\n{told}")
        rest = threading.Thread(target=process.stderr.read)  # so that it never waits for us to read
        rest.start()
        try:
            yield int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=60)
            rest.join()
    if code != 0:
        sys.exit(f"the server ended with code {code}")


def ask(connection: http.client.HTTPConnection, adapter: str, text: str) -> tuple[int, bytes]:
    body = json.dumps({"texts": [text], "adapters": adapter}).encode()
    connection.request("POST", "/classify", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


@dataclass
class Load:
    """What all clients together saw."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    busy: int = 0
    """Requests answered with 429."""


def load(port: int, offline: Offline, adapters: Sequence[str], clients: int, *, seconds: float, requests: int) -> Load:
    """`clients` clients until the seconds are over or the requests are answered; every answer is checked."""
    load = Load()
    turn, lock = in_turn(adapters, len(offline.texts)), threading.Lock()
    problems: list[str] = []
    answers: list[tuple[Asked, bytes]] = []
    left = requests
    end = time.perf_counter() + seconds

    def client() -> None:
        nonlocal left
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            while True:
                with lock:
                    if left <= 0 or time.perf_counter() >= end:
                        return
                    left -= 1
                    asked = next(turn)
                started = time.perf_counter()
                status, answer = ask(connection, asked[0], offline.texts[asked[1]])
                took = time.perf_counter() - started
                with lock:
                    if status == 429:
                        load.busy += 1
                    elif status == 200:
                        load.latencies.append(took)
                        answers.append((asked, answer))
                    else:
                        problems.append(f"status {status}: {answer[:200]!r}")
                if status == 429:
                    time.sleep(0.05)
        except (OSError, http.client.HTTPException) as error:
            problems.append(f"an answer was lost: {error!r}")
        finally:
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - started
    if problems:
        sys.exit(f"{clients} clients: {problems[0]} ({len(problems)} such)")
    for asked, answer in answers:  # afterwards, so that checking takes no time from the server
        offline.check(asked, answer)
    return load


def metric(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


# -------------------------------------------------------------------- the three questions


def throughput(
    figures: Figures, offline: Offline, folders: Sequence[Path], seconds: float, alone_requests: int
) -> None:
    names = [folder.name for folder in folders]
    with server(folders) as port:
        load(port, offline, names, 8, seconds=120, requests=2 * len(names))  # warm
        offline.seconds_each(names, len(names))
        for count in ADAPTERS:
            each = offline.seconds_each(names[:count], alone_requests)  # the server waits meanwhile
            alone = len(each) / sum(each)
            case = f"one request at a time, {adapters_of(count)}"
            figures.add("rows/s", "rows/s", [1 / one for one in each], case=case, note=f"{len(each)} requests, no HTTP")
            for clients in CLIENTS:
                rows, passes = metric(port, "katei_pass_rows_sum"), metric(port, "katei_pass_rows_count")
                told = load(port, offline, names[:count], clients, seconds=seconds, requests=10**6)
                rows, passes = (
                    metric(port, "katei_pass_rows_sum") - rows,
                    metric(port, "katei_pass_rows_count") - passes,
                )
                case = f"{clients} client{'s' if clients > 1 else ''}, {adapters_of(count)}"
                rate = len(told.latencies) / told.seconds
                note = f"{len(told.latencies)} requests, {rows / passes:.1f} rows a pass, all equal the offline answer"
                figures.add("rows/s", "rows/s", [rate], case=case, note=note)
                figures.add("÷ one request at a time", "×", [rate / alone], case=case, note=note)
                for share in (0.5, 0.95, 0.99):
                    figures.add(f"p{100 * share:.0f}", "s", [quantile(told.latencies, share)], case=case, note=note)
    figures.add("largest difference of a probability", "", [offline.worst], note="served and offline, all answers")


def adapters_of(count: int) -> str:
    return f"{count} adapter{'s' if count > 1 else ''}"


def overload(figures: Figures, offline: Offline, folders: Sequence[Path], seconds: float) -> None:
    with server(folders, "--queue-rows", str(OVERLOAD_ROWS)) as port:
        told = load(port, offline, [folder.name for folder in folders], 64, seconds=seconds, requests=10**6)
        if not told.busy or not told.latencies:
            sys.exit(f"overload: {told.busy} times 429, {len(told.latencies)} answers; both were to be seen")
        after = load(port, offline, [folders[0].name], 1, seconds=60, requests=3)
    if len(after.latencies) != 3 or after.busy:
        sys.exit("after the overload the server did not answer as before")
    case = f"64 clients, {adapters_of(len(folders))}, a queue of {OVERLOAD_ROWS} rows"
    note = f"{len(told.latencies)} answered, all equal the offline answer; {told.busy} times 429"
    figures.add("overload: rows/s", "rows/s", [len(told.latencies) / told.seconds], case=case, note=note)
    figures.add("overload: p99 of the answered", "s", [quantile(told.latencies, 0.99)], case=case, note=note)


def memory(figures: Figures, loaded: Any, texts: Sequence[str], folder: Path, requests: int) -> None:
    name = make_tiny(loaded, folder / "tiny")
    tiny = load_base(name)
    base = Base(tiny.model, tiny.tokenizer, name=name, fingerprint=tiny.fingerprint)
    folders = make_adapters(base, name, name, folder / "tiny-adapters")
    offline = Offline(base, folders, texts)
    with server(folders) as port:
        load(port, offline, list(offline.stacks), 8, seconds=600, requests=requests // 4)  # warm
        held = [metric(port, "katei_resident_bytes")]
        for _ in range(4):
            told = load(port, offline, list(offline.stacks), 8, seconds=600, requests=requests // 4)
            if len(told.latencies) != requests // 4:
                sys.exit(f"{len(told.latencies)} answers to {requests // 4} requests")
            held.append(metric(port, "katei_resident_bytes"))
    mebibytes = [one / 2**20 for one in held]
    note = f"resident MiB at the start, each quarter and the end: {', '.join(f'{one:.1f}' for one in mebibytes)}"
    say(f"  {note}")
    case = f"{requests:,} requests, 8 clients, 10 adapters, tiny model"
    figures.add("memory growth", "MiB", [mebibytes[-1] - mebibytes[0]], case=case, note=note)


def main() -> None:
    options = arguments(__doc__).parse_args()
    figures = Figures("serve_load", quick=options.quick)
    seconds, pool, alone, requests = (1.5, 4, 10, 800) if options.quick else (12.0, 24, 40, 10_000)
    dataset = load_dataset(DATA)
    texts = list(dataset.train.texts[:pool])
    folder = Path(tempfile.mkdtemp())
    try:
        loaded = load_base(MODEL)
        base = Base(loaded.model, loaded.tokenizer, name=MODEL, fingerprint=loaded.fingerprint)
        folders = make_adapters(base, MODEL, loaded.path, folder / "adapters")
        offline = Offline(base, folders, texts)
        throughput(figures, offline, folders, seconds, alone)
        overload(figures, offline, folders, seconds)
        memory(figures, loaded, texts, folder, requests)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
