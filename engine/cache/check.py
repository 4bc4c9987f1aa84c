"""What must always be true of pools and tree: `check` says what is not, `repair` makes it so again.

Every page has one owner: the free list, one node of the tree, or one sequence. What the tree has counted is what can
be counted. Both walk the whole tree, some microseconds a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.cache.node import NONE, Node, Root, below, upwards
from engine.cache.radix import RadixTree

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What `repair` found and did.

    found: as `check` says it. lost: pages that nobody owned, now free. dropped: nodes taken away. left: per group,
    pages that more than one sequence says it owns: nothing here can mend that, those sequences must end.
    """

    found: tuple[str, ...] = ()
    lost: int = 0
    dropped: int = 0
    left: tuple[frozenset[int], ...] = ()


def check(
    tree: RadixTree, owned_by: Sequence[Iterable[int]] | None = None, readers: Iterable[Node] | None = None
) -> list[str]:
    """What is wrong; empty is good. owned_by: per group, the pages that sequences own, each as often as one says so.
    readers: the node of each lock. None: not known, and not looked at."""
    return [
        *_shape(tree),
        *_pages(tree, owned_by),
        *_locks(tree, readers),
        *_counts(tree),
        *_queues(tree),
    ]


def _name(node: Node) -> str:
    return f"node {node.serial}"


def _fault(tree: RadixTree, node: Node, head: bytes, parent: Node) -> str | None:
    """What is wrong with a node itself, given where it was found."""
    width = tree.page * 4
    count, left = divmod(len(node.key), width)
    if node.parent is not parent or left or not count or node.key[:width] != head:
        return "stands where its key does not lead"
    if not node.alive or isinstance(node, Root) or node.fresh != parent.fresh:
        return "is not what stands in a tree"
    for g, group in enumerate(tree.groups):
        if len(node.pages[g]) != (0 if group.kind == "state" else count):
            return f"has {len(node.pages[g])} pages of group {g} for {count} pages of tokens"
        if group.kind == "full" and NONE in node.pages[g]:
            return f"lacks a page of group {g}"
        if group.kind != "state" and node.states[g] != NONE:
            return f"has a state in group {g}"
        own = _own(node, g)
        if ((own < 0) | (own >= tree.pools[g].total)).any():
            return f"has a page of group {g} that is none"
    return None


def _own(node: Node, g: int) -> Counts:
    """The pages of group g that a node really owns, whatever it has counted."""
    pages: Counts = np.array([*node.pages[g], node.states[g]], np.int64)
    own: Counts = pages[pages != NONE]
    return own


def _shape(tree: RadixTree) -> Iterator[str]:
    for space, root in tree.roots.items():
        if root.space != space or not root.children or root.parent is not None:
            yield f"namespace {space} is empty or misplaced"
        if root.fresh != (space[0] == tree.version):
            yield f"namespace {space} has the wrong weights"
        for parent in (root, *below(root)):
            for head, node in parent.children.items():
                fault = _fault(tree, node, head, parent)
                if fault is not None:
                    yield f"{_name(node)} {fault}"


def _claims(tree: RadixTree, g: int) -> Counts:
    """[pages]: how many nodes own each page."""
    return _tally([_own(node, g) for node in tree.nodes()], tree.pools[g].total)


def _tally(columns: Sequence[Sequence[int] | Counts], total: int) -> Counts:
    """[total]: how often each page occurs in some columns; what is no page is left out."""
    pages = np.concatenate([np.array(column, np.int64) for column in (*columns, ())])
    return np.bincount(pages[(pages >= 0) & (pages < total)], minlength=total)


def _pages(tree: RadixTree, owned_by: Sequence[Iterable[int]] | None) -> Iterator[str]:
    for g, pool in enumerate(tree.pools):
        free, held = _tally([pool.listed()], pool.total), _claims(tree, g)
        taken = None if owned_by is None else _tally([[*owned_by[g]]], pool.total)
        for what, pages in {
            "free twice": free > 1,
            "free and counted as taken": (free > 0) == pool.marked(),
            "owned by two nodes": held > 1,
            "free and a node's": (free > 0) & (held > 0),
            **({} if taken is None else _sequences(free, held, taken)),
        }.items():
            if pages.any():
                yield f"group {g}: pages {np.flatnonzero(pages)[:8].tolist()} are {what}"


def _sequences(free: Counts, held: Counts, taken: Counts) -> dict[str, Any]:
    return {
        "lost": (free == 0) & (held == 0) & (taken == 0),
        "owned by two sequences": taken > 1,
        "a sequence's and a node's": (taken > 0) & (held > 0),
        "a sequence's and free": (taken > 0) & (free > 0),
    }


def _locks(tree: RadixTree, readers: Iterable[Node] | None) -> Iterator[str]:
    locks, holds = Counter[Node](), {g: Counter[Node]() for g in tree.loose}
    for node in tree.nodes():
        away = 0
        for at in upwards(node) if node.ends else ():
            locks[at] += node.ends
            for g in tree.loose:
                group = tree.groups[g]
                if (group.kind == "window" and away + 1 < group.window) or (group.kind == "state" and at is node):
                    holds[g][at] += node.ends
            away += len(at.key) // 4
    known = None if readers is None else Counter(node for node in readers if node.alive and node.parent is not None)
    for node in tree.nodes():
        if node.ends < 0 or (known is not None and node.ends != known[node]):
            yield f"{_name(node)} counts {node.ends} locks that end there"
        if node.lock != locks[node]:
            yield f"{_name(node)} counts {node.lock} locks, not {locks[node]}"
        for g in tree.loose:
            if node.holds[g] != holds[g][node]:
                yield f"{_name(node)} counts {node.holds[g]} readers of group {g}, not {holds[g][node]}"


