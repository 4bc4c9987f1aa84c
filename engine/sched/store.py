"""The cache as runs use it: what is matched, shared, checkpointed and copied for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from backends.api.limits import Limits
from engine.cache.check import repair
from engine.cache.events import AllBlocksCleared
from engine.cache.pages import PagePool
from engine.cache.radix import NONE, Match, RadixTree
from engine.cache.sequence import SequenceCache
from engine.sched.request import Request, Run

Copy = tuple[int, int, int, int]
"""(group, shard, src, dst)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where the pages of one cache group are; the four always sum to total, or a page is lost."""

    free: int
    evictable: int
    locked: int
    owned: int
    total: int

    @property
    def sound(self) -> bool:
        """Whether no page is lost or had twice."""
        parts = (self.free, self.evictable, self.locked, self.owned)
        return min(parts) >= 0 and sum(parts) == self.total


class Store:
    """Pools and radix tree. radix: keep prefixes of requests that ended. eviction: what of them goes first. events: log
    what comes and goes (engine.cache.events). copies: to be done before the next step that is planned; those asked
    for while a step is planned belong to the one after."""

    def __init__(self, limits: Limits, radix: bool, eviction: str, events: bool = False) -> None:
        self.limits, self.radix, self.eviction, self.events = limits, radix, eviction, events
        self.copies: list[Copy] = []
        self._open: Counter[Hashable] = Counter()
        self._stateful = [g for g, group in enumerate(limits.groups) if group.kind == "state"]
        self._begin(0)
        self.page = self.tree.page

    def empty(self) -> None:
        """New pools, and a tree that knows of nothing; what runs hold is of the old ones."""
        self.copies.clear()
        self._begin(self.tree.version)
        if self.tree.log is not None:
            self.tree.log.append(AllBlocksCleared())

    def _begin(self, version: int) -> None:
        self.pools = [PagePool(n) for n in self.limits.pages]
        self.tree = RadixTree(self.limits.groups, self.pools, eviction=self.eviction, events=self.events)
        self.tree.renew(version)

    def accounts(self, running: Iterable[Run]) -> list[Account]:
        """Where the pages of each group are."""
        caches = [run.cache for run in running if run.cache is not None]
        return [
            Account(free=p.free, evictable=e, locked=h - e, owned=sum(len(c.own[g]) for c in caches), total=p.total)
            for g, (p, e, h) in enumerate(zip(self.pools, self.tree.evictable, self.tree.held, strict=True))
        ]

    def keeps(self, run: Run) -> bool:
        """Whether the prefix cache is for this run."""
        return (self.radix or bool(run.request.group)) and not run.cold

    def space(self, request: Request) -> Hashable:
        """What may share a request's prefixes: without the prefix cache only the answers of its group, while any of
        them is open."""
        return request.namespace if self.radix else (request.namespace, request.group)

    def enter(self, run: Run) -> None:
        """A run is open."""
        if not self.radix and run.request.group:
            self._open[run.space] += 1

    def leave(self, run: Run) -> None:
        """A run ended."""
        if self._open[run.space]:
            self._open[run.space] -= 1
            if not self._open[run.space]:
                del self._open[run.space]
                self.tree.flush(run.space)

    def mend(self, running: Iterable[Run]) -> list[Run]:
        """Make all true again: pages that nobody has become free, what is broken in the tree goes; where a page is two
        runs', everything begins anew. Gives the runs that read what went: they must lose their seats."""
        caches = {run: run.cache for run in running if run.cache is not None}
        owned = [[page for cache in caches.values() for page in cache.own[g]] for g in range(len(self.pools))]
        if any(repair(self.tree, owned, [cache.node for cache in caches.values()]).left):
            self.empty()
            return list(caches)
        return [run for run, cache in caches.items() if not cache.node.alive]

    def match(self, run: Run) -> Match:
        """The longest cached prefix of what a run must be fed, but for one token at least, and for what must score the
        prompt: a token is scored by the row that feeds the one before it."""
        most = min(run.length, run.unscored) - 1
        return self.tree.match(run.space, run.key, most if self.keeps(run) else 0)

    def fits(self, match: Match, need: Sequence[int]) -> bool:
        """Whether so many pages of each group can be had beside a match; those that nobody reads are evicted for it."""
        self.tree.lock(match.node)
        fits = self.tree.evict(need)
        self.tree.unlock(match.node)
        return fits

    def open(self, run: Run, match: Match) -> None:
        """A cache for a run that is being seated."""
        run.cache = SequenceCache(self.tree, self.pools, self.limits.max_row_pages, match)

    def close(self, run: Run) -> None:
        """Give back all that a run holds."""
        assert run.cache is not None
        for g, own in enumerate(run.cache.own):
            self._forget(g, own)
        if run.cache.tree is self.tree:
            run.cache.release()
        run.cache = None
        run.checkpoints.clear()

    def branch(self, run: Run, parent: Run, at: int, copies: list[Copy]) -> bool:
        """Let a run go on at position `at`, in the middle of the page after those matched, as its parent did; copies:
        of the step being planned, to be added to. False: the parent has not got it any more, or there is no room."""
        if run.cache is None or parent.cache is None or len(copies) + len(self.pools) > self.limits.max_copies:
            return False
        made = run.cache.branch(parent.cache, at, parent.checkpoints.get(at, {}))
        copies += [(g, 0, source, page) for g, source, page in made]
        return bool(made)

    def checkpoint(self, run: Run) -> None:
        """Ask for a copy of the recurrent state after the row just planned, where others could go on from it."""
        cache = run.cache
        if not self._stateful or not self.keeps(run) or cache is None:
            return
        if run.fed % self.page and run.fed not in run.stops:
            return
        if len(self.copies) + len(self._stateful) > self.limits.max_copies:
            return
        pages = {g: cache.checkpoint(g) for g in self._stateful}
        run.checkpoints[run.fed] = pages
        if NONE in pages.values():
            self._drop(run, run.fed)
        else:
            self.copies += [(g, 0, cache.write[g], page) for g, page in pages.items()]

    def spare(self, running: Iterable[Run]) -> None:
        """Give back the checkpoints that only await branches, as pages are short."""
        for run in running:
            for at in [at for at in run.checkpoints if at % self.page and at <= run.settled]:
                self._drop(run, at)

    def share(self, run: Run, length: int, at: int = NONE) -> None:
        """Offer the first `length` positions to the tree; models with recurrent state only where a checkpoint is.
        at: a chunk ended there, which is `length` or less."""
        cache = run.cache
        states = run.checkpoints.get(at) if at % self.page == 0 else None
        if cache is None or not self.keeps(run) or (self._stateful and states is None):
            return
        whole = min(length, len(run.request.tokens) + len(run.out)) // self.page * self.page
        given = [(states or {}).get(g, NONE) for g in range(len(self.pools))]
        cache.share(run.space, run.prefix(whole), given, run.request.priority)
        if states is not None:
            self._drop(run, at)

    def _drop(self, run: Run, at: int) -> None:
        """Give back what the tree did not take of a checkpoint."""
        assert run.cache is not None
        for g, page in run.checkpoints.pop(at).items():
            if page in run.cache.own[g]:
                run.cache.give(g, page)
                self._forget(g, (page,))

    def _forget(self, g: int, pages: Iterable[int]) -> None:
        """Nothing is copied to these pages any more."""
        if self.copies:
            gone = set(pages)
            self.copies = [c for c in self.copies if c[0] != g or c[3] not in gone]
