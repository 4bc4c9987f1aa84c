"""When two backends may put out different tokens: the near-tie rule, once, for every comparison.

At the first difference the reference's margin between its two best (noise included) must be under 10 times the measured
logit difference, in at most 1 sequence of 100; anything else is a fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backends.api.choice import Choice, choose, scaled, scored
from backends.api.step import F32

FACTOR = 10.0
SHARE = 0.01


def first_difference(reference: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, a missing one included; None where the sequences are equal."""
    for i, (a, b) in enumerate(zip(reference, other, strict=False)):
        if a != b:
            return i
    return None if len(reference) == len(other) else min(len(reference), len(other))


def margin(scores: F32) -> float:
    """Distance between the two largest of scores float32[V]. In units of a logit where they were not divided by a
    temperature; otherwise multiply by it."""
    second, best = np.partition(scores, -2)[-2:]
    return float(best - second)


def near_tie(margin: float, difference: float) -> bool:
    """Whether a margin (in logits) is small enough for a measured logit difference to turn the choice."""
    return margin < FACTOR * difference


def admissible(token: int, logits: F32, choice: Choice, position: int, difference: float) -> bool:
    """Whether a backend whose logits stand within `difference` of logits float32[V] may choose `token` here.

    Knows the filters too: a token on the edge of top-k, top-p or min-p may be in for one backend and out for the other.
    """
    if token == choose(logits, choice, position):
        return True
    values, within = scaled(logits, choice), FACTOR * difference / (choice.temperature or 1.0)
    loose, tight = scored(values, choice, position, within), scored(values, choice, position, -within)
    return bool(loose[token] > tight.max() - within)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """What a comparison of sequences found. equal, near: counts. faults: (sequence, index of the first difference)."""

    equal: int
    near: int
    faults: tuple[tuple[int, int], ...]

    @property
    def ok(self) -> bool:
        """No fault, and no more near-ties than 1 sequence of 100, rounded up."""
        return not self.faults and self.near <= math.ceil(SHARE * (self.equal + self.near))


def judge(
    reference: Sequence[Sequence[int]],
    other: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
    difference: float,
) -> Ties:
    """Compare sequences of tokens. margins: of the reference, in logits, one a token. difference: measured, in logits.

    What follows a first difference is not compared. A sequence that is longer than the other is a fault.
    """
    near, faults = 0, []
    for i, (a, b, gaps) in enumerate(zip(reference, other, margins, strict=True)):
        at = first_difference(a, b)
        if at is None:
            continue
        if at < min(len(a), len(b)) and near_tie(gaps[at], difference):
            near += 1
        else:
            faults.append((i, at))
    return Ties(equal=len(reference) - near - len(faults), near=near, faults=tuple(faults))
