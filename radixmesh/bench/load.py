"""Clients that read streams of server-sent events, cheaply enough that one process can read many."""

from __future__ import annotations

import asyncio
import re
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

END = b"\r\n0\r\n\r\n"
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
PATIENCE = 120.0
"""Seconds that open answers get after the last began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """streams: at once. requests: bodies as bytes, taken in turn. seconds: no answer begins later; count: at most so
    many answers in all."""

    host: str
    port: int
    path: str
    key: str | None
    streams: int
    requests: Sequence[bytes]
    seconds: float
    count: int | None = None


@dataclass(slots=True, kw_only=True)
class Tally:
    """What came. asked: requests so far; answers, tokens (by usage, or events where none is told), events, bytes;
    first: seconds to the first event; gaps: seconds between what came one after the other on one stream; errors: what
    went wrong, and how often."""

    began: float
    left: int | None
    asked: int = 0
    answers: int = 0
    tokens: int = 0
    events: int = 0
    size: int = 0
    first: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("d"))
    errors: dict[str, int] = field(default_factory=dict)

    def fail(self, why: str) -> None:
        """One more error."""
        self.errors[why] = self.errors.get(why, 0) + 1


def load(wanted: Wanted) -> dict[str, Any]:
    """Read streams until the time is up, and say what came. In a process of its own, or it measures its own caller."""
    import uvloop

    return uvloop.run(_load(wanted))


async def _load(wanted: Wanted) -> dict[str, Any]:
    loop, tally = asyncio.get_running_loop(), Tally(began=time.perf_counter(), left=wanted.count)
    key = f"authorization: Bearer {wanted.key}\r\n" if wanted.key else ""
    head = f"POST {wanted.path} HTTP/1.1\r\nhost: {wanted.host}\r\n{key}content-type: application/json\r\n"
    whole = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in wanted.requests]
    ended = [loop.create_future() for _ in range(wanted.streams)]
    streams = [Stream(tally, whole, tally.began + wanted.seconds, end) for end in ended]
    cpu = time.process_time()
    for stream in streams:
        try:
            await loop.create_connection(lambda s=stream: s, wanted.host, wanted.port)  # type: ignore[misc]
        except OSError as error:
            tally.fail(f"connect: {error.strerror}")
            stream.ended.set_result(None)
    _, late = await asyncio.wait(ended, timeout=wanted.seconds + PATIENCE)
    if late:
        tally.fail(f"{len(late)} answers never ended")
    seconds = time.perf_counter() - tally.began
    for stream in streams:
        stream.leave()
    return {
        "streams": wanted.streams,
        "seconds": seconds,
        "answers": tally.answers,
        "errors": tally.errors,
        "tokens": tally.tokens,
        "events": tally.events,
        "tokens_per_second": tally.tokens / seconds,
        "bytes_per_event": tally.size / max(tally.events, 1),
        "ttft_seconds": spread(tally.first),
        "gap_seconds": spread(tally.gaps),
        "client_cpu_us_per_token": (time.process_time() - cpu) * 1e6 / max(tally.tokens, 1),
    }


def spread(values: Sequence[float]) -> Mapping[str, float]:
    """Percentiles; nothing of nothing."""
    ordered = sorted(values)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[min(int(len(ordered) * q), len(ordered) - 1)] for name, q in at.items()} if ordered else {}


class Stream(asyncio.Protocol):
    """One connection, which asks again and again."""

    def __init__(self, tally: Tally, requests: Sequence[bytes], until: float, ended: asyncio.Future[None]) -> None:
        self.tally, self.requests, self.until, self.ended = tally, requests, until, ended
        self.transport: Any = None
        self.body = bytearray()
        self.sent = self.last = 0.0

    def connection_made(self, transport: Any) -> None:
        """Ask at once."""
        self.transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        """A piece of an answer."""
        now = time.perf_counter()
        if self.last:
            self.tally.gaps.append(now - self.last)
            self.last = now
        self.body += data
        if not self.last and b"data: " in self.body:
            self.tally.first.append(now - self.sent)
            self.last = now
        if self.body.endswith(END):
            self._count(bytes(self.body))
            self._ask()
        elif not self.body.startswith(b"HTTP/1.1 200"[: len(self.body)]):
            self.tally.fail(f"status {bytes(self.body[9:12]).decode(errors='replace')}")
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody asked for that."""
        if not self.ended.done():
            self.tally.fail("the server hung up")
            self._end()

    def leave(self) -> None:
        """Hang up."""
        if self.transport is not None:
            self.transport.abort()

    def _ask(self) -> None:
        now, tally = time.perf_counter(), self.tally
        if now >= self.until or tally.left == 0:
            self._end()
            return
        if tally.left is not None:
            tally.left -= 1
        self.body.clear()
        self.sent, self.last = now, 0.0
        self.transport.write(self.requests[tally.asked % len(self.requests)])
        tally.asked += 1

    def _count(self, body: bytes) -> None:
        events, usage = body.count(b"data: {"), USAGE.search(body)
        if b"data: [DONE]" not in body or b'data: {"error"' in body:
            self.tally.fail("an answer that failed in the middle")
        self.tally.answers += 1
        self.tally.events += events
        self.tally.tokens += int(usage[1]) if usage else events
        self.tally.size += len(body)

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        self.leave()
