"""A real server on a free port of this machine, in a thread, and a client that knows nothing but HTTP."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from katei.ship.serve import engine as engine_module
from katei.ship.serve.engine import Engine, Limits, Row
from katei.ship.serve.server import Server, listening_socket, serve
from katei.ship.serve.shelf import Shelf


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"kind", "message", "hint"}
        return error


@dataclass
class Running:
    """A server, and how to ask it."""

    port: int
    server: Server
    thread: threading.Thread
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        return self.server.service.engine

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
            connection.request(method, path, data, dict(headers or {}))
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.ask("POST", path, json.dumps(body), {"Content-Type": "application/json"} | headers)

    def later(self, path: str, body: Any) -> Later:
        return Later(self, path, body)


class Later:
    """A request in a thread of its own."""

    def __init__(self, running: Running, path: str, body: Any):
        self._reply: Reply | None = None

        def ask() -> None:
            self._reply = running.post(path, body)

        self._thread = threading.Thread(target=ask)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def reply(self) -> Reply:
        self._thread.join(30)
        assert self._reply is not None, "no reply within 30 s"
        return self._reply


@contextmanager
def serving(shelf: Shelf, *, token: str | None = None, host: str = "127.0.0.1", **limits: Any) -> Iterator[Running]:
    sock = listening_socket("127.0.0.1", 0)
    port = sock.getsockname()[1]
    up = threading.Event()
    server: list[Server] = []
    result: dict[str, Any] = {}

    def started(one: Server, url: str) -> None:
        server.append(one)
        up.set()

    def run() -> None:
        bounds = Limits(**limits)
        result.update(serve(shelf, sock, host=host, limits=bounds, token=token, say=lambda text: None, started=started))

    thread = threading.Thread(target=run)
    thread.start()
    assert up.wait(30)
    try:
        yield Running(port, server[0], thread, result)
    finally:
        server[0].stop()
        thread.join(30)
        assert not thread.is_alive()


class Gate:
    """Holds passes back, so that a test decides what is waiting when the next one begins; remembers each pass's rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.passes: list[list[Row]] = []
        self._open = threading.Event()
        self._open.set()
        run_pass = engine_module.run_pass

        def held(shelf: Shelf, rows: list[Row]) -> list[Any]:
            self.passes.append(list(rows))
            assert self._open.wait(30)
            return run_pass(shelf, rows)

        monkeypatch.setattr(engine_module, "run_pass", held)

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()
