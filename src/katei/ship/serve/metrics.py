"""Counts of what a server did, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Counter:
    """A number per combination of labels, which only grows."""

    kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()):
        self.name, self.help, self.labels = name, help, tuple(labels)
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        self._lock = threading.Lock()

    def add(self, *labels: str, by: float = 1) -> None:
        assert len(labels) == len(self.labels)
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + by

    def total(self) -> float:
        with self._lock:
            return sum(self._values.values())

    def lines(self) -> list[str]:
        with self._lock:
            values = sorted(self._values.items())
        return [f"{self.name}{_braces(zip(self.labels, key, strict=True))} {value:g}" for key, value in values]


class Gauge:
    """A number that is read when it is asked for."""

    kind = "gauge"

    def __init__(self, name: str, help: str, read: Callable[[], float]):
        self.name, self.help, self._read = name, help, read

    def lines(self) -> list[str]:
        return [f"{self.name} {self._read():.17g}"]


class Histogram:
    """How many observations were at most each bound."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float]):
        self.name, self.help, self.bounds = name, help, tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += 1
            self._sum += value

    def lines(self) -> list[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        lines, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
            below += count
            lines.append(f'{self.name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{self.name}_sum {total:.9g}", f"{self.name}_count {below}"]


class Metrics:
    """All of one server's."""

    def __init__(self) -> None:
        self.requests = Counter("katei_requests_total", "Requests answered.", ("endpoint", "status"))
        self.rows = Counter("katei_rows_total", "Rows computed.", ("adapter",))
        self.tokens = Counter("katei_tokens_total", "Tokens that went through the base.")
        self.dropped = Counter("katei_dropped_total", "Requests given up before their answer.", ("reason",))
        self.request_seconds = Histogram("katei_request_seconds", "From a request's last byte to its answer.", SECONDS)
        self.pass_seconds = Histogram("katei_pass_seconds", "Of one packed pass.", SECONDS)
        self.pass_rows = Histogram("katei_pass_rows", "Rows that shared one packed pass.", ROWS)
        self.pass_requests = Histogram("katei_pass_requests", "Requests that shared one packed pass.", ROWS)
        self.gauges: list[Gauge] = []

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        self.gauges.append(Gauge(name, help, read))

    def text(self) -> str:
        parts: list[Counter | Gauge | Histogram] = [
            *(self.requests, self.rows, self.tokens, self.dropped),
            *(self.request_seconds, self.pass_seconds, self.pass_rows, self.pass_requests),
            *self.gauges,
        ]
        lines = []
        for part in parts:
            lines += [f"# HELP {part.name} {part.help}", f"# TYPE {part.name} {part.kind}", *part.lines()]
        return "\n".join(lines) + "\n"


def _braces(pairs: zip[tuple[str, str]]) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs)
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
