"""What jax says that it compiles, heard where it matters: by the thread that compiles, while somebody listens there."""

from __future__ import annotations

import threading
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
"""Also said of a program that jax's cache had."""
FROM_CACHE = "/jax/compilation_cache/cache_hits"


class Heard:
    """A context: counts what its thread compiles inside of it. compiles: programs, hits: of them from jax's cache."""

    __slots__ = ("compiles", "hits")

    def __init__(self) -> None:
        self.compiles = self.hits = 0

    def __enter__(self) -> Heard:
        _EARS.heard = self
        return self

    def __exit__(self, *error: object) -> None:
        _EARS.heard = None


class _Ears(threading.local):
    heard: Heard | None = None


_EARS = _Ears()


def _event(name: str, **about: Any) -> None:
    if _EARS.heard is not None and name == FROM_CACHE:
        _EARS.heard.hits += 1


def _duration(name: str, seconds: float, **about: Any) -> None:
    if _EARS.heard is not None and name == COMPILED:
        _EARS.heard.compiles += 1


jax.monitoring.register_event_listener(_event)
jax.monitoring.register_event_duration_secs_listener(_duration)
