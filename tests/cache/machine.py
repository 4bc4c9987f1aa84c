"""The cache against a plain dict of prefixes: sequences that match, lock, take, share, trim, fork and end, evictions of
every group, new weights. After every step the tree must hold exactly what the dict holds, and `check` find nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.check import check
from engine.cache.events import AllBlocksCleared, BlockRemoved, BlockStored
from engine.cache.evict import POLICIES, PROTECTED
from engine.cache.node import Node
from engine.cache.pages import PagePool
from engine.cache.radix import NONE, RadixTree, as_key
from engine.model.groups import CacheGroup

Place = tuple[tuple[int, Hashable], tuple[int, ...]]
"""Weights' version and namespace, and the tokens up to the end of a page."""

KINDS = (("full",), ("full", "full"), ("full", "window"), ("window",), ("full", "state"), ("window", "state"),
         ("full", "window", "state"))  # fmt: skip
BRANCHES = (0, 2, 5, 9)
"""Positions where prompts part: each is a path through a tree of 16."""


def prompt(length: int, path: int) -> tuple[int, ...]:
    """Tokens that another of the same path shares, and any other up to where the paths part."""
    return tuple(1 + (path >> BRANCHES.index(i) & 1) if i in BRANCHES else 0 for i in range(length))


TOKENS = st.builds(prompt, st.sampled_from([0, 1, 4, 7, 8, 10, 11, 12, 13, 14]), st.integers(0, 15))
SPACES = st.sampled_from(["", "", "", "lora", ("lora", "tenant")])
HOLES, MOSTLY = st.integers(0, 7), st.sampled_from([True, True, False])


@dataclass(kw_only=True)
class Stored:
    """What the tree must hold at a place: a page per group or -1, a checkpoint per group or -1, and its use."""

    pages: list[int]
    states: list[int]
    tick: int = 0
    hits: int = 0
    priority: int = -9


@dataclass(kw_only=True, eq=False)
class Seq:
    """A sequence as engine.cache.sequence keeps it, in short. locked: the prefix whose end its lock is on."""

    space: tuple[int, Hashable]
    tokens: tuple[int, ...]
    node: Node
    table: list[list[int]]
    priority: int
    own: list[set[int]] = field(default_factory=list)
    locked: tuple[int, ...] = ()
    seen: int = 0


