"""`radixmesh compile` for a GPU that need not be here: every Triton kernel that serving the model would run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from backends.target import examine_gpu
from engine.config import Config
from engine.errors import ConfigError
from engine.run.start import Decided
from engine.target import Target

FIELDS = ("compile_s", "shared", "registers", "spilled")


def check(config: Config, target: Target) -> None:
    """Refuse a backend that has no kernels of its own. Raises ConfigError."""
    if config.backend.name not in ("auto", "torch"):
        raise ConfigError(
            f"backend: {config.backend.name} has no kernels for {target}; torch has them", field="backend.name"
        )


def report(decided: Decided, target: Target, console: Console, quiet: bool) -> dict[str, Any]:
    """Compile, and show each kernel as it is done and all as a table, unless it is to be quiet."""
    spec, resolved = decided.spec, decided.resolved
    layers, kernels = [], []
    for record in examine_gpu(spec, resolved, target.arch):
        (layers if "layer" in record else kernels).append(record)
        if not quiet and "case" in record:
            print(f"{target}: {record['case']}: {record.get('error') or said(record)}", file=sys.stderr, flush=True)
    made = {
        "target": str(target),
        "model": str(decided.path),
        "family": spec.family,
        "dtype": resolved.dtype,
        "cache_dtype": resolved.cache_dtype,
        "mesh": str(resolved.mesh),
        "max_len": resolved.max_len,
        "layers": layers,
        "kernels": kernels,
        "ok": all("error" not in k for k in kernels),
    }
    if not quiet:
        show(made, console)
    return made


def said(kernel: Mapping[str, Any]) -> str:
    """What the compiler said of a kernel."""
    return (
        f"{kernel['compile_s']:.1f} s, {kernel['shared']} bytes shared, {kernel['registers']} registers, "
        f"{kernel['spilled']} bytes spilled"
    )


def show(made: Mapping[str, Any], console: Console) -> None:
    """The kernels as a table, and which layers have none."""
    console.print(
        f"{made['target']}: {made['model']} ({made['family']}), {made['mesh']}, {made['dtype']}", markup=False
    )
    for layer in made["layers"]:
        if layer["plain"]:
            console.print(f"{layer['layer']}: plain torch, {layer['plain']}", markup=False)
    table = Table("kernel", *FIELDS, box=None, pad_edge=False)
    for kernel in made["kernels"]:
        table.add_row(*row(kernel))
    console.print(table)
    spilled = sum(k.get("spilled", 0) > 0 for k in made["kernels"])
    failed = sum("error" in k for k in made["kernels"])
    console.print(f"{len(made['kernels'])} kernels, {failed} failed, {spilled} spill registers")


def row(kernel: Mapping[str, Any]) -> list[str]:
    """A kernel's cells: its name, and FIELDS or why it failed."""
    return [kernel["case"], *(str(kernel.get(name, kernel.get("error", ""))) for name in FIELDS)]
