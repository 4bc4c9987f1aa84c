"""Planted faults: each changes one line of the engine (or of the toy device), and a few random trials must notice.

`python -m tests.simulation.faults N` runs fault N in this process and exits 1 when a trial fails, as it should.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 150


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is broken, in which module, and how: `old` must stand there exactly once."""

    name: str
    module: str
    old: str
    new: str


def _faults(module: str, *rows: tuple[str, str, str]) -> list[Fault]:
    return [Fault(name=name, module=module, old=old, new=new) for name, old, new in rows]


FAULTS = [
    # Those that the sketch of the contract was tried with.
    *_faults(
        "engine.cache.sequence",
        ("window trimmed one token early", "lower - group.window + 1", "lower - group.window + 2"),
        ("pages stay the sequence's after the tree took them", "self.own[g].difference_update(taken)", "pass"),
        ("the shared prefix is not locked", "self.tree.lock(node)\n        self.tree.unlock(self.node)", "pass"),
        ("seating sends no page table", "[list(enumerate(pages)) for pages in self.table]", "[[] for _ in self.table]"),
        ("the whole table is not told after a rebase", "self.edits[g] = list(enumerate(self.table[g]))", "pass"),
    ),
    *_faults(
        "engine.sched.scheduler",
        (
            "state checkpoint copy lost",
            "self._copies += [(g, 0, cache.write[g], page)",
            "[(g, 0, cache.write[g], page)",
        ),
        ("seated row sent as continuing", "start=run.start,", "start=-1,"),
        ("mask one token stale", "q.grammar.accept(kept)", "q.grammar.accept(kept[:-1])"),
        ("pages sized without drafts", "run.upper + 1 + k, drafts", "run.upper + 1, drafts"),
        ("lower bound forgets rejections", "run.lower += n - k", "run.lower += n"),
        ("copies never cleared", "copies, self._copies = self._copies, []", "copies = list(self._copies)"),
        # Preemption and slot reuse.
        ("epoch not counted", "run.epoch += 1", "run.epoch += 0"),
        ("preempted output is not fed again", '"waiting", run.tokens, 0', '"waiting", run.request.tokens, 0'),
        ("rows in flight survive a preemption", "run.flying = run.verifying = run.pending = 0", "pass"),
        ("a slot is given out twice", "self._slots.append(run.slot)", "self._slots += [run.slot] * 2"),
        ("a slot's new tenant sees old results", " and row.run.epoch == row.epoch\n", "\n"),
        ("rows that outlive their run are shared", "min(length, len(tokens))", "(length + self.tree.page)"),
        # Penalties' history.
        ("fed again, output counts as prompt", "(t, i >= prompt)", "(t, False)"),
        ("history only at the first seating", "wanted = seated and", "wanted = seated and run.epoch == 0 and"),
        (
            "history without the output",
            "for i, t in enumerate(run.fill)] if",
            "for i, t in enumerate(run.request.tokens)] if",
        ),
        # Failure.
        ("tree survives a device failure", "self.tree.flush()\n        for key", "for key"),
        ("everyone in a failed step fails", "if len(suspects) != 1:", "if len(suspects) < 1:"),
        (
            "suspects run together",
            "suspects = [r for r in (*self.running, *self.waiting) if r.alone_until]",
            "suspects = []",
        ),
    ),
    *_faults(
        "engine.sched.rows",
        ("refused rows leave their tokens behind", "[i] for i in keep]", "[i] for i in range(len(keep))]"),
        ("one seed for all", "[run.request.seed for run in runs]", "[runs[0].request.seed for run in runs]"),
        ("history of refused rows keeps its row numbers", "(moved[r], *rest)", "(r, *rest)"),
    ),
    *_faults(
        "engine.cache.node",
        ("a page too much is matched", "return low * width", "return high * width"),
        ("a prefix without its window is matched", "ok[1:] &= last <", "ok[1:] |= last <"),
    ),
    *_faults(
        "engine.cache.radix",
        (
            "eviction ignores locks",
            "if not node.lock and not node.children:\n                    self._drop(node)",
            "if not node.children:\n                    self._drop(node)",
        ),
        ("a window's pages are taken too soon", "away < group.window - 1", "away < 0"),
        ("a split forgets who reads", "upper.lock, upper.tick,", "_, upper.tick,"),
    ),
    *_faults(
        "engine.sched.stop",
        ("stops one token late", "keep, finish = i + 1, Finish", "keep, finish = i + 2, Finish"),
        ("length ignores what was made before", "if before + len(new) >= room:", "if len(new) >= room:"),
    ),
    *_faults(
        "tests.simulation.toy",
        ("state version ignored after a partial accept", "0 if seated else slot.version", "0"),
        (
            "device length counts rejected drafts",
            "row.start + n - row.drafts + len(got) - 1, len(got) - 1",
            "row.start + n, len(got) - 1",
        ),
    ),
]


class Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module with one line changed."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.path = ROOT / (fault.module.replace(".", "/") + ".py")

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        return (
            importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.fault.module else None
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        source = self.path.read_text()
        assert source.count(self.fault.old) == 1, f"{self.fault.name}: stands {source.count(self.fault.old)} times"
        exec(compile(source.replace(self.fault.old, self.fault.new), str(self.path), "exec"), module.__dict__)


def main(number: int) -> int:
    """Run trials with a fault planted: 1 when it was noticed (good), 0 when not, 2 when it could not be planted."""
    sys.meta_path.insert(0, Planter(FAULTS[number]))
    try:
        from tests.simulation.trial import trial
    except AssertionError as error:
        print(error)
        return 2
    for seed in range(TRIALS):
        try:
            trial(seed, turns=600)
        except Exception as error:  # noqa: BLE001 whatever breaks, the fault was noticed
            print(f"trial {seed}: {type(error).__name__}: {str(error)[:100]}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
