"""Ends the engine's process when it is stuck or nobody's: a thread that looks at the loop now and then."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from engine.run.loop import Loop

STUCK, ORPHAN = 3, 4
"""Exit codes."""


class Watchdog:
    """Looks whether the parent lives and, once `watch` named a loop, whether its last call of the backend came back.

    seconds: after which a call counts as stuck; a loop that is idle never is. parent: process id. tell: called with
    the reason before the process ends. All stacks are on stderr then.
    """

    def __init__(self, seconds: float, parent: int, tell: Callable[[str], None]) -> None:
        self._seconds, self._parent, self._tell = seconds, parent, tell
        self._loop: Loop | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="radixmesh-watchdog", daemon=True)
        self._thread.start()

    def watch(self, loop: Loop) -> None:
        """From now on."""
        self._arm()
        self._loop = loop

    def stop(self) -> None:
        """Look no more."""
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 4)):
            if os.getppid() != self._parent:
                os._exit(ORPHAN)
            if self._loop is not None:
                self._look(self._loop)
                self._arm()

    def _arm(self) -> None:
        """Python's threads stand still when a library hangs and holds the interpreter's lock; this timer does not."""
        faulthandler.dump_traceback_later(2 * self._seconds + 1, exit=True)

    def _look(self, loop: Loop) -> None:
        doing = loop.doing  # before `since`, which the loop sets first
        since = time.monotonic() - loop.since
        if doing == "idle" or since <= self._seconds:
            return
        faulthandler.dump_traceback(all_threads=True)
        reason = f"the engine was stuck: {doing}, after {since:.1f} s (serve.watchdog is {self._seconds:g})"
        print(f"radixmesh: {reason}; all stacks are above", file=sys.stderr, flush=True)
        self._tell(reason)
        os._exit(STUCK)
