"""One of the processes that are a backend together: `python -m engine.run.worker`, which engine.run.remote starts."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

from backends import open_backend
from backends.api.protocol import Backend, Member
from engine.errors import BackendLost, RadixmeshError
from engine.model.checkpoint import Checkpoint
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource
from engine.run import wire
from engine.run.lifeline import die_with, end

LOOK_MS = 1000
"""How often a worker that hears nothing looks whether its parent lives, where the system doesn't see to it."""
LINGER_MS = 2000


class Link:
    """The worker's end of its socket, `rank-i` in the folder."""

    def __init__(self, member: Member, parent: int) -> None:
        self._parent = parent
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.connect(f"ipc://{os.path.join(member.folder, f'rank-{member.rank}')}")

    def receive(self) -> Any:
        """The next message; Close when the parent is gone."""
        while not self._socket.poll(LOOK_MS):
            if os.getppid() != self._parent:
                return wire.Close()
        return wire.decode(self._socket.recv())

    def send(self, message: Any) -> None:
        """Never waits."""
        self._socket.send(wire.encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """Wait until what was sent is read."""
        self._context.destroy(linger=LINGER_MS)


class Asked:
    """A WeightSource whose numbers the parent reads."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        """Raises what the parent's source raised."""
        self._link.send(wire.Read(name=name, part=tuple((s.start, s.stop) for s in part)))
        answer = self._link.receive()
        if isinstance(answer, wire.Raised):
            raise answer.error
        if not isinstance(answer, np.ndarray):
            raise BackendLost(f"{name}: the parent answered {type(answer).__name__}")
        return answer


class Worker:
    """Does as it is told, one message after the other. failed: why a step that nobody waits for went wrong."""

    def __init__(self, member: Member, link: Link) -> None:
        self.member, self.link = member, link
        self.backend: Backend | None = None
        self.spec: ModelSpec | None = None
        self.failed: RadixmeshError | None = None

    def run(self) -> None:
        """Until it is told to close."""
        while not isinstance(message := self.link.receive(), wire.Close):
            waited = not isinstance(message, (wire.Forward, wire.Sample))
            try:
                answer = None if self.failed else self.do(message)
            except RadixmeshError as error:
                self.failed = error
            except Exception as error:  # noqa: BLE001  (the parent raises it)
                traceback.print_exc()
                cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                self.failed = BackendLost(cause)
            if waited:
                self.link.send(answer if self.failed is None else wire.Raised(error=self.failed))
                self.failed = None
        if self.backend is not None:
            self.backend.close()

    def do(self, message: Any) -> Any:
        """Do one thing, and give the answer."""
        if isinstance(message, wire.Open):
            self.spec = message.spec
            self.backend = open_backend(message.config.backend, message.spec, message.config, self.member)
            return wire.Opened(limits=self.backend.limits, status=self.backend.status())
        backend, spec = self.backend, self.spec
        if backend is None or spec is None:
            raise BackendLost("no backend is open")
        if isinstance(message, wire.Forward):
            return backend.forward(message.step)
        if isinstance(message, wire.Sample):
            return backend.sample(message.ticket, message.masks)
        if isinstance(message, wire.Collect):
            result = backend.collect(message.ticket, message.timeout)
            return wire.Collected(result=None if self.member.rank else result, digest=wire.digest(result))
        if isinstance(message, wire.Load):
            source: WeightSource = Checkpoint(message.folder, spec) if message.folder else Asked(self.link)
            backend.load(source, message.version)
        elif isinstance(message, wire.Warm):
            backend.warmup()
        else:
            raise BackendLost(f"{type(message).__name__} means nothing here")
        return wire.Done(status=backend.status())


def main() -> int:
    """Arguments: folder, rank, how many there are, process id of the parent."""
    folder, rank, size, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for name in (signal.SIGINT, signal.SIGTERM):  # the parent says when to end
        signal.signal(name, signal.SIG_IGN)
    die_with(parent)
    member = Member(rank=rank, size=size, folder=folder)
    link = Link(member, parent)
    try:
        Worker(member, link).run()
        return 0
    finally:
        link.close()


if __name__ == "__main__":
    end(main())
