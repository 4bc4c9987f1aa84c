"""One HTTP request and its answer: a body within bounds, JSON, server-sent events, errors as OpenAI shapes them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from engine.errors import DeadlineExceeded, InvalidRequest, Overloaded, RadixmeshError
from engine.serve.reading import read

if TYPE_CHECKING:
    from engine.serve.http import Face

T = TypeVar("T")
Header: TypeAlias = tuple[bytes, bytes]
Handler: TypeAlias = Callable[["Exchange"], Awaitable[None]]

ENCODER = msgspec.json.Encoder()
JSON = b"application/json"
BODY_SECONDS = 60.0
"""How long a body may take to come."""
REST = 64 << 20
REST_SECONDS = 5.0
"""Bytes and seconds that a client whose body is refused may go on sending, so that it reads why."""
SSE: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class NotFound(InvalidRequest):
    """A model, a route or a request that is not here."""

    http = 404
    grpc = "NOT_FOUND"

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message, field=field)
        self.code = code


class TooLarge(InvalidRequest):
    """A body over serve.body bytes."""

    http = 413
    code = "request_too_large"


class TooSlow(InvalidRequest):
    """A body that does not come."""

    http = 408


class Gone(Exception):
    """The client went away before its body was whole."""


def problem(error: RadixmeshError) -> tuple[int, bytes, tuple[Header, ...]]:
    """Status, body and further headers of an error."""
    overloaded = isinstance(error, Overloaded)
    kind = "invalid_request_error" if error.http < 500 else "server_error"
    code = getattr(error, "code", None) or ("overloaded" if overloaded else None)
    headers: tuple[Header, ...] = ((b"retry-after", b"1"),) if overloaded else ()
    if isinstance(error, DeadlineExceeded):  # OpenAI's clients ask again after any 5xx, unless they are told
        headers = ((b"x-should-retry", b"false"),)
    return error.http, trouble(str(error), kind, error.field, code), headers


def trouble(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error as OpenAI shapes it."""
    return ENCODER.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


class Exchange:
    """One request. face: what it came through; id: its X-Request-Id; body: all of it; route: as the app has it.
    names: ids of its calls."""

    __slots__ = ("body", "ended", "face", "id", "names", "receive", "route", "scope", "send", "started")

    def __init__(self, face: Face, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        self.face, self.route, self.scope, self.receive, self.send = face, route, scope, receive, send
        self.id: str = scope["request_id"]
        self.body = b""
        self.names: list[str] = []
        self.started = self.ended = False

    def read(self, form: type[T], unbuilt: Any = {}) -> T:  # noqa: B006  (never changed)
        """The body as a Struct. Raises InvalidRequest naming the field."""
        return read(self.body, form, unbuilt, self.face.metrics.unknown)

    def served(self, model: str | None) -> None:
        """Raises NotFound for a model that is not served here."""
        service = self.face.service
        if model is not None and model not in (service.name, service.info.path):
            raise NotFound(
                f"model: {model[:200]!r} is not served here; {service.name!r} is", field="model", code="model_not_found"
            )

    async def take(self) -> None:
        """Read the body. Raises TooLarge before it is read whole, TooSlow or Gone."""
        most = self.face.service.config.body
        length = next((v for k, v in self.scope["headers"] if k == b"content-length"), b"")
        if length.isdigit() and int(length) > most:
            raise self._large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise self._large(most)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise TooSlow(f"body: did not come within {BODY_SECONDS:g} s", field="body") from None
        self.body = b"".join(parts)

    async def rest(self) -> None:
        """Drop what a client still sends of a body that was refused, within bounds."""
        if any(k == b"expect" for k, _ in self.scope["headers"]):
            return
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(REST_SECONDS):
                while size < REST:
                    message = await self.receive()
                    size += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

    async def gone(self) -> None:
        """Wait until the client goes away."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def answer(
        self, body: bytes, status: int = 200, headers: Sequence[Header] = (), kind: bytes = JSON, more: bool = False
    ) -> None:
        """Send all of an answer. more: the exchange is not over with it."""
        self.started, self.ended = True, not more
        length = str(len(body)).encode()
        start = [(b"content-type", kind), (b"content-length", length), *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": start})
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def json(self, value: Any, status: int = 200) -> None:
        """Answer with a value."""
        await self.answer(ENCODER.encode(value), status)

    async def begin(self) -> None:
        """Begin a stream of events."""
        self.started = True
        await self.send({"type": "http.response.start", "status": 200, "headers": SSE})

    async def write(self, data: bytes) -> None:
        """Events. Waits while the client is slow."""
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """The last events."""
        self.ended = True
        await self.send({"type": "http.response.body", "body": data, "more_body": False})

    async def fail(self, error: RadixmeshError) -> None:
        """Answer with an error; in a stream that has begun, as an event that ends it."""
        status, body, headers = problem(error)
        if self.started:
            await self.end(b"data: " + body + b"\n\n")
        elif isinstance(error, TooLarge | TooSlow):  # what is left of the body is not the next request
            await self.answer(body, status, (*headers, (b"connection", b"close")), more=True)
            await self.rest()
            await self.end()
        else:
            await self.answer(body, status, headers)

    @staticmethod
    def _large(most: int) -> TooLarge:
        return TooLarge(f"body: is over {most} bytes (serve.body)", field="body")


class Endpoint:
    """A route's handler as ASGI. What it does is cancelled when its client goes away: that aborts its requests."""

    def __init__(self, face: Face, path: str, handler: Handler) -> None:
        self.face, self.path, self.handler = face, path, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        x = Exchange(self.face, self.path, scope, receive, send)
        if scope["method"] != "POST":
            await self._work(x)
            return
        try:
            await x.take()
        except Gone:
            return
        except InvalidRequest as error:
            await x.fail(error)
            return
        work, gone = asyncio.ensure_future(self._work(x)), asyncio.ensure_future(x.gone())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if x.ended:  # an answer that is complete looks like a client that is gone
                await work
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait((work, gone))
        if not work.cancelled():
            work.result()

    async def _work(self, x: Exchange) -> None:
        try:
            await self.handler(x)
        except RadixmeshError as error:
            await x.fail(error)
        finally:
            self.face.close(x)
