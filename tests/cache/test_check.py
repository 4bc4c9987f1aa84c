"""What is broken by hand is named, and mended; a good cache is left as it is."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from engine.cache.check import check, repair
from engine.cache.node import Node
from engine.cache.pages import PagePool
from engine.cache.radix import NONE, RadixTree, as_key
from engine.model.groups import CacheGroup

GROUPS = (
    CacheGroup(kind="full", page=2),
    CacheGroup(kind="window", page=2, window=4),
    CacheGroup(kind="state", page=0),
)


class World:
    """A tree with some branches, two of them locked, and a sequence that owns pages."""

    def __init__(self) -> None:
        self.pools = [PagePool(40), PagePool(40), PagePool(10)]
        self.tree = RadixTree(GROUPS, self.pools)
        self.readers: list[Node] = []
        self.held: list[Node] = []
        for tokens in ([0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2], [3, 3, 3, 3]):
            self.held.append(self.put(tokens))
        for node in self.held[1:3]:
            self.tree.lock(node)
            self.readers.append(node)
        self.owned = [list(pool.take(3)) for pool in self.pools]

    def put(self, tokens: list[int]) -> Node:
        pages = [self.pools[g].take(len(tokens) // 2) for g in (0, 1)]
        state = self.pools[2].take(1)
        node, took = self.tree.insert("", as_key(tokens), [*pages, []], [NONE, NONE, state[0]])
        for pool, offered, taken in zip(self.pools, (*pages, state), took, strict=True):
            pool.give({*offered} - {*taken})
        return node

    def wrong(self) -> list[str]:
        return check(self.tree, self.owned, self.readers)


def lost(w: World) -> None:
    w.owned[0].pop()


def leaked_lock(w: World) -> None:
    w.readers.pop()


def count(w: World) -> None:
    w.tree.evictable[1] += 1


def held(w: World) -> None:
    w.tree.held[0] -= 1


def lock(w: World) -> None:
    w.held[0].lock += 1


def hold(w: World) -> None:
    w.held[1].holds[1] -= 1


def size(w: World) -> None:
    w.held[3].size[0] += 1


def queue(w: World) -> None:
    w.tree.leaves.clear()


def twice_queued(w: World) -> None:
    w.tree.leaves.heap.append(w.tree.leaves.heap[-1])


def free_and_a_nodes(w: World) -> None:
    w.pools[0].give(w.held[0].pages[0][:1])


def a_sequences_and_free(w: World) -> None:
    w.pools[1].give(w.owned[1][:1])


def two_nodes(w: World) -> None:
    w.held[0].pages[0][0] = w.held[3].pages[0][0]


def a_sequences_and_a_nodes(w: World) -> None:
    w.held[3].pages[1][0] = w.owned[1][0]


def misplaced(w: World) -> None:
    node = w.held[3]
    node.parent.children[as_key([9, 9])] = node  # type: ignore[union-attr]


def wrong_key(w: World) -> None:
    w.held[0].key = as_key([7, 7, 7, 7])


def short_column(w: World) -> None:
    w.held[1].pages[0] = w.held[1].pages[0][:0]


def hole(w: World) -> None:
    w.held[0].pages[0][0] = NONE


def no_page(w: World) -> None:
    w.held[0].pages[0][0] = 1000


def orphan(w: World) -> None:
    w.held[0].parent = w.held[3]


def dead(w: World) -> None:
    w.held[3].alive = False


def empty_namespace(w: World) -> None:
    w.tree.insert("x", as_key([5, 5]), [w.pools[0].take(1), w.pools[1].take(1), []], [NONE] * 3)
    w.tree.roots[0, "x"].children.clear()


def free_list(w: World) -> None:
    w.pools[0]._free.append(w.pools[0]._free[0])


FAULTS: dict[str, tuple[Callable[[World], None], str]] = {
    "lost": (lost, "are lost"),
    "leaked lock": (leaked_lock, "counts 1 locks that end there"),
    "evictable": (count, "evictable are counted"),
    "held": (held, "pages held"),
    "lock": (lock, "counts 1 locks, not 0"),
    "hold": (hold, "counts 0 readers of group 1, not 1"),
    "size": (size, "counts 3 pages of group 0, not 2"),
    "queue": (queue, "stands 0 times in a queue"),
    "twice queued": (twice_queued, "stands 2 times in a queue"),
    "free and a node's": (free_and_a_nodes, "are free and a node's"),
    "a sequence's and free": (a_sequences_and_free, "are a sequence's and free"),
    "two nodes": (two_nodes, "are owned by two nodes"),
    "a sequence's and a node's": (a_sequences_and_a_nodes, "are a sequence's and a node's"),
    "misplaced": (misplaced, "stands where its key does not lead"),
    "wrong key": (wrong_key, "stands where its key does not lead"),
    "short column": (short_column, "has 0 pages of group 0 for 1 pages of tokens"),
    "hole": (hole, "lacks a page of group 0"),
    "no page": (no_page, "has a page of group 0 that is none"),
    "orphan": (orphan, "stands where its key does not lead"),
    "dead": (dead, "is not what stands in a tree"),
    "empty namespace": (empty_namespace, "is empty or misplaced"),
    "free list": (free_list, "are free twice"),
}


LOST = {"lost": 1, "empty namespace": 2, "two nodes": 1, "a sequence's and a node's": 1, "short column": 1, "hole": 1,
        "no page": 1}  # fmt: skip
"""Pages that nobody owns any more."""
KILLED = {"two nodes", "a sequence's and a node's", "misplaced", "wrong key", "short column", "hole", "no page", "dead",
          "orphan"}  # fmt: skip
"""Faults after which a node can't be trusted."""


