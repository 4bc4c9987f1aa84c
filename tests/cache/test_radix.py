"""The radix tree where the state machine (test_machine.py) does not look: sizes, policies by example, memory."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from engine.cache.check import check
from engine.cache.evict import POLICIES
from engine.cache.node import common
from engine.cache.pages import PagePool
from engine.cache.radix import NONE, RadixTree, as_key
from engine.config import EVICTIONS
from engine.model.groups import CacheGroup


def make(pages: int, page: int = 2, eviction: str = "lru", window: int = 0) -> RadixTree:
    """A tree over a full group and, if asked, one of windows."""
    groups = [CacheGroup(kind="full", page=page)]
    if window:
        groups.append(CacheGroup(kind="window", page=page, window=window))
    return RadixTree(groups, [PagePool(pages) for _ in groups], eviction=eviction)


def put(tree: RadixTree, tokens: Sequence[int], priority: int = 0, name: object = "") -> None:
    """All of a request: match, evict, take, insert, give back what the tree had."""
    key = as_key(tokens)
    match = tree.match(name, key, len(tokens))
    tree.lock(match.node)
    count = len(tokens) // tree.page
    have = zip(match.base, match.pages, strict=True)
    assert tree.evict([count - len(pages) - base // tree.page for base, pages in have])
    columns = []
    for base, pages, pool in zip(match.base, match.pages, tree.pools, strict=True):
        column = [NONE] * (base // tree.page) + list(pages)
        columns.append(column + list(pool.take(count - len(column))))
    whole = key[: count * tree.page * 4]
    tree.insert(name, whole, columns, [NONE] * len(tree.pools), priority=priority)
    tree.unlock(match.node)


def left(tree: RadixTree, *prompts: Sequence[int]) -> list[int]:
    """Cached tokens of each."""
    return [tree.cached("", as_key(p), len(p)) for p in prompts]


A, B, C = range(0, 4), range(10, 14), range(20, 24)


def test_the_policies_are_those_of_the_configuration() -> None:
    assert set(POLICIES) == set(EVICTIONS)


@pytest.mark.parametrize(
    ("eviction", "kept"),
    [
        ("lru", [0, 0, 4]),  # C came last
        ("lfu", [4, 0, 0]),  # A was used thrice, B twice
        ("slru", [4, 0, 0]),  # A and B were used again, A later
        ("priority", [0, 4, 0]),  # B's requests came first
    ],
)
def test_what_goes_first(eviction: str, kept: list[int]) -> None:
    tree = make(6, eviction=eviction)
    for tokens, priority in ((A, 0), (B, 0), (A, 0), (B, 1), (A, 0), (C, 0)):
        put(tree, tokens, priority)
    assert left(tree, A, B, C) == [4, 4, 4]
    assert tree.evict([4])
    assert left(tree, A, B, C) == kept


def test_slru_protects_what_was_used_twice() -> None:
    tree = make(4, eviction="slru")
    for tokens in (A, A, C):
        put(tree, tokens)
    assert tree.evict([2])
    assert left(tree, A, C) == [4, 0]


def test_a_child_goes_before_its_parent() -> None:
    """A leaf that waits for its eviction gets a child."""
    tree, longer = make(8), [*A, *B]
    put(tree, A)
    put(tree, longer)
    assert tree.evict([6])
    assert left(tree, longer) == [4]


def test_a_look_is_a_use_for_lru() -> None:
    tree = make(6)
    for tokens in (A, B, C):
        put(tree, tokens)
    tree.match("", as_key(A), 4)
    assert tree.evict([2])
    assert left(tree, A, B, C) == [4, 0, 4]


def test_a_chunked_prompt_is_one_use() -> None:
    tree = make(8, eviction="lfu")
    pages, seen = list(tree.pools[0].take(3)), 0
    for end in (2, 4, 6):
        tree.insert("", as_key(range(end)), [pages[: end // 2]], [NONE], seen=seen)
        seen = end
    assert [node.hits for node in tree.nodes()] == [1, 1, 1]
    put(tree, range(6))
    assert [node.hits for node in tree.nodes()] == [2, 2, 2]


def test_new_weights_make_the_old_prefixes_useless_and_first_to_go() -> None:
    tree = make(6)
    put(tree, A)
    tree.renew(1)
    put(tree, B)
    assert left(tree, A, B) == [0, 4]
    put(tree, A)
    tree.match("", as_key(B), 4)
    assert tree.evict([2])
    assert left(tree, A, B) == [4, 4]
    assert {version for version, _ in tree.roots} == {1}


def test_a_sequence_of_old_weights_shares_only_with_its_like() -> None:
    tree = make(6)
    match = tree.match("", as_key(A), 4)
    tree.renew(1)
    tree.insert("", as_key(A), [tree.pools[0].take(2)], [NONE], version=match.version)
    assert left(tree, A) == [0]
    assert check(tree) == []


def test_prefix_is_never_the_whole_prompt() -> None:
    tree = make(4)
    put(tree, A)
    assert tree.match("", as_key(A), 3).length == 2


def test_state_is_matched_where_its_checkpoint_is() -> None:
    state = CacheGroup(kind="state", page=0)
    tree = RadixTree([CacheGroup(kind="full", page=2), state], [PagePool(8), PagePool(2)])
    checkpoint = tree.pools[1].take(1)[0]
    tree.insert("", as_key(range(4)), [tree.pools[0].take(2), []], [NONE, checkpoint])
    tree.insert("", as_key(range(8)), [tree.pools[0].take(4), []], [NONE, NONE])
    match = tree.match("", as_key(range(9)), 8)
    assert (match.length, match.states[1], len(match.pages[0])) == (4, checkpoint, 2)


@pytest.mark.parametrize("page", [1, 3, 16, 128])
def test_page_sizes(page: int) -> None:
    tree = make(64, page=page, window=2 * page)
    long, short = range(page * 10 + page // 2), [*range(page * 4), *range(7000, 7000 + page * 3)]
    put(tree, long)
    put(tree, short)
    assert left(tree, long, short, [9]) == [page * 10, page * 7, 0]
    assert tree.held == [13, 13]
    assert check(tree) == []


def test_what_is_not_whole_is_refused() -> None:
    tree = make(8)
    with pytest.raises(ValueError, match="3 tokens are no whole pages of 2"):
        tree.insert("", as_key(range(3)), [[0, 1]], [NONE])
    with pytest.raises(ValueError, match="2 pages of tokens"):
        tree.insert("", as_key(range(4)), [[0]], [NONE])
    assert not tree.roots
    with pytest.raises(OverflowError):
        as_key([1 << 31])


def test_common_prefix_is_in_whole_widths() -> None:
    for n in range(1, 20):
        a, b = bytes(range(20)), bytes(range(n)) + bytes([255] * (20 - n))
        assert common(a, b, 4) == n // 4 * 4


@pytest.mark.parametrize("eviction", sorted(EVICTIONS))
@pytest.mark.parametrize("window", [0, 6])
def test_memory_is_flat(eviction: str, window: int) -> None:
    """Many short requests of many tenants, new weights now and then."""
    tree, rng = make(400, eviction=eviction, window=window), random.Random(0)
    for i in range(50_000 // 8):
        put(tree, [rng.randrange(4) for _ in range(rng.randrange(2, 24))], i % 3, name=(i % 977,))
        tree.match((i,), as_key([1, 2, 3]), 3)  # a tenant that has nothing
        if i % 1000 == 999:
            tree.renew(i)
        heaps = [queue.heap for queue in (tree.leaves, *tree.loose.values())]
        size = sum(map(len, heaps)) + len(tree.roots) + sum(1 for _ in tree.nodes())
        assert size < 2500, f"after {i} requests"
    assert check(tree) == []
    tree.flush()
    assert not tree.roots
    assert [pool.free for pool in tree.pools] == [pool.total for pool in tree.pools]
