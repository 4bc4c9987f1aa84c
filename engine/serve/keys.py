"""What stands before the router: ids in and out, what was asked and answered, and the key that every route wants."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serve.exchange import JSON, trouble

OPEN = frozenset({"/livez", "/readyz", "/health"})
"""What needs no key. All else does, known or not."""
MAX_ID = 128


class Traffic:
    """Gives every request an id, its own X-Request-Id where it has a decent one, and sends it back; counts.

    count: told the route ("other" where there is none) and the status, before the last of the answer is sent (of an
    error, the first), so that who has it reads it in the metrics; 499 is a client that went away before that.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        text = given.decode("latin-1")
        decent = 0 < len(text) <= MAX_ID and text.isascii() and text.isprintable()
        scope["request_id"] = text if decent else uuid4().hex
        status, counted = 499, False

        def ended() -> None:
            nonlocal counted
            if not counted:
                counted = True
                self.count(getattr(scope.get("endpoint"), "path", "other"), status)

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                mark = (b"x-request-id", scope["request_id"].encode())
                message = {**message, "headers": [*message.get("headers", ()), mark]}
            elif message["type"] == "http.response.body" and (status >= 400 or not message.get("more_body", False)):
                ended()
            await send(message)

        try:
            await self.app(scope, receive, tell)
        except Exception:
            status = 500
            raise
        finally:
            ended()


class Keys:
    """Refuses every request without the key, but for OPEN: a route is closed unless it is listed there.

    The key comes as "Authorization: Bearer KEY" or "X-Api-Key: KEY".
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and (scope["path"] in OPEN or self._has(scope))):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            body = trouble(
                "a key is wanted here: give the header Authorization: Bearer KEY",
                "invalid_request_error",
                code="invalid_api_key",
            )
            headers = [
                (b"content-type", JSON),
                (b"content-length", str(len(body)).encode()),
                (b"www-authenticate", b"Bearer"),
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _has(self, scope: Scope) -> bool:
        scheme, _, key = header(scope, b"authorization").partition(b" ")
        if scheme.lower() != b"bearer":
            key = header(scope, b"x-api-key")
        return hmac.compare_digest(key.strip(), self.key)


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of a name, or nothing."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""
