"""The HTTP face: an ASGI app over a Service, and uvicorn that serves it. The owner of the process keeps its signals."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.config import Config, Serve
from engine.errors import ConfigError, InvalidRequest
from engine.serve import native, openai
from engine.serve.call import Call
from engine.serve.exchange import Endpoint, Exchange, Handler, trouble
from engine.serve.keys import MAX_ID, Keys, Traffic, header
from engine.serve.metrics import Metrics
from engine.serve.records import log
from engine.serve.service import Ask, Service

MAX_HEAD = 64 << 10
"""Bytes of a request's line and headers."""
HEAD_SECONDS = 30.0
"""How long a connection may take to send them, and may stay idle before the first."""
KEEP_SECONDS = 60
"""How long a connection may stay idle between requests."""

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/chat/completions", openai.chat),
    ("POST", "/v1/completions", openai.completions),
    ("GET", "/v1/models", openai.models),
    ("GET", "/v1/models/{id:path}", openai.model),
    ("POST", "/generate", native.generate),
    ("POST", "/tokenize", native.tokenize),
    ("POST", "/detokenize", native.detokenize),
    ("POST", "/abort_request", native.abort),
    ("POST", "/flush_cache", native.flush),
    ("POST", "/update_weights_from_disk", native.update),
    ("GET", "/server_info", native.info),
)


class Face:
    """What the handlers share. config: what /server_info shows. It records and counts every request of the service,
    whatever face it came by."""

    def __init__(self, service: Service, config: Config | Serve) -> None:
        self.service, self.config = service, config
        self.metrics = Metrics(service)
        self._prints: dict[int, str] = {}
        self._taken: set[str] = set()
        service.finished += [self.metrics.record, log]

    @property
    def fingerprint(self) -> str:
        """Of the model with the weights that it has now."""
        version = self.service.version
        if version not in self._prints:
            self._prints = {version: openai.fingerprint(self.service)}
        return self._prints[version]

    async def open(self, x: Exchange, asks: Sequence[Ask], rid: str | None) -> Call:
        """A call under the id that its client gave it: rid, else X-Request-Id unless that is in use."""
        if rid is not None and not (0 < len(rid) <= MAX_ID and rid.isascii() and rid.isprintable()):
            raise InvalidRequest(f"rid: must be 1 to {MAX_ID} printable ASCII characters", field="rid")
        if rid is not None and rid in self._taken:
            raise InvalidRequest(f"rid: {rid!r} is in use", field="rid")
        try:
            return await self._open(x, asks, rid or (x.id if x.id not in self._taken else uuid4().hex))
        except InvalidRequest as error:
            if rid is not None or error.field != "rid":
                raise
        # its X-Request-Id is that of a request which has yet to end: who lost patience asks again under the same
        return await self._open(x, asks, uuid4().hex)

    async def _open(self, x: Exchange, asks: Sequence[Ask], name: str) -> Call:
        self._taken.add(name)
        x.names.append(name)
        return await self.service.open(asks, name, x.route)

    def close(self, x: Exchange) -> None:
        """Its ids may be used again."""
        self._taken.difference_update(x.names)


def make_app(service: Service, config: Config | None = None) -> Starlette:
    """The app. config: what /server_info shows beside what was decided, without the key. service.config.api_key: what
    every route but engine.serve.keys.OPEN wants; None is none. Call it once per service: it listens to its records."""
    face = Face(service, config or service.config)
    routes = [Route(path, Endpoint(face, path, do), methods=[method]) for method, path, do in (*ROUTES, *_state())]
    middleware = [Middleware(Traffic, count=face.metrics.answered)]
    if service.config.api_key is not None:
        middleware.append(Middleware(Keys, key=service.config.api_key))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _refuse, 500: _broken},
    )
    app.router.redirect_slashes = False
    return app


def _state() -> tuple[tuple[str, str, Handler], ...]:
    """How the server is. /livez: 503 when the engine is gone for good, which only a new start mends; /readyz and
    /health: 503 while requests are not taken."""

    async def livez(x: Exchange) -> None:
        await _say(x, x.face.service.lost is None)

    async def ready(x: Exchange) -> None:
        await _say(x, x.face.service.ready)

    async def metrics(x: Exchange) -> None:
        body, kind = x.face.metrics.text(header(x.scope, b"accept").decode("latin-1"))
        await x.answer(body, kind=kind.encode())

    return (
        ("GET", "/livez", livez),
        ("GET", "/readyz", ready),
        ("GET", "/health", ready),
        ("GET", "/metrics", metrics),
    )


async def _say(x: Exchange, well: bool) -> None:
    service = x.face.service
    why = "ok" if well else "draining" if service.lost is None else f"lost: {service.lost}"
    await x.json({"status": why}, 200 if well else 503)


async def _refuse(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no route {request.url.path[:200]}", 405: f"{request.method} is not for this route"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    body = trouble(what.get(error.status_code, error.detail), "invalid_request_error", code=code)
    return Response(body, error.status_code, headers=error.headers, media_type="application/json")


async def _broken(request: Request, error: Exception) -> Response:
    """A fault of ours: uvicorn logs it with its traceback."""
    body = trouble("the server made a mistake; its log says which", "server_error", code="internal_error")
    mark = {"x-request-id": request.scope["request_id"]}  # what Traffic adds stands within this
    return Response(body, 500, headers=mark, media_type="application/json")


async def serve(
    app: Any, sock: socket.socket, ready: Callable[[int], None], stop: asyncio.Event, grace: int = 5
) -> None:
    """Serve on the running event loop until `stop` is set, then let answers end for `grace` seconds and cut the rest.

    ready: called with the port when connections are taken. Installs no signal handlers and logs no accesses. Who stops
    it drains the service before.
    """
    config = uvicorn.Config(
        app,
        loop="none",
        http=Wire,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_SECONDS,
        timeout_graceful_shutdown=grace,
    )
    server = Server(config, lambda: ready(sock.getsockname()[1]))
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        server.should_exit = True
        await task


class Server(uvicorn.Server):
    """uvicorn without its signal handlers. up: called when it listens."""

    def __init__(self, config: uvicorn.Config, up: Callable[[], None]) -> None:
        super().__init__(config)
        self._up = up

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None of them."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, and say so. Raises ConfigError for a socket whose port another took meanwhile."""
        try:
            await super().startup(sockets=sockets)
        except OSError as error:
            raise ConfigError(f"serve.port: can't listen: {error.strerror}", field="serve.port") from error
        self._up()


class Wire(HttpToolsProtocol):
    """uvicorn's protocol, which takes headers of any size for any time, with a bound on both."""

    _late: asyncio.TimerHandle | None = None
    _head = 0
    _whole = False
    _open: Sequence[Any] = ()

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, self._cut)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for. uvicorn tells only the last request of a pipeline that its client is gone."""
        self._forget()
        super().connection_lost(exc)
        self.pipeline.clear()
        for cycle in self._open:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Count what comes before a body."""
        super().data_received(data)
        if not self._whole:
            self._head += len(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("The request's headers are too large.")

    def on_message_begin(self) -> None:
        """A request's line and headers begin."""
        super().on_message_begin()
        self._head, self._whole = 0, False
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self._cut)

    def on_headers_complete(self) -> None:
        """And are whole."""
        self._whole = True
        self._forget()
        super().on_headers_complete()
        if self.cycle is not None:
            self._open = [*(c for c in self._open if not c.response_complete and c is not self.cycle), self.cycle]

    def _cut(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.close()

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
