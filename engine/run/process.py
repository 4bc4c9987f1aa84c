"""The client of an engine in a process of its own, which it starts: engine.run.child.

Two zmq PAIR sockets, one each way, each used by one thread at a time, on unix sockets in a private folder that is gone
once both ends are connected.
"""

from __future__ import annotations

import atexit
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import zmq

from engine.config import Config
from engine.errors import BackendLost, RadixmeshError
from engine.run.ipc import (
    ORDERS,
    REPORTS,
    Begin,
    Failed,
    Malformed,
    Ready,
    Shutdown,
    Stage,
    decode_report,
    encode_order,
)
from engine.run.messages import Flush, Info, Load, Message, News, Submit
from engine.run.spawn import bind, spawn
from engine.sched.request import Output
from engine.sched.stop import Finish
from engine.text.words import Words

LOOK_MS = 100
"""How often a client that hears nothing looks whether its engine lives."""
PROGRAM = ("-m", "engine.run.child")
"""Arguments of python: the engine's process."""


class ProcessClient:
    """engine.run.client.Client on a process of its own, which probes the device and decides the configuration.

    default: folder of the model when config names none. stage: told, on the caller's thread, as each stage of the start
    begins. words: of its tokenizer, which is opened meanwhile; None: token ids only. grace: seconds that shutdown gives
    the engine before it is killed. program: arguments of python.

    Raises ConfigError or ModelError as the engine raised it, BackendLost when its process ends before it is ready.
    """

    def __init__(
        self,
        config: Config,
        default: Path,
        *,
        words: Future[Words] | None = None,
        stage: Callable[[str], None] = lambda name: None,
        grace: float = 10.0,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self._grace, self._program = grace, program
        self._start: queue.SimpleQueue[Stage | Ready | BaseException] = queue.SimpleQueue()
        self._take: Callable[[News], None] | None = None
        self._early: list[News] = []
        self._open: set[str] = set()
        self._lost: RadixmeshError | None = None
        self._closing = False
        self._said, self._heard = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.mkdtemp(prefix="radixmesh-")
        self._context = zmq.Context()
        try:
            self._orders, self._reports = (bind(self._context, self._folder, name) for name in (ORDERS, REPORTS))
        except BaseException:
            self._clean()
            raise
        self._words = words
        begin = Begin(config=config, default=str(default), words=words is not None, began=time.monotonic())
        frame = encode_order(begin)
        self._thread = threading.Thread(target=self._run, args=(frame,), name="radixmesh-client", daemon=True)
        self._thread.start()
        atexit.register(self.shutdown)
        self._info = self._wait(stage)

    @property
    def info(self) -> Info:
        """What the engine is."""
        return self._info

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        assert self._process is not None
        return self._process.pid

    def listen(self, take: Callable[[News], None]) -> None:
        """Who hears the news, on a thread of the client's; what came before, on this one."""
        with self._heard:
            self._take = take
            for news in self._early:
                take(news)
            self._early.clear()

    def say(self, message: Message) -> None:
        """Raises BackendLost when the engine is gone, InvalidRequest for a request that can't cross."""
        frame = encode_order(message)
        with self._said:
            if self._lost is not None:
                raise self._lost
            try:
                self._orders.send(frame, zmq.NOBLOCK)
            except zmq.Again as error:  # nobody is connected
                raise BackendLost("the engine's process is gone") from error
            if isinstance(message, Submit):
                self._open.add(message.request.rid)
            elif isinstance(message, Flush | Load):
                self._open.add(message.rid)

    def shutdown(self) -> None:
        """Stop the loop after the step it is in; open requests end with BackendLost. Past `grace` the process is
        killed. Harmless when it was done."""
        with self._said:
            if self._lost is None and not self._closing:
                with suppress(zmq.Again):
                    self._orders.send(encode_order(Shutdown()), zmq.NOBLOCK)
            self._closing = True
        self._thread.join(self._grace)
        self.kill()
        atexit.unregister(self.shutdown)

    def kill(self) -> None:
        """End the engine's process at once."""
        with self._said:
            self._closing = True
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
        self._thread.join()

    def _wait(self, stage: Callable[[str], None]) -> Info:
        """Until the engine is ready. Nothing of it is left when this raises."""
        try:
            while not isinstance(said := self._start.get(), Ready):
                if isinstance(said, BaseException):
                    raise said
                stage(said.name)
        except BaseException:
            self.kill()
            atexit.unregister(self.shutdown)
            raise
        return said.info

    def _run(self, begin: bytes) -> None:
        """The client's thread: starts the process and hears it until it is gone."""
        reason: RadixmeshError = BackendLost("the engine's client died; its traceback says why")
        last, write = os.pipe()
        os.set_blocking(last, False)
        try:
            try:
                with self._said:
                    self._process = None if self._closing else self._spawn(write)
            finally:
                os.close(write)
            if self._process is not None:
                self._greet(self._process, begin)
                self._hear(self._process)
                reason = self._reason(self._process, last)
        except RadixmeshError as error:
            reason = error
        except BaseException as error:
            self._start.put(error)
            raise
        finally:
            os.close(last)
            if self._process is not None:
                if self._process.poll() is None:
                    self._process.kill()
                self._process.wait()
            self._start.put(reason)
            try:
                self._lose(reason)
            finally:
                self._clean()

    def _spawn(self, last: int) -> subprocess.Popen[bytes]:
        """Start the process from this thread: where the parent's death ends the child, it is that of the thread which
        started it. last: a pipe for its last words."""
        return spawn([*self._program, self._folder, str(os.getpid()), str(last)], keep=[last])

    def _greet(self, process: subprocess.Popen[bytes], begin: bytes) -> None:
        """Send the first order as soon as there is somebody to take it."""
        while process.poll() is None:
            if self._orders.poll(LOOK_MS, zmq.POLLOUT):
                self._orders.send(begin)
                return

    def _hear(self, process: subprocess.Popen[bytes]) -> None:
        """Take what the engine says until its process has ended and all is read. Raises why it could not start,
        or its tokenizer not be opened."""
        words, decided = self._words, False
        while True:
            # a model that is not there is told as the engine tells it, which looks at all of it
            if words is not None and words.done() and (decided or words.exception() is None):
                frame = encode_order(words.result())
                with self._said, suppress(zmq.Again):  # again: it is gone, or has yet to connect
                    self._orders.send(frame, zmq.NOBLOCK)
                    words = None
            ended = process.poll() is not None
            if not self._reports.poll(LOOK_MS):
                if ended:
                    return
                continue
            try:
                report = decode_report(self._reports.recv())
            except Malformed as error:
                raise BackendLost(f"the engine's process said what can't be read: {error}") from error
            if isinstance(report, News):
                self._tell(report)
            elif isinstance(report, Failed):
                raise report.error
            else:
                shutil.rmtree(self._folder, ignore_errors=True)  # both sockets are connected
                decided = decided or report == Stage("device")
                self._start.put(report)

    def _tell(self, news: News) -> None:
        for output in news.outputs:
            if output.finish is not None:
                with self._said:
                    self._open.discard(output.rid)
        if news.lost is not None:
            self._lose(news.lost, news)
        else:
            self._pass(news)

    def _lose(self, reason: RadixmeshError, news: News | None = None) -> None:
        """The engine is gone: nothing is left without an answer, neither what ran nor what was said and not heard."""
        with self._said:
            if self._lost is not None:
                return
            self._lost = reason
            rids, self._open = sorted(self._open), set()
        unheard = [Output(rid=rid, finish=Finish(kind="error"), error=reason) for rid in rids]
        self._pass(News(outputs=(*(news.outputs if news else ()), *unheard), lost=reason))

    def _pass(self, news: News) -> None:
        with self._heard:
            if self._take is None:
                self._early.append(news)
            else:
                self._take(news)

    def _reason(self, process: subprocess.Popen[bytes], last: int) -> BackendLost:
        """Why a process ended."""
        with suppress(BlockingIOError):
            words = os.read(last, 4096).decode(errors="replace")
            if words:
                return BackendLost(words)
        code = process.returncode
        if self._closing:
            return BackendLost("the engine was shut down")
        if code < 0:
            hint = "; was memory short?" if code == -signal.SIGKILL else ""
            return BackendLost(f"the engine's process was killed by {signal.Signals(-code).name}{hint}")
        return BackendLost(f"the engine's process ended with exit code {code}; what it wrote to stderr says why")

    def _clean(self) -> None:
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)
