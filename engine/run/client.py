"""What serves requests, in this process or another: say things to a loop, hear its news."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Protocol

from engine.errors import BackendLost, RadixmeshError
from engine.run.messages import Abort, Info, Message, News, Submit
from engine.sched.request import Output


class Client(Protocol):
    """The near end of a loop. Every method may be called from any thread.

    listen: who hears the news, on a thread of the client's; called once, before the first message.
    """

    @property
    def info(self) -> Info: ...

    def listen(self, take: Callable[[News], None]) -> None: ...

    def say(self, message: Message) -> None:
        """Raises BackendLost when the loop is gone."""
        ...

    def shutdown(self) -> None:
        """Stop the loop after the step it is in; open requests end with BackendLost. Harmless when it was done."""
        ...


class Streams:
    """Blocking streams over a client: what is new of each request, for threads that wait for it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._streams: dict[str, queue.SimpleQueue[Output]] = {}
        self._lost: RadixmeshError | None = None
        self._lock = threading.Lock()
        client.listen(self._take)

    def open(self, message: Message, rid: str, stream: queue.SimpleQueue[Output] | None = None) -> None:
        """Say something that is answered by Outputs of `rid`, in a stream of its own or a given one. Raises
        BackendLost."""
        with self._lock:
            if self._lost is not None:
                raise self._lost
            self._streams[rid] = queue.SimpleQueue() if stream is None else stream
        try:
            self._client.say(message)
        except RadixmeshError:
            self._streams.pop(rid, None)
            raise

    def read(self, rid: str) -> Generator[Output, None, None]:
        """What comes back, until it ends. Closing the iterator early aborts the request."""
        stream, ended = self._streams[rid], False
        try:
            while not ended:
                output = stream.get()
                ended = output.finish is not None
                yield output
        finally:
            del self._streams[rid]
            if not ended:
                with suppress(BackendLost):
                    self._client.say(Abort(rid=rid))

    def gather(self, messages: Sequence[Submit]) -> Generator[Output, None, None]:
        """Open requests together: what comes back of any, as it comes, until all have ended. Closing the iterator early
        aborts those that have not, and waits until they have. Raises BackendLost."""
        stream: queue.SimpleQueue[Output] = queue.SimpleQueue()
        unread: dict[str, None] = {}
        try:
            for message in messages:
                self.open(message, message.request.rid, stream)
                unread[message.request.rid] = None
            while unread:
                output = stream.get()
                if output.finish is not None:
                    del unread[output.rid], self._streams[output.rid]
                yield output
        finally:
            for rid in unread:
                self._client.say(Abort(rid=rid))
            while unread:
                output = stream.get()
                if output.finish is not None:
                    del unread[output.rid], self._streams[output.rid]

    def _take(self, news: News) -> None:
        with self._lock:
            self._lost = news.lost or self._lost
        for output in news.outputs:
            stream = self._streams.get(output.rid)
            if stream is not None:
                stream.put(output)
