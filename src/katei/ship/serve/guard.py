"""What a request must pass before it is read: who it is meant for, where it comes from, its token, its size.

A server on 127.0.0.1 can be reached by every page a browser on this machine shows. So, besides the address it binds to:

    Host      on a loopback address only names of this machine are answered (a name that was rebound to 127.0.0.1 is not)
    Origin    a browser sends it with what a page asks for: it must be the server's own
    type      a body must be application/json, which no page may send elsewhere without asking first (and we never agree)
    token     beyond loopback each request but the page's own files needs `Authorization: Bearer TOKEN`
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from katei.ship.serve.engine import Limits
from katei.ship.serve.metrics import Metrics
from katei.ship.serve.responses import Answer, problem

OPEN = ("/", "/docs", "/openapi.json", "/health")
"""Read without a token: they hold nothing of a user's, and a browser cannot send one with the address it opens."""
SWALLOWED = 64 << 20
"""Of a body that is too large so many bytes are read and forgotten, so that the sender comes to read the answer."""

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware; `known_paths` are the names under which requests are counted."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        accepting: Callable[[], bool],
        token: str | None,
        loopback: bool,
        known_paths: frozenset[str],
    ):
        self.app, self.limits, self.metrics, self.accepting = app, limits, metrics, accepting
        self.token = None if token is None else token.encode()
        self.loopback, self.known_paths = loopback, known_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.known_paths else "(other)"
        started = time.monotonic()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.add(path, str(message["status"]))
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        refused = self._refusal(scope)
        body = b""
        if scope["method"] == "POST":
            if refused is not None:
                await _swallow(receive, self.limits.body_seconds)
            else:
                body, refused = await self._body(scope, receive)
                started = time.monotonic()
        if refused is not None:
            await refused(scope, receive, tell)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, replay, tell)
        if scope["method"] == "POST":
            self.metrics.request_seconds.observe(time.monotonic() - started)

    def _refusal(self, scope: Scope) -> Answer | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.loopback and not is_loopback(_hostname(host)):
            what = f"this server answers for this machine alone, not for the host '{host[:80]}'"
            return problem(403, "host", what, hint="http://127.0.0.1 with its port")
        origin = headers.get("origin")
        if origin is not None and origin.split("://", 1)[-1] != host:
            return problem(
                403, "origin", f"pages of '{origin[:80]}' may not use this server", hint="open its own page: /"
            )
        if self.token is not None and scope["path"] not in OPEN:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), b"Bearer " + self.token):
                what = "the token is wrong" if given else "this server wants its token"
                answer = problem(401, "token", what, hint="send the header 'Authorization: Bearer TOKEN'")
                answer.headers["WWW-Authenticate"] = "Bearer"
                return answer
        if scope["method"] != "POST":
            return None
        if not self.accepting():
            return problem(503, "stopping", "the server is stopping: it finishes what it has taken, and takes no more")
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            what = f"the body's type is '{headers.get('content-type', '')[:80]}', but only JSON is read"
            return problem(415, "type", what, hint="send the header 'Content-Type: application/json'")
        length = headers.get("content-length")
        if length is not None and (not length.isdigit() or int(length[:19]) > self.limits.body_bytes):
            return self._too_large()
        return None

    def _too_large(self) -> Answer:
        what = f"the body is larger than {self.limits.body_bytes:,} bytes"
        return problem(413, "limit", what, hint="send fewer texts at once")

    async def _body(self, scope: Scope, receive: Receive) -> tuple[bytes, Answer | None]:
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b"", problem(400, "http", "the body ends before it is whole")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self.limits.body_bytes:
                        break
                    if not message.get("more_body", False):
                        return b"".join(chunks), None
        except TimeoutError:
            return b"", problem(408, "timeout", f"the body was not here after {self.limits.body_seconds:g} s")
        await _swallow(receive, self.limits.body_seconds)
        return b"", self._too_large()


async def _swallow(receive: Receive, seconds: float) -> None:
    """Read the rest of a body without keeping it, up to a point."""
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while size < SWALLOWED:
                message: dict[str, Any] = dict(await receive())
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _hostname(host: str) -> str:
    """127.0.0.1:8000 → 127.0.0.1, [::1]:8000 → [::1]"""
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.rsplit(":", 1)[0] if ":" in host else host