class Machine(RuleBasedStateMachine):
    """Rules draw what happens; `truth` says what must come of it."""

    @initialize(
        kinds=st.sampled_from(KINDS),
        page=st.integers(1, 3),
        window=st.integers(2, 6),
        pages=st.integers(14, 40),
        eviction=st.sampled_from(sorted(POLICIES)),
    )
    def start(self, kinds: tuple[Any, ...], page: int, window: int, pages: int, eviction: str) -> None:
        self.groups = [
            CacheGroup(kind=k, page=page if k != "state" else 0, window=window if k == "window" else 0) for k in kinds
        ]
        self.page, self.eviction, self.now = page, eviction, 0
        self.pools = [PagePool(pages if k != "state" else pages // 5) for k in kinds]
        self.tree = RadixTree(self.groups, self.pools, eviction=eviction, events=True)
        self.truth: dict[Place, Stored] = {}
        self.seqs: list[Seq] = []
        self.heard: set[int] = set()

    # What must be

    def usable(self, space: tuple[int, Hashable], tokens: tuple[int, ...], limit: int) -> int:
        """Pages of the longest prefix that every group can go on after."""
        for count in range(min(len(tokens), limit) // self.page, 0, -1):
            stored = [self.truth.get((space, tokens[: i * self.page])) for i in range(1, count + 1)]
            if all(self.has(g, stored, count) for g in range(len(self.groups))):
                return count
        return 0

    def has(self, g: int, stored: list[Stored | None], count: int) -> bool:
        group, end = self.groups[g], stored[count - 1]
        if group.kind == "state":
            return end is not None and end.states[g] != NONE
        first = 0 if group.kind == "full" else max(0, count * self.page - group.window + 1) // self.page
        return all(s is not None and s.pages[g] != NONE for s in stored[first:])

    def needed(self, g: int, count: int) -> range:
        """Indices of the pages that a lock after `count` pages protects."""
        group = self.groups[g]
        if group.kind == "state":
            return range(0)
        low = 0 if group.kind == "full" else max(0, count * self.page - group.window + 1) // self.page
        return range(low, count)

    def rank(self, place: Place) -> tuple[bool, int, int]:
        """The order of eviction, from the words of the documentation."""
        s = self.truth[place]
        first = {"lru": 0, "lfu": s.hits, "slru": int(s.hits >= PROTECTED), "priority": s.priority}[self.eviction]
        return place[0][0] == self.tree.version, first, s.tick

    def walk(self) -> dict[Place, tuple[Node, int]]:
        """Every page of the tree: its place -> (node, index in it)."""
        out, stack = {}, [(space, (), child) for space, r in self.tree.roots.items() for child in r.children.values()]
        while stack:
            space, before, node = stack.pop()
            tokens = tuple(memoryview(node.key).cast("i").tolist())
            for i in range(len(tokens) // self.page):
                out[space, before + tokens[: (i + 1) * self.page]] = (node, i)
            stack += [(space, before + tokens, child) for child in node.children.values()]
        return out

    def reap(self) -> None:
        """Forget what the tree gave back: pages that are free now, and places that lead nowhere."""
        walked, free = self.walk(), [set(pool.listed().tolist()) for pool in self.pools]
        for place, s in [*self.truth.items()]:
            for g in range(len(self.groups)):
                s.pages[g] = NONE if s.pages[g] in free[g] else s.pages[g]
                s.states[g] = NONE if s.states[g] in free[g] else s.states[g]
            if place not in walked:
                assert {*s.pages, *s.states} == {NONE}, "a node went, but not its pages"
                del self.truth[place]

    # What happens

    @rule(tokens=TOKENS, name=SPACES, limit=st.integers(0, 15))
    def look(self, tokens: tuple[int, ...], name: Hashable, limit: int) -> None:
        """Match without a lock."""
        self.match(name, tokens, limit)

    def match(self, name: Hashable, tokens: tuple[int, ...], limit: int) -> Any:
        space = (self.tree.version, name)
        want = self.usable(space, tokens, limit)
        assert self.tree.cached(name, as_key(tokens), limit) == want * self.page
        match = self.tree.match(name, as_key(tokens), limit)
        self.now += 1
        assert match.length == want * self.page
        assert match.version == self.tree.version
        stored = [self.truth[space, tokens[: i * self.page]] for i in range(1, want + 1)]
        for s in stored:
            s.tick = self.now
        for g, (base, pages) in enumerate(zip(match.base, match.pages, strict=True)):
            needed = self.needed(g, want)
            assert list(pages) == [self.truth[space, tokens[: (i + 1) * self.page]].pages[g] for i in needed]
            assert base == (needed.start if needed else want if self.groups[g].kind != "full" else 0) * self.page
            assert match.states[g] == (stored[-1].states[g] if stored else NONE)
        return match

    @rule(tokens=TOKENS, name=SPACES, priority=st.integers(-1, 2))
    def seat(self, tokens: tuple[int, ...], name: Hashable, priority: int) -> None:
        """Match, lock, make room for all of the prompt."""
        match = self.match(name, tokens, max(0, len(tokens) - 1))
        self.tree.lock(match.node)
        missing = [
            0 if g.kind == "state" else len(tokens) // self.page - match.length // self.page for g in self.groups
        ]
        if not self.evict_for(missing):
            self.tree.unlock(match.node)
            return
        taken = [list(pool.take(n)) for pool, n in zip(self.pools, missing, strict=True)]
        self.seqs.append(
            Seq(
                space=(match.version, name),
                tokens=tokens,
                node=match.node,
                table=[
                    []
                    if self.groups[g].kind == "state"
                    else [NONE] * (match.base[g] // self.page) + [*pages, *taken[g]]
                    for g, pages in enumerate(match.pages)
                ],
                priority=priority,
                own=[set(pages) for pages in taken],
                locked=tokens[: match.length],
            )
        )

    @rule(
        tokens=TOKENS,
        name=SPACES,
        priority=st.integers(-1, 2),
        holes=HOLES,
        state=MOSTLY,
    )
    def serve(self, tokens: tuple[int, ...], name: Hashable, priority: int, holes: int, state: bool) -> None:
        """All of a request at once."""
        before = len(self.seqs)
        self.seat(tokens, name, priority)
        if len(self.seqs) > before:
            self.share_to(self.seqs[-1], len(tokens) // self.page, holes, state)
            self.end(self.seqs[-1])

    @precondition(lambda self: self.seqs)
    @rule(
        data=st.data(),
        holes=HOLES,
        state=MOSTLY,
        back=st.sampled_from([0, 0, 0, 1, 2, 4]),
    )
    def share(self, data: st.DataObject, holes: int, state: bool, back: int) -> None:
        """Offer some of a prompt, further than before."""
        seq = data.draw(st.sampled_from(self.seqs))
        low = max(seq.seen, len(seq.locked)) // self.page
        self.share_to(seq, max(low, len(seq.tokens) // self.page - back), holes, state)

    def share_to(self, seq: Seq, count: int, holes: int, state: bool) -> None:
        for g in [g for g, group in enumerate(self.groups) if group.kind == "window"]:
            for i in range(min(holes, count)):  # what the window left behind is trimmed
                if seq.table[g][i] in seq.own[g]:
                    seq.own[g].remove(seq.table[g][i])
                    self.pools[g].give([seq.table[g][i]])
                seq.table[g][i] = NONE
        states = [NONE] * len(self.groups)
        for g in [g for g, group in enumerate(self.groups) if group.kind == "state" and state]:
            if count and self.evict_for([int(i == g) for i in range(len(self.groups))]):
                states[g] = self.pools[g].take(1)[0]
                seq.own[g].add(states[g])
        self.insert(seq, count, states)

    def insert(self, seq: Seq, count: int, states: list[int]) -> None:
        version, name = seq.space
        columns = [
            [page if page in own or group.kind == "full" else NONE for page in table[:count]]
            for group, own, table in zip(self.groups, seq.own, seq.table, strict=True)
        ]
        key = as_key(seq.tokens[: count * self.page])
        places = [(seq.space, seq.tokens[: (i + 1) * self.page]) for i in range(count)]
        walked, self.now = self.walk(), self.now + 1
        want = [set[int]() for _ in self.groups]
        full = any(g.kind == "full" for g in self.groups)
        stands = max([i + 1 for i, p in enumerate(places) if p in walked], default=0)
        some = full or states != [NONE] * len(states) or any(p != NONE for c in columns for p in c[stands:])
        for i, place in enumerate(places if some else places[:stands]):
            s = self.truth.setdefault(
                place, Stored(pages=[NONE] * len(self.groups), states=[NONE] * len(self.groups))
            )  # fmt: skip
            for g, column in enumerate(columns):
                if column and s.pages[g] == NONE and column[i] != NONE:
                    s.pages[g] = column[i]
                    want[g].add(column[i])
            s.tick, s.priority = self.now, max(s.priority, seq.priority)
            s.hits += (i + 1 if i < stands else count) * self.page > seq.seen  # what is new is one node
        if places and (some or stands == count):
            for g, state in enumerate(states):
                if state != NONE and self.truth[places[-1]].states[g] == NONE:
                    self.truth[places[-1]].states[g] = state
                    want[g].add(state)
        node, took = self.tree.insert(name, key, columns, states, priority=seq.priority, seen=seq.seen, version=version)
        assert [set(t) for t in took] == want
        assert [len(t) for t in took] == [len(w) for w in want]
        self.tree.lock(node)
        self.tree.unlock(seq.node)
        reached = count if some else stands
        seq.node, seq.seen, seq.locked = node, reached * self.page, seq.tokens[: reached * self.page]
        for g, taken in enumerate(took):
            seq.own[g].difference_update(taken)
            if states[g] in seq.own[g]:
                seq.own[g].remove(states[g])
                self.pools[g].give([states[g]])
            for i, theirs in enumerate(self.tree.column(node, g)):
                mine = seq.table[g][i]
                if mine in seq.own[g]:
                    assert theirs == self.truth[places[i]].pages[g] != NONE
                    seq.own[g].remove(mine)
                    self.pools[g].give([mine])
                    seq.table[g][i] = theirs
        self.reap()

    @precondition(lambda self: self.seqs)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.seqs)))

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), holes=HOLES, state=MOSTLY)
    def preempt(self, data: st.DataObject, holes: int, state: bool) -> None:
        """What is there is shared, the rest lost; then all of it is fed again, under the weights of now."""
        seq = data.draw(st.sampled_from(self.seqs))
        self.share_to(seq, max(seq.seen, len(seq.locked)) // self.page, holes, state)
        self.end(seq)
        self.seat(seq.tokens, seq.space[1], seq.priority)

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), tail=TOKENS)
    def fork(self, data: st.DataObject, tail: tuple[int, ...]) -> None:
        """A child reads what its parent has locked, and goes on with pages and tokens of its own."""
        seq = data.draw(st.sampled_from(self.seqs))
        count, tokens = len(seq.locked) // self.page, seq.locked + tail
        self.tree.lock(seq.node)
        missing = [0 if g.kind == "state" else len(tokens) // self.page - count for g in self.groups]
        if not self.evict_for(missing):
            self.tree.unlock(seq.node)
            return
        taken = [list(pool.take(n)) for pool, n in zip(self.pools, missing, strict=True)]
        table = [  # without what a window has left behind: the tree may have given that away
            [page if i in self.needed(g, count) else NONE for i, page in enumerate(parent[:count])] + new
            for g, (parent, new) in enumerate(zip(seq.table, taken, strict=True))
        ]
        own = [set(pages) for pages in taken]
        self.seqs.append(
            Seq(
                space=seq.space,
                tokens=tokens,
                node=seq.node,
                table=table,
                priority=seq.priority,
                own=own,
                locked=seq.locked,
                seen=len(seq.locked),
            )
        )

    def end(self, seq: Seq) -> None:
        self.seqs.remove(seq)
        for pool, own in zip(self.pools, seq.own, strict=True):
            pool.give(own)
        self.tree.unlock(seq.node)
        self.reap()

    @rule(more=st.integers(1, 12), g=st.integers(0, 2))
    def evict(self, more: int, g: int) -> None:
        """Ask for some more pages of a group than are free, mostly no more than can be had."""
        g = g % len(self.groups)
        more = more if more > 10 else max(1, min(more, self.tree.evictable[g]))
        self.evict_for([self.pools[g].free + more if i == g else 0 for i in range(len(self.groups))])

    def evict_for(self, need: list[int]) -> bool:
        could = all(n <= p.free + e for n, p, e in zip(need, self.pools, self.tree.evictable, strict=True))
        before, ranks = self.walk(), {place: self.rank(place) for place in self.truth}
        short = [g for g, (n, p) in enumerate(zip(need, self.pools, strict=True)) if n > p.free]
        one = short[0] if len(short) == 1 else -1
        loose = one >= 0 and self.groups[one].kind != "full"
        # nodes, each by its last page, that could be first to go
        first = {node: ranks[place] for place, (node, _) in before.items() if self.may_go(node, one, loose)}
        free = [pool.free for pool in self.pools]
        assert self.tree.evict(need) == could
        if not could:
            assert [pool.free for pool in self.pools] == free
            return False
        assert all(p.free >= n for p, n in zip(self.pools, need, strict=True))
        self.reap()
        if loose or (short and {self.groups[g].kind for g in short} == {"full"}):
            gone = [rank for node, rank in first.items() if not (node.size[one] if loose else node.alive)]
            stay = [rank for node, rank in first.items() if (node.size[one] if loose else node.alive)]
            assert not gone or not stay or max(gone) <= min(stay), "what is worth more went first"
        return True

    def may_go(self, node: Node, g: int, loose: bool) -> bool:
        return bool(node.size[g]) and not node.holds[g] if loose else not node.children and not node.lock

    @rule(version=st.sampled_from([None, None, None, 0, 1]))
    def renew(self, version: int | None) -> None:
        """New weights, and back."""
        if version is not None:
            self.tree.renew(version)

    @precondition(lambda self: len(self.truth) > 12)
    @rule()
    def flush(self) -> None:
        self.tree.flush()
        self.reap()

    # What must stay

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, "tree"):
            owned = [[page for seq in self.seqs for page in seq.own[g]] for g in range(len(self.groups))]
            assert check(self.tree, owned, [seq.node for seq in self.seqs]) == []

    @invariant()
    def the_tree_holds_what_the_dict_holds(self) -> None:
        if not hasattr(self, "tree"):
            return
        found: dict[Place, Stored] = {}
        for place, (node, i) in self.walk().items():
            last = i + 1 == len(node.key) // 4 // self.page
            pages = [column[i] if column else NONE for column in node.pages]
            states = list(node.states) if last else [NONE] * len(self.groups)
            found[place] = Stored(pages=pages, states=states, tick=node.tick, hits=node.hits, priority=node.priority)
        different = {p: (found.get(p), self.truth.get(p)) for p in found.keys() | self.truth.keys()}
        different = {p: (a, b) for p, (a, b) in different.items() if a != b}
        assert different == {}

    @invariant()
    def what_is_locked_stays(self) -> None:
        for seq in getattr(self, "seqs", []):
            count = len(seq.locked) // self.page
            for g in range(len(self.groups)):
                column = self.tree.column(seq.node, g)
                for i in self.needed(g, count):
                    assert i >= len(column) or seq.table[g][i] in (column[i], NONE)

    @invariant()
    def events_tell_what_is_cached(self) -> None:
        if not hasattr(self, "tree"):
            return
        for event in self.tree.drain():
            if isinstance(event, BlockStored):
                assert not self.heard & {*event.hashes}
                assert event.parent is None or event.parent in self.heard
                assert len(event.tokens) == len(event.hashes) * event.page == len(event.hashes) * self.page
                self.heard.update(event.hashes)
            elif isinstance(event, BlockRemoved):
                assert self.heard >= {*event.hashes}
                self.heard.difference_update(event.hashes)
            else:
                assert isinstance(event, AllBlocksCleared)
                self.heard.clear()
        assert self.heard == {self.hash(*p) for p in self.walk() if p[0][0] == self.tree.version}

    def hash(self, space: tuple[int, Hashable], tokens: tuple[int, ...]) -> int:
        before = repr(space).encode()
        for i in range(0, len(tokens), self.page):
            before = blake2b(before + as_key(tokens[i : i + self.page]), digest_size=8).digest()
        return int.from_bytes(before, "little")

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for seq in [*self.seqs]:
            self.end(seq)
        self.tree.flush()
        assert [p.free for p in self.pools] == [p.total for p in self.pools]
        assert not self.tree.roots
        assert all(not entry[2].alive for entry in self.tree.leaves.heap)
