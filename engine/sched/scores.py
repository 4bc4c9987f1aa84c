"""Logprobs on their way from the device to a face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from backends.api.step import Logprobs


class Score(NamedTuple):
    """Of one token: its own logprob, and (id, logprob) of the likeliest, likeliest first."""

    own: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Logprobs of N tokens, packed little-endian, so that a message stays small: own float32[N]; ids int32[N, k] and
    top float32[N, k] of the k likeliest."""

    own: bytes = b""
    ids: bytes = b""
    top: bytes = b""

    @classmethod
    def of(cls, given: Logprobs, count: int) -> Scores:
        """The first `count` tokens of what a step returned for a row."""
        return cls(
            own=np.asarray(given.own[:count], "<f4").tobytes(),
            ids=np.asarray(given.ids[:count], "<i4").tobytes(),
            top=np.asarray(given.top[:count], "<f4").tobytes(),
        )

    def __len__(self) -> int:
        return len(self.own) // 4

    def __add__(self, more: Scores) -> Scores:
        return Scores(own=self.own + more.own, ids=self.ids + more.ids, top=self.top + more.top)

    def rows(self) -> list[Score]:
        """Token by token."""
        count = len(self)
        own = np.frombuffer(self.own, "<f4").tolist()
        ids = np.frombuffer(self.ids, "<i4").reshape(count, -1).tolist() if count else []
        top = np.frombuffer(self.top, "<f4").reshape(count, -1).tolist() if count else []
        return [Score(o, tuple(zip(i, t, strict=True))) for o, i, t in zip(own, ids, top, strict=True)]
