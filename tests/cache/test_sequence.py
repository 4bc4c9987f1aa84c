"""What a sequence offers to the tree."""

from __future__ import annotations

from engine.cache.check import check
from engine.cache.pages import PagePool
from engine.cache.radix import NONE, RadixTree, as_key
from engine.cache.sequence import SequenceCache
from engine.model.groups import CacheGroup


def test_pages_that_were_evicted_behind_it_are_not_offered_again() -> None:
    """Two steps are in flight: the tree may lose a window's old pages before the sequence has trimmed them."""
    groups, pools = [CacheGroup(kind="window", page=2, window=4)], [PagePool(12)]
    tree = RadixTree(groups, pools)
    seq = SequenceCache(tree, pools, [12], tree.match("", b"", 0))
    seq.grow(12)
    for end in (4, 8):
        seq.share("", as_key(range(end)), [NONE])
    first = next(iter(tree.nodes()))
    assert tree.evict([pools[0].free + 1])
    assert first.size == [0]
    taken = pools[0].take(pools[0].free)  # someone else's now
    seq.share("", as_key(range(12)), [NONE])
    assert check(tree, [[*taken, *seq.own[0]]], [seq.node]) == []
    seq.release()
    pools[0].give(taken)
    tree.flush()
    assert pools[0].free == 12


def test_a_chunked_prompt_is_one_use_of_what_it_shares() -> None:
    groups, pools = [CacheGroup(kind="full", page=2)], [PagePool(12)]
    tree = RadixTree(groups, pools, eviction="lfu")
    for priority in (0, 3):
        seq = SequenceCache(tree, pools, [12], tree.match("", as_key(range(8)), 4 * priority // 3))
        seq.grow(8)
        for end in (4, 6, 8):
            seq.share("", as_key(range(end)), [NONE], priority)
        seq.release()
    assert {(node.hits, node.priority) for node in tree.nodes()} == {(2, 3)}


def test_new_weights_in_mid_prompt() -> None:
    groups, pools = [CacheGroup(kind="full", page=2)], [PagePool(12)]
    tree = RadixTree(groups, pools)
    seq = SequenceCache(tree, pools, [12], tree.match("", b"", 0))
    seq.grow(8)
    seq.share("", as_key(range(4)), [NONE])
    tree.renew(7)
    seq.share("", as_key(range(8)), [NONE])
    assert tree.cached("", as_key(range(8)), 8) == 0
    assert check(tree, [seq.own[0]], [seq.node]) == []
