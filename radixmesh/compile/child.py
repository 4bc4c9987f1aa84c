"""The process that compiles: `python -m radixmesh.compile.child`, with backends.target.SETTINGS in its environment.

Read: one line of JSON {"topology", "only", "bundle"}, then engine.run.wire.Open. Written: a line of JSON a record.
"""

from __future__ import annotations

import json
import sys
import threading

from backends.target import examine
from engine.errors import RadixmeshError
from engine.run import wire

STACK = 256 << 20
"""Bytes of a compiling thread's stack: for 256 devices XLA's recursion overflows the usual 8 MiB."""


def main() -> None:
    """Answer the one request on standard input."""
    threading.stack_size(STACK)
    asked, opened = json.loads(sys.stdin.buffer.readline()), wire.decode(sys.stdin.buffer.read())
    try:
        for record in examine(opened.spec, opened.config, asked["topology"], asked["only"], asked["bundle"]):
            print(json.dumps(record), flush=True)
    except RadixmeshError as error:
        print(json.dumps({"refused": str(error), "field": error.field}), flush=True)


if __name__ == "__main__":
    main()
