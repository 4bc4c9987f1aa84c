"""A real uvicorn on a real loopback port, in a thread, over the reference backend and a random model."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import uvloop

from engine.config import Config, load
from engine.run.local import LocalClient
from engine.run.start import decide, start
from engine.serve.call import Record
from engine.serve.http import make_app, serve
from engine.serve.service import Service
from engine.serve.sockets import listen
from engine.text.tokenizer import Tokenizer
from tests.text.made import byte_level
from tests.tiny import tiny

T = TypeVar("T")
Slow: TypeAlias = Callable[[float], AbstractContextManager[None]]
NAME = "tiny"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SMALL: dict[str, Any] = {"backend": "reference", "slots": 4, "max_tokens": 32, "cache_tokens": 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """A server. sock: what it listens on; slow: makes every turn of the engine's loop take so many seconds; records: of
    the requests that ended."""

    url: str
    port: int
    sock: socket.socket
    app: Any
    service: Service
    client: LocalClient
    loop: asyncio.AbstractEventLoop
    tokenizer: Tokenizer
    config: Config
    slow: Slow
    records: list[Record] = field(default_factory=list)

    def run(self, awaitable: Awaitable[T]) -> T:
        """Await something on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(_await(awaitable), self.loop).result(60)

    def settle(self, seconds: float = 20.0) -> None:
        """Wait until no request is open and no page is held."""
        self.until(lambda: not self.service.open_requests and not self.held, "a request was never ended", seconds)

    def until(self, true: Callable[[], bool], says: str, seconds: float = 20.0) -> None:
        """Wait for something."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, says
            time.sleep(0.005)

    @property
    def held(self) -> int:
        """Pages that open requests hold."""
        return sum(a.locked + a.owned for a in self.client.carrier.loop.scheduler.accounts())


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


def folder(path: Path, **model: Any) -> Path:
    """A random model with a tokenizer and a chat template. model: arguments of `tiny`."""
    tokenizer = byte_level(chat_template=TEMPLATE)
    tiny(path, **({"vocab": len(tokenizer), "max_len": 192, "eos": tokenizer.eos_token_id} | model))
    tokenizer.save_pretrained(path)
    return path


@contextmanager
def house(path: Path, **keys: Any) -> Iterator[House]:
    """A server of the model in a folder. keys: of the configuration, flat or dotted, over SMALL."""
    config = load(None, SMALL | keys)
    sock = listen("127.0.0.1", 0)
    decided, tokenizer = decide(config, path), Tokenizer.open(path)
    bounds = {"queue": config.serve.queue, "queue_tokens": config.serve.queue_tokens}
    client = LocalClient(partial(start, decided, lambda: tokenizer.words, **bounds))
    slow = slowed(client)
    loop, ready, made = uvloop.new_event_loop(), threading.Event(), []

    async def main() -> None:
        stop = asyncio.Event()
        service = Service(client, tokenizer, config.serve, NAME)
        app = make_app(service, config)
        made.extend((service, app, stop))
        await serve(app, sock, lambda port: ready.set(), stop, grace=2)

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(main())

    thread = threading.Thread(target=work, name="server", daemon=True)
    thread.start()
    assert ready.wait(20), "the server did not come up"
    service, app, stop = made
    port = sock.getsockname()[1]
    records: list[Record] = []
    service.finished.append(records.append)
    try:
        yield House(
            url=f"http://127.0.0.1:{port}", port=port, sock=sock, app=app, service=service, client=client, loop=loop,
            tokenizer=tokenizer, config=config, slow=slow, records=records,
        )  # fmt: skip
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        client.shutdown()
        assert not thread.is_alive(), "the server did not stop"
        loop.close()


def slowed(client: LocalClient) -> Slow:
    """What makes every turn of an engine's loop take so many seconds, for a while."""
    turn, pace = client.carrier.loop.turn, [0.0]

    def slowly() -> None:
        time.sleep(pace[0])
        turn()

    @contextmanager
    def slow(seconds: float) -> Iterator[None]:
        pace[0] = seconds
        try:
            yield
        finally:
            pace[0] = 0.0

    client.carrier.loop.turn = slowly  # type: ignore[method-assign]
    return slow
