"""An engine's process whose reference backend misbehaves: `python hanging.py HOW ARGUMENTS of engine.run.child`."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

from backends.reference.backend import ReferenceBackend
from engine.run import child

HOW = sys.argv.pop(1)
COLLECT = ReferenceBackend.collect


def collect(self: ReferenceBackend, *args: Any) -> Any:
    if HOW == "sleeps":
        time.sleep(1000)
    if HOW == "holds":  # a library that hangs and never lets go of the interpreter's lock
        ctypes.PyDLL(None).sleep(1000)
    if HOW == "exits":
        os._exit(7)
    if HOW == "raises":
        raise ZeroDivisionError("a fault of ours")
    return COLLECT(self, *args)


def load(self: ReferenceBackend, *args: Any) -> None:
    if HOW == "unready":
        time.sleep(1000)
    raise MemoryError("no room\nat all")


if __name__ == "__main__":
    ReferenceBackend.collect = collect  # type: ignore[method-assign]
    if HOW in ("unready", "unloadable"):
        ReferenceBackend.load = load  # type: ignore[method-assign]
    child.end(child.main())
