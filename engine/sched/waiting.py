"""The runs that wait, in order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from engine.sched.request import Run


class Waiting:
    """Runs by rank. Those that wait for what another computes stand aside, with it, until they are called back.

    tokens: of what all of them must feed. Adding and removing search a sorted list and shift its pointers, which takes
    two microseconds with 10,000 in it.
    """

    __slots__ = ("_aside", "_ranks", "_runs", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self._ranks: list[tuple[float, int]] = []
        self._runs: list[Run] = []
        self._aside: dict[Run, None] = {}

    def __len__(self) -> int:
        return len(self._runs) + len(self._aside)

    def __iter__(self) -> Iterator[Run]:
        yield from self._runs
        yield from self._aside

    def first(self, count: int) -> list[Run]:
        """The first so many by rank, without those that stand aside."""
        return self._runs[:count]

    def add(self, run: Run) -> None:
        """Queue a run."""
        self.tokens += run.length
        self._insert(run)

    def remove(self, run: Run) -> None:
        """Take a run out, wherever it stands."""
        self.tokens -= run.length
        if run.leader is None:
            self._take(run)
        else:
            del self._aside[run], run.leader.followers[run]
            run.leader = None

    def follow(self, run: Run, leader: Run, upto: int) -> None:
        """Stand aside until the leader has committed `upto` positions, or is gone."""
        self._take(run)
        self._aside[run] = None
        run.leader = leader
        run.waits += 1
        leader.followers[run] = upto

    def call(self, leader: Run, settled: int | None = None) -> None:
        """Back into the queue: the followers for whom `settled` positions are enough; None: all."""
        for run, upto in list(leader.followers.items()):
            if settled is None or settled >= upto:
                del leader.followers[run], self._aside[run]
                run.leader = None
                self._insert(run)

    def _insert(self, run: Run) -> None:
        at = bisect_left(self._ranks, run.rank)
        self._ranks.insert(at, run.rank)
        self._runs.insert(at, run)

    def _take(self, run: Run) -> None:
        at = bisect_left(self._ranks, run.rank)
        assert self._runs[at] is run
        del self._ranks[at], self._runs[at]
