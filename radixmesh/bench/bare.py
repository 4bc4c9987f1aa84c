"""A bare uvicorn with starlette that streams events: what any HTTP server in Python pays. `python -m` runs it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator


def main(chunks: int, size: int) -> None:
    """Serve on any port of loopback, printed as a URL. size: bytes of an event as it is sent."""
    import socket

    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    frame = len(b'data: {"x":""}\n\n') + len(b"ff\r\n\r\n")
    event = b'data: {"x":"' + b"y" * max(size - frame, 0) + b'"}\n\n'

    async def events() -> AsyncIterator[bytes]:
        for _ in range(chunks):
            yield event
        yield b"data: [DONE]\n\n"

    async def stream(request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/stream", stream, methods=["POST"])])
    sock = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, loop="uvloop", http="httptools", access_log=False, log_level="warning", lifespan="off")
    uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
