"""In which order waiting requests are seated."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from math import floor

from engine.cache.node import common
from engine.sched.request import KEY_BYTES, Run

POLICIES = ("lpm", "fcfs", "dfs-weight")
WINDOW = 128
"""A step looks at this many waiting requests, the first by rank; the others wait for their turn to be looked at."""
LOOKUPS = 2
"""What a request has in the cache is looked up when it enters the window; so many of the window anew in each step."""


def rank(priority: int, now: float, order: int, ageing: float) -> tuple[float, int]:
    """Place among those that wait, lowest first: by effective priority, then arrival.

    The effective priority grows by one with each `ageing` seconds of waiting (0 = never). It grows as fast for all, so
    that their order never changes, and a rank is made once: -rank[0] + now / ageing is the effective priority.
    """
    return (now / ageing if ageing else 0.0) - priority, order


class Order:
    """A policy. cached: looks up how many tokens of a run the prefix cache holds.

    All seat by effective priority first, in whole steps. Within one step: "fcfs": by arrival. "lpm": longest cached
    prefix, then arrival. "dfs-weight": the prompts are the leaves of a tree; depth first, the heaviest branch first.
    """

    def __init__(self, policy: str, ageing: float, cached: Callable[[Run], int]) -> None:
        self.policy, self.ageing, self.cached = policy, ageing, cached
        self._turn = 0

    def sort(self, window: Sequence[Run], now: float) -> Sequence[Run]:
        """window: the first that wait, by rank. First to be seated first."""
        if self.policy == "fcfs" or len(window) < 2:
            return window
        past = now / self.ageing if self.ageing else 0.0
        if self.policy == "lpm":
            self._look(window)
            keyed = [(-floor(past - run.rank[0]), -run.hint, run.rank, run) for run in window]
        else:
            place = {run: i for i, run in enumerate(by_weight(window))}
            keyed = [(-floor(past - run.rank[0]), place[run], run.rank, run) for run in window]
        keyed.sort()  # no two ranks are the same, so runs are never compared
        return [run for *_, run in keyed]

    def _look(self, window: Sequence[Run]) -> None:
        """Look up what was never looked up, and the next few."""
        for _ in range(LOOKUPS):
            self._turn = (self._turn + 1) % len(window)
            window[self._turn].hint = -1
        for run in window:
            if run.hint < 0:
                run.hint = self.cached(run)


def by_weight(runs: Sequence[Run]) -> list[Run]:
    """Depth first through the tree of the runs' prompts, the branch with most of them first (SGLang's dfs-weight, here
    over whole prompts, cached or not). A prompt that others go on from comes before them."""
    out: list[Run] = []
    todo = [(branch, 0) for branch in _lightest_first((run.request.namespace, run) for run in runs)]
    while todo:
        branch, at = todo.pop()
        if len(branch) == 1:
            out += branch
            continue
        low, high = min(r.key for r in branch), max(r.key for r in branch)
        at += common(low[at:], high[at:], KEY_BYTES)  # all share what the first and the last by alphabet do
        out += [run for run in branch if len(run.key) == at]
        going = [(run.key[at : at + KEY_BYTES], run) for run in branch if len(run.key) > at]
        todo += [(b, at) for b in _lightest_first(going)]
    return out


def _lightest_first(keyed: Iterable[tuple[Hashable, Run]]) -> list[list[Run]]:
    """Runs by key, those with the fewest runs first, and of these what came last."""
    branches: dict[Hashable, list[Run]] = {}
    for key, run in keyed:
        branches.setdefault(key, []).append(run)
    return sorted(branches.values(), key=lambda b: (-len(b), b[0].rank), reverse=True)
