"""Two readings of one prompt against each other: value by value, then token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.api.ties import first_difference, near_tie
from radixmesh.parity.readings import Reading
from radixmesh.parity.thresholds import Thresholds, thresholds

FLOAT32 = thresholds("float32", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far one named value is from the judge's. worst: max |difference|; allowed: what it may be."""

    name: str
    worst: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.worst <= self.allowed  # False for NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One subject against the judge. first: the first value out of tolerance. differs: index of the first greedy
    token that differs; tie: whether the judge's two best were so near there that it may."""

    name: str
    gaps: tuple[Gap, ...]
    std: float
    first: str | None
    differs: int | None
    tie: bool

    @property
    def ok(self) -> bool:
        return self.first is None and (self.differs is None or self.tie)


def compare(judge: Reading, subject: Reading, limits: Thresholds = FLOAT32) -> Verdict:
    """Value by value in the order of computation, then the greedy tokens by the near-tie rule."""
    gaps = []
    for name, right in judge.values.items():
        worst = float(np.abs(right - subject.values[name]).max())
        allowed = limits.value * max(1.0, float(right.std())) + limits.peak * float(np.abs(right).max())
        gaps.append(Gap(name=name, worst=worst, allowed=allowed))
    differs = first_difference(judge.tokens, subject.tokens)
    return Verdict(
        name=subject.name,
        gaps=tuple(gaps),
        std=float(judge.values["logits"].std()),
        first=next((g.name for g in gaps if not g.ok), None),
        differs=differs,
        tie=differs is not None and near_tie(judge.margins[differs], gaps[-1].worst),
    )
