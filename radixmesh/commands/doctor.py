"""`radixmesh doctor`: what this machine has, what would be used, and how to mend what is missing."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import typer

from engine.errors import RadixmeshError
from engine.installed import version
from radixmesh.commands import options

NEEDED = (
    "jax",
    "ml_dtypes",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "jinja2",
    "typer",
    "rich",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "msgspec",
    "pyzmq",
    "grpcio",
    "grpcio-health-checking",
    "grpcio-reflection",
    "protobuf",
    "prometheus-client",
)
OPTIONAL = ("torch", "triton", "libtpu")
SOCKET_PATH = 100
"""Bytes that the name of a unix socket may have, less a few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fact. fix: how to mend it, "" where nothing is wrong; broken: serving needs it."""

    name: str
    value: str
    fix: str = ""
    broken: bool = False


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(as_json: options.Json = False) -> None:
    """Look at this machine. Exit code 1 when something that serving needs is broken."""
    found = list(examine())
    if as_json:
        print(json.dumps({"ok": not any(f.broken for f in found), "findings": [asdict(f) for f in found]}))
    else:
        show(found)
    sys.exit(1 if any(f.broken for f in found) else 0)


def examine() -> Iterator[Finding]:
    """Everything, in the order in which it is shown."""
    yield Finding(name="python", value=f"{platform.python_version()} at {sys.executable}")
    yield Finding(name="platform", value=platform.platform())
    yield Finding(name="cores", value=str(_cores()))
    yield _memory()
    yield from packages()
    yield device()
    yield demo()
    yield port()
    yield folder()


def packages() -> Iterator[Finding]:
    """Versions, read without importing anything."""
    for name in (*NEEDED, *OPTIONAL):
        if found := version(name):
            yield Finding(name=name, value=found)
        elif name in OPTIONAL:
            yield Finding(name=name, value="not installed (optional)")
        else:
            yield Finding(name=name, value="not installed", fix=f"pip install {name}", broken=True)


def device() -> Finding:
    """What `--backend auto` would pick here, and why."""
    from backends.probe import probe

    try:
        d = probe()
    except RadixmeshError as error:
        return Finding(name="backend", value="none can run", fix=_line(error), broken=True)
    value = f"{d.backend} on {d.count} x {d.kind} ({d.platform}), {d.memory_bytes / 2**30:.1f} GiB free: {d.why}"
    return Finding(name="backend", value=value)


def demo() -> Finding:
    """Whether the model that comes with the package can be read."""
    from engine.model.checkpoint import Checkpoint
    from engine.model.registry import read_spec
    from engine.text.tokenizer import Tokenizer
    from radixmesh.engine import DEMO

    try:
        spec = read_spec(DEMO)
        Checkpoint(DEMO, spec)
        Tokenizer.open(DEMO)
    except (RadixmeshError, ImportError) as error:
        return Finding(
            name="demo model", value="can't be read", fix=f"install radixmesh anew: {_line(error)}", broken=True
        )
    return Finding(name="demo model", value=f"{spec.family}, {len(spec.layers)} layers, at {DEMO}")


def port() -> Finding:
    """Whether the usual port is free. Another can be chosen, so that nothing is broken when it isn't."""
    from engine.config import Serve
    from engine.serve.sockets import listen

    usual = Serve()
    try:
        listen(usual.host, usual.port).close()
    except RadixmeshError as error:
        return Finding(name="port", value=f"{usual.port} can't be used", fix=_line(error))
    return Finding(name="port", value=f"{usual.port} is free")


def folder() -> Finding:
    """Whether the engine's process and the server can meet at a unix socket."""
    try:
        with tempfile.TemporaryDirectory(prefix="radixmesh-") as made:
            if len(os.fsencode(made)) > SOCKET_PATH - 8:
                return Finding(
                    name="sockets",
                    value=f"{made} is too long a name",
                    fix="set TMPDIR to a folder with a shorter name",
                    broken=True,
                )
            return Finding(name="sockets", value=f"in {os.path.dirname(made)}")
    except OSError as error:
        return Finding(
            name="sockets", value=_line(error), fix="set TMPDIR to a folder that can be written", broken=True
        )


def show(found: list[Finding]) -> None:
    """A table, then one line for each trouble."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table("what", "found", box=None, pad_edge=False)
    for f in found:
        table.add_row(f.name, f"{f.value} (!)" if f.fix else f.value)
    console.print(table)
    for f in found:
        if f.fix:
            console.print(f"{f.name}: {f.value}; {f.fix}", markup=False)
    if not any(f.fix for f in found):
        console.print("all is well; start with: radixmesh serve")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Finding:
    from backends.probe import probe

    free = probe("reference").memory_bytes
    return Finding(name="memory", value=f"{free / 2**30:.1f} GiB free")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
