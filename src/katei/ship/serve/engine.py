"""The batching engine: one thread, one bounded queue, packed passes of whatever is waiting. No HTTP here.

    submit(job)  →  queue, ordered by when a job would be done if it were alone  →  passes of at most `token_budget` tokens

A row is one text for one adapter; rows of any request and any adapter share a pass, and each is what it would be alone
(`katei.base.packed`). A row asks for its classes, or for its next token: then it comes back one token longer.

A job's place in the queue is its arrival plus the seconds its own tokens take. So equal jobs are served in turn, a small job need
not wait for a large one that came just before it, and a large one is overtaken only for as long as it takes itself.

Dimensions: B rows · D width · C classes · V vocabulary.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from katei.base.stream import PackedRow
from katei.core.errors import KateiError, RecipeError
from katei.ship.generate import Sampling, choose_token, token_scores
from katei.ship.serve.metrics import Metrics
from katei.ship.serve.shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on. Everything is bounded: bytes, rows, tokens, seconds."""

    body_bytes: int = 1 << 20
    rows: int = 512
    """Of one request: texts × adapters."""
    tokens: int = 2048
    """Of one text, before it is cut to an adapter's own length."""
    new_tokens: int = 256
    """Of one continuation."""
    queue_rows: int = 2048
    queue_tokens: int = 65_536
    token_budget: int = 1024
    """Of one pass; a longer row goes alone."""
    seconds: float = 60.0
    """From a request's arrival to its answer."""
    body_seconds: float = 10.0
    """A request's body must be here after so long."""
    connections: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                flag = "timeout" if field.name == "seconds" else field.name.replace("_", "-")
                raise RecipeError(f"--{flag} is {value}, but it must be more than 0", hint="katei serve --help")


class Busy(KateiError):
    """The queue is full."""

    def __init__(self, retry_seconds: int):
        super().__init__(f"the queue is full; it is worked off in about {retry_seconds} s")
        self.retry_seconds = retry_seconds


class Stopping(KateiError):
    """The server takes no more requests."""


class NotFinite(KateiError):
    """An adapter's numbers overflowed on a text."""


# -------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Row:
    """One text for one adapter."""

    stack: int
    adapter: int
    ids: Sequence[int]
    next_token: bool = False
    """It asks for the scores of the token that follows, (V,), not for its classes' probabilities, (C,)."""


class Job(ABC):
    """What one request asks for. Touched by the engine alone once it is submitted."""

    def __init__(self, rows: Sequence[Row], work_tokens: int):
        self.work_tokens = work_tokens
        """Roughly how many tokens will go through the base for it."""
        self.pending: deque[tuple[int, Row]] = deque(enumerate(rows))
        self.unanswered = len(rows)
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # only the engine ends it
        self.key = 0.0
        self.queued = False
        self.deadline = math.inf

    @abstractmethod
    def take(self, place: int, answer: Any) -> Row | None:
        """The answer to row `place`; returns the row that follows from it, if there is one."""

    @abstractmethod
    def result(self) -> Any:
        """What the future gets once no row is open."""


class Scoring(Job):
    """Class probabilities of each row, in order."""

    def __init__(self, rows: Sequence[Row]):
        super().__init__(rows, sum(len(row.ids) for row in rows))
        self.answers: list[NDArray[np.float64]] = [np.empty(0)] * len(rows)

    def take(self, place: int, answer: NDArray[np.float64]) -> Row | None:
        if not np.isfinite(answer).all():
            raise NotFinite("the adapter's numbers overflow on this text")
        self.answers[place] = answer
        return None

    def result(self) -> list[NDArray[np.float64]]:
        return self.answers


class Continuing(Job):
    """Each row's tokens with those that were added, as `katei.ship.generate.generate` adds them."""

    def __init__(self, rows: Sequence[Row], sampling: Sampling, stops: set[int]):
        new = sampling.new_tokens
        super().__init__(rows, sum(new * len(row.ids) + new * (new - 1) // 2 for row in rows))
        self.sampling, self.stops = sampling, stops
        self.starts = [len(row.ids) for row in rows]
        self.ids = [list(row.ids) for row in rows]
        self.rows = rows
        self.rngs = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(rows))]

    def take(self, place: int, answer: Tensor) -> Row | None:
        if not bool(torch.isfinite(answer).any()):
            raise NotFinite("the adapter's numbers overflow on this prompt")
        token = choose_token(answer, self.sampling, self.rngs[place])
        if token in self.stops:
            return None
        ids = self.ids[place]
        ids.append(token)
        if len(ids) - self.starts[place] >= self.sampling.new_tokens:
            return None
        row = self.rows[place]
        return Row(row.stack, row.adapter, tuple(ids), next_token=True)

    def result(self) -> list[list[int]]:
        return self.ids


