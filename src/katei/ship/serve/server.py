"""Binding, signals and a graceful stop: what `katei serve` runs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from katei.core.errors import RecipeError, UserError
from katei.ship.serve.app import Service, build_app
from katei.ship.serve.engine import Limits
from katei.ship.serve.guard import is_loopback
from katei.ship.serve.shelf import Shelf

Say = Callable[[str], None]

NEW_TOKEN = "katei serve RUN --host HOST --token \"$(python3 -c 'import secrets; print(secrets.token_urlsafe())')\""
GRACE = 5.0
"""Beyond a request's own time limit, until connections are closed whether or not they are answered."""


def check_binding(host: str, port: int, token: str | None) -> None:
    """Raise RecipeError for an address that others can reach without a token, before anything is loaded."""
    if not 0 <= port < 65536:
        raise RecipeError(f"port is {port}, but it is a number from 0 to 65535", hint="--port 8000")
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token or not token):
        raise RecipeError("the token holds other than printable ASCII characters, or none", hint=NEW_TOKEN)
    if token is None and not is_loopback(host):
        raise RecipeError(
            f"'{host}' can be reached from other machines, so a token is needed", hint=NEW_TOKEN.replace("HOST", host)
        )


def listening_socket(host: str, port: int) -> socket.socket:
    """Bound, so that a taken port is known before the base is loaded. Raises RecipeError."""
    bare = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise RecipeError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}",
            hint="--port another number, or 0 for any free one",
        ) from None
    return sock


class Server(uvicorn.Server):
    """The first signal lets what was accepted finish and refuses the rest with 503; the second ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float, say: Say):
        super().__init__(config)
        self.service, self.seconds, self.say = service, seconds, say
        self._stopping = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stopping:
            self.force_exit = self.should_exit = True
            return
        threading.Thread(target=self.stop, daemon=True).start()

    def stop(self) -> None:
        """Finish what was accepted, then end `run`. From any thread."""
        self._stopping = True
        self.service.engine.stop_accepting()
        self.say("stopping: finishing what was accepted (once more to stop at once)")
        if not self.service.engine.drain(self.seconds):
            self.say(f"not all of it was finished in {self.seconds:g} s")
        self.should_exit = True


def serve(
    shelf: Shelf,
    sock: socket.socket,
    *,
    host: str = "127.0.0.1",
    limits: Limits | None = None,
    token: str | None = None,
    say: Say,
    started: Callable[[Server, str], None] | None = None,
) -> dict[str, Any]:
    """Serve until stopped. `started` is called with the server and its address once connections are taken.

    Returns `requests`, `rows` and `seconds`, for a last line.
    """
    limits = limits or Limits()
    app = build_app(shelf, limits, token=token, loopback=is_loopback(host))
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        limit_concurrency=limits.connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(GRACE),
    )
    server = Server(config, service, limits.seconds + GRACE, say)
    shown = f"[{host.strip('[]')}]" if ":" in host else host
    url = f"http://{shown}:{sock.getsockname()[1]}"
    service.engine.start()
    began = time.monotonic()
    if started is not None:
        threading.Thread(target=_tell, args=(server, url, started), daemon=True).start()
    try:
        server.run(sockets=[sock])
    finally:
        service.close()
        sock.close()
    if not server.started:
        raise UserError("the server did not start", hint="--port another number")
    metrics = service.metrics
    return {
        "url": url,
        "requests": int(metrics.requests.total()),
        "rows": int(metrics.rows.total()),
        "seconds": round(time.monotonic() - began, 3),
    }


def _tell(server: Server, url: str, started: Callable[[Server, str], None]) -> None:
    while not server.started and not server.should_exit:
        time.sleep(0.01)
    if server.started:
        started(server, url)
