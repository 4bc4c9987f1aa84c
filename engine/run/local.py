"""The loop on a thread of this process, and its client."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from engine.errors import RadixmeshError
from engine.run.loop import Carrier
from engine.run.messages import MOST, Flush, Info, Load, Message, News, Submit
from engine.run.start import Started
from engine.sched.request import Output
from engine.sched.stop import Finish


class LocalClient:
    """engine.run.client.Client on a thread of this process.

    begin: opens the engine. It runs on the loop's thread, as does every other call of the backend: a library that
    keeps a team of workers for each thread that calls it (OpenMP) then keeps one, and two teams on the same cores wait
    for each other (docs/decisions/0005-dtypes-on-cpu.md). Raises what begin raises.
    """

    def __init__(self, begin: Callable[[], Started]) -> None:
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._take: Callable[[News], None] | None = None
        self._early: list[News] = []
        self._lost: RadixmeshError | None = None
        self._lock = threading.Lock()
        opened: Future[tuple[Info, Carrier]] = Future()
        self._thread = threading.Thread(target=self._run, args=(begin, opened), name="radixmesh-loop", daemon=True)
        self._thread.start()
        self._info, self._carrier = opened.result()

    @property
    def info(self) -> Info:
        """What the engine is."""
        return self._info

    @property
    def carrier(self) -> Carrier:
        """The loop, to be looked at."""
        return self._carrier

    def listen(self, take: Callable[[News], None]) -> None:
        """Who hears the news, on the loop's thread; what came before, on this one."""
        with self._lock:
            self._take = take
            early, self._early = self._early, []
            for news in early:
                take(news)

    def say(self, message: Message) -> None:
        """Raises BackendLost when the loop is gone."""
        with self._lock:
            if self._lost is not None:
                raise self._lost
            self._inbox.put(message)

    def shutdown(self) -> None:
        """Stop the loop after the step it is in and close the backend; open requests end with BackendLost."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self, begin: Callable[[], Started], opened: Future[tuple[Info, Carrier]]) -> None:
        try:
            started = begin()
            carrier = Carrier(started, self._receive, self._send)
        except BaseException as error:  # noqa: BLE001  (the thread that waits gets it)
            opened.set_exception(error)
            return
        opened.set_result((started.info, carrier))
        carrier.run()

    def _receive(self, block: bool) -> Sequence[Message] | None:
        messages: list[Message] = []
        try:
            while len(messages) < MOST:
                message = self._inbox.get(block=block and not messages)
                if message is None and messages:
                    self._inbox.put(None)  # first what was said before it
                    return messages
                if message is None:
                    return None
                messages.append(message)
        except queue.Empty:
            pass
        return messages

    def _send(self, news: News) -> None:
        if news.lost is not None:  # nothing is left without an answer: neither what ran nor what was said and not heard
            with self._lock:
                self._lost = news.lost
            unheard: list[Output] = []
            while not self._inbox.empty():
                message = self._inbox.get()
                if isinstance(message, Submit | Flush | Load):
                    rid = message.request.rid if isinstance(message, Submit) else message.rid
                    unheard.append(Output(rid=rid, finish=Finish(kind="error"), error=news.lost))
            news = News(outputs=(*news.outputs, *unheard), lost=news.lost)
        with self._lock:
            take = self._take
            if take is None:
                self._early.append(news)
        if take is not None:
            take(news)