# -------------------------------------------------------------------- one pass


def run_pass(shelf: Shelf, rows: Sequence[Row]) -> list[Any]:
    """What each row asks for, from one packed pass: (C,) float64 probabilities, or (V,) scores of the next token.

    As `katei.engine.lockstep.score_rows`, for stacks whose numbers of classes differ.
    """
    base, stacks = shelf.base, shelf.stacks
    stream = base.stream([PackedRow(row.stack, row.adapter, row.ids) for row in rows], stacks)
    answers: list[Any] = [None] * len(rows)
    with torch.no_grad(), base.running(stream, stacks):
        pooled_BD = base.pooled(stream, stacks)
        for part in stream.parts:
            scores_BC = stacks[part.stack].scores(pooled_BD[part.first : part.last], part)
            probability_BC = torch.softmax(scores_BC.double(), 1).cpu().numpy()
            for b in range(part.first, part.last):
                answers[stream.order[b]] = probability_BC[b - part.first]
        asking = [b for b, place in enumerate(stream.order) if rows[place].next_token]
        if asking:
            for b, scores_V in zip(asking, token_scores(base, shelf.lm_head, pooled_BD[asking]), strict=True):
                answers[stream.order[b]] = scores_V
    return answers


# -------------------------------------------------------------------- the engine

PATIENCE = 0.1
"""After a pass, this share of its time is waited for those it answered to come back with their next request …"""
MOST_PATIENCE = 0.02
"""… but at most so many seconds. Clients that ask in turn then share passes instead of splitting into two groups."""
WEIGHT = 0.2
"""Of the latest pass in the running mean of seconds per token."""


