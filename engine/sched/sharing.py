"""Who computes a prefix that others need too, so that they may wait for it instead of computing it again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import islice

from engine.cache.node import common
from engine.cache.sequence import MOST
from engine.model.groups import CacheGroup
from engine.sched.request import KEY_BYTES, Run

LEAST, GAIN = 32, 16
"""Tokens that two prompts must have in common (SGLang's threshold), and by which it must be more than is cached now, so
that one waits for the other."""
LOOKED_AT = 8
"""Runs that a waiting one is compared with, the newest first."""
PATIENCE = 4
"""A run waits for so many others at most, one after the other. Each ends or goes on, so none waits for ever."""


class Sharing:
    """The runs that compute their prompts now, by how these begin, and one seated run of each group.

    least: tokens. Behind a window that doesn't hold the whole prompt, and behind recurrent state, a prefix can be taken
    over only where a chunk ended (`stops`).
    """

    __slots__ = ("_groups", "_open", "_whole", "least", "page")

    def __init__(self, groups: Sequence[CacheGroup], page: int, least: int) -> None:
        self.page, self.least = page, least
        self._whole = min([MOST, *(0 if g.kind == "state" else g.window for g in groups if g.kind != "full")])
        self._open: dict[Hashable, dict[Run, None]] = {}
        self._groups: dict[str, Run] = {}

    def begin(self, run: Run) -> None:
        """A run was seated."""
        if run.request.group:
            self._groups.setdefault(run.request.group, run)
        if run.length >= self.least:
            self._open.setdefault(self._mark(run), {})[run] = None

    def done(self, run: Run) -> None:
        """All of what it was seated to compute is committed."""
        same = self._open.get(self._mark(run))
        if same is not None and run in same:
            del same[run]
            if not same:
                del self._open[self._mark(run)]

    def end(self, run: Run) -> None:
        """A run lost its slot."""
        self.done(run)
        if self._groups.get(run.request.group) is run:
            del self._groups[run.request.group]

    def clear(self) -> None:
        """What is computed now is of no use to those that come later."""
        self._open.clear()
        self._groups.clear()

    def leader(self, run: Run, cached: int) -> tuple[Run, int] | None:
        """The run that a waiting one does well to wait for, and until which position: it is about to have more of the
        same than the `cached` tokens. Not one of a lower priority, which others may go before."""
        parent, last = self.parent(run), len(run.request.tokens) - 1
        if run.waits >= PATIENCE or not (run.scored or (parent is not None and parent.scores_alike(run))):
            return None  # it must compute to score
        gain = min(self.least, GAIN)
        if parent is not None and parent.settled < last and last >= self.least and last > cached:
            return parent, last
        if not run.scored:
            return None
        best: tuple[Run, int] | None = None
        for other in islice(reversed(self._open.get(self._mark(run), {})), LOOKED_AT):
            same = self._same(other, run, run.length - 1)
            if same < self.least or same - cached < gain or other.settled >= same:
                continue
            if self.exact(other) and other.fed > same:
                continue
            if other.rank[0] >= run.rank[0] + 1:
                continue
            if best is None or same > best[1]:
                best = other, same
        return best

    def stops(self, run: Run, waiting: Iterable[Run]) -> set[int]:
        """Where chunks of a run that was just seated must end, so that its group and those that wait can go on."""
        if not self.exact(run):
            return set()
        last, ends = len(run.request.tokens) - 1, set()
        if run.request.group:
            ends = {last // self.page * self.page, last}
        space, mark = run.space, run.key[: self.least * KEY_BYTES]
        for other in waiting:
            if other.space == space and other.key.startswith(mark):
                ends.add(self._same(other, run, other.length - 1))
        return {end for end in ends if end > run.fed}

    def exact(self, run: Run) -> bool:
        """Whether what a run has computed can be taken over only where a chunk of it ended."""
        return run.length + self.page > self._whole

    def parent(self, run: Run) -> Run | None:
        """A seated run of the same group, whose prompt really is the same."""
        parent = self._groups.get(run.request.group)
        if parent is None or parent is run or parent.space != run.space:
            return None
        return parent if parent.request.tokens == run.request.tokens else None

    def _same(self, other: Run, run: Run, most: int) -> int:
        """Tokens that two begin with alike, no more than `most`, in whole pages."""
        return min(common(other.key, run.key, KEY_BYTES) // KEY_BYTES, most) // self.page * self.page

    def _mark(self, run: Run) -> Hashable:
        return run.space, run.key[: self.least * KEY_BYTES]
