"""`radixmesh plan`: which meshes of a chip hold a model, and what each is estimated to give."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radixmesh.commands import options

if TYPE_CHECKING:
    from radixmesh.compile.plan import Option


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(plan)


def plan(
    target: Annotated[str, typer.Option(help="A chip, tpu:v6e, or a topology that bounds it, tpu:v6e:2x4.")],
    model: Annotated[str | None, typer.Option(help="Folder with config.json; no weights needed.")] = None,
    latency: Annotated[float | None, typer.Option(min=0, help="Milliseconds that a step of one row may take.")] = None,
    throughput: Annotated[float | None, typer.Option(min=0, help="Tokens a second, of all rows, at least.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Positions that each row sees.")] = 1024,
    refine: Annotated[
        bool, typer.Option("--compile", help="By the compiler's cycles instead of the roofline.")
    ] = False,
    dtype: options.Dtype = None,
    config: options.File = None,
    pairs: options.Set = None,
    html: options.Html = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Try meshes, print which fit and what each gives. Exit code 1 where none is fast enough."""
    from backends.target import check
    from engine.config import load
    from engine.model.registry import read_spec
    from engine.target import Target
    from radixmesh.bench import record
    from radixmesh.compile import page, plan
    from radixmesh.engine import DEMO

    at = Target.parse(target)
    if refine:
        check(at)
    settings = load(config, options.flags(model, None, None, dtype, pairs))
    folder = Path(settings.model.path or DEMO)
    found = plan.options(settings, read_spec(folder), at, context, refine)
    best = plan.best(found, latency, throughput)
    report = {
        "model": folder.name,
        "target": str(at),
        "context": context,
        "latency": latency,
        "throughput": throughput,
        "options": [asdict(o) | {"rate": o.rate} for o in found],
        "best": best and best.mesh,
        "made": record.made(),
    }
    text = json.dumps(report, indent=1) + "\n"
    for file, content in ((out, text), (html, page.make_plan(report) if html else "")):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
    print(text) if as_json else _show(report, found, best)
    sys.exit(0 if best else 1)


def _show(report: dict[str, Any], found: list[Option], best: Option | None) -> None:
    from rich.table import Table

    from radixmesh.compile import show
    from radixmesh.compile.gates import size

    console = show.console()
    table = Table("mesh", "on", box=None, pad_edge=False)
    for name in ("weights", "KV tokens", "rows", "step of 1", "of all rows", "tokens/s"):
        table.add_column(name, justify="right")
    for o in found:
        if not o.refused:
            table.add_row(
                o.mesh,
                o.target,
                size(o.weights),
                str(o.kv_tokens),
                str(o.rows),
                f"{o.one_ms:.2f} ms",
                f"{o.many_ms:.2f} ms",
                f"{o.rate:,.0f}",
            )
    console.print(f"{report['model']} on {report['target']}, {report['context']} positions a row", markup=False)
    console.print(table)
    for o in found:
        if o.refused:
            console.print(f"{o.mesh}: {o.refused}", markup=False)
    how = "the compiler's cycles" if any(o.compiled for o in found) else "the roofline: no step can be faster"
    console.print(f"estimated by {how}; weights are of one device", markup=False)
    asked = [f"{v:g} {unit}" for v, unit in ((report["latency"], "ms"), (report["throughput"], "tokens/s")) if v]
    if best:
        console.print(
            f"smallest that {'gives ' + ' and '.join(asked) if asked else 'fits'}: {best.mesh} on {best.target}"
        )
    else:
        console.print(f"none {'gives ' + ' and '.join(asked) if asked else 'fits'}", markup=False)
