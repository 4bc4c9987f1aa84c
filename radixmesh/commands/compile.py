"""`radixmesh compile`: every program that serving would run, compiled for a device that need not be here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import ConfigError
from radixmesh.commands import options

if TYPE_CHECKING:
    from engine.run.start import Decided

PARTS = ("all", "steps", "decode", "layers")
EVERY = ("cpu", "tpu:v5e:2x4", "tpu:v5p:2x2x2", "tpu:v6e:2x4", "tpu:tpu7x:2x2x1", "cuda:sm_90", "rocm:gfx942")
"""What --all-targets compiles for."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(compile)


def compile(
    target: Annotated[
        str | None, typer.Option(help="tpu:CHIP:TOPOLOGY such as tpu:v6e:2x4, cuda:sm_90, rocm:gfx942, or cpu.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder with config.json; no weights needed.")] = None,
    mesh: options.Mesh = None,
    dtype: options.Dtype = None,
    config: options.File = None,
    pairs: options.Set = None,
    only: Annotated[str, typer.Option(help="all, steps, decode (the step of the most rows), layers.")] = "all",
    context: Annotated[int, typer.Option(min=1, help="Positions that each row sees, in estimates.")] = 1024,
    temp: Annotated[int, typer.Option(min=1, help="MiB of temporaries that a program may have.")] = 512,
    all_targets: Annotated[
        bool, typer.Option("--all-targets", help=f"One after the other: {', '.join(EVERY)}.")
    ] = False,
    golden: Annotated[bool, typer.Option("--golden", help="Against the golden records, of --target or all.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Write the golden records anew.")] = False,
    bundle: Annotated[
        Path | None, typer.Option(help="Keep the programs in this folder: `serve --bundle` starts from it.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON here.")] = None,
    as_json: options.Json = False,
) -> None:
    """Does it compile, does it fit, what does a step cost? Exit code 1 where a gate fails.

    A bundle is for one kind of machine, model, configuration and set of versions. It holds machine code: take one only
    from where you would take a program.
    """
    if update and not golden:
        raise ConfigError("update: only golden records are updated; give --golden too", field="update")
    if bundle is not None and (golden or all_targets or only != "all"):
        raise ConfigError("bundle: holds all programs of one target; leave out what asks for others", field="bundle")
    if golden:
        sys.exit(_golden(model, target, update))
    if only not in PARTS:
        raise ConfigError(f"only: {only!r} is none of {', '.join(PARTS)}", field="only")
    if all_targets == (target is not None):
        raise ConfigError("target: give --target, such as tpu:v6e:2x4, or --all-targets", field="target")
    names = EVERY if all_targets else (target or "",)
    asked = options.flags(model, None, mesh, dtype, pairs)
    part = "" if only == "all" else only
    if target is not None and target.partition(":")[0] in ("cuda", "rocm") and (part or bundle):
        raise ConfigError(f"target {target}: has kernels; only and bundle are for programs", field="target")
    wanted = Wanted(only=part, bundle=str(bundle or ""), context=context, temp=temp << 20, quiet=as_json)
    reports = list(_reports(names, asked, config, wanted))
    from radixmesh.bench import record
    from radixmesh.compile import page

    made = record.made()
    text = json.dumps(({"targets": reports} if all_targets else reports[0]) | {"made": made}, indent=1)
    for file, content in ((out, text + "\n"), (html, page.make(reports, made) if html else "")):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
    if as_json:
        print(text)
    elif all_targets:
        _matrix(reports)
    sys.exit(0 if all(r["ok"] for r in reports) else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Of each target. only, bundle: as backends.jax.target.examine has them; context: positions of a row; temp: bytes;
    quiet: nothing is shown."""

    only: str
    bundle: str
    context: int
    temp: int
    quiet: bool


def _reports(
    names: Sequence[str], asked: dict[str, Any], file: Path | None, wanted: Wanted
) -> Iterable[dict[str, Any]]:
    """A report for each target, shown as it is done. Of several, those that can't hold the model are told as
    {"target", "refused", "ok"}; where that is all of them, as an error, before anything is compiled."""
    from backends.target import check
    from engine.config import load
    from engine.target import GPUS, Target
    from radixmesh.compile import gpu, report, run
    from radixmesh.compile import show as terminal
    from radixmesh.engine import DEMO

    settings = load(file, asked)
    targets = [Target.parse(name) for name in names]
    decided: list[Decided | ConfigError] = []
    for target in targets:
        try:
            check(target)
            if target.platform in GPUS:
                gpu.check(settings, target)
            decided.append(run.decide(settings, target, DEMO))
        except ConfigError as error:
            decided.append(error)
    refused = [one for one in decided if isinstance(one, ConfigError)]
    if len(refused) == len(decided):
        raise refused[0]
    console = terminal.console()
    for target, one in zip(targets, decided, strict=True):
        if isinstance(one, ConfigError):
            yield {"target": str(target), "refused": str(one), "ok": False}
            continue
        if target.platform in GPUS:
            yield gpu.report(one, target, console, wanted.quiet)
            continue
        found = []
        for r in run.records(one, target, wanted.only, wanted.bundle):
            found.append(r)
            if not wanted.quiet and "program" in r:
                print(f"{target}: {r['program']} in {r['seconds']:.1f} s", file=sys.stderr, flush=True)
        made = report.make(one, target, found, wanted.context, wanted.temp)
        if not wanted.quiet:
            terminal.show(made, console)
            _bundled(wanted.bundle, found)
        yield made


def _bundled(folder: str, found: Sequence[dict[str, Any]]) -> None:
    """Say what became of a bundle."""
    if not folder:
        return
    size = next((r["bytes"] for r in found if "bundle" in r), None)
    count = sum("program" in r for r in found)
    what = "no bundle, as a program failed" if size is None else f"{count} programs, {size / 2**20:.1f} MiB"
    print(f"{folder}: {what}", flush=True)


def _golden(model: str | None, target: str | None, update: bool) -> int:
    """Compile the golden cases, and say what moved. Exit code."""
    from backends.target import check
    from engine.target import Target
    from radixmesh.compile import golden

    named = target and str(Target.parse(target))
    cases = [c for c in golden.CASES if model in (None, c.model) and named in (None, c.target)]
    if not cases:
        models = ", ".join(sorted({c.model for c in golden.CASES}))
        raise ConfigError(
            f"golden: no record of {model or 'any model'} on {target}; models are {models}", field="golden"
        )
    worst = 0
    for case in cases:
        check(Target.parse(case.target))
        now = golden.figures(golden.measure(case))
        if update:
            golden.write(case, now)
            print(f"{case.name}: written" + "".join(f"; fails {f}" for f in now["failed"]), flush=True)
            continue
        found = golden.moved(golden.kept(case), now)
        print(f"{case.name}: " + ("; ".join(found) or "as it was"), flush=True)
        worst = max(worst, int(bool(found)))
    return worst


def _matrix(reports: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from radixmesh.compile.page import MATRIX, summary
    from radixmesh.compile.show import console

    table = Table(*MATRIX, box=None, pad_edge=False)
    for r in reports:
        table.add_row(*summary(r)[:-1], "refused" if "refused" in r else summary(r)[-1])
    console().print(table)
    for r in reports:
        if "refused" in r:
            console().print(f"{r['target']}: {r['refused']}", markup=False)
