"""The prefix cache alone, without a model: microseconds of CPU time that a request costs the radix tree.

Requests share seeded prefixes by Zipf's law. Each is matched, its prefix locked, what is missing evicted and taken,
the whole inserted and unlocked, as the scheduler does for a request that is seated and ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from engine.cache.pages import PagePool
from engine.cache.radix import NONE, RadixTree, as_key
from engine.model.groups import CacheGroup

LENGTHS, PREFIXES, SHARED, VOCAB, SKEW = (512, 4096), (256, 2048), 64, 128_000, 1.1
"""Tokens of a request and of a shared prefix, both ends included; how many prefixes; token ids; exponent of Zipf."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Figures of one page size; times are CPU microseconds a request, the median of the repeats and the best.

    total: match, lock, evict, take, insert and unlock. match: that alone. key: token ids (a tuple) to what the tree
    compares, not part of total. cached: share of the tokens that were matched. evicted: tokens.
    """

    page: int
    total: float
    best: float
    match: float
    match_best: float
    key: float
    cached: float
    evicted: int


def workload(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Token ids of `count` requests: a shared prefix, chosen by rank ** -SKEW, then at least 32 tokens of its own."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(0, VOCAB, rng.integers(PREFIXES[0], PREFIXES[1] + 1)) for _ in range(SHARED)]
    weight = 1.0 / np.arange(1, SHARED + 1) ** SKEW
    out = []
    for which in rng.choice(SHARED, count, p=weight / weight.sum()):
        total = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
        prefix = prefixes[which][: total - 32]
        tail = rng.integers(0, VOCAB, total - len(prefix))
        out.append(tuple(np.concatenate([prefix, tail]).tolist()))
    return out


def serve(tree: RadixTree, keys: Sequence[bytes], clock: Callable[[], int] | None = None) -> tuple[int, int, int]:
    """Every request through the tree. Returns nanoseconds in match (0 without a clock), tokens matched and evicted."""
    pool, page, spent, matched, evicted = tree.pools[0], tree.page, 0, 0, 0
    for key in keys:
        count, then = len(key) // (4 * page), clock() if clock else 0
        match = tree.match("", key, len(key) // 4)
        spent += clock() - then if clock else 0
        tree.lock(match.node)
        matched += match.length
        missing, free = count - match.length // page, pool.free
        assert tree.evict([missing])
        evicted += (pool.free - free) * page
        pages = match.pages[0]
        pages += pool.take(missing)
        _, took = tree.insert("", key[: count * page * 4], [pages], [NONE])
        assert len(took[0]) == missing
        tree.unlock(match.node)
    return spent, matched, evicted


def measure(page: int, requests: int, capacity: int, repeats: int, seed: int = 0) -> Cost:
    """Serve the workload `repeats` times, each from an empty tree of `capacity` tokens, once for the whole and once
    with a clock around match."""
    prompts = workload(requests, seed)
    cpu = time.process_time_ns
    keys, totals, matches, makes = list[bytes](), list[float](), list[float](), list[float]()
    matched = evicted = 0
    for _ in range(repeats):
        then = cpu()
        keys = [as_key(p) for p in prompts]
        makes.append((cpu() - then) / 1e3 / requests)
        tree = fresh(page, capacity)
        then = cpu()
        _, matched, evicted = serve(tree, keys)
        totals.append((cpu() - then) / 1e3 / requests)
        matches.append(serve(fresh(page, capacity), keys, cpu)[0] / 1e3 / requests)
    return Cost(
        page=page,
        total=median(totals),
        best=min(totals),
        match=median(matches),
        match_best=min(matches),
        key=median(makes),
        cached=matched * 4 / sum(map(len, keys)),
        evicted=evicted,
    )


def fresh(page: int, capacity: int) -> RadixTree:
    """An empty tree over one full group."""
    return RadixTree([CacheGroup(kind="full", page=page)], [PagePool(capacity // page)])
