"""The endpoints: what a request asks for becomes rows, the engine's answers become JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeVar

import psutil
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from katei import __version__
from katei.core.errors import AdapterError, RecipeError, UserError
from katei.ship.generate import Sampling, stop_tokens
from katei.ship.serve.docs import docs_html
from katei.ship.serve.engine import Busy, Continuing, Engine, Job, Limits, NotFinite, Row, Scoring, Stopping
from katei.ship.serve.explain import MOST_PARTS, effects, occluded
from katei.ship.serve.guard import Guard
from katei.ship.serve.metrics import Metrics
from katei.ship.serve.page import page_html, page_policy
from katei.ship.serve.reader import Reader, TooLong
from katei.ship.serve.responses import Answer, problem
from katei.ship.serve.shelf import Served, Shelf


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Adapters = Annotated[
    str | list[str] | None,
    Field(description="One adapter's name, several, or all of them (left out, null or 'all').", examples=["all"]),
]


class ClassifyRequest(Strict):
    """Texts, and the adapters to ask."""

    texts: list[str] = Field(min_length=1, examples=[["春の夜の夢"]])
    adapters: Adapters = None


class ClassAnswer(BaseModel):
    prediction: str
    probabilities: dict[str, float] = Field(description="By label.")
    tokens: int = Field(description="Tokens of the text that the adapter read.")
    cut: bool = Field(description="The text was longer than the adapter reads; its end was left out, as in training.")


class ClassifyAnswer(BaseModel):
    results: list[dict[str, ClassAnswer]] = Field(description="For each text: the answers by adapter.")


class ExplainRequest(Strict):
    """A text, and the one adapter whose answer is to be explained."""

    text: str = Field(examples=["春の夜の夢"])
    adapter: str | None = Field(None, description="May be left out where there is only one.")


class PartEffect(BaseModel):
    text: str
    effect: float | None = Field(
        description="How much less probable the prediction is without this part of the text; null if nothing else is there."
    )


class ExplainAnswer(BaseModel):
    adapter: str
    prediction: str
    probabilities: dict[str, float]
    parts: list[PartEffect] = Field(description="Put end to end, their texts are the text that was read.")
    rest: str = Field(description="What the adapter did not read, since the text is longer.")
    method: str = "occlusion"


class GenerateRequest(Strict):
    """Prompts for the base, or for an adapter that acts on it."""

    prompts: list[str] = Field(min_length=1, examples=[["春の夜の"]])
    adapter: str | None = Field(None, description="Left out: the base as it is.")
    new_tokens: int = 40
    temperature: float = Field(0.0, description="0 is greedy, 0.8 varied.")
    top_p: float = 1.0
    seed: int = 0


class GenerateAnswer(BaseModel):
    adapter: str | None
    continuations: list[str]


T = TypeVar("T")


class Service:
    """Everything behind the endpoints."""

    def __init__(self, shelf: Shelf, limits: Limits):
        self.shelf, self.limits = shelf, limits
        self.metrics = Metrics()
        self.engine = Engine(shelf, limits, self.metrics)
        self.reader = Reader(shelf.base, limits.tokens)
        self._reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="katei-reader")
        process = psutil.Process()
        self.metrics.gauge(
            "katei_resident_bytes", "Memory this process holds.", lambda: float(process.memory_info().rss)
        )

    async def read(self, work: Callable[[], T]) -> T:
        """Run what tokenizes beside the event loop, so that a long text holds up nobody else's answer."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)

    async def answer(self, job: Job, request: Request) -> Any:
        """Submit a job and wait for its end, the client's departure or the time limit, whichever comes first."""
        size = sum(self.engine.tokens(row) for _, row in job.pending)
        if size > self.limits.queue_tokens or len(job.pending) > self.limits.queue_rows:
            raise TooLong(
                f"the request comes to {len(job.pending):,} rows and {size:,} tokens, more than the queue holds",
                hint="send fewer texts at once, or ask fewer adapters",
            )
        self.engine.submit(job)
        ended = asyncio.wrap_future(job.future)
        ended.add_done_callback(
            lambda future: future.cancelled() or future.exception()
        )  # looked at, even if nobody waits
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({ended, gone}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return ended.result()
            if gone.done():
                self.engine.drop(job, "disconnect")
                raise HTTPException(499, "the client is gone")
            raise TimeoutError
        finally:
            gone.cancel()
            self.engine.drop(job, "timeout")

    def close(self) -> None:
        self.engine.close()
        self._reading.shutdown(wait=False, cancel_futures=True)

    def about(self) -> dict[str, Any]:
        limits = self.limits
        return {
            "base": Path(self.shelf.base.name).name,  # a folder's path is nobody's business
            "generates": self.shelf.lm_head is not None,
            "adapters": [served.about() for served in self.shelf.adapters.values()],
            "limits": {
                "body_bytes": limits.body_bytes,
                "rows": limits.rows,
                "tokens": limits.tokens,
                "new_tokens": limits.new_tokens,
                "seconds": limits.seconds,
            },
        }

    def check_rows(self, rows: int, what: str) -> None:
        if rows > self.limits.rows:
            raise TooLong(
                f"the request asks for {rows:,} rows ({what}); at most {self.limits.rows:,} are taken",
                hint="send fewer texts at once, or start the server with a larger --max-rows",
            )


def build_app(shelf: Shelf, limits: Limits, *, token: str | None = None, loopback: bool = True) -> FastAPI:
    """The application; `app.state.service` is what answers. Its engine is started by the caller."""
    service = Service(shelf, limits)
    app = FastAPI(
        title="katei",
        version=__version__,
        description="Adapters over one base. Rows of all requests and adapters share packed passes; each answer is the one "
        "`katei predict` gives.",
        docs_url=None,
        redoc_url=None,
        default_response_class=Answer,
    )
    app.state.service = service
    _add_endpoints(app, service, token is not None)
    _add_errors(app)
    app.add_middleware(
        Guard,
        limits=limits,
        metrics=service.metrics,
        accepting=lambda: service.engine.accepting,
        token=token,
        loopback=loopback,
        known_paths=frozenset(getattr(route, "path", "") for route in app.routes),
    )
    return app


def _add_endpoints(app: FastAPI, service: Service, wants_token: bool) -> None:
    shelf, limits, reader = service.shelf, service.limits, service.reader

    @app.post("/classify", response_model=ClassifyAnswer, responses=_responses(404, 413, 422, 429, 503, 504))
    async def classify(ask: ClassifyRequest, request: Request) -> Response:
        """Each text's class by each adapter, with the probability of every label."""
        chosen = shelf.choose(ask.adapters)
        service.check_rows(len(ask.texts) * len(chosen), "texts × adapters")
        lengths = sorted({served.note.max_length for served in chosen})
        read = await service.read(
            lambda: [reader.read(text, lengths, f"text {i}") for i, text in enumerate(ask.texts, 1)]
        )
        rows = [
            Row(served.stack, served.adapter, of_text[served.note.max_length].ids)
            for of_text in read
            for served in chosen
        ]
        answers = iter(await service.answer(Scoring(rows), request))
        results = []
        for of_text in read:
            result = {}
            for served in chosen:
                told, mine = _classes(served, next(answers)), of_text[served.note.max_length]
                result[served.name] = told | {"tokens": len(mine.ids), "cut": mine.cut}
            results.append(result)
        return Answer({"results": results})

    @app.post("/explain", response_model=ExplainAnswer, responses=_responses(404, 413, 422, 429, 503, 504))
    async def explain(ask: ExplainRequest, request: Request) -> Response:
        """Which parts of a text spoke for the answer: the text again without each of them (occlusion)."""
        if ask.adapter is None and len(shelf.adapters) > 1:
            raise RecipeError("adapter is missing", hint=f"one of: {', '.join(shelf.adapters)}")
        served = next(iter(shelf.adapters.values())) if ask.adapter is None else shelf.choose([ask.adapter])[0]
        ids, parts = await service.read(
            lambda: reader.parts(ask.text, served.note.max_length, min(MOST_PARTS, limits.rows - 1), "the text")
        )
        answers = await service.answer(Scoring(occluded(served, ids, parts)), request)
        told = effects(ids, parts, answers)
        shown = [{"text": ask.text[e.part.start : e.part.stop], "effect": e.effect} for e in told]
        rest = ask.text[parts[-1].stop if parts else 0 :]
        return Answer(
            {
                "adapter": served.name,
                **_classes(served, answers[0]),
                "parts": shown,
                "rest": rest,
                "method": "occlusion",
            }
        )

    @app.post("/generate", response_model=GenerateAnswer, responses=_responses(404, 409, 413, 422, 429, 503, 504))
    async def generate(ask: GenerateRequest, request: Request) -> Response:
        """Continuations of each prompt, by the base or by the base with an adapter."""
        if shelf.lm_head is None:
            return problem(409, "base", "this base has no language-model head, so it continues no text")
        sampling = Sampling(new_tokens=ask.new_tokens, temperature=ask.temperature, top_p=ask.top_p, seed=ask.seed)
        if sampling.new_tokens > limits.new_tokens:
            raise TooLong(f"new_tokens is {sampling.new_tokens:,}; at most {limits.new_tokens:,} are given")
        service.check_rows(len(ask.prompts), "prompts")
        stack, adapter = shelf.bare, 0
        if ask.adapter is not None:
            served = shelf.choose([ask.adapter])[0]
            stack, adapter = served.stack, served.adapter
        prompts = await service.read(
            lambda: [reader.prompt(text, f"prompt {i}") for i, text in enumerate(ask.prompts, 1)]
        )
        rows = [Row(stack, adapter, ids, next_token=True) for ids in prompts]
        done = await service.answer(Continuing(rows, sampling, stop_tokens(shelf.base)), request)
        texts = await service.read(
            lambda: [reader.continuation(ids, len(ids_0)) for ids, ids_0 in zip(done, prompts, strict=True)]
        )
        return Answer({"adapter": ask.adapter, "continuations": texts})

    @app.get("/adapters")
    async def adapters() -> Response:
        """The base, its adapters with their labels, and what a request may hold."""
        return Answer(service.about())

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken; 503 once the server is stopping."""
        state = "ok" if service.engine.accepting and service.engine.alive else "stopping"
        return Answer({"status": state, "wants_token": wants_token}, status_code=200 if state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(page_html(), headers={"Content-Security-Policy": page_policy()})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
        return HTMLResponse(docs_html(app.openapi()), headers={"Content-Security-Policy": policy})


def _classes(served: Served, probability_C: Any) -> dict[str, Any]:
    labels = served.note.labels
    by_label = {label: float(p) for label, p in zip(labels, probability_C, strict=True)}
    return {"prediction": labels[int(probability_C.argmax())], "probabilities": by_label}


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -------------------------------------------------------------------- errors

MEANING = {
    404: "No such adapter.",
    409: "The base cannot do this.",
    413: "Larger than the limits allow.",
    422: "Something in the request is not as it should be.",
    429: "The queue is full; Retry-After says when to ask again.",
    503: "The server is stopping.",
    504: "Not answered in time.",
}


class Problem(BaseModel):
    kind: str
    message: str
    hint: str | None


class ProblemAnswer(BaseModel):
    error: Problem


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ProblemAnswer, "description": MEANING[status]} for status in statuses}


def _add_errors(app: FastAPI) -> None:
    handlers: dict[type[Exception], Callable[[Any], Response]] = {
        RequestValidationError: _invalid,
        HTTPException: _http,
        AdapterError: lambda e: problem(404, e.kind, e.message, hint=e.hint),
        TooLong: lambda e: problem(413, e.kind, e.message, hint=e.hint),
        UserError: lambda e: problem(422, e.kind, e.message, hint=e.hint),
        Stopping: lambda e: problem(503, "stopping", str(e)),
        NotFinite: lambda e: problem(422, "adapter", str(e)),
        TimeoutError: lambda e: problem(
            504, "timeout", "the answer was not ready in time", hint="send fewer texts at once"
        ),
        Busy: _busy,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, _handled(handler))
    app.add_exception_handler(
        Exception, _handled(lambda e: problem(500, "bug", f"a mistake of katei's own: {type(e).__name__}"))
    )


def _handled(handler: Callable[[Any], Response]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        return handler(error)

    return handle


def _http(error: HTTPException) -> Response:
    answer = problem(error.status_code, "http", str(error.detail), hint="/docs shows what there is")
    answer.headers.update(error.headers or {})
    return answer


def _busy(error: Busy) -> Response:
    answer = problem(429, "busy", str(error), hint="ask again after the seconds that Retry-After says")
    answer.headers["Retry-After"] = str(error.retry_seconds)
    return answer


def _invalid(error: RequestValidationError) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return problem(400, "json", f"the body is not JSON: {first.get('ctx', {}).get('error', '')}")
    where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    message = str(first["msg"])
    return problem(422, "request", f"{where[:80]}: {message[:1].lower()}{message[1:]}", hint="/docs shows what is read")
