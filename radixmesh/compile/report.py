"""The report of a target: what was decided, what every program takes and costs, which gates it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from backends.target import versions
from engine.model.groups import cache_groups
from engine.run.start import Decided
from engine.target import Chip, Target
from radixmesh.compile import gates, roofline

BLOCK = 128
"""Positions of the cache that one turn of attention's loop reads, where it is a loop (backends.jax.attend)."""
UNCOUNTED = (
    "not in the cycles: turns of loops that depend on the data beyond those of the context named here, kernels without "
    "an estimate, copies and collectives that run beside computation, waiting for other chips"
)


def make(
    decided: Decided, target: Target, found: Sequence[Mapping[str, Any]], context: int, temp: int = gates.TEMP
) -> dict[str, Any]:
    """From the records of backends.jax.target.examine. context: positions that each row sees."""
    first = next(r for r in found if "held" in r)
    held = dict(first["held"])
    programs = [dict(r) for r in found if "program" in r]
    config, chip = decided.resolved, target.chip
    memory = chip.memory if chip else 0
    for p in programs:
        if p["kind"] == "step" and chip and "error" not in p and p["layers"] == len(decided.spec.layers):
            p["estimate"] = estimate(decided, chip, p, context)
    kept = gates.check(decided.spec, config, held, programs, memory, temp)
    full = [n for n, g in zip(config.pages, cache_groups(decided.spec, config.page), strict=True) if not g.window]
    return {
        "target": str(target),
        "model": decided.path.name,
        "family": decided.spec.family,
        "layers": len(decided.spec.layers),
        "mesh": str(config.mesh),
        "devices": target.devices,
        "device": first["device"],
        "dtype": config.dtype,
        "stack": config.stack,
        "context": context,
        "held": held,
        "memory": memory,
        "kv_tokens": min(full, default=0) * config.page,
        "max_len": config.max_len,
        "max_rows": config.max_rows,
        "programs": programs,
        "unrolled": _unrolled(decided, chip, programs, context) if chip else None,
        "gates": [asdict(g) for g in kept],
        "ok": all(g.ok for g in kept),
        "versions": versions(),
        "decisions": [{"field": d.field, "value": str(d.value), "why": d.why} for d in decided.decisions],
    }


def _unrolled(
    decided: Decided, chip: Chip, programs: Sequence[Mapping[str, Any]], context: int
) -> dict[str, float] | None:
    """The estimate of the decode step unrolled, from those of few layers; None where they were not compiled."""
    total = len(decided.spec.layers)
    some = sorted((p for p in programs if p["layers"] < total and "error" not in p), key=lambda p: p["layers"])
    if len(some) < 2:
        return None
    a, b = some[0], some[-1]

    def grown(key: str) -> int:
        return int(a[key] + (b[key] - a[key]) * (total - a["layers"]) / (b["layers"] - a["layers"]))

    whole = {**b, **{key: grown(key) for key in ("cycles", "dearest", "turning")}}
    return estimate(decided, chip, whole, context) | {"layers": total}


def estimate(decided: Decided, chip: Chip, p: Mapping[str, Any], context: int) -> dict[str, float]:
    """Milliseconds of a step: by the compiler's cycles (greedy; with the dearest sampling), and by the roofline."""
    turns = -(-context // BLOCK) if p["loops"] else 0
    cycles = p["cycles"] + turns * p["turning"]
    bound = roofline.load(decided.spec, decided.resolved, chip, p["tokens"], p["rows"], context)
    return {
        "cycles": cycles,
        "ms": 1e3 * (cycles / chip.clock + bound.link_s),
        "sampled_ms": 1e3 * ((cycles + p["dearest"] - p["cycles"]) / chip.clock + bound.link_s),
        "roofline_ms": 1e3 * bound.seconds,
        "memory_ms": 1e3 * bound.memory_s,
        "compute_ms": 1e3 * bound.compute_s,
        "link_ms": 1e3 * bound.link_s,
    }
