"""Planted faults of the cache (tests.planting): the state machine must notice each.

`python -m tests.cache.faults N` runs the machine with fault N and exits 1 when it fails, as it should.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.planting import Fault, faults, plant

EXAMPLES = 500

LEAF = "if not node.lock and not node.children:\n                    self._drop"
LOOSE = "if not node.holds[g] and node.size[g]:\n                    self._strip"
COPIED = "upper.hits, upper.priority = node.lock, node.tick, node.hits,"
UPPER = "[c[:count] for c in node.pages], "
LAST = "elif not parent.lock:\n                self.offer(parent)"
RANK = "node.fresh, self._class(node), node.tick"

FAULTS: list[Fault] = [
    *faults(
        "engine.cache.radix",
        ("a match goes past its limit", "min(len(tokens) // width, limit // self.page)", "len(tokens) // width"),
        ("a match is not marked as used", "node.tick = tick\n", "pass\n"),
        ("a match ends at the wrong node", "path.append(self._split(node, count - reach))", "path.append(node)"),
        ("namespaces are one", "self.roots.get((self.version, namespace))", "self.roots.get((self.version, ''))"),
        ("old weights are matched", "self.version = version\n", "pass\n"),
        ("a sequence of old weights shares with new ones", "self.version if version is None else", "self.version or"),
        ("an empty namespace stays", "del self.roots[parent.space]", "pass"),
        ("use is not counted", "node.hits += at > seen * 4", "pass"),
        ("a chunk counts as another use", "node.hits += at > seen * 4", "node.hits += 1"),
        ("a priority is lowered", "if node.priority < priority:", "if True:"),
        ("a window's hole is filled twice", "if own == NONE and other != NONE:", "if other != NONE:"),
        ("a page is taken and not told", "took[g].extend(pages)", "pass"),
        ("a checkpoint is replaced", "if states[g] != NONE and node.states[g] == NONE", "if states[g] != NONE"),
        ("a lock does not protect from eviction", LEAF, LEAF.replace("not node.lock and ", "")),
        ("a parent goes before its child", LEAF, LEAF.replace(" and not node.children", "")),
        ("unlocking counts nothing", "node.ends -= 1\n            self.hold(node, -1)", "node.ends -= 1"),
        ("evictable pages are counted at every lock", "if not before or not now:", "if True:"),
        ("a window is held one node too short", "away < group.window - 1 if", "away < group.window - 2 if"),
        ("what a reader needs is stripped", LOOSE, LOOSE.replace("not node.holds[g] and ", "")),
        ("a stripped node keeps its state", "node.states[g] = NONE\n        if not node.lock", "if not node.lock"),
        ("a stripped leaf stays", "        if not node.lock and not node.children:\n            self.offer(node)", ""),
        ("a leaf left behind is not queued", LAST, "elif False:\n                pass"),
        ("a split forgets its readers", "upper.lock, upper.tick,", "_, upper.tick,"),
        ("a split forgets its use", COPIED, COPIED.replace("node.hits", "0")),
        ("a split counts its window twice", "node.size[g] -= upper.size[g]", "pass"),
        ("a split takes the state along", UPPER + "[NONE] * len(self.groups)", UPPER + "[*node.states]"),
        ("a split cuts hashes wrongly", "node.hashes[:count], node.hashes[count:]", "node.hashes, node.hashes[count:]"),
        ("a removal is not told", "self.log.append(BlockRemoved(hashes=node.hashes))", "pass"),
        ("pages of old weights are still told", "if node.hashes and not root.fresh:", "if False:"),
        ("old weights that come back are not told", "self._tell(node, root.space)", "pass"),
        ("what old weights make is told", "leaf.parent is not None and leaf.fresh", "leaf.parent is not None"),
        ("flush tells of less", "self.log[known:] = [AllBlocksCleared()]", "self.log[known:] = []"),
    ),
    *faults(
        "engine.cache.evict",
        ("the youngest goes first", RANK, RANK.replace("node.tick", "-node.tick")),
        ("old weights go last", RANK, RANK.replace("node.fresh", "not node.fresh")),
        ("ranks are never looked at again", "elif rank != self.rank(node):", "elif False:"),
        ("the rank of old weights is not renewed", "heapq.heapify(self.heap)", "pass"),
        ("SLRU protects after three", "node.hits >= PROTECTED", "node.hits > PROTECTED"),
        ("a node is queued twice", "if not node.queued & self.bit:", "if True:"),
    ),
    *faults(
        "engine.cache.node",
        ("a window's page too little is matched", "to * page - group.window + 1", "to * page"),
        ("a window's page too much is asked", "to * page - group.window + 1", "to * 0"),
        ("a state is matched where none is", "ok[at] = True", "ok[:at] = True"),
        ("a page too much is common", "return low * width", "return high * width"),
        ("a column is joined from below", "for node in path:", "for node in reversed(path):"),
        ("holes count as pages", "pages[pages != NONE]", "pages[pages != -2]"),
    ),
    *faults(
        "engine.cache.events",
        ("a hash forgets what came before", "blake2b(before + key", "blake2b(key"),
    ),
]  # fmt: skip


def trials() -> Iterable[tuple[str, Callable[[], object]]]:
    """What the machine meets by luck alone, and the machine."""
    from tests.cache import test_radix
    from tests.cache.machine import Machine

    once = settings(
        max_examples=EXAMPLES,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    rare = (test_radix.test_slru_protects_what_was_used_twice, test_radix.test_a_child_goes_before_its_parent)
    return [
        *((test.__name__, test) for test in rare),
        ("machine", partial(run_state_machine_as_test, Machine, settings=once)),
    ]


if __name__ == "__main__":
    sys.exit(plant(FAULTS[int(sys.argv[1])], trials))
