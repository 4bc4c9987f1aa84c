"""What the value of a key of the configuration may be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import field
from itertools import pairwise
from typing import Any, TypeAlias

from engine.errors import ConfigError

Check: TypeAlias = Callable[[str, Any], Any]
"""(key, value) -> the value as it is kept. Raises ConfigError naming the key."""

MOST = 2**31 - 1
MOST_BUCKETS = 12
"""Sizes that steps are padded to: each is a program."""


def fail(key: str, what: str) -> ConfigError:
    return ConfigError(f"{key}: {what}", field=key)


def text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise fail(key, f"must be a string, not {value!r}")
    return value


def address(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.startswith(("tcp://", "ipc://")):
        raise fail(key, f'must be an address such as "tcp://127.0.0.1:5557" or "ipc:///tmp/events", not {value!r}')
    return value


def flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise fail(key, f"must be true or false, not {value!r}")
    return value


def whole(low: int, high: int = MOST) -> Check:
    def check(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise fail(key, f"must be an integer, not {value!r}")
        if not low <= value <= high:
            raise fail(key, f"must be between {low} and {high}, not {value}")
        return value

    return check


def portion(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise fail(key, f"must be a number, not {value!r}")
    if not 0 < value <= 1:
        raise fail(key, f"must be above 0 and at most 1, not {value:g}")
    return float(value)


def one_of(names: tuple[str, ...]) -> Check:
    def check(key: str, value: Any) -> str:
        if value in names:
            return str(value)
        near = difflib.get_close_matches(str(value), names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise fail(key, f"must be one of {', '.join(names)}, not {value!r}{hint}")

    return check


def ladder(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise fail(key, f"must be a list of integers, not {value!r}")
    steps = tuple(whole(1)(key, v) for v in value)
    if any(a >= b for a, b in pairwise(steps)):
        raise fail(key, f"must rise, not {list(steps)}")
    if len(steps) > MOST_BUCKETS:
        raise fail(key, f"at most {MOST_BUCKETS} sizes, not {len(steps)}; radixmesh buckets chooses them from a log")
    return steps


def or_auto(check: Check) -> Check:
    """A key that is decided when it is left out or "auto"."""
    return lambda key, value: None if value == "auto" else check(key, value)


def checked(check: Check, default: Any) -> Any:
    """A field of a table, and what its values must pass."""
    return field(default=default, metadata={"check": check})
