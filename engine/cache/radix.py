"""The radix tree: prompts that begin alike share the pages of what they have in common.

Keys are token ids as bytes (int32), compared at memory speed, in whole pages. A node owns, for each cache group, one
page per page of its key (-1 where a window had passed), and for state groups a checkpoint of the state at its end.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.cache.pages import PagePool
from engine.model.groups import CacheGroup

NONE = -1


class Node:
    """An edge of the tree and what it owns. tick: last use.

    ends: locks that end here. lock: locks that end here or below. holds: per group, those of them that still need
    this node's pages: all for full groups, for a window those that end less than a window away, for state the own.
    """

    __slots__ = ("alive", "children", "ends", "holds", "key", "lock", "pages", "parent", "queued", "states", "tick")

    def __init__(self, key: bytes, pages: list[list[int]], states: list[int], parent: Node | None, tick: int) -> None:
        self.key, self.pages, self.states, self.parent, self.tick = key, pages, states, parent, tick
        self.children: dict[bytes, Node] = {}
        self.ends = self.lock = 0
        self.holds = [0] * len(states)
        self.alive, self.queued = True, False


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The longest usable prefix. length: tokens, whole pages. node: ends there. pages: per group, from position
    `base` on (state groups: none). states: per group, the checkpoint to start from, or -1."""

    length: int
    node: Node
    base: tuple[int, ...]
    pages: tuple[list[int], ...]
    states: tuple[int, ...]


