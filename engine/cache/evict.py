"""Which node goes first when pages are short."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from engine.cache.radix import Node

Rank: TypeAlias = tuple[bool, int, int]
"""What is lower goes first: of old weights, by policy, by last use."""

PROTECTED = 2
"""Requests that make a node worth keeping for SLRU."""

POLICIES: Mapping[str, Callable[[Node], int]] = {
    "lru": lambda node: 0,
    "lfu": lambda node: node.hits,
    "slru": lambda node: node.hits >= PROTECTED,
    "priority": lambda node: node.priority,
}
"""cache.eviction -> what counts before the last use, as in SGLang (srt/mem_cache/evict_policy.py)."""


class Queue:
    """Nodes that may be evicted, the lowest rank first.

    A node stands here once; `bit` in node.queued says so. Ranks rise while a node waits, so that entries may be out of
    date: `pop` looks again. A node that is dropped elsewhere stays as a dead entry, and these are purged before they
    outnumber the living.
    """

    __slots__ = ("_class", "_dead", "bit", "heap")

    def __init__(self, policy: str, bit: int) -> None:
        self._class, self.bit = POLICIES[policy], bit
        self.heap: list[tuple[Rank, int, Node]] = []
        self._dead = 0

    def rank(self, node: Node) -> Rank:
        """Where a node stands now."""
        return node.fresh, self._class(node), node.tick

    def push(self, node: Node) -> None:
        """Queue a node, unless it is queued."""
        if not node.queued & self.bit:
            node.queued |= self.bit
            heapq.heappush(self.heap, (self.rank(node), node.serial, node))

    def pop(self) -> Node:
        """Take the first living node. The caller looks whether it may still be evicted. Raises IndexError if none."""
        while True:
            rank, _, node = heapq.heappop(self.heap)
            node.queued &= ~self.bit
            if not node.alive:
                self._dead -= 1
            elif rank != self.rank(node):
                self.push(node)
            else:
                return node

    def died(self) -> None:
        """A node that is queued here was dropped."""
        self._dead += 1
        if self._dead > 32 + len(self.heap) // 2:
            self.renew()

    def renew(self) -> None:
        """Purge the dead and rank the living anew."""
        self.heap = [(self.rank(n), serial, n) for _, serial, n in self.heap if n.alive]
        heapq.heapify(self.heap)
        self._dead = 0

    def clear(self) -> None:
        """Forget everything; the nodes' bits are the caller's to clear."""
        self.heap.clear()
        self._dead = 0
