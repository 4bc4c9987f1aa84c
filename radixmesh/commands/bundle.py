"""`radixmesh bundle`: compile what serving would compile, and keep it in a folder to start from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from radixmesh.commands import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bundle)


def bundle(
    out: Annotated[Path, typer.Option(help="Folder that the bundle is written to.")],
    model: options.Model = None,
    backend: options.Backend = None,
    mesh: options.Mesh = None,
    dtype: options.Dtype = None,
    config: options.File = None,
    pairs: options.Set = None,
) -> None:
    """Compile every program that serving with these options needs, and write them down: `serve --bundle` starts from
    them without compiling. A bundle is for one machine, model, configuration and set of versions.

    It holds machine code: take one only from where you would take a program.
    """
    from backends import make_bundle
    from engine.config import load
    from engine.run.start import decide
    from radixmesh.engine import DEMO

    began = time.monotonic()
    given = {"backend": "jax"} | options.flags(model, backend, mesh, dtype, pairs)
    decided = decide(load(config, given), DEMO)
    programs = make_bundle(decided.spec, decided.resolved, out)["programs"]
    size = sum(program["bytes"] for program in programs)
    print(f"{out}: {len(programs)} programs, {size / 2**20:.1f} MiB, in {time.monotonic() - began:.1f} s")
