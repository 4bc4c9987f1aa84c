"""The loop on a thread of this process, and its client."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence

from backends.api.protocol import Backend
from engine.errors import BackendLost, RadixmeshError
from engine.run.loop import Loop
from engine.run.messages import Abort, Message, Submit
from engine.sched.request import Output, Request
from engine.sched.scheduler import Scheduler
from engine.sched.stop import Finish


class LocalClient:
    """Submits requests to a loop that runs on a thread of its own, and reads what comes back."""

    def __init__(self, scheduler: Scheduler, backend: Backend) -> None:
        self._loop = Loop(scheduler, backend, self._emit)
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._streams: dict[str, queue.SimpleQueue[Output]] = {}
        self._lost: RadixmeshError | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="radixmesh-loop", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest or ContextOverflow before anything is enqueued."""
        self._loop.scheduler.check(request)
        with self._lock:
            if self._lost is not None:
                raise self._lost
            self._streams[request.rid] = queue.SimpleQueue()
            self._inbox.put(Submit(request=request))

    def abort(self, rid: str) -> None:
        """End a request; its stream then ends with finish kind "abort". Harmless when it has ended."""
        self._inbox.put(Abort(rid=rid))

    def outputs(self, rid: str) -> Generator[Output, None, None]:
        """What a submitted request makes, until it ends. Closing the iterator early aborts the request."""
        stream, ended = self._streams[rid], False
        try:
            while not ended:
                output = stream.get()
                ended = output.finish is not None
                yield output
        finally:
            del self._streams[rid]
            if not ended:
                self.abort(rid)

    def shutdown(self) -> None:
        """Stop the loop after the step it is in; open requests end with BackendLost."""
        self._inbox.put(None)
        self._thread.join()

    def _emit(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.rid)
            if stream is not None:
                stream.put(output)

    def _run(self) -> None:
        reason: RadixmeshError = BackendLost("the engine's loop died; its traceback says why")
        try:
            while self._drain():
                if self._loop.busy:
                    self._loop.turn()
            reason = BackendLost("the engine was shut down")
        except BackendLost as error:
            reason = error
        finally:
            self._close(reason)

    def _drain(self) -> bool:
        """Take what was said; sleep when there is nothing else to do. False: shut down."""
        messages: list[Message] = []
        try:
            while True:
                message = self._inbox.get(block=not self._loop.busy and not messages)
                if message is None:
                    return False
                messages.append(message)
        except queue.Empty:
            self._loop.take(messages)
        return True

    def _close(self, reason: RadixmeshError) -> None:
        """Nothing is left without an answer: neither what runs nor what was said and not heard."""
        with self._lock:
            self._lost = reason
            unheard: list[Message | None] = []
            while not self._inbox.empty():
                unheard.append(self._inbox.get())
        self._emit(self._loop.scheduler.lost(reason))
        rids = [m.request.rid for m in unheard if isinstance(m, Submit)]
        self._emit([Output(rid=rid, finish=Finish(kind="error"), error=reason) for rid in rids])
