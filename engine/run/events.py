"""Tells others what the prefix cache holds: batches on a ZeroMQ PUB socket, in the form of vLLM's KV events.

A message is [TOPIC, sequence number, payload]: the number has 8 bytes, the most significant first, and counts up from
0; the payload is msgpack, [wall clock in seconds, [event, ...]]. Events are lists:

    ["BlockStored", hashes, parent's hash or nil, token ids, tokens of a block, nil, nil, nil, keys]
    ["BlockRemoved", hashes, nil]
    ["AllBlocksCleared"]

keys: the namespace of each block, where it has one; else it is left out with the nil before it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from engine.cache.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from engine.errors import ConfigError

TOPIC = b"kv-events"
END = (-1).to_bytes(8, "big", signed=True)
"""Ends a replay, in place of a sequence number."""
KEPT = 10_000
"""Batches that can be had again."""
QUEUE = 1024
"""Batches that wait for the thread; beyond, they are dropped."""
STOP = b""


class Publisher:
    """The sockets, on a thread of their own: who publishes never waits. One thread may publish.

    address: what PUB is bound to; replay: what answers who missed something, "" is none. A client (DEALER or REQ) sends
    [empty, sequence number] there and gets [empty, number, payload] for each batch that is kept from that number on,
    then [empty, END, empty]. dropped: batches that found the queue full; their numbers are missing.

    Raises ConfigError where an address can't be bound.
    """

    def __init__(self, address: str, replay: str = "", *, kept: int = KEPT, queue: int = QUEUE) -> None:
        self.next = self.dropped = 0
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=kept)
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.Context()
        try:
            self._out, self.address = self._bind(zmq.PUB, "cache.events", address)
            self._again: zmq.Socket[bytes] | None = None
            self.replay = ""
            if replay:
                self._again, self.replay = self._bind(zmq.ROUTER, "cache.replay", replay)
            self._inner, end = (self._context.socket(zmq.PAIR) for _ in range(2))
            for socket in (self._inner, end):
                socket.set_hwm(max(1, queue // 2))
            self._inner.bind("inproc://events")
            end.connect("inproc://events")
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, args=(end,), name="radixmesh-events", daemon=True)
        self._thread.start()

    def publish(self, events: Sequence[Event]) -> None:
        """One batch. Never waits."""
        number, self.next = self.next.to_bytes(8, "big"), self.next + 1
        payload = self._encoder.encode((time.time(), [_plain(event) for event in events]))
        try:
            self._inner.send(number + payload, zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1

    def close(self) -> None:
        """Send what waits, and stop. Harmless when it was done."""
        if self._thread.is_alive():
            self._inner.send(STOP)
            self._thread.join()
            self._context.destroy(linger=0)

    def _bind(self, kind: int, field: str, address: str) -> tuple[zmq.Socket[bytes], str]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        if kind == zmq.ROUTER:
            socket.set_hwm(0)  # an answer is bounded by what is kept
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"{field}: can't listen on {address}: {error}; choose another", field=field) from error
        return socket, socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]

    def _run(self, inner: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for socket in (inner, self._again):
            if socket is not None:
                poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if inner in ready:
                frame = inner.recv()
                if frame == STOP:
                    return
                self._send(frame[:8], frame[8:])
            if self._again is not None and self._again in ready:
                self._answer(self._again, self._again.recv_multipart())

    def _send(self, number: bytes, payload: bytes) -> None:
        """To all who listen; one that is too slow misses it, which the next number tells."""
        self._kept.append((number, payload))
        self._out.send_multipart([TOPIC, number, payload])

    def _answer(self, again: zmq.Socket[bytes], asked: Sequence[bytes]) -> None:
        """Say again what is kept. What is no question is passed over."""
        if len(asked) != 3 or len(asked[2]) != 8:
            return
        for number, payload in self._kept:
            if number >= asked[2]:
                again.send_multipart([asked[0], b"", number, payload])
        again.send_multipart([asked[0], b"", END, b""])


def _plain(event: Event) -> list[Any]:
    if isinstance(event, BlockStored):
        out = ["BlockStored", event.hashes, event.parent, event.tokens, event.page, None, None]
        return [*out, None, [event.namespace] * len(event.hashes)] if event.namespace else out
    if isinstance(event, BlockRemoved):
        return ["BlockRemoved", event.hashes, None]
    assert isinstance(event, AllBlocksCleared)
    return ["AllBlocksCleared"]
