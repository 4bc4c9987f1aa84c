"""One line of JSON for each request that ended."""

from __future__ import annotations

import logging
import time
from typing import TextIO

import msgspec

from engine.serve.call import Record

LOGGER = logging.getLogger("radixmesh.requests")


def log(record: Record) -> None:
    """Write a record at level INFO of the logger "radixmesh.requests". Times are seconds; `time` is the wall clock."""
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info(msgspec.json.encode(line(record)).decode())


def line(record: Record) -> dict[str, object]:
    """What is written."""
    return {
        "time": round(time.time(), 3),
        "request_id": record.call,
        "rid": record.rid,
        "route": record.route,
        "reason": record.reason,
        "error": record.error,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.made_tokens,
        "queue": round(record.queue, 6),
        "prefill": round(record.prefill, 6),
        "decode": round(record.decode, 6),
        "total": round(record.total, 6),
    }


def show(stream: TextIO) -> logging.Handler:
    """Send the lines, and nothing but them, to a stream. Gives the handler, for who wants to take it away again."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    return handler
