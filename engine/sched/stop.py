"""When a request ends: pure functions of its committed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How a request ended. matched: the id or the string that stopped it."""

    kind: Literal["length", "stop", "abort", "error"]
    matched: int | str | None = None


class Stopper(Protocol):
    """Looks for stop strings in the text that tokens make."""

    matched: str | None

    def feed(self, tokens: Sequence[int]) -> int | None:
        """How many of these new tokens belong to the output if a stop string was completed, the completing one
        included; else None."""
        ...


def stopping(params: SamplingParams, eos: frozenset[int]) -> frozenset[int]:
    """Ids that end a request."""
    return frozenset(params.stop_token_ids) if params.ignore_eos else eos.union(params.stop_token_ids)


def ending(
    new: Sequence[int], before: int, room: int, params: SamplingParams, eos: frozenset[int], stopper: Stopper | None
) -> tuple[int, Finish | None]:
    """How many of the `new` tokens to keep, and whether the request ends with the last of them.

    before: tokens made earlier. room: tokens that may be made in all.
    """
    keep, finish = min(len(new), room - before), None
    if before + len(new) >= room:
        finish = Finish(kind="length")
    ids = stopping(params, eos)
    for i, token in enumerate(new[:keep]):
        if token in ids:
            keep, finish = i + 1, Finish(kind="stop", matched=token)
            break
    if stopper is not None:
        at = stopper.feed(new[:keep])
        # An id that stops at the same token wins: its text is not part of the answer.
        if at is not None and (at < keep or finish is None or finish.kind == "length"):
            keep, finish = at, Finish(kind="stop", matched=stopper.matched)
    return keep, finish
