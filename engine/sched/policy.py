"""In which order waiting requests are seated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.sched.request import Run

POLICIES = ("lpm", "fcfs")
LOOKED_UP = 128
"""Longest-prefix order looks up this many waiting requests a step; the rest keep their order of arrival."""


def order(policy: str, waiting: Sequence[Run], cached: Callable[[Run], int]) -> list[Run]:
    """Waiting runs, first to be seated first. cached: tokens of a run that the prefix cache holds.

    "fcfs": by priority, then arrival. "lpm": by priority, then longest cached prefix, then arrival.
    """
    runs = sorted(waiting, key=lambda r: (-r.request.priority, r.order))
    if policy == "fcfs" or len(runs) < 2:
        return runs
    head = [(-r.request.priority, -cached(r), r.order, r) for r in runs[:LOOKED_UP]]
    return [r for *_, r in sorted(head, key=lambda t: t[:3])] + runs[LOOKED_UP:]
