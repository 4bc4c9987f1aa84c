"""The engine's process: `python -m engine.run.child`, which engine.run.process starts and talks to."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import zmq

from engine.errors import BackendLost, RadixmeshError
from engine.run.ipc import (
    ORDERS,
    REPORTS,
    Begin,
    Failed,
    Malformed,
    Order,
    Ready,
    Report,
    Shutdown,
    Stage,
    decode_order,
    encode_report,
)
from engine.run.lifeline import die_with, end
from engine.run.loop import Carrier
from engine.run.messages import MOST, Message
from engine.run.start import Started, decide, start
from engine.run.watchdog import Watchdog
from engine.text.words import Words

HELLO_SECONDS = 60.0
"""How long a new engine waits for its first order."""
LINGER_MS = 5000
"""How long an engine that ends waits until its last words are read."""


class Link:
    """The engine's end: orders come in, reports go out."""

    def __init__(self, folder: str) -> None:
        self.context = zmq.Context()
        self._orders, self._reports = (self._connect(folder, name) for name in (ORDERS, REPORTS))
        self.closing = False

    def first(self) -> Begin:
        """The first order. Raises BackendLost when none comes."""
        if not self._orders.poll(int(HELLO_SECONDS * 1000)):
            raise BackendLost(f"no order came for {HELLO_SECONDS:g} s")
        order = decode_order(self._orders.recv())
        if not isinstance(order, Begin):
            raise BackendLost(f"the first order was {type(order).__name__}")
        return order

    def words(self) -> Words:
        """The order after the first, where Words follow. Raises BackendLost when another comes, such as to stop."""
        order = decode_order(self._orders.recv())
        if not isinstance(order, Words):
            raise BackendLost(f"{type(order).__name__} came before the tokenizer's words")
        return order

    def receive(self, block: bool) -> Sequence[Message] | None:
        """As a Carrier wants it. What can't be read is named on stderr and dropped."""
        messages: list[Message] = []
        while len(messages) < MOST and self._orders.poll(None if block and not messages else 0):
            order = self._next()
            if isinstance(order, Shutdown):
                return None
            if order is not None and not isinstance(order, Begin | Words):
                messages.append(order)
        return messages

    def send(self, report: Report) -> None:
        """Never waits."""
        self._reports.send(encode_report(report), zmq.NOBLOCK)

    def close(self) -> None:
        """Wait until what was sent is read, for LINGER_MS at most."""
        self.context.destroy(linger=LINGER_MS)

    def _next(self) -> Order | None:
        try:
            return decode_order(self._orders.recv())
        except Malformed as error:
            print(f"radixmesh: the engine dropped an order: {error}", file=sys.stderr, flush=True)
            return None

    def _connect(self, folder: str, name: str) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.connect(f"ipc://{os.path.join(folder, name)}")
        return socket


def main() -> int:
    """Arguments: folder of the sockets, process id of the parent, pipe for a reason to end."""
    folder, parent, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for name in (signal.SIGINT, signal.SIGTERM):  # a service manager tells all at once; the parent says when to end
        signal.signal(name, signal.SIG_IGN)
    die_with(parent)
    link = Link(folder)
    try:
        begin = link.first()
        watchdog = Watchdog(begin.config.serve.watchdog, parent, lambda why: _write(last, why))
        started = _open(begin, link)
        if started is None:
            return 2
        carrier = Carrier(started, link.receive, link.send)
        watchdog.watch(carrier.loop)
        link.send(Ready(started.info))
        try:
            carrier.run()
        finally:
            watchdog.stop()
        return 0
    finally:
        link.close()


def _open(begin: Begin, link: Link) -> Started | None:
    """Decide and start; what fails is told, and gives None."""
    stages: list[tuple[str, float]] = [("imports", time.monotonic() - begin.began)]
    try:
        link.send(Stage("decisions"))
        clock, serve = time.monotonic(), begin.config.serve
        decided = decide(begin.config, Path(begin.default))
        stages.append(("decisions", time.monotonic() - clock))
        started = start(
            decided,
            link.words if begin.words else lambda: None,
            queue=serve.queue,
            queue_tokens=serve.queue_tokens,
            stage=lambda name: link.send(Stage(name)),
        )
    except RadixmeshError as error:
        link.send(Failed(error))
    except BaseException as error:  # noqa: BLE001  (the client raises it)
        traceback.print_exc()
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        link.send(Failed(RadixmeshError(f"the engine could not start: {cause}")))
    else:
        return replace(started, info=replace(started.info, stages=(*stages, *started.info.stages)))
    return None


def _write(file: int, text: str) -> None:
    with suppress(OSError):
        os.write(file, text.encode())


if __name__ == "__main__":
    end(main())