def _counts(tree: RadixTree) -> Iterator[str]:
    for g in range(len(tree.groups)):
        held = evictable = 0
        for node in tree.nodes():
            size = len(_own(node, g))
            held += size
            evictable += 0 if _held(tree, node, g) else size
            if node.size[g] != size:
                yield f"{_name(node)} counts {node.size[g]} pages of group {g}, not {size}"
        if (tree.held[g], tree.evictable[g]) != (held, evictable):
            yield (
                f"group {g}: {tree.held[g]} pages held and {tree.evictable[g]} evictable are counted, "
                f"not {held} and {evictable}"
            )


def _held(tree: RadixTree, node: Node, g: int) -> int:
    return node.holds[g] if g in tree.loose else node.lock


def _queues(tree: RadixTree) -> Iterator[str]:
    """What may be evicted must be queued, once, and not behind its rank."""
    for queue in (tree.leaves, *tree.loose.values()):
        there = Counter(node for _, _, node in queue.heap if node.alive)
        for node in tree.nodes():
            if there[node] != bool(node.queued & queue.bit):
                yield f"{_name(node)} stands {there[node]} times in a queue"
        if any(rank > queue.rank(node) for rank, _, node in queue.heap if node.alive):
            yield "a node would be evicted after its turn"
        if len(queue.heap) > 2 * sum(there.values()) + 66:
            yield "a queue holds more dead nodes than living"
    for node in tree.nodes():
        if not node.lock and not node.children and not node.queued & tree.leaves.bit:
            yield f"{_name(node)} is a leaf that can't be evicted"
        if not node.lock and not node.children and not any(node.size):
            yield f"{_name(node)} stands there for nothing"
        for g, queue in tree.loose.items():
            if node.size[g] and not node.holds[g] and not node.queued & queue.bit:
                yield f"{_name(node)} has pages of group {g} that can't be evicted"


def repair(tree: RadixTree, owned_by: Sequence[Iterable[int]], readers: Iterable[Node] | None = None) -> Repair:
    """Make the tree and its pools true again, whatever is wrong: nodes that are not whole or whose pages have a second
    owner go, with all below them; what nobody owns becomes free; all counts are made anew.

    A sequence whose node is not `alive` afterwards reads pages that may be another's: it must be unseated, and must
    not offer its pages to the tree. A free page that a sequence or a node owns stays theirs.
    """
    listed = [[*pages] for pages in owned_by]
    readers = None if readers is None else [*readers]
    found = check(tree, listed, readers)
    if not found:
        return Repair()
    totals = [pool.total for pool in tree.pools]
    taken = [_tally([pages], total) for pages, total in zip(listed, totals, strict=True)]
    claims = [_claims(tree, g) + t for g, t in enumerate(taken)]
    lost = sum(
        int(((_tally([pool.listed()], pool.total) == 0) & (claim == 0)).sum())
        for pool, claim in zip(tree.pools, claims, strict=True)
    )
    dropped = 0
    while gone := _cut(tree, claims):
        dropped += gone
    for g, pool in enumerate(tree.pools):
        pool.reset((_claims(tree, g) + taken[g]) > 0)
    if readers is not None:
        ends = Counter(node for node in readers if node.alive)
        for node in tree.nodes():
            node.ends = ends[node]
    _recount(tree)
    return Repair(
        found=tuple(found),
        lost=lost,
        dropped=dropped,
        left=tuple(frozenset(np.flatnonzero(t > 1).tolist()) for t in taken),
    )


def _cut(tree: RadixTree, claims: Sequence[Counts]) -> int:
    """Take away what is not whole, or owns a page that has more than one owner, and all below. Returns how many."""
    gone = 0
    for space, root in [*tree.roots.items()]:
        root.space, root.fresh, root.parent = space, space[0] == tree.version, None
        for parent in (root, *below(root)):
            for head, node in [*parent.children.items()]:
                whole = parent.alive and _fault(tree, node, head, parent) is None
                if not whole or any((claim[_own(node, g)] > 1).any() for g, claim in enumerate(claims)):
                    del parent.children[head]
                    gone += 1
                    if node.alive:
                        tree.forget(node)
        if not root.children:
            del tree.roots[space]
    return gone


def _recount(tree: RadixTree) -> None:
    """All that the tree has counted and queued, from the nodes and the locks that end at them."""
    tree.held[:] = tree.evictable[:] = [0] * len(tree.groups)
    for queue in (tree.leaves, *tree.loose.values()):
        queue.clear()
    for node in tree.nodes():
        node.lock, node.queued, node.ends = 0, 0, max(0, node.ends)
        node.holds = [0] * len(tree.groups)
        for g in range(len(tree.groups)):
            node.size[g] = len(_own(node, g))
            tree.held[g] += node.size[g]
            tree.evictable[g] += node.size[g]
            if g in tree.loose and node.size[g]:
                tree.loose[g].push(node)
    for node in [*tree.nodes()]:
        if node.ends:
            tree.hold(node, node.ends)
    for node in reversed([*tree.nodes()]):
        if node.alive and not node.lock and not node.children:
            tree.offer(node)