class RadixTree:
    """Prefix cache over the pools of all groups; evicts what was least recently used and nobody reads.

    Full pages go with their leaf. Pages of windows and checkpoints of state are also taken from within: the node stays,
    with -1. `held[g]` counts the pages that the tree owns in group g, `evictable[g]` those that no lock needs.
    """

    def __init__(self, groups: Sequence[CacheGroup], pools: Sequence[PagePool]) -> None:
        paged = {g.page for g in groups if g.kind != "state"}
        if len(paged) != 1:
            raise ValueError(f"groups must share one page size, not {sorted(paged)}")
        self.groups, self.pools, self.page = tuple(groups), tuple(pools), paged.pop()
        self.held = [0] * len(self.groups)
        self.evictable = [0] * len(self.groups)
        self._stateful = [g for g, group in enumerate(groups) if group.kind == "state"]
        self._roots: dict[Hashable, Node] = {}
        self._leaves: list[tuple[int, int, Node]] = []
        self._tick = 0

    def match(self, namespace: Hashable, tokens: bytes, limit: int) -> Match:
        """The longest cached prefix of `tokens` (int32 bytes) of at most `limit` tokens. Marks it as used now."""
        self._tick += 1
        node, path, width = self._root(namespace), [], self.page * 4
        end, at = limit // self.page * width, 0
        while at < end:
            child = node.children.get(tokens[at : at + width])
            if child is None:
                break
            same = common(child.key, tokens[at : min(end, at + len(child.key))], width)
            if same < len(child.key):
                child = self._split(child, same)
                path.append(child)
                break
            path.append(child)
            node, at = child, at + same
        for n in path:
            n.tick = self._tick
        return self._usable(self._root(namespace), path)

    def _usable(self, root: Node, path: list[Node]) -> Match:
        """Cut a matched path back to where every group has what a reader needs."""
        columns = [[p for n in path for p in n.pages[g]] for g in range(len(self.groups))]
        ends, total = [], 0
        for n in path:
            total += len(n.key) // (4 * self.page)
            ends.append(total)
        for count in sorted(set(ends) if self._stateful else range(1, total + 1), reverse=True):
            if all(self._readable(g, columns[g], count) for g in range(len(self.groups))):
                i = next(i for i, e in enumerate(ends) if e >= count)
                node = path[i] if ends[i] == count else self._split(path[i], self._width(path[i], ends[i] - count))
                if any(node.states[g] == NONE for g in self._stateful):
                    continue
                first = [self._first(g, count) for g in range(len(self.groups))]
                return Match(
                    length=count * self.page,
                    node=node,
                    base=tuple(f * self.page for f in first),
                    pages=tuple(columns[g][f:count] for g, f in enumerate(first)),
                    states=tuple(node.states),
                )
        none = len(self.groups)
        return Match(length=0, node=root, base=(0,) * none, pages=tuple([] for _ in range(none)), states=(NONE,) * none)

    def _width(self, node: Node, back: int) -> int:
        return len(node.key) - back * self.page * 4

    def _first(self, g: int, count: int) -> int:
        """Index of the first page that a row starting at position count * page reads in group g."""
        group = self.groups[g]
        if group.kind == "full":
            return 0
        if group.kind == "state":
            return count
        return min(count, max(0, count * self.page - group.window + 1) // self.page)

    def _readable(self, g: int, column: list[int], count: int) -> bool:
        return NONE not in column[self._first(g, count) : count]

    def insert(
        self, namespace: Hashable, tokens: bytes, pages: Sequence[Sequence[int]], states: Sequence[int]
    ) -> tuple[Node, list[set[int]]]:
        """Offer a prefix of whole pages. pages: per group one a page (-1 = has none; empty for state groups).
        states: per group a checkpoint at the end, or -1.

        Returns the node that ends there and, per group, the pages that the tree took; the rest stay the caller's.
        """
        self._tick += 1
        node, at, width = self._root(namespace), 0, self.page * 4
        took: list[set[int]] = [set() for _ in self.groups]
        while at < len(tokens):
            child = node.children.get(tokens[at : at + width])
            here = at // width
            if child is None:
                rest = [list(column[here:]) for column in pages]
                child = Node(tokens[at:], rest, [NONE] * len(self.groups), node, self._tick)
                node.children[tokens[at : at + width]] = child
                self._count(child, took)
            else:
                same = common(child.key, tokens[at : at + len(child.key)], width)
                if same < len(child.key):
                    child = self._split(child, same)
                self._fill(child, [column[here:] for column in pages], took)
            child.tick = self._tick
            node, at = child, at + len(child.key)
        for g, state in enumerate(states):
            if state != NONE and node.parent is not None and node.states[g] == NONE:
                node.states[g] = state
                self._own(node, g, state, took)
        if node.lock == 0 and not node.children:
            self._offer(node)
        return node, took

    def column(self, node: Node, g: int) -> list[int]:
        """The tree's pages of group g from position 0 to the end of `node`."""
        parts, at = [], node
        while at.parent is not None:
            parts.append(at.pages[g])
            at = at.parent
        return [page for part in reversed(parts) for page in part]

    def _count(self, node: Node, took: list[set[int]]) -> None:
        for g, column in enumerate(node.pages):
            for page in column:
                if page != NONE:
                    self._own(node, g, page, took)

    def _fill(self, node: Node, pages: Sequence[Sequence[int]], took: list[set[int]]) -> None:
        """Give a node the pages that it has none of."""
        for g, column in enumerate(node.pages):
            if NONE in column:
                for i, (mine, other) in enumerate(zip(column, pages[g], strict=False)):
                    if mine == NONE and other != NONE:
                        column[i] = other
                        self._own(node, g, other, took)

    def _own(self, node: Node, g: int, page: int, took: list[set[int]]) -> None:
        took[g].add(page)
        self.held[g] += 1
        if node.holds[g] == 0:
            self.evictable[g] += 1

    def lock(self, node: Node) -> None:
        """Protect what a reader that goes on at the end of `node` needs."""
        node.ends += 1
        self._hold(node, 1)

    def unlock(self, node: Node) -> None:
        """Undo one `lock`."""
        node.ends -= 1
        self._hold(node, -1)

    def _hold(self, node: Node, by: int) -> None:
        at: Node | None = node
        away = 0
        while at is not None:
            at.lock += by
            for g in range(len(self.groups)):
                if self._needs(g, away, at is node):
                    at.holds[g] += by
                    if at.holds[g] == (by > 0):
                        self.evictable[g] -= by * self._size(at, g)
            if at.lock == 0 and not at.children:
                self._offer(at)
            away += len(at.key) // 4
            at = at.parent

    def _needs(self, g: int, away: int, own: bool) -> bool:
        """Whether a reader at a position `away` tokens past a node's end needs the node's pages in group g."""
        group = self.groups[g]
        return group.kind == "full" or (away < group.window - 1 if group.kind == "window" else own)

    def _size(self, node: Node, g: int) -> int:
        return sum(p != NONE for p in owned(node, g))

    def evict(self, need: Sequence[int]) -> bool:
        """Free pages until each pool has at least need[g] free. False when that can't be reached; nothing is then lost
        that a lock protects."""
        if any(n > p.free + e for n, p, e in zip(need, self.pools, self.evictable, strict=True)):
            return False
        for g, group in enumerate(self.groups):
            while group.kind == "full" and need[g] > self.pools[g].free:
                tick, node = self._oldest()
                if not node.alive or node.lock or node.children:
                    continue
                if node.tick != tick:
                    self._offer(node)
                else:
                    self._drop(node)
            if need[g] > self.pools[g].free:
                self._strip(g, need[g])
        return True

    def _strip(self, g: int, need: int) -> None:
        """Take pages of group g out of the nodes that were used longest ago and whose readers don't need them."""
        nodes, stack = [], list(self._roots.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if not node.holds[g] and self._size(node, g):
                nodes.append(node)
        for node in sorted(nodes, key=lambda n: n.tick):
            pages = [p for p in owned(node, g) if p != NONE]
            self._forget(g, pages)
            node.pages[g] = [NONE] * len(node.pages[g])
            node.states[g] = NONE
            if node.lock == 0 and not node.children and not any(self._size(node, i) for i in range(len(self.groups))):
                self._drop(node)
            if need <= self.pools[g].free:
                return

    def _forget(self, g: int, pages: Sequence[int]) -> None:
        """Give pages that no lock needs back to their pool."""
        self.pools[g].give(pages)
        self.held[g] -= len(pages)
        self.evictable[g] -= len(pages)

    def _drop(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        for g in range(len(self.groups)):
            self._forget(g, [p for p in owned(node, g) if p != NONE])
        node.alive = False
        del parent.children[node.key[: self.page * 4]]
        if not parent.children and parent.lock == 0:
            self._offer(parent)

    def _offer(self, node: Node) -> None:
        """Queue a leaf for eviction. Its place is by the tick of now; `evict` looks again when its turn comes."""
        if node.parent is not None and not node.queued:
            node.queued = True
            heapq.heappush(self._leaves, (node.tick, id(node), node))

    def _oldest(self) -> tuple[int, Node]:
        tick, _, node = heapq.heappop(self._leaves)
        node.queued = False
        return tick, node

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node after `at` bytes; returns the new upper part."""
        parent, width = node.parent, self.page * 4
        assert parent is not None
        assert 0 < at < len(node.key)
        cut = at // width
        upper = Node(node.key[:at], [c[:cut] for c in node.pages], [NONE] * len(self.groups), parent, node.tick)
        upper.lock = node.lock
        upper.children[node.key[at : at + width]] = node
        parent.children[node.key[:width]] = upper
        node.key, node.pages, node.parent = node.key[at:], [c[cut:] for c in node.pages], upper
        for g, group in enumerate(self.groups):
            upper.holds[g] = node.lock if group.kind == "full" else self._readers(g, upper)
            if node.holds[g] and not upper.holds[g]:
                self.evictable[g] += self._size(upper, g)
        return upper

    def _readers(self, g: int, node: Node) -> int:
        """How many of the locks below a node (not its own) need its pages in group g."""
        found, stack = 0, [(child, len(child.key) // 4) for child in node.children.values()]
        while stack:
            at, away = stack.pop()
            if self._needs(g, away, False):
                found += at.ends
                stack += [(child, away + len(child.key) // 4) for child in at.children.values()]
        return found

    def _root(self, namespace: Hashable) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            empty: list[list[int]] = [[] for _ in self.groups]
            root = self._roots[namespace] = Node(b"", empty, [NONE] * len(self.groups), None, 0)
        return root

    def flush(self) -> None:
        """Drop every node that no lock protects."""
        while self._leaves:
            _, node = self._oldest()
            if node.alive and not node.lock and not node.children:
                self._drop(node)


def owned(node: Node, g: int) -> list[int]:
    """The pages of group g that a node owns, -1 among them."""
    return [*node.pages[g], node.states[g]]


def common(a: bytes, b: bytes, width: int) -> int:
    """Length of the common prefix of a and b in bytes, rounded down to whole `width`s."""
    n = min(len(a), len(b)) // width * width
    if a[:n] == b[:n]:
        return n
    low, high = 0, n // width
    while high - low > 1:
        mid = (low + high) // 2
        if a[low * width : mid * width] == b[low * width : mid * width]:
            low = mid
        else:
            high = mid
    return low * width


def as_key(tokens: Sequence[int]) -> bytes:
    """Token ids as the tree compares them."""
    return np.asarray(tokens, np.int32).tobytes()
