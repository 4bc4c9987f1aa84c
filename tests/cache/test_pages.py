"""The free list: what is taken comes back once, few pages at a time (a loop) and many (numpy)."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.pages import FEW, PagePool


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 3 * FEW), max_size=8))
def test_every_page_is_out_once(counts: list[int]) -> None:
    pool = PagePool(100)
    taken: list[list[int]] = []
    for count in counts:
        if count > pool.free:
            with pytest.raises(IndexError, match="free"):
                pool.take(count)
            pool.give(taken.pop())
        taken.append(list(pool.take(min(count, pool.free))))
        out = [page for pages in taken for page in pages]
        assert len({*out}) == len(out) == pool.total - pool.free
        assert sorted([*out, *pool.listed().tolist()]) == list(range(100))
        assert pool.marked().nonzero()[0].tolist() == sorted(out)
    for pages in taken:
        pool.give(set(pages))
    assert pool.free == 100


@pytest.mark.parametrize("count", [2, FEW + 8])
@pytest.mark.parametrize("bad", ["free", "same", "negative"])
def test_what_is_not_out_is_refused_and_nothing_changes(count: int, bad: str) -> None:
    pool = PagePool(100)
    pages = list(pool.take(count))
    free = pool.take(1)[0]
    pool.give([free])
    wrong = {"free": free, "same": pages[0], "negative": -1}[bad]
    with pytest.raises(ValueError, match=f"page {wrong} was given back twice"):
        pool.give([*pages, wrong])
    assert pool.free == 100 - count
    pool.give(pages)
    assert pool.free == 100


def test_the_lowest_go_first() -> None:
    assert all(a < b for a, b in pairwise(PagePool(100).take(FEW + 1)))
