"""What the programs of an engine are made from, as JSON has it: where two recipes are equal, so are the programs."""

from __future__ import annotations

import json
import platform as machine
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from backends.jax.step import Plan
from engine.installed import version

ROOT = Path(__file__).parents[2]
SOURCES = ("backends/api", "backends/jax", "engine/mesh.py", "engine/model", "kernels_pallas", "models_jax")
"""Where the code of programs stands."""
APART = (
    *("radix", "eviction", "policy", "priority_preemption", "ageing"),
    *("backend", "programs", "bundle", "ready_early"),
)
"""Fields of Resolved that no program depends on."""


def recipe(plan: Plan, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Versions, code, device, mesh, compiler options, model, limits, configuration: in the order in which a difference
    is told. options: the compiler's."""
    device = plan.mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    made = {
        "versions": {name: version(name) for name in ("jax", "jaxlib", *(() if on_cpu else ("libtpu",)))},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "runtime": device.client.platform_version,
            "processor": processor() if on_cpu else "",
        },
        "mesh": dict(plan.mesh.shape),
        "options": dict(options or {}),
        "model": asdict(plan.spec),
        "limits": asdict(plan.limits),
        "config": {name: value for name, value in asdict(plan.config).items() if name not in APART},
        "code": code(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return plain


def first_difference(theirs: Any, ours: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(dotted path, theirs, ours) of the first value in which two recipes differ; None where a side has none."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(f"{path}.{name}".strip("."), theirs.get(name), ours.get(name)) for name in {**ours, **theirs}]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(f"{path}.{i}", a, b) for i, (a, b) in enumerate(zip(theirs, ours, strict=True))]
    else:
        return None if theirs == ours and type(theirs) is type(ours) else (path, theirs, ours)
    return next((found for name, a, b in pairs if (found := first_difference(a, b, name))), None)


@cache
def code() -> str:
    """Digest of the source that programs are traced from."""
    out = sha256()
    for name in SOURCES:
        place = ROOT / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            out.update(f"{file.relative_to(ROOT).as_posix()}\0".encode() + file.read_bytes())
    return out.hexdigest()[:16]


@cache
def processor() -> str:
    """Digest of this processor's name and features: what is compiled for one CPU need not run on another."""
    cpu, facts = Path("/proc/cpuinfo"), set[str]()
    if cpu.is_file():
        facts = {x for x in cpu.read_text().splitlines() if x.startswith(("flags", "Features", "model name"))}
    return sha256(f"{machine.machine()} {sorted(facts)}".encode()).hexdigest()[:12]
