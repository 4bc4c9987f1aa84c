"""Which rows of a step read the same pages, so that a backend may read them once for all (ScheduleStep.shared)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from backends.api.limits import Limits
from backends.api.step import I32, empty
from engine.sched.request import Row, Run

STRIDE = 64
"""Pages of two tables that are compared at once."""
NOBODY = empty(0, 4)
LAST = 1 << 30
"""Place of a row that is in no group."""

Group = tuple[int, int, int, int]
"""First row, last row, first position, last position."""
Key = tuple[int, int, bytes]
"""Weights' version, number of the space, prompt: runs in the order of these stand beside those that they share with."""


class Prefixes:
    """The runs that decode, in the order of their prompts, and how many pages each has in common with the one before.

    Runs whose prompts begin alike stand side by side in that order, at every level of the tree. What two have in common
    is read from their tables, so it is true whatever the order; it stays as it is while both are seated, since only
    pages of the tree are in two tables, and these are locked. stamp: counts what changed anything that `arrange` says.
    """

    __slots__ = (
        "_cost",
        "_fresh",
        "_full",
        "_joined",
        "_keys",
        "_page",
        "_places",
        "_runs",
        "_same",
        "_spaces",
        "stamp",
    )

    def __init__(self, limits: Limits) -> None:
        self._cost = limits.sharing
        self._full = [g for g, group in enumerate(limits.groups) if group.kind == "full"]
        self._page = limits.groups[self._full[0]].page if self._full else 0
        self._keys: list[Key] = []
        self._runs: list[Run] = []
        self._same: list[int] = []  # pages in common with the run before; of the first 0
        self._joined = 0  # how many of these are not 0
        self._places: dict[Run, int] | None = None
        self._spaces: dict[Hashable, tuple[int, int]] = {}  # number, runs
        self._fresh = self.stamp = 0

    def enter(self, run: Run) -> None:
        """All that a run was seated to compute is committed and shared: its table is as it will stay."""
        if self._cost is None or not self._full or run.cache is None:
            return
        self._fresh += 1
        number, runs = self._spaces.get(run.space, (self._fresh, 0))
        self._spaces[run.space] = number, runs + 1
        key = run.cache.version, number, run.key
        at = bisect_left(self._keys, key)
        self._keys.insert(at, key)
        self._runs.insert(at, run)
        self._same.insert(at, 0)
        before = self._joined
        self._meet(at)
        self._meet(at + 1)
        self._changed(before)

    def leave(self, run: Run) -> None:
        """A run lost its seat, and still has its table."""
        if not self._runs or run.cache is None or run.space not in self._spaces:
            return
        number, runs = self._spaces[run.space]
        at = bisect_left(self._keys, (run.cache.version, number, run.key))
        while at < len(self._runs) and self._runs[at] is not run and self._keys[at][2] == run.key:
            at += 1
        if at == len(self._runs) or self._runs[at] is not run:
            return
        if runs == 1:
            del self._spaces[run.space]
        else:
            self._spaces[run.space] = number, runs - 1
        before = self._joined
        self._joined -= self._same[at] > 0
        del self._keys[at], self._runs[at], self._same[at]
        self._meet(at)
        self._changed(before)

    def _meet(self, at: int) -> None:
        """Look anew at what the run at a place has in common with the one before."""
        if at >= len(self._runs):
            return
        self._joined -= self._same[at] > 0
        a, b = self._runs[at - 1].cache, self._runs[at].cache
        if at == 0 or a is None or b is None or a.tree is not b.tree:
            self._same[at] = 0
        else:
            self._same[at] = min([alike(a.table[g], b.table[g]) for g in self._full])
        self._joined += self._same[at] > 0

    def _changed(self, before: int) -> None:
        self._places = None
        self.stamp += before > 0 or self._joined > 0

    def arrange(self, rows: list[Row]) -> tuple[list[Row], I32]:
        """The rows of a step, those that read the same pages side by side, and ScheduleStep.shared: groups outermost
        first, those of a row end to end from position 0. Changes nothing where nothing is shared."""
        if not self._joined:
            return rows, NOBODY
        if self._places is None:
            self._places = {run: i for i, run in enumerate(self._runs)}
        places = self._places
        ranked = [places.get(row.run, LAST) for row in rows]
        order = sorted(range(len(rows)), key=ranked.__getitem__)
        at = [ranked[i] for i in order if ranked[i] != LAST]
        if len(at) == len(self._same):
            same = self._same
        else:  # between two rows, the least of all that stand there
            same = [0, *(min(self._same[a + 1 : b + 1]) for a, b in pairwise(at))]
        assert self._cost is not None
        groups, heads = list[Group](), [i for i, n in enumerate(same) if n == 0]
        for low, high in pairwise([*heads, len(same)]):  # one family changes at a time, and the others are known
            if high - low > 1:
                found = nest(tuple(same[low:high]), self._page, *self._cost)
                groups += [(a + low, b + low, begin, end) for a, b, begin, end in found]
        if not groups:
            return rows, NOBODY
        return [rows[i] for i in order], np.array(groups, np.int32)


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many entries two tables have in common at their beginning."""
    at, end = 0, min(len(a), len(b))
    while at < end and a[at : at + STRIDE] == b[at : at + STRIDE]:
        at += STRIDE
    if at >= end:
        return end
    while at < end and a[at] == b[at]:
        at += 1
    return at


@lru_cache(maxsize=1024)
def nest(same: tuple[int, ...], page: int, fixed: int, each: int, read: int) -> list[Group]:
    """The groups that pay of two rows or more, outermost first.

    same: of each row, pages in common with the row before. fixed, each: what a group costs, and each of its rows, in
    positions that are read. A group saves what its parts, which are rows or groups within it, would read, of which
    `read` in 100 count, but for reading it once.
    One that doesn't pay is left out, and those within it begin where it would have begun.
    """
    out, todo = list[Group](), [(0, len(same), 0)]
    while todo:
        low, high, begin = todo.pop()
        end = min(same[low + 1 : high])
        cuts = [i for i in range(low + 1, high) if same[i] == end]
        saves = ((len(cuts) + 1) * read - 100) * (end - begin) * page // 100
        if end > begin and saves > fixed + each * (high - low):
            out.append((low, high - 1, begin * page, end * page - 1))
            begin = end
        if len(cuts) < high - low - 1:  # some have more in common
            todo += reversed([(a, b, begin) for a, b in pairwise([low, *cuts, high]) if b - a > 1])
    return out
