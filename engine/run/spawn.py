"""How a process of ours is started, and the socket that it is met at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import zmq

from engine.errors import ConfigError


def bind(context: zmq.Context[zmq.Socket[bytes]], folder: str, name: str) -> zmq.Socket[bytes]:
    """This end of a PAIR, at a unix socket of a private folder. Raises ConfigError where none can be made."""
    path = os.path.join(folder, name)
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # what is said is bounded by what is open
    socket.linger = 0
    try:
        socket.bind(f"ipc://{path}")
    except zmq.ZMQError as error:
        raise ConfigError(
            f"no socket can be made at {path}: {error}; set TMPDIR to a folder with a short name, on a local disk",
            field="TMPDIR",
        ) from error
    return socket


def spawn(arguments: Sequence[str], keep: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start python with the same packages as here, in a group of its own: an interrupt from the terminal is the
    parent's to handle. keep: files that stay open."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=2,
        env=os.environ | {"PYTHONPATH": path},
        pass_fds=keep,
        process_group=0,
    )
