"""How a process that another one started begins and ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End when the parent does. Where the system can't, somebody must look now and then whether it lives."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        sys.exit(0)


def end(code: int) -> NoReturn:
    """Leave without the interpreter's teardown: the backend is closed, and libraries take a while over nothing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
