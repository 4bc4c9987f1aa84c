"""A node of the radix tree, and what can be said of nodes without the tree."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence

from engine.cache.pages import Pages, ids

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
