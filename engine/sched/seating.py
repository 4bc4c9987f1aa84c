"""Who has a seat: slots, pages and prefixes for those that run, and who loses them."""

from __future__ import annotations

from collections.abc import Iterator

from backends.api.limits import Limits
from engine.cache.radix import Match
from engine.sched.admission import Estimate
from engine.sched.policy import WINDOW, Order
from engine.sched.prefixes import Prefixes
from engine.sched.request import Run
from engine.sched.rows import Draft
from engine.sched.sharing import Sharing
from engine.sched.store import Store
from engine.sched.waiting import Waiting

RETRY = 8
"""Steps until those that didn't fit are tried again, where none came or went meanwhile."""


class Seating:
    """Those that wait and those that run. The arguments are the Scheduler's.

    again: the step from which those that wait are looked at; 0: now. preemptions, prompt_tokens, cached_tokens: as the
    Scheduler has them.
    """

    def __init__(
        self, limits: Limits, store: Store, policy: str, priority_preemption: int, ageing: float, least: int
    ) -> None:
        self.limits, self.store, self.priority_preemption = limits, store, priority_preemption
        self.waiting, self.estimate = Waiting(), Estimate()
        self.running: dict[Run, None] = {}
        self.slots = list(range(limits.slots - 1, -1, -1))
        self.sharing = Sharing(limits.groups, store.page, least)
        self.prefixes = Prefixes(limits)
        self.again = self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        self._order = Order(policy, ageing, lambda run: store.match(run).length)
        self._lowest: Run | None = None

    def make_way(self) -> None:
        """Take the seat of the lowest where the first that waits is so much above it, and can't be seated otherwise."""
        for first in self.waiting.first(1) if self.priority_preemption else ():
            while self.running:
                if self._lowest is None:
                    self._lowest = max(self.running, key=lambda run: run.rank)
                if self._lowest.rank[0] - first.rank[0] < self.priority_preemption:
                    return
                self.estimate.count(self.running)
                match, free = self.store.match(first), self.slots and len(self.running) < self.limits.max_rows
                if self._leader(first, match) or (free and self._fits(first, match)):
                    return
                self.preempt(self._lowest)

    def admit(self, now: float, draft: Draft, before: float | None = None) -> Iterator[Run]:
        """Seat waiting runs, in order, until one doesn't fit; gives each. before: only those of a rank up to this."""
        first = self.waiting.first(1)
        if not (first and self.slots and draft.free > 0 and draft.tokens > 0) or draft.number < self.again:
            return
        if before is not None and first[0].rank[0] > before:
            return
        self.estimate.count(self.running)
        for run in self._order.sort(self.waiting.first(WINDOW), now):
            if not (self.slots and draft.free > 0 and draft.tokens > 0):
                return
            if before is not None and run.rank[0] > before:
                return
            if not self.seat(run, draft):
                self.again = draft.number + RETRY
                self.store.spare(self.running)
                return
            yield run

    def _estimate(self, run: Run, match: Match) -> list[int]:
        """Pages that seating a run needs now: what it feeds, a page for each run that decodes beside it, and a share of
        what all of them may still make."""
        out, beside = [], len(self.running)
        ahead = self.estimate.ahead(run) if beside else 0
        for g, group in enumerate(self.limits.groups):
            if group.kind == "state":
                out.append(1)
                continue
            last = run.length if group.kind == "full" else min(run.length, match.length + self.limits.max_tokens)
            out.append(-(-(last + 1 - match.base[g]) // group.page) - len(match.pages[g]) + beside)
            if group.kind == "full":
                out[g] += ahead // group.page
        return out

    def _fits(self, run: Run, match: Match) -> bool:
        return self.store.fits(match, self._estimate(run, match))

    def seat(self, run: Run, draft: Draft) -> bool:
        """Give a run a slot and the longest cached prefix, if the pages that it needs can be had. True, too, when it
        does better to wait for another."""
        parent = self.sharing.parent(run)
        if parent is not None and not run.scored and parent.scored and parent.scores_alike(run):
            run.scores = parent.scores
        match = self.store.match(run)
        run.hint = match.length
        if (found := self._leader(run, match)) is not None:
            leader, upto = found
            self.waiting.follow(run, leader, upto)
            if self.sharing.exact(leader):
                leader.stops.add(upto)
            return True
        if not self._fits(run, match):
            return False
        self.waiting.remove(run)
        run.slot = self.slots.pop()
        self.store.open(run, match)
        run.start = run.fed = run.settled = run.lower = run.upper = self._branch(run, match.length, draft)
        if run.epoch == 0:
            run.cached = run.start
            self.prompt_tokens += run.length
            self.cached_tokens += run.start
        run.state = "seated"
        self.running[run] = self._lowest = None
        self.estimate.add(run)
        if self.store.keeps(run):
            self.sharing.begin(run)
            run.stops = self.sharing.stops(run, self.waiting.first(WINDOW))
        return True

    def _leader(self, run: Run, match: Match) -> tuple[Run, int] | None:
        return self.sharing.leader(run, match.length) if self.store.keeps(run) else None

    def _branch(self, run: Run, length: int, draft: Draft) -> int:
        """Where a run that has `length` matched tokens goes on: in the middle of the next page, when one of its group
        has computed that and it can be copied."""
        parent, last = self.sharing.parent(run), len(run.request.tokens) - 1
        if not self.store.keeps(run) or parent is None or parent.settled < last or run.unscored <= last:
            return length
        if not 0 < last - length < self.store.page:
            return length
        return last if self.store.branch(run, parent, last, draft.copies) else length

    def reserve(self, run: Run, upto: int, draft: Draft) -> bool:
        """Make room for a run to reach `upto`: evict, then preempt those that came last. False: it was preempted
        itself, or must wait."""
        cache = run.cache
        assert cache is not None
        if upto <= cache.end and run.lower < cache.due:
            return True
        if run.lower >= cache.due:
            cache.trim(run.lower)
        while not self.store.tree.evict(cache.need(upto)):
            planned = {row.run for row in draft.rows}
            victim = max((r for r in self.running if r not in planned), key=lambda r: r.rank)
            self.estimate.rise()
            # Alone, it lacks just what is locked for it in the tree, where a node's window pages stay as one.
            run.cold |= len(self.running) == 1
            self.preempt(victim)
            if victim is run:
                return False
        cache.grow(upto)
        return True

    def preempt(self, run: Run) -> None:
        """Back to the queue. Tokens not collected yet are dropped; committed ones will be fed again."""
        self.preemptions += 1
        self.store.share(run, run.settled)
        self.requeue(run)

    def requeue(self, run: Run) -> None:
        """Back to the queue: what is committed will be fed again."""
        self.unseat(run)
        run.refill()
        self.waiting.add(run)

    def unseat(self, run: Run) -> None:
        self.sharing.end(run)
        self.waiting.call(run)
        self.prefixes.leave(run)
        self.store.close(run)
        run.row = None
        del self.running[run]
        self._lowest = None
        self.again = 0
        self.slots.append(run.slot)
        run.epoch += 1
        run.state = "waiting"
        run.flying = run.verifying = run.pending = 0
        run.stops.clear()

    def renew(self) -> None:
        """What runs has computed is of no use to others any more."""
        self.sharing.clear()
        for leader in self.running:
            self.waiting.call(leader)
        for run in self.waiting:
            run.hint = -1
        self.again = 0

    def fed(self, run: Run, end: int) -> None:
        """A chunk is committed: share it, and call back those that waited for it."""
        self.store.share(run, run.settled, at=end)
        if end == run.length:
            self.sharing.done(run)
            self.prefixes.enter(run)
        if run.followers:
            self.waiting.call(run, run.settled)
            self.again = 0
