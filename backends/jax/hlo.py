"""What a compiled program says of itself: its scheduled HLO, read for cycles and collectives.

XLA for TPUs writes "estimated_cycles" at what it schedules. The sum over a program multiplies a loop's body by its
turns where they are a number in the program (a scan over layers). Not in the sum: turns of loops that depend on data
(attention over the cache), which are given as cycles of one turn; what a kernel of ours costs, unless it says; copies
and collectives that run beside computation; waiting for other chips.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

SIZES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s4": 0.5}
"""Bytes of an element; what is not here has 4, or 8 where its name ends so."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
KERNEL = "tpu_custom_call"
"""Target of a Pallas kernel's call."""

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_CALL = re.compile(r" (call|call-start|async-start)\(.*(?:to_apply|calls|called_computation)=%?([\w.\-]+)")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_LESS = re.compile(r"ROOT .* compare\(.*?%?([\w.\-]+)\), direction=LT")


@dataclass(slots=True, kw_only=True)
class Count:
    """What a program, or a part of it, does once.

    cycles: with the cheapest branch of every condition; dearest: with the dearest. turning: cycles of one turn of all
    loops whose turns are not known. loops: such loops. kernels: calls of kernels without an estimate.
    collectives: operation -> (how many, bytes that one device receives).
    """

    cycles: int = 0
    dearest: int = 0
    turning: int = 0
    loops: int = 0
    kernels: int = 0
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: Count, times: int = 1) -> None:
        """This and then another, so many times."""
        self.cycles += other.cycles * times
        self.dearest += other.dearest * times
        self.turning += other.turning * times
        self.loops += other.loops
        self.kernels += other.kernels * times
        for name, (count, size) in other.collectives.items():
            have = self.collectives.get(name, (0, 0))
            self.collectives[name] = (have[0] + count * times, have[1] + size * times)


def read(text: str) -> Count:
    """Of the scheduled HLO of a whole program, as `jax.stages.Compiled.as_text` gives it."""
    parts, entry = _split(text)
    return _count(parts, entry)


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first."""
    parts: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        head = None if line.startswith(" ") else _HEAD.match(line)
        if head:
            lines = parts.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line.strip())
    return parts, entry


def _count(parts: Mapping[str, Sequence[str]], name: str) -> Count:
    total = Count()
    for line in parts[name]:
        given = _CYCLES.search(line)
        if given:
            total.add(Count(cycles=int(given[1]), dearest=int(given[1])))
        elif KERNEL in line and " custom-call(" in line:
            total.kernels += 1
        if loop := _WHILE.search(line):
            _turn(total, _count(parts, loop[2]), turns(parts[loop[1]]))
        elif " conditional(" in line:
            names = [n.strip().lstrip("%") for both in _BRANCHES.findall(line) for n in "".join(both).split(",")]
            _branch(total, [_count(parts, n) for n in names])
        elif call := _CALL.search(line):
            inner = _count(parts, call[2])  # what is started runs beside computation, on 7x on a core of its own
            total.add(inner if call[1] == "call" else Count(collectives=inner.collectives))
        if joined := _COLLECTIVE.search(line):
            total.add(Count(collectives={joined[2]: (1, _bytes(joined[1], bool(joined[3])))}))
    return total


def _turn(total: Count, body: Count, known: int | None) -> None:
    """Add a loop. One whose turns are not known is counted apart; loops in it count as one turn of theirs."""
    if known is not None:
        total.add(body, known)
        return
    total.add(Count(turning=body.cycles + body.turning, loops=body.loops + 1, kernels=body.kernels))
    total.add(Count(collectives=body.collectives))


def _branch(total: Count, branches: Sequence[Count]) -> None:
    """Add a condition. Collectives are the same in every branch, or devices would wait for each other."""
    least, most = min(branches, key=lambda b: b.cycles), max(branches, key=lambda b: b.dearest)
    total.add(least)
    total.dearest += most.dearest - least.dearest


def turns(condition: Sequence[str]) -> int | None:
    """How often a loop from 0 turns whose condition is `i < number`; None where the number is not in the program."""
    less = next((found for line in condition if (found := _LESS.search(line))), None)
    if less is None:
        return None
    bound = re.compile(rf"^%?{re.escape(less[1])} = s32\[\]\S* constant\((\d+)\)")
    return next((int(found[1]) for line in condition if (found := bound.match(line))), None)


def _bytes(types: str, started: bool) -> int:
    """Of the arrays of a result. A started collective names its operands too: the last array is what comes."""
    arrays = _ARRAY.findall(types)
    return sum(
        int(SIZES.get(kind, 8 if kind.endswith("64") else 4) * prod(int(d) for d in dims.split(",") if d))
        for kind, dims in (arrays[-1:] if started else arrays)
    )
