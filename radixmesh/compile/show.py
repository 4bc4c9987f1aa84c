"""A report of a target on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from radixmesh.compile.gates import size
from radixmesh.compile.report import UNCOUNTED

WIDTH = 170
"""Columns of a table where the output is no terminal."""


def console() -> Console:
    """What reports are printed on: tables are not broken where there is no terminal."""
    made = Console(highlight=False, soft_wrap=True)
    return made if made.is_terminal else Console(highlight=False, soft_wrap=True, width=WIDTH)


def show(report: Mapping[str, Any], console: Console) -> None:
    """Every program, the memory, and the gates that failed."""
    held, memory = report["held"], report["memory"]
    console.print(
        f"{report['target']}: {report['model']} ({report['family']}, {report['layers']} layers), {report['mesh']}"
        f"{_spare(report)}, {report['dtype']}, layers {report['stack']}",
        markup=False,
    )
    each = " on each device" if report["devices"] > 1 else ""
    console.print(
        f"memory{each}: weights {size(held['weights'])}, cache {size(held['cache'])}"
        + (f", of {size(memory)}" if memory else "")
        + f"; {report['kv_tokens']} tokens fit the cache; a request may reach {report['max_len']}"
    )
    table = Table(box=None, pad_edge=False)
    steps = any("estimate" in p for p in report["programs"])
    times = ("step", "sampling", "roofline") if steps else ()
    for name in ("program", "compiled in", "temporaries", "code", "peak", *times, "collectives"):
        left = name in ("program", "collectives")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for p in report["programs"]:
        table.add_row(*row(p, report, steps))
    console.print(table)
    if steps:
        console.print(
            f"step: estimated by the compiler's cycles with {report['context']} positions a row, greedy; sampling: "
            f"with top-p and top-k; roofline: weights and cache over the bandwidth, operations over the peak, and "
            f"collectives over the links. {UNCOUNTED[0].upper()}{UNCOUNTED[1:]}.",
            markup=False,
        )
    if report["unrolled"]:
        e = report["unrolled"]
        console.print(
            f"unrolled to all {e['layers']} layers: {e['ms']:.2f} ms greedy, {e['sampled_ms']:.2f} ms with sampling, "
            f"roofline {e['roofline_ms']:.2f} ms",
            markup=False,
        )
    _gates(report["gates"], console)


def _spare(report: Mapping[str, Any]) -> str:
    used = int(report["mesh"].rpartition("=")[2])
    spare = report["devices"] - used
    return f" ({used} of {report['devices']} devices; the others run nothing of this engine)" if spare > 0 else ""


def row(p: Mapping[str, Any], report: Mapping[str, Any], steps: bool) -> list[str]:
    """A program's cells."""
    name = f"{p['kind']} {p['tokens'] or p['size'] or ''}".strip() + (
        f", {p['layers']} layers unrolled" if p["layers"] != report["layers"] else ""
    )
    if "error" in p:
        return [name, f"{p['seconds']:.1f} s", "failed"]
    joined = ", ".join(f"{c['count']} {n} {size(c['bytes'])}" for n, c in p["collectives"].items())
    cells = [name, f"{p['seconds']:.1f} s", size(p["temp"]), size(p["code"]), size(p["peak"])]
    if steps:
        e = p.get("estimate")
        cells += [f"{e[k]:.2f} ms" if e else "" for k in ("ms", "sampled_ms", "roofline_ms")]
    return [*cells, joined or "none"]


def _gates(gates: Sequence[Mapping[str, Any]], console: Console) -> None:
    failed = [g for g in gates if not g["ok"]]
    names = sorted({g["name"] for g in gates})
    console.print(f"gates ({', '.join(names)}): {len(gates) - len(failed)} passed, {len(failed)} failed", markup=False)
    for g in failed:
        limit = f", not {g['limit']}" if g["limit"] else ""
        console.print(f"  {g['program']}: {g['name']}: {g['found']}{limit}", markup=False)