class Engine:
    """Answers jobs in a thread of its own. `submit`, `drop` and `drain` may be called from any thread."""

    def __init__(self, shelf: Shelf, limits: Limits, metrics: Metrics):
        self.shelf, self.limits, self.metrics = shelf, limits, metrics
        self.seconds_per_token = 1e-3
        self._names = {(a.stack, a.adapter): a.name for a in shelf.adapters.values()}
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Job]] = []
        self._arrivals = 0
        self._queued_jobs = 0
        self.queued_rows = 0
        self.queued_tokens = 0
        self._running_tokens = 0
        self._accepting = True
        self._ended = False
        self._expected = 0
        self._patient_until = 0.0
        self._thread = threading.Thread(target=self._work, name="katei-engine", daemon=True)
        metrics.gauge("katei_queue_rows", "Rows waiting.", lambda: self.queued_rows)
        metrics.gauge("katei_queue_tokens", "Tokens waiting.", lambda: self.queued_tokens)
        metrics.gauge("katei_seconds_per_token", "Of the passes, a running mean.", lambda: self.seconds_per_token)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def accepting(self) -> bool:
        return self._accepting

    # ---------------------------------------------------------------- for others

    def tokens(self, row: Row) -> int:
        return len(row.ids) + self.shelf.stacks[row.stack].virtual_tokens

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy or Stopping; then nothing of it is kept."""
        assert job.pending, "a job without rows would never end"
        rows, tokens = len(job.pending), sum(self.tokens(row) for _, row in job.pending)
        with self._changed:
            if not self._accepting:
                raise Stopping("the server is stopping")
            full = self.queued_rows + rows > self.limits.queue_rows
            if full or self.queued_tokens + tokens > self.limits.queue_tokens:
                ahead = self.queued_tokens + self._running_tokens
                raise Busy(max(1, math.ceil(ahead * self.seconds_per_token)))
            now = time.monotonic()
            job.key = now + job.work_tokens * self.seconds_per_token
            job.deadline = now + self.limits.seconds
            self._count(rows, tokens)
            self._push(job)
            self._changed.notify_all()

    def drop(self, job: Job, reason: str) -> None:
        """Take what is left of a job out of the queue: nobody waits for it any more."""
        with self._changed:
            if not job.future.done():
                self.metrics.dropped.add(reason)
                self._end(job, error=TimeoutError(reason))
            self._changed.notify_all()

    def stop_accepting(self) -> None:
        self._accepting = False

    def drain(self, seconds: float) -> bool:
        """Take nothing more, wait for what was taken. True if all of it was answered in time."""
        self.stop_accepting()
        until = time.monotonic() + seconds
        with self._changed:
            while self._queued_jobs or self._running_tokens:
                if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    return False
        return True

    def close(self) -> None:
        """End the thread after the pass it is in; jobs that are still queued fail."""
        with self._changed:
            self._accepting = False
            self._ended = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        with self._changed:
            for _, _, job in self._heap:
                self._end(job, error=Stopping("the server is stopping"))
            self._heap.clear()

    # ---------------------------------------------------------------- the queue (all of it under `_changed`)

    def _count(self, rows: int, tokens: int) -> None:
        self.queued_rows += rows
        self.queued_tokens += tokens

    def _push(self, job: Job) -> None:
        if not job.queued:
            job.queued = True
            self._queued_jobs += 1
            self._arrivals += 1
            heapq.heappush(self._heap, (job.key, self._arrivals, job))

    def _end(self, job: Job, *, error: Exception | None = None) -> None:
        """Forget a job's rows and give its future an end."""
        self._count(-len(job.pending), -sum(self.tokens(row) for _, row in job.pending))
        job.pending.clear()
        if job.queued:
            job.queued = False
            self._queued_jobs -= 1
        if not job.future.done():
            if error is None:
                job.future.set_result(job.result())
            else:
                job.future.set_exception(error)

    def _pick(self) -> list[tuple[Job, int, Row]]:
        """The rows of the next pass, taken off the queue."""
        chosen: list[tuple[Job, int, Row]] = []
        tokens, now = 0, time.monotonic()
        while self._heap:
            _, _, job = self._heap[0]
            if job.queued and now > job.deadline:
                self.metrics.dropped.add("timeout")
                self._end(job, error=TimeoutError("timeout"))
            while job.pending:
                size = self.tokens(job.pending[0][1])
                if chosen and tokens + size > self.limits.token_budget:
                    self._running_tokens = tokens
                    return chosen
                place, row = job.pending.popleft()
                self._count(-1, -size)
                chosen.append((job, place, row))
                tokens += size
            heapq.heappop(self._heap)
            if job.queued:
                job.queued = False
                self._queued_jobs -= 1
        self._running_tokens = tokens
        return chosen

    def _wait(self) -> None:
        """Until there is something to do; a little longer where those just answered may be back at once."""
        while not self._queued_jobs and not self._ended:
            self._changed.wait()
        while not self._ended and self._accepting and 0 < self._queued_jobs < self._expected:
            left = self._patient_until - time.monotonic()
            if left <= 0 or self.queued_tokens >= self.limits.token_budget:
                break
            self._changed.wait(left)

    # ---------------------------------------------------------------- the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._wait()
                if self._ended:
                    return
                chosen = self._pick()
            if chosen:
                self._answer(chosen)
            with self._changed:
                self._running_tokens = 0
                self._changed.notify_all()

    def _answer(self, chosen: list[tuple[Job, int, Row]]) -> None:
        jobs = list({id(job): job for job, _, _ in chosen}.values())
        started = time.monotonic()
        try:
            answers = run_pass(self.shelf, [row for _, _, row in chosen])
        except Exception as error:
            # whose fault it is does not show: each job by itself, so that one cannot fail the others
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([item for item in chosen if item[0] is job])
            else:
                with self._changed:
                    self._end(jobs[0], error=error)
            return
        seconds = time.monotonic() - started
        tokens = sum(self.tokens(row) for _, _, row in chosen)
        self.seconds_per_token += WEIGHT * (seconds / tokens - self.seconds_per_token)
        self._note(chosen, len(jobs), tokens, seconds)
        outcomes: list[tuple[Job, int, Row | Exception | None]] = []
        for (job, place, _), answer in zip(chosen, answers, strict=True):  # not under the lock: a draw takes a while
            try:
                outcomes.append((job, place, job.take(place, answer)))
            except Exception as error:
                outcomes.append((job, place, error))
        done = 0
        with self._changed:
            for job, place, outcome in outcomes:
                if job.future.done():  # dropped, or failed at an earlier row
                    continue
                if isinstance(outcome, Exception):
                    self._end(job, error=outcome)
                elif outcome is not None:
                    job.pending.append((place, outcome))
                    self._count(1, self.tokens(outcome))
                    self._push(job)
                else:
                    job.unanswered -= 1
                    if job.unanswered == 0:
                        done += 1
                        self._end(job)
            self._expected = self._queued_jobs + done
            self._patient_until = time.monotonic() + min(PATIENCE * seconds, MOST_PATIENCE)

    def _note(self, chosen: list[tuple[Job, int, Row]], jobs: int, tokens: int, seconds: float) -> None:
        for _, _, row in chosen:
            self.metrics.rows.add(self._names.get((row.stack, row.adapter), "(base)"))
        self.metrics.tokens.add(by=tokens)
        self.metrics.pass_seconds.observe(seconds)
        self.metrics.pass_rows.observe(len(chosen))
        self.metrics.pass_requests.observe(jobs)
