"""One request's view of the cache: its page tables, what it owns of them, and what the device has yet to be told."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from engine.cache.pages import PagePool
from engine.cache.radix import NONE, Match, RadixTree

MOST = 2**31 - 1


class SequenceCache:
    """Pages of one seated request, per cache group.

    table[g]: pages from position base[g] on, as the device's slot table has them (entries before `gone[g]` are trimmed
    and stale). own[g]: those that this sequence must give back; the others belong to the tree, which a lock on `node`
    protects. read[g]: state page that the next row starts from. edits[g]: (index, page) that the device doesn't know;
    told: there are none. end: positions before it have a page; due: once `lower` is there, `trim` has something to do;
    still: what is fed before it needs neither a page nor a word to the device. seen: tokens that were offered to the
    tree. version: of the weights that the tree had at the start.
    """

    __slots__ = (
        "base", "due", "edits", "end", "gone", "groups", "limit", "node", "own", "pools", "read", "seen", "still",
        "table", "told", "tree", "version", "write",
    )  # fmt: skip

    def __init__(self, tree: RadixTree, pools: Sequence[PagePool], limit: Sequence[int], match: Match) -> None:
        """Take over a match, which gets locked. limit: entries of a slot's table, per group. Needs one free page in
        each state group."""
        self.tree, self.groups, self.pools, self.limit = tree, tree.groups, tuple(pools), tuple(limit)
        self.node, self.version, self.seen = match.node, match.version, 0
        tree.lock(match.node)
        self.table = [list(pages) for pages in match.pages]
        self.base = list(match.base)
        self.gone = [0] * len(self.groups)
        self.own: list[set[int]] = [set() for _ in self.groups]
        self.edits: list[list[tuple[int, int]]] = [list(enumerate(pages)) for pages in self.table]
        self.told = False
        self.read = list(match.states)
        self.write = [NONE] * len(self.groups)
        for g, group in enumerate(self.groups):
            if group.kind == "state":
                self.write[g] = self._take(g)
        self._mark()

    def _mark(self) -> None:
        """Say anew how far the pages reach."""
        self.end, self.due = MOST, MOST
        for g, group in enumerate(self.groups):
            if group.kind != "state":
                self.end = min(self.end, self.base[g] + len(self.table[g]) * group.page)
            if group.kind == "window":
                self.due = min(self.due, self.base[g] + (self.gone[g] + 1) * group.page + group.window - 1)
        self.still = min(self.end, self.due) if self.told else 0

    def branch(self, other: SequenceCache, at: int, states: Mapping[int, int]) -> list[tuple[int, int, int]]:
        """Go on at position `at`, inside the page after those matched, as another sequence did.

        states: for each state group, the page with the other's state there. Gives the copies that make it so, (group,
        src, dst), to be done before the next row; none when the other has no longer what it takes.
        """
        sources = {}
        for g, group in enumerate(self.groups):
            if group.kind == "state":
                sources[g] = states.get(g, NONE)
                continue
            i = (at - other.base[g]) // group.page
            held = 0 <= i < len(other.table[g]) and len(self.table[g]) < self.limit[g]
            sources[g] = other.table[g][i] if held else NONE
        if NONE in sources.values():
            return []
        copies = []
        for g, source in sources.items():
            if self.groups[g].kind == "state":
                page = self.write[g]
                self.read = [page if i == g else read for i, read in enumerate(self.read)]
            else:
                page = self._take(g)
                self.edits[g].append((len(self.table[g]), page))
                self.table[g].append(page)
            copies.append((g, source, page))
        self.told = False
        self._mark()
        return copies

    def _take(self, g: int) -> int:
        page = self.pools[g].take(1)[0]
        self.own[g].add(page)
        return page

    def need(self, upto: int) -> list[int]:
        """Pages that growing to `upto` positions takes from each pool."""
        return [
            0 if group.kind == "state" else max(0, -(-(upto - self.base[g]) // group.page) - len(self.table[g]))
            for g, group in enumerate(self.groups)
        ]

    def trim(self, lower: int) -> None:
        """Give back the pages that no query at position `lower` or later reads (windows)."""
        for g, group in enumerate(self.groups):
            if group.kind != "window":
                continue
            low = max(0, lower - group.window + 1)
            while self.gone[g] < len(self.table[g]) and self.base[g] + (self.gone[g] + 1) * group.page <= low:
                page = self.table[g][self.gone[g]]
                self.gone[g] += 1
                if page in self.own[g]:
                    self.own[g].remove(page)
                    self.pools[g].give([page])
                self.table[g][self.gone[g] - 1] = NONE
        self._mark()

    def grow(self, upto: int) -> None:
        """Take pages until positions before `upto` have one. The pools must have `need(upto)` free."""
        for g, count in enumerate(self.need(upto)):
            if len(self.table[g]) + count > self.limit[g]:
                self._rebase(g)
            if count:
                pages, known = self.pools[g].take(count), len(self.table[g])
                self.own[g].update(pages)
                self.edits[g] += enumerate(pages, known)
                self.table[g] += pages
                self.told = False
        self._mark()

    def _rebase(self, g: int) -> None:
        """Shift a window's table to begin at its first page still held, and tell the device the whole of it."""
        gone = self.gone[g]
        assert gone > 0, "a row outgrew limits.max_row_pages"
        self.table[g] = self.table[g][gone:]
        self.base[g] += gone * self.groups[g].page
        self.gone[g] = 0
        self.edits[g] = list(enumerate(self.table[g]))

    def sent(self) -> None:
        """The device was told: the next row starts from its own state page and has no edits yet."""
        self.read = self.write
        if not self.told:
            self.edits, self.told = [[] for _ in self.groups], True
            self.still = min(self.end, self.due)

    def share(self, namespace: Hashable, key: bytes, states: Sequence[int], priority: int = 0) -> None:
        """Offer the whole pages that `key` (int32 bytes) covers to the tree, with state checkpoints owned by this
        sequence, or -1. From now on they are the tree's, locked through its node; where the tree had its own of the
        same content, the table turns to those (rows in flight still read the old ones, which is why they are only
        given out to later steps)."""
        count = len(key) // 4 // self.tree.page
        offered = [[NONE] * self._skipped(g) + self._mine(g) for g in range(len(self.groups))]
        columns = [column[:count] for column in offered]
        node, took = self.tree.insert(
            namespace, key, columns, states, priority=priority, seen=self.seen, version=self.version
        )
        self.seen = len(key) // 4
        self.tree.lock(node)
        self.tree.unlock(self.node)
        self.node = node
        for g, taken in enumerate(took):
            self.own[g].difference_update(taken)
            if self.own[g].intersection(offered[g][:count]):
                self._adopt(g, self.tree.column(node, g))

    def _mine(self, g: int) -> list[int]:
        """The table as it may be offered: a window's pages that were the tree's may have been evicted since."""
        if self.groups[g].kind != "window":
            return self.table[g]
        return [page if page in self.own[g] else NONE for page in self.table[g]]

    def _skipped(self, g: int) -> int:
        """Pages before the table's first."""
        return self.base[g] // self.groups[g].page if self.groups[g].page else 0

    def _adopt(self, g: int, column: Sequence[int]) -> None:
        """Turn to the tree's pages where this sequence has the same in pages of its own."""
        for i, theirs in enumerate(column[self._skipped(g) :]):
            mine = self.table[g][i]
            if mine != theirs and mine in self.own[g]:
                self.give(g, mine)
                self.table[g][i] = theirs
                self.edits[g].append((i, theirs))
                self.told, self.still = False, 0

    def checkpoint(self, g: int) -> int:
        """A page for a copy of state group g, or -1 when none is to be had."""
        return self._take(g) if self.pools[g].free else NONE

    def give(self, g: int, page: int) -> None:
        """Give one page back that this sequence owns."""
        self.own[g].remove(page)
        self.pools[g].give([page])

    def release(self) -> None:
        """Give everything back; the sequence is over."""
        for own, pool in zip(self.own, self.pools, strict=True):
            pool.give(own)
            own.clear()
        self.tree.unlock(self.node)
