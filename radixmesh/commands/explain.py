"""`radixmesh explain`: what would be decided, and why, before anything is allocated."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from radixmesh.commands import options

if TYPE_CHECKING:
    from engine.config import Config
    from engine.run.start import Decided
    from engine.target import Target


def register(app: typer.Typer) -> None:
    app.command()(explain)


def explain(
    model: options.Model = None,
    backend: options.Backend = None,
    mesh: options.Mesh = None,
    dtype: options.Dtype = None,
    config: options.File = None,
    pairs: options.Set = None,
    target: Annotated[
        str | None, typer.Option(help="As if it ran there, such as tpu:v6e:2x4, cuda:sm_90:h200.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Print every decision with its reason, the memory plan and each layer's kernel. Allocates nothing."""
    from backends.probe import kernels
    from engine.config import load
    from engine.resolve.memory import plan_memory
    from engine.run.start import decide
    from engine.target import Target
    from radixmesh.engine import DEMO

    asked = load(config, options.flags(model, backend, mesh, dtype, pairs))
    at = None if target is None else Target.parse(target)
    decided = decide(asked, DEMO) if at is None else _decide(asked, at, DEMO)
    memory = plan_memory(decided.spec, decided.resolved)
    layers = kernels(decided.spec, decided.resolved, at)
    if as_json:
        decisions = [{"field": d.field, "value": _plain(d.value), "why": d.why} for d in decided.decisions]
        print(
            json.dumps(
                {
                    "model": str(decided.path),
                    "decisions": decisions,
                    "memory": asdict(memory) | {"total": memory.total},
                    "layers": [{"layers": [first, last], "kernel": kernel} for first, last, kernel in layers],
                }
            )
        )
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"model {decided.path}: {decided.spec.family}, {len(decided.spec.layers)} layers", markup=False)
    table = Table("field", "value", "why", box=None, pad_edge=False)
    for d in decided.decisions:
        table.add_row(d.field, str(_plain(d.value)), d.why)
    console.print(table)
    cache = " + ".join(_size(b) for b in memory.cache)
    size = decided.resolved.mesh.size
    each = f" on each of {size} devices" if size > 1 else ""
    parts = f"weights {_size(memory.weights)}, cache {cache}, counts of penalties {_size(memory.counts)}"
    parts += f", captured steps at most {_size(memory.graphs)}" if memory.graphs else ""
    console.print(f"memory{each}: {parts}, together {_size(memory.total)}")
    for first, last, kernel in layers:
        console.print(f"layers {first}-{last}: {kernel}" if last > first else f"layer {first}: {kernel}", markup=False)


def _decide(asked: Config, target: Target, default: Path) -> Decided:
    """What a start on a target that is not here would decide."""
    from radixmesh.compile.run import decide

    return decide(asked, target, default)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value if isinstance(value, (int, float, str)) else str(value)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