def test_a_good_cache_is_left_alone() -> None:
    w = World()
    assert w.wrong() == []
    before = [(n.serial, n.ends, n.lock, [*n.size]) for n in w.tree.nodes()]
    assert repair(w.tree, w.owned, w.readers).found == ()
    assert [(n.serial, n.ends, n.lock, [*n.size]) for n in w.tree.nodes()] == before


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named_and_mended(name: str) -> None:
    w = World()
    plant, says = FAULTS[name]
    plant(w)
    assert any(says in line for line in w.wrong()), w.wrong()
    done = repair(w.tree, w.owned, w.readers)
    assert done.found
    assert w.wrong() == []
    assert done.lost == LOST.get(name, 0)
    assert (done.dropped > 0) == (name in KILLED), done
    goes_on(w)


def goes_on(w: World) -> None:
    """All locks go, also those of nodes that went; everything can be evicted; all pages come back."""
    for node in w.readers:
        w.tree.unlock(node)
    for pool, pages in zip(w.pools, w.owned, strict=True):
        pool.give(pages)
    assert check(w.tree, [[], [], []], []) == []
    assert w.tree.evict([40, 40, 10])
    assert [pool.free for pool in w.pools] == [40, 40, 10]
    assert not w.tree.roots


def test_a_page_of_two_sequences_is_left_to_the_caller() -> None:
    w = World()
    w.owned[0].append(w.owned[0][0])
    done = repair(w.tree, w.owned, w.readers)
    assert done.left == (frozenset({w.owned[0][0]}), frozenset(), frozenset())
    assert done.dropped == 0
    assert any("owned by two sequences" in line for line in w.wrong())


@pytest.mark.parametrize("seed", range(20))
def test_many_faults_at_once(seed: int) -> None:
    rng, w = random.Random(seed), World()
    for name in rng.sample(sorted(FAULTS), 4):
        try:
            FAULTS[name][0](w)
        except (ValueError, IndexError):  # what one fault broke can't be broken by the next
            continue
    repair(w.tree, w.owned, w.readers)
    assert w.wrong() == []
    goes_on(w)


def test_unknown_owners_are_not_guessed() -> None:
    w = World()
    w.owned[0].pop()
    assert check(w.tree) == []
    w.tree.held[0] += 1
    assert len(check(w.tree)) == 1
