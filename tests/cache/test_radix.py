"""The radix tree against a list of everything that was ever inserted."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.pages import PagePool
from engine.cache.radix import NONE, Match, RadixTree, as_key, common
from engine.model.groups import CacheGroup

PAGE = 2
FULL, WINDOW = CacheGroup(kind="full", page=PAGE), CacheGroup(kind="window", page=PAGE, window=4)
TOKENS = st.lists(st.integers(0, 2), min_size=0, max_size=14)


class Tree(RuleBasedStateMachine):
    """Insert, match, lock, evict. A page's content is the prefix that it ends, kept beside the tree."""

    @initialize(windowed=st.booleans(), pages=st.integers(8, 30))
    def start(self, windowed: bool, pages: int) -> None:
        self.groups = (FULL, WINDOW) if windowed else (FULL,)
        self.pools = [PagePool(pages) for _ in self.groups]
        self.tree = RadixTree(self.groups, self.pools)
        self.content: list[dict[int, tuple[int, ...]]] = [{} for _ in self.groups]
        self.locked: list[Match] = []

    @rule(tokens=TOKENS, namespace=st.sampled_from(["a", "b"]), holes=st.integers(0, 7))
    def insert(self, tokens: list[int], namespace: str, holes: int) -> None:
        count = len(tokens) // PAGE
        if not self.tree.evict([count] * len(self.groups)):
            return
        columns = []
        for g, pool in enumerate(self.pools):
            column = pool.take(count)
            for i, page in enumerate(column):
                self.content[g][page] = (namespace, *tokens[: (i + 1) * PAGE])
            if self.groups[g].kind == "window":  # a sequence has trimmed what its window left behind
                pool.give(column[: min(holes, count)])
                column = [NONE] * min(holes, count) + column[min(holes, count) :]
            columns.append(column)
        _, took = self.tree.insert(namespace, as_key(tokens[: count * PAGE]), columns, [NONE] * len(self.groups))
        for column, taken, pool in zip(columns, took, self.pools, strict=True):
            pool.give(p for p in column if p != NONE and p not in taken)

    @rule(tokens=TOKENS, namespace=st.sampled_from(["a", "b"]), lock=st.booleans())
    def match(self, tokens: list[int], namespace: str, lock: bool) -> None:
        limit = max(0, len(tokens) - 1)
        match = self.tree.match(namespace, as_key(tokens), limit)
        assert match.length % PAGE == 0
        assert match.length <= limit
        for g, (base, pages) in enumerate(zip(match.base, match.pages, strict=True)):
            assert base + len(pages) * PAGE == match.length
            if self.groups[g].kind == "window":
                assert base <= max(0, match.length - WINDOW.window + 1)
            for i, page in enumerate(pages):
                assert self.content[g][page] == (namespace, *tokens[: base + (i + 1) * PAGE])
        if lock:
            self.tree.lock(match.node)
            self.locked.append(match)

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        match = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
        self.tree.unlock(match.node)

    @rule(need=st.integers(1, 30), group=st.integers(0, 1))
    def evict(self, need: int, group: int) -> None:
        wanted = [need if g == group else 0 for g in range(len(self.groups))]
        could = all(n <= p.free + e for n, p, e in zip(wanted, self.pools, self.tree.evictable, strict=True))
        assert self.tree.evict(wanted) == could
        assert not could or all(p.free >= n for p, n in zip(self.pools, wanted, strict=True))

    @invariant()
    def locked_prefixes_stay(self) -> None:
        for match in getattr(self, "locked", []):
            for g, pages in enumerate(match.pages):
                assert self.tree.column(match.node, g)[match.base[g] // PAGE :][: len(pages)] == pages

    @invariant()
    def counts_are_true(self) -> None:
        if not hasattr(self, "tree"):
            return
        nodes, stack = [], list(self.tree._roots.values())
        while stack:
            node = stack.pop()
            nodes.append(node)
            stack += node.children.values()
        for g, pool in enumerate(self.pools):
            sizes = {id(n): sum(p != NONE for p in n.pages[g]) for n in nodes}
            assert self.tree.held[g] == sum(sizes.values())
            assert self.tree.evictable[g] == sum(sizes[id(n)] for n in nodes if not n.holds[g])
            assert pool.free + self.tree.held[g] == pool.total

    def teardown(self) -> None:
        for match in getattr(self, "locked", []):
            self.tree.unlock(match.node)
        if hasattr(self, "tree"):
            self.tree.flush()
            assert [p.free for p in self.pools] == [p.total for p in self.pools]


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_least_recently_used_goes_first() -> None:
    tree = RadixTree([FULL], [PagePool(6)])
    for start in (0, 10, 20):
        column = tree.pools[0].take(2)
        tree.insert("", as_key(range(start, start + 4)), [column], [NONE])
    assert tree.match("", as_key(range(6)), 4).length == 4  # touched: now the youngest
    assert tree.evict([2])
    assert [tree.match("", as_key(range(s, s + 6)), 4).length for s in (0, 10, 20)] == [4, 0, 4]


def test_prefix_is_never_the_whole_prompt() -> None:
    tree = RadixTree([FULL], [PagePool(4)])
    tree.insert("", as_key(range(4)), [tree.pools[0].take(2)], [NONE])
    assert tree.match("", as_key(range(4)), 3).length == 2


def test_state_is_matched_where_its_checkpoint_is() -> None:
    state = CacheGroup(kind="state", page=0)
    tree = RadixTree([FULL, state], [PagePool(8), PagePool(2)])
    checkpoint = tree.pools[1].take(1)[0]
    tree.insert("", as_key(range(4)), [tree.pools[0].take(2), []], [NONE, checkpoint])
    tree.insert("", as_key(range(8)), [tree.pools[0].take(4), []], [NONE, NONE])
    match = tree.match("", as_key(range(9)), 8)
    assert (match.length, match.states[1], len(match.pages[0])) == (4, checkpoint, 2)


def test_common_prefix_is_in_whole_widths() -> None:
    for n in range(1, 20):
        a, b = bytes(range(20)), bytes(range(n)) + bytes([255] * (20 - n))
        assert common(a, b, 4) == n // 4 * 4


def test_pool_refuses_what_is_not_there() -> None:
    pool = PagePool(2)
    pages = pool.take(2)
    with pytest.raises(IndexError):
        pool.take(1)
    pool.give(pages[:1])
    with pytest.raises(ValueError, match="twice"):
        pool.give(pages[:1])
    assert all(a != b for a, b in pairwise(sorted(pages)))
