"""The radix tree: prompts that begin alike share the pages of what they have in common.

Keys are token ids as bytes (int32), compared at memory speed, in whole pages. A node owns, for each cache group, one
page per page of its key (-1 where a window had passed), and for state groups a checkpoint of the state at its end.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator, Sequence

from engine.cache.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, chain
from engine.cache.evict import Queue
from engine.cache.node import (
    NONE,
    Match,
    Node,
    Root,
    below,
    common,
    first_read,
    joined,
    owned,
    solid,
    upwards,
    usable,
)
from engine.cache.pages import PagePool, Pages
from engine.model.groups import CacheGroup

__all__ = ("NONE", "Match", "Node", "RadixTree", "as_key")


class RadixTree:
    """Prefix cache over the pools of all groups; evicts what its policy (engine.cache.evict) says and nobody reads.

    Full pages go with their leaf. Pages of windows and checkpoints of state are also taken from within: the node stays,
    with -1. `held[g]` counts the pages that the tree owns in group g, `evictable[g]` those that no lock needs.
    A namespace is there while it holds something. version: of the weights; prefixes of others are never matched.
    """

    def __init__(
        self, groups: Sequence[CacheGroup], pools: Sequence[PagePool], *, eviction: str = "lru", events: bool = False
    ) -> None:
        paged = {g.page for g in groups if g.kind != "state"}
        if len(paged) != 1:
            raise ValueError(f"groups must share one page size, not {sorted(paged)}")
        self.groups, self.pools, self.page = tuple(groups), tuple(pools), paged.pop()
        self.held, self.evictable = [0] * len(self.groups), [0] * len(self.groups)
        self.version, self.log = 0, list[Event]() if events else None
        self.roots: dict[tuple[int, Hashable], Root] = {}
        self.leaves = Queue(eviction, 1)
        self.loose = {g: Queue(eviction, 2 << g) for g, group in enumerate(groups) if group.kind != "full"}
        self._full = [g for g, group in enumerate(groups) if group.kind == "full"]
        self._windows = [g for g, group in enumerate(groups) if group.kind == "window"]
        self._states = [g for g, group in enumerate(groups) if group.kind == "state"]
        self._void = Root(len(self.groups), (0, ()))  # where a match of nothing ends
        self._width = self.page * 4
        self._tick = self._serial = 0

    # Look up

    def match(self, namespace: Hashable, tokens: bytes, limit: int) -> Match:
        """The longest cached prefix of `tokens` (int32 bytes) of at most `limit` tokens. Marks it as used now."""
        path, reach, count = self._find(namespace, tokens, limit)
        while reach > count:
            node = path.pop()
            reach -= len(node.key) // self._width
            if reach < count:
                path.append(self._split(node, count - reach))
        tick = self._tick = self._tick + 1
        for node in path:
            node.tick = tick
        first = [first_read(group, count, self.page) for group in self.groups]
        end = path[-1] if path else self._void
        return Match(
            length=count * self.page,
            node=end,
            base=tuple([f * self.page for f in first]),
            pages=tuple([joined(path, g)[f:] for g, f in enumerate(first)]),
            states=tuple(end.states),
            version=self.version,
        )

    def cached(self, namespace: Hashable, tokens: bytes, limit: int) -> int:
        """The length that `match` would have; changes nothing."""
        return self._find(namespace, tokens, limit)[2] * self.page

    def _find(self, namespace: Hashable, tokens: bytes, limit: int) -> tuple[list[Node], int, int]:
        """The nodes that `tokens` leads through, the last perhaps not to its end, the pages up to the end of the last,
        and how many of them are usable."""
        root = self.roots.get((self.version, namespace))
        if root is None:
            return [], 0, 0
        path, at, short, children, width = list[Node](), 0, 0, root.children, self._width
        end = min(len(tokens) // width, limit // self.page) * width
        tokens = tokens[:end]
        while at < end:
            node = children.get(tokens[at : at + width])
            if node is None:
                break
            path.append(node)
            key, children = node.key, node.children
            if not tokens.startswith(key, at):
                short = len(key) - common(key, tokens[at : at + len(key)], width)
                children = {}
            at += len(key)
        count = (at - short) // width
        return path, at // width, usable(path, count, self.groups, self.page) if self.loose and count else count

    def column(self, node: Node, g: int) -> Pages:
        """The tree's pages of group g from position 0 to the end of `node`."""
        return joined([*reversed([*upwards(node)])], g)

    # Insert

    def insert(
        self,
        namespace: Hashable,
        tokens: bytes,
        pages: Sequence[Sequence[int]],
        states: Sequence[int],
        *,
        priority: int = 0,
        seen: int = 0,
        version: int | None = None,
    ) -> tuple[Node, list[Pages]]:
        """Offer a prefix of whole pages. pages: per group one a page (-1 = has none; empty for state groups), which the
        caller owns; for full groups also those that the tree has there.
        states: per group a checkpoint at the end, or -1. priority: of the request. seen: tokens that it offered before,
        which count as used by it once. version: of the weights that began it; None is that of now.

        Returns the node that ends there (or before, where nothing is left to own) and, per group, the pages that the
        tree took; the rest stay the caller's. Raises ValueError when tokens or pages aren't whole.
        """
        if len(tokens) % self._width:
            raise ValueError(f"{len(tokens) // 4} tokens are no whole pages of {self.page}")
        self._tick += 1
        space = self.version if version is None else version, namespace
        root = self.roots.get(space) or Root(len(self.groups), space)
        root.fresh = space[0] == self.version
        node: Node = root
        at, end, took = 0, len(tokens), [array("i") for _ in self.groups]
        while at < end:
            child = node.children.get(tokens[at : at + self._width])
            if child is None:
                rest = [column[at // self._width :] for column in pages]
                child = self._grow(node, tokens[at:], rest, states, took, priority)
                if child is None:
                    break
                self._tell(child, space)
            else:
                if not tokens.startswith(child.key, at):
                    same = common(child.key, tokens[at : at + len(child.key)], self._width)
                    child = self._split(child, same // self._width)
                if self._windows:
                    self._fill(child, [column[at // self._width :] for column in pages], took)
            node, at = child, at + len(child.key)
            node.tick = self._tick
            node.hits += at > seen * 4
            if node.priority < priority:
                node.priority = priority
        if at == end:
            for g in self._states:
                if states[g] != NONE and node.states[g] == NONE and node is not root:
                    node.states[g] = states[g]
                    self._own(node, g, array("i", [states[g]]), took)
        if root.children:
            self.roots[space] = root
        return (self._void if node is root else node), took

    def _grow(
        self,
        node: Node,
        key: bytes,
        pages: Sequence[Sequence[int]],
        states: Sequence[int],
        took: list[Pages],
        priority: int,
    ) -> Node | None:
        """A new leaf below `node`; None when it would own nothing."""
        own = [column if isinstance(column, array) else array("i", column) for column in pages]
        count = len(key) // self._width
        if any(len(own[g]) != count for g in (*self._full, *self._windows)):
            raise ValueError(f"{count} pages of tokens, but {[len(column) for column in own]} pages were offered")
        if not self._full and all(s == NONE for s in states) and not any(len(solid(column)) for column in own):
            return None
        leaf = Node(key, own, [NONE] * len(self.groups), node)
        leaf.fresh, leaf.priority, leaf.tick, leaf.serial = node.fresh, priority, self._tick, self._count()
        node.children[key[: self._width]] = leaf
        for g, column in enumerate(own):
            self._own(leaf, g, column if g in self._full else solid(column), took)
        self.leaves.push(leaf)
        return leaf

    def _tell(self, leaf: Node, space: tuple[int, Hashable]) -> None:
        """Log a node that came, if it is of the weights of now."""
        if self.log is not None and leaf.parent is not None and leaf.fresh:
            before, tokens = leaf.parent.hashes, tuple(array("i", leaf.key))
            parent = before[-1] if before else None
            leaf.hashes = chain(leaf.key, self._width, parent, space)
            self.log.append(
                BlockStored(hashes=leaf.hashes, parent=parent, tokens=tokens, page=self.page, namespace=space[1])
            )

    def _untell(self, node: Node) -> None:
        """Log that a node can't be matched any more."""
        if self.log is not None:
            self.log.append(BlockRemoved(hashes=(*node.hashes,)))
        node.hashes = ()

    def _count(self) -> int:
        self._serial += 1
        return self._serial

    def _fill(self, node: Node, pages: Sequence[Sequence[int]], took: list[Pages]) -> None:
        """Give a node the pages that it has none of."""
        for g in self._windows:
            mine = node.pages[g]
            if node.size[g] < len(mine):
                new = array("i")
                for i, (own, other) in enumerate(zip(mine, pages[g], strict=False)):
                    if own == NONE and other != NONE:
                        mine[i] = other
                        new.append(other)
                self._own(node, g, new, took)

    def _own(self, node: Node, g: int, pages: Pages, took: list[Pages]) -> None:
        took[g].extend(pages)
        node.size[g] += len(pages)
        self.held[g] += len(pages)
        if not (node.holds[g] if g in self.loose else node.lock):
            self.evictable[g] += len(pages)
            if g in self.loose and node.size[g]:
                self.loose[g].push(node)

    # Lock

    def lock(self, node: Node) -> None:
        """Protect what a reader that goes on at the end of `node` needs."""
        assert node.alive, "a node was evicted between match and lock"
        node.ends += 1
        self.hold(node, 1)

    def unlock(self, node: Node) -> None:
        """Undo one `lock`. Does nothing where `engine.cache.check.repair` took the node away."""
        if node.alive:
            node.ends -= 1
            self.hold(node, -1)

    def hold(self, node: Node, by: int) -> None:
        """Count `by` more locks that end at `node`, in it and above; `lock` and `unlock` without their own count."""
        if self.loose:
            self._hold_loose(node, by)
        at, above = node, node.parent
        while above is not None:
            before = at.lock
            at.lock = now = before + by
            if not before or not now:  # the first came, or the last went
                for g in self._full:
                    self.evictable[g] += at.size[g] if before else -at.size[g]
                if before and not at.children:
                    self.offer(at)
            at, above = above, above.parent

    def _hold_loose(self, node: Node, by: int) -> None:
        """`hold` of what is not full: only those count that still need a node's pages."""
        away = 0
        for at in upwards(node):
            for g, queue in self.loose.items():
                if self._needs(g, away, at is node):
                    before = at.holds[g]
                    at.holds[g] = before + by
                    if not before or not at.holds[g]:
                        self.evictable[g] += at.size[g] if before else -at.size[g]
                        if before and at.size[g]:
                            queue.push(at)
            away += len(at.key) // 4

    def _needs(self, g: int, away: int, own: bool) -> bool:
        """Whether a reader at a position `away` tokens past a node's end needs the node's pages in group g, which is
        of windows or state."""
        group = self.groups[g]
        return away < group.window - 1 if group.kind == "window" else own

    # Evict

    def evict(self, need: Sequence[int]) -> bool:
        """Free pages until each pool has at least need[g] free. False when that can't be reached; nothing is then lost.
        What a lock protects stays."""
        if all(n <= p.free for n, p in zip(need, self.pools, strict=True)):
            return True
        if any(n > p.free + e for n, p, e in zip(need, self.pools, self.evictable, strict=True)):
            return False
        for g in self._full:
            while need[g] > self.pools[g].free:
                node = self.leaves.pop()
                if not node.lock and not node.children:
                    self._drop(node)
        for g, queue in self.loose.items():
            while need[g] > self.pools[g].free:
                node = queue.pop()
                if not node.holds[g] and node.size[g]:
                    self._strip(node, g)
        return True

    def _strip(self, node: Node, g: int) -> None:
        """Take the pages of a window or state group out of a node whose readers don't need them."""
        self._release(node, g)
        node.pages[g] = array("i", [NONE]) * len(node.pages[g])
        node.states[g] = NONE
        if not node.lock and not node.children:
            self.offer(node)

    def offer(self, node: Node) -> None:
        """An unlocked leaf waits for its eviction, unless nothing would be won by that."""
        if any(node.size):
            self.leaves.push(node)
        else:
            self._drop(node)

    def _release(self, node: Node, g: int) -> None:
        """Give a node's pages of group g, which no lock needs, back to their pool."""
        count = node.size[g]
        if count:
            self.pools[g].give(owned(node, g))
            self.held[g] -= count
            self.evictable[g] -= count
            node.size[g] = 0

    def _drop(self, node: Node) -> None:
        """Take an unlocked leaf away, and what then stands there for nothing above it."""
        parent = node.parent
        assert parent is not None
        for g in range(len(self.groups)):
            self._release(node, g)
        self.forget(node)
        del parent.children[node.key[: self._width]]
        if not parent.children:
            if isinstance(parent, Root):
                del self.roots[parent.space]
            elif not parent.lock:
                self.offer(parent)

    def forget(self, node: Node) -> None:
        """A node is the tree's no more."""
        node.alive = False
        for queue in (self.leaves, *self.loose.values()) if node.queued else ():
            if node.queued & queue.bit:
                queue.died()
        if self.log is not None and node.hashes:
            self.log.append(BlockRemoved(hashes=node.hashes))

    def flush(self, namespace: Hashable | None = None) -> None:
        """Drop every node that no lock protects; of one namespace, where one is given."""
        known = len(self.log or ())
        roots = [root for space, root in self.roots.items() if namespace is None or space[1] == namespace]
        for node in reversed([node for root in roots for node in below(root)]):  # children before their parents
            if node.alive and not node.lock and not node.children:
                self._drop(node)
        if self.log is not None and not self.roots:
            self.log[known:] = [AllBlocksCleared()]

    def renew(self, version: int) -> None:
        """The weights are of `version` from now on: what others made is not matched any more, and goes first."""
        self.version = version
        for root in self.roots.values():
            root.fresh = root.space[0] == version
            for node in below(root):
                if node.hashes and not root.fresh:
                    self._untell(node)
                elif not node.fresh and root.fresh:
                    node.fresh = True
                    self._tell(node, root.space)
                node.fresh = root.fresh
        for queue in (self.leaves, *self.loose.values()):
            queue.renew()

    def _split(self, node: Node, count: int) -> Node:
        """Cut a node after `count` pages; returns the new upper part."""
        parent, at = node.parent, count * self._width
        assert parent is not None
        assert 0 < at < len(node.key)
        upper = Node(node.key[:at], [c[:count] for c in node.pages], [NONE] * len(self.groups), parent)
        upper.lock, upper.tick, upper.hits, upper.priority = node.lock, node.tick, node.hits, node.priority
        upper.fresh, upper.serial = node.fresh, self._count()
        upper.children[node.key[at : at + self._width]] = node
        parent.children[node.key[: self._width]] = upper
        node.key, node.pages, node.parent = node.key[at:], [c[count:] for c in node.pages], upper
        upper.hashes, node.hashes = node.hashes[:count], node.hashes[count:]
        for g in self._full:
            upper.size[g] = count
            node.size[g] -= count
        for g, queue in self.loose.items():
            upper.size[g] = len(solid(upper.pages[g]))
            node.size[g] -= upper.size[g]
            upper.holds[g] = self._readers(g, upper)
            if upper.size[g] and not upper.holds[g]:
                self.evictable[g] += upper.size[g] if node.holds[g] else 0
                queue.push(upper)
        return upper

    def _readers(self, g: int, node: Node) -> int:
        """How many of the locks below a node (not its own) need its pages in group g."""
        found, stack = 0, [(child, len(child.key) // 4) for child in node.children.values()]
        while stack:
            at, away = stack.pop()
            if at.lock and self._needs(g, away, False):
                found += at.ends
                stack += [(child, away + len(child.key) // 4) for child in at.children.values()]
        return found

    # Look around

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before their children."""
        for root in self.roots.values():
            yield from below(root)

    def drain(self) -> list[Event]:
        """What happened since the last call; nothing where events are off."""
        out, self.log = self.log or [], None if self.log is None else []
        return out


def as_key(tokens: Sequence[int]) -> bytes:
    """Token ids as the tree compares them. Raises OverflowError for what is no int32."""
    return array("i", tokens).tobytes()
