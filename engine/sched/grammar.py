"""What the scheduler asks of a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from backends.api.step import U32


class Grammar(Protocol):
    """The state of one request's structured output; it advances with committed tokens only. It is one source of a
    request's masks (engine.sched.masks), and one that waits for them."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Advance over tokens that were committed."""
        ...

    def mask(self) -> U32:
        """Allowed next tokens: uint32[ceil(vocab / 32)], bit v % 32 of word v // 32. Only read."""
        ...
