"""A backend that is several processes, one for each device of a mesh: engine.run.worker, which this starts.

Every process gets the same calls in the same order over a unix socket of its own, in a private folder, and computes its
part; they sum and join among themselves (backends.torch.comm). Rank 0 sends results, the others a digest of theirs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import zmq

from backends.api.limits import Limits
from backends.api.protocol import Status
from backends.api.step import U32, ScheduleStep, StepResult, Ticket
from backends.api.turns import Turns
from engine.config import Resolved
from engine.errors import BackendLost, ConfigError, ModelError, RadixmeshError
from engine.model.checkpoint import Checkpoint
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource
from engine.run import wire
from engine.run.ipc import Malformed
from engine.run.spawn import bind, spawn

LOOK_MS = 50
"""How often a backend that waits looks whether its processes live."""
OPEN_SECONDS = 600.0
GRACE_SECONDS = 5.0
"""That closing gives the processes before they are killed."""
BLAME_SECONDS = 2.0
"""After a failure, how long to wait whether another process, that it was waiting for, turns out to be dead."""
PROGRAM = ("-m", "engine.run.worker")
"""Arguments of python: a process."""


class RemoteBackend:
    """backends.api.protocol.Backend on config.mesh.size processes. One thread calls it, but any may ask for its status.

    A mesh does not outlive a failure: where one process fails, the others wait in a sum for what never comes. So a
    process that fails, dies, is late or disagrees is BackendLost, which names its rank, and ends them all.
    program: arguments of python, a process. Raises ConfigError as a process raised it.
    """

    def __init__(self, spec: ModelSpec, config: Resolved, *, program: Sequence[str] = PROGRAM) -> None:
        self.closed = False
        self._crew = _Crew(config.mesh.size, program)
        self._finalizer = weakref.finalize(self, self._crew.end, 0.0)
        try:
            self._tell(wire.Open(spec=spec, config=config))
            opened = self._hear(OPEN_SECONDS)
        except BaseException:
            self.close()
            raise
        self.limits: Limits = opened[0].limits
        self._status: Status = opened[0].status
        self._turns = Turns(self.limits)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._crew.processes]

    def load(self, weights: WeightSource, version: int = 0) -> None:
        """Take weights. A checkpoint's files are opened by each process, which reads its part; any other source is read
        here. Raises ModelError naming a tensor, and then every process has kept the old ones."""
        self._open()
        folder = str(weights.path) if isinstance(weights, Checkpoint) else None
        self._tell(wire.Load(folder=folder, version=version))
        self._status = self._hear(None, weights)[0].status
        self._turns.loaded = True

    def warmup(self) -> None:
        """Every process warms up."""
        self._open()
        self._tell(wire.Warm())
        self._status = self._hear(None)[0].status

    def forward(self, step: ScheduleStep) -> Ticket:
        """Check the step and send it; waits for nobody."""
        self._open()
        dead = self._crew.dead()
        if dead:
            self._lose(dead)
        self._turns.forward(step)
        self._tell(wire.Forward(step=step))
        return step.step

    def sample(self, ticket: Ticket, masks: U32 | None = None) -> None:
        """Every process chooses the same tokens."""
        self._open()
        self._turns.sample(ticket, masks)
        self._tell(wire.Sample(ticket=ticket, masks=masks))

    def collect(self, ticket: Ticket, timeout: float = 60.0) -> StepResult:
        """Wait for the oldest step of every process. timeout: seconds."""
        self._open()
        self._turns.collect(ticket)
        self._tell(wire.Collect(ticket=ticket, timeout=timeout))
        answers = self._hear(timeout + GRACE_SECONDS)  # each has the deadline itself
        for rank, answer in enumerate(answers):
            if answer.digest != answers[0].digest:
                self._lose(f"rank {rank} chose other tokens than rank 0 in step {ticket}")
        result: StepResult = answers[0].result
        return result

    def status(self) -> Status:
        """How rank 0 stood when it was last loaded or warmed up; bytes are of one device."""
        status, size = self._status, self._crew.size
        memory = dict.fromkeys(status.memory, 0) if self.closed else status.memory
        return replace(
            status, ready=status.ready and not self.closed, device=f"{size} x {status.device}", memory=memory
        )

    def close(self) -> None:
        """End the processes."""
        if not self.closed:
            self.closed = True
            self._finalizer.detach()
            self._crew.end(GRACE_SECONDS)

    def _open(self) -> None:
        if self.closed:
            raise BackendLost("the backend is closed")

    def _tell(self, message: Any, rank: int | None = None) -> None:
        """To one process, or all."""
        try:
            self._crew.tell(message, rank)
        except zmq.Again:
            self._lose(self._crew.blame() or "a process is gone")

    def _hear(self, seconds: float | None, weights: WeightSource | None = None) -> list[Any]:
        """The answer of every process, by rank. weights: what they may ask to be read meanwhile; then an error is
        raised once all have answered, and otherwise ends them all."""
        answers: dict[int, Any] = {}
        start = time.monotonic()
        while len(answers) < self._crew.size:
            said = self._crew.hear()
            for rank, message in said:
                if isinstance(message, wire.Read) and weights is not None:
                    self._tell(_read(weights, message), rank)
                elif isinstance(message, wire.Raised) and weights is None:
                    self._fail(rank, message.error)
                else:
                    answers[rank] = message
            if said:
                continue
            dead = self._crew.dead()
            if dead:
                self._lose(dead)
            if seconds is not None and time.monotonic() - start > seconds:
                late = ", ".join(str(rank) for rank in range(self._crew.size) if rank not in answers)
                self._lose(f"rank {late} gave no answer after {seconds:g} s")
        raised = {rank: a.error for rank, a in sorted(answers.items()) if isinstance(a, wire.Raised)}
        if raised and (len(raised) < self._crew.size or not all(isinstance(e, ModelError) for e in raised.values())):
            rank, error = next(iter(raised.items()))
            self._lose(f"rank {rank} could not take the weights that others took: {error}")
        if raised:
            raise next(iter(raised.values()))
        return [answers[rank] for rank in range(self._crew.size)]

    def _fail(self, rank: int, error: RadixmeshError) -> NoReturn:
        """One process failed; what it waited for may be another one that is dead."""
        if isinstance(error, ConfigError):
            self.close()
            raise error
        self._lose(self._crew.blame() or f"rank {rank} failed: {error}")

    def _lose(self, why: str) -> NoReturn:
        self.closed = True
        self._finalizer.detach()
        self._crew.end(0.0)
        raise BackendLost(f"the mesh is lost: {why}")


class _Crew:
    """The processes and their sockets."""

    def __init__(self, size: int, program: Sequence[str]) -> None:
        self.size = size
        self.processes: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.mkdtemp(prefix="radixmesh-")
        self._context, self._poller = zmq.Context(), zmq.Poller()
        self._sockets: list[zmq.Socket[bytes]] = []
        try:
            for rank in range(size):
                self._sockets.append(bind(self._context, self._folder, f"rank-{rank}"))
                self._poller.register(self._sockets[rank], zmq.POLLIN)
            for rank in range(size):
                self.processes.append(spawn([*program, self._folder, str(rank), str(size), str(os.getpid())]))
            self._meet()
        except BaseException:
            self.end(0.0)
            raise

    def tell(self, message: Any, rank: int | None = None) -> None:
        """Send to all, or to one. Never waits. Raises zmq.Again where nobody is there."""
        frame = wire.encode(message)
        for socket in self._sockets if rank is None else [self._sockets[rank]]:
            socket.send(frame, zmq.NOBLOCK)

    def hear(self) -> list[tuple[int, Any]]:
        """What processes say, for LOOK_MS at most: (rank, message)."""
        out = []
        ready = dict(self._poller.poll(LOOK_MS))
        for rank, socket in enumerate(self._sockets):
            if socket in ready:
                try:
                    out.append((rank, wire.decode(socket.recv())))
                except Malformed as error:
                    out.append((rank, wire.Raised(error=BackendLost(str(error)))))
        return out

    def dead(self) -> str:
        """Which process has ended and how, or ""."""
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code is None:
                continue
            if code < 0:
                hint = "; was memory short?" if code == -signal.SIGKILL else ""
                return f"the process of rank {rank} was killed by {signal.Signals(-code).name}{hint}"
            return f"the process of rank {rank} ended with exit code {code}; what it wrote to stderr says why"
        return ""

    def blame(self) -> str:
        """`dead`, after a while if need be."""
        start = time.monotonic()
        while not (dead := self.dead()) and time.monotonic() - start < BLAME_SECONDS:
            time.sleep(LOOK_MS / 1000)
        return dead

    def end(self, grace: float) -> None:
        """Tell all to close, and kill those that live after `grace` seconds. Nothing is left; harmless when done."""
        if grace:
            with suppress(zmq.ZMQError):
                self.tell(wire.Close())
        stop = time.monotonic() + grace
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, stop - time.monotonic()))
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _meet(self) -> None:
        """Wait until every process is connected."""
        stop = time.monotonic() + OPEN_SECONDS
        for socket in self._sockets:
            while not socket.poll(LOOK_MS, zmq.POLLOUT):
                dead = self.dead() or ("a process did not start in time" if time.monotonic() > stop else "")
                if dead:
                    raise BackendLost(f"the mesh could not start: {dead}")


def _read(weights: WeightSource, asked: wire.Read) -> Any:
    """An array, or why there is none."""
    try:
        return weights.read(asked.name, tuple(slice(start, stop) for start, stop in asked.part))
    except RadixmeshError as error:
        return wire.Raised(error=error)
