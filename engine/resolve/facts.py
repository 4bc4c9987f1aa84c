"""What a resolver is given and what it gives: a device, and decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Facts of the device that a backend would run on; `backends.probe` finds them.

    backend, why: the backend that was chosen, and why. platform: "cpu", "gpu" or "tpu". kind: the device's name.
    memory_bytes: free memory of one device. bf16: whether it has bfloat16 instructions.
    """

    backend: str
    why: str
    platform: str
    kind: str
    count: int
    memory_bytes: int
    bf16: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One field of Resolved, its value, and why."""

    field: str
    value: Any
    why: str
