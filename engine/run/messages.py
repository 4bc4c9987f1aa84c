"""What may be said to the loop. Outputs come back as engine.sched.request.Output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from engine.sched.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Complete a prompt."""

    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """End a request now."""

    rid: str


Message: TypeAlias = Submit | Abort
