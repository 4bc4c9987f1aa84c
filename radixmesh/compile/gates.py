"""What a compiled program must keep so that it may go out: each gate a figure, its limit and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.config import Resolved
from engine.model.spec import ModelSpec
from engine.target import MOST
from radixmesh.compile.roofline import collectives

TEMP = 512 << 20
"""Bytes of temporaries that a program may have on one device."""
CODE = 0.02
"""Of a device's memory, what the code of all programs may take."""
DONATED = {
    "step": ("cache", "state"),
    "copy": ("cache",),
    "edit": ("state",),
    "count": ("counts",),
    "choose": ("state", "counts"),
}
"""Kind of program -> what of the device's it changes in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One figure of a program. program: "all" where it is of all together."""

    program: str
    name: str
    found: str
    limit: str
    ok: bool


def check(
    spec: ModelSpec,
    config: Resolved,
    held: Mapping[str, int],
    programs: Sequence[Mapping[str, Any]],
    memory: int,
    temp: int = TEMP,
) -> list[Gate]:
    """All gates. held: bytes of weights on a device, of all layers; memory: bytes of a device, 0 = not known;
    temp: bytes that temporaries may take."""
    found: list[Gate] = []
    for p in programs:
        if "error" in p:
            found.append(Gate(program=p["program"], name="compiles", found=p["error"], limit="", ok=False))
            continue
        found += _memory(p, held, memory, temp)
        if p["kind"] == "step":
            found.append(_joined(p, spec, config))
    made = [p for p in programs if "error" not in p]
    if memory and made:
        total = sum(p["code"] for p in made)
        found.append(_most("all", "code", total, int(CODE * memory)))
    return found


def _most(program: str, name: str, value: int, limit: int) -> Gate:
    return Gate(program=program, name=name, found=size(value), limit=f"<= {size(limit)}", ok=value <= limit)


def _memory(p: Mapping[str, Any], held: Mapping[str, int], memory: int, temp: int) -> Iterator[Gate]:
    if memory:
        missing = held["weights"] - p["holds"]["weights"]  # of a step of few layers
        yield _most(p["program"], "peak", p["peak"] + missing, int(MOST * memory))
    yield _most(p["program"], "temporaries", p["temp"], temp)
    if p["kind"] in DONATED:
        given = sum(p["holds"][name] for name in DONATED[p["kind"]])
        found, limit, ok = f"{p['alias']:,} B", f"{given:,} B", p["alias"] == given
        yield Gate(program=p["program"], name="alias", found=found, limit=limit, ok=ok)


def _joined(p: Mapping[str, Any], spec: ModelSpec, config: Resolved) -> Gate:
    """The collectives of a step are what the description and the mesh predict, and no others."""
    here = replace(spec, layers=spec.layers[: p["layers"]])
    want: dict[str, tuple[int, int]] = {}
    for name, count, each in collectives(here, config, p["tokens"], p["rows"]):
        before = want.get(name, (0, 0))
        want[name] = before[0] + count, before[1] + count * each
    have = {name: (c["count"], c["bytes"]) for name, c in p["collectives"].items()}
    return Gate(program=p["program"], name="collectives", found=_said(have), limit=_said(want), ok=have == want)


def _said(found: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{count} {name} {size(total)}" for name, (count, total) in sorted(found.items())) or "none"


def size(count: float) -> str:
    """Bytes, for reading."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"
