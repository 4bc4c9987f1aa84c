"""A node of the radix tree, and what can be said of nodes without the tree."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.cache.pages import Pages, ids
from engine.model.groups import CacheGroup

NONE = -1


class Node:
    """An edge of the tree and what it owns.

    size: pages that it owns, per group. tick: last use. hits: requests that used it. priority: the highest of theirs.
    fresh: of the weights of now. ends: locks that end here. lock: locks that end here or below. holds: per window or
    state group, those of them that still need this node's pages: for a window those that end less than a window away,
    for state its own. queued: bits of the queues that it stands in. serial: nodes count up. hashes: of its pages, kept
    where events are.
    """

    __slots__ = (
        "alive", "children", "ends", "fresh", "hashes", "hits", "holds", "key", "lock", "pages", "parent", "priority",
        "queued", "serial", "size", "states", "tick",
    )  # fmt: skip

    def __init__(self, key: bytes, pages: list[Pages], states: list[int], parent: Node | None) -> None:
        self.key, self.pages, self.states, self.parent = key, pages, states, parent
        self.children: dict[bytes, Node] = {}
        self.size, self.holds = [0] * len(states), [0] * len(states)
        self.ends = self.lock = self.hits = self.priority = self.queued = self.serial = self.tick = 0
        self.alive = self.fresh = True
        self.hashes: tuple[int, ...] = ()


class Root(Node):
    """Where a namespace begins; owns nothing. space: weights' version and namespace."""

    __slots__ = ("space",)

    def __init__(self, groups: int, space: tuple[int, Hashable]) -> None:
        super().__init__(b"", [array("i") for _ in range(groups)], [NONE] * groups, None)
        self.space = space


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The longest usable prefix. length: tokens, whole pages. node: ends there. pages: per group, from position
    `base` on (state groups: none); the caller's own. states: per group, the checkpoint to start from, or -1.
    version: of the weights that made it."""

    length: int
    node: Node
    base: tuple[int, ...]
    pages: tuple[Pages, ...]
    states: tuple[int, ...]
    version: int


def below(node: Node) -> Iterator[Node]:
    """Every node below another, parents before their children."""
    stack = [*node.children.values()]
    while stack:
        at = stack.pop()
        yield at
        stack += at.children.values()


def upwards(node: Node) -> Iterator[Node]:
    """A node and those above it, without the root."""
    at, parent = node, node.parent
    while parent is not None:
        yield at
        at, parent = parent, parent.parent


def joined(path: Sequence[Node], g: int) -> Pages:
    """The pages of group g of nodes that follow each other."""
    out = array("i")
    for node in path:
        out += node.pages[g]
    return out


def solid(column: Pages) -> Pages:
    """The pages of a column that are there."""
    if not column:
        return column
    pages = ids(column)
    return array("i", pages[pages != NONE].tobytes())


def owned(node: Node, g: int) -> Pages:
    """The pages of group g that a node owns."""
    column = node.pages[g]
    return column if node.size[g] == len(column) else solid(column + array("i", [node.states[g]]))


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


def usable(path: Sequence[Node], count: int, groups: Sequence[CacheGroup], page: int) -> int:
    """The most pages of a path, up to `count`, after which every group has what a reader needs."""
    states = [g for g, group in enumerate(groups) if group.kind == "state"]
    ok = np.full(count + 1, not states)  # ok[c]: a reader can go on after c pages
    at = 0
    for node in path if states else ():
        at += len(node.key) // (4 * page)
        if at <= count and all(node.states[g] != NONE for g in states):
            ok[at] = True
    ok[0], to = True, np.arange(1, count + 1)
    for g, group in enumerate(groups):
        if group.kind == "window":
            holes = ids(joined(path, g))[:count] == NONE
            last = np.maximum.accumulate(np.where(holes, to - 1, NONE))  # the last hole before c pages
            ok[1:] &= last < np.maximum(0, to * page - group.window + 1) // page
    return int(np.flatnonzero(ok)[-1])


def first_read(group: CacheGroup, count: int, page: int) -> int:
    """Index of the first page that a reader at position count * page reads in a group."""
    if group.kind == "full":
        return 0
    return count if group.kind == "state" else min(count, max(0, count * page - group.window + 1) // page)
