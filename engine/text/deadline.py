"""Ends code that runs for too long on this thread, such as a template that loops."""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType

TICK = 0.1
"""Seconds between two looks of the watch."""


class Late(BaseException):
    """Raised by the watch inside the code that is late; no `except Exception` of that code takes it."""


class Deadline:
    """A context that raises TimeoutError when its Python code runs for longer than so many seconds.

    One thread watches all of them. A single call of C code is let end first.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        WATCH.add(self._thread, time.monotonic() + self._seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            WATCH.drop(self._thread)
        except Late:  # it came while it was being called off
            WATCH.drop(self._thread)
            kind = Late
        if kind is not None and issubclass(kind, Late):
            raise TimeoutError(f"not done after {self._seconds:g} s") from None


class Watch:
    """Looks at the deadlines of all threads while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, float] = {}
        self._some = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, thread: int, when: float) -> None:
        """Watch a thread."""
        with self._lock:
            self._open[thread] = when
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="radixmesh-deadlines", daemon=True)
                self._thread.start()
        self._some.set()

    def drop(self, thread: int) -> None:
        """Watch it no more, and take back what was not raised yet."""
        with self._lock:
            self._open.pop(thread, None)
            _raise(thread, None)

    def _run(self) -> None:
        while True:
            self._some.wait()
            with self._lock:
                now = time.monotonic()
                for thread, when in self._open.items():
                    if now > when:
                        _raise(thread, Late)  # again at the next look, should the code have swallowed it
                if not self._open:
                    self._some.clear()
            time.sleep(TICK)


def _raise(thread: int, what: type[BaseException] | None) -> None:
    """Raise in another thread before its next line; None takes back what is not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None if what is None else ctypes.py_object(what))


WATCH = Watch()
