"""`radixmesh convert`: a model's folder as safetensors or as an Orbax checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(convert)


def convert(
    source: Annotated[Path, typer.Argument(help="A model's folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not be there, or be empty.")],
    to: Annotated[str, typer.Option(help="orbax or safetensors.")],
) -> None:
    """The same tensors in another form, bit for bit, with a checksum of each; every other file is carried along."""
    from radixmesh.convert.convert import convert as run

    start = time.perf_counter()
    done = run(source, target, to, lambda text: print(f"  {text}"))
    seconds = time.perf_counter() - start
    print(f"{done.tensors} tensors, {done.bytes / 1e6:.1f} MB in {seconds:.1f} s, read back and equal: {target}")
    if not done.known:
        print(f"  {source} has no checksums: what was read is what was written, whether it was whole is not known")
    print(f"  carried along: {', '.join(done.carried) or 'nothing'}")
    if done.left:
        print(f"  left behind: {', '.join(done.left)}")
