"""Options that commands share: which model, on what, configured how."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import ConfigError, InvalidRequest

Model = Annotated[str | None, typer.Option(help="Folder of a model; the demo model if left out.")]
Backend = Annotated[str | None, typer.Option(help="auto, jax, torch or reference.")]
Mesh = Annotated[str | None, typer.Option(help='Devices, such as "tp=2".')]
Dtype = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")]
File = Annotated[Path | None, typer.Option("--config", help="A TOML configuration; flags stand over it.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, such as cache.page=32.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="The same bits whatever else runs; slower.")]
Texts = Annotated[
    list[str] | None, typer.Option("--prompt", help="Text to feed, instead of the packaged ones; may be repeated.")
]
Ids = Annotated[int, typer.Option("--tokens", min=0, help="Feed so many random ids instead of a text.")]
Seed = Annotated[int, typer.Option(help="Of the random ids.")]
Thresholds = Annotated[Path, typer.Option("--thresholds", help="A TOML of thresholds instead of the packaged.")]
Out = Annotated[Path | None, typer.Option(help="Write JSON here.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with plots here.")]
Plot = Annotated[Path | None, typer.Option(help="Write charts here: a page (.html), or the charts alone (.svg).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_set(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE pairs as configuration keys; values are TOML, or else strings. Raises ConfigError."""
    out: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {pair}: write it as KEY=VALUE, such as cache.page=32", field="set")
        try:
            out[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            out[key.strip()] = value.strip()
    return out


def read_bias(pairs: list[str] | None) -> dict[str, float] | None:
    """ID=VALUE pairs as a logit bias. Raises InvalidRequest."""
    out: dict[str, float] = {}
    for pair in pairs or []:
        token, _, value = pair.partition("=")
        try:
            out[token.strip()] = float(value)
        except ValueError as error:
            says = f"logit_bias: {pair}: write it as ID=VALUE, such as 5=-100"
            raise InvalidRequest(says, field="logit_bias") from error
    return out or None


def words(given: Mapping[str, object], pairs: list[str] | None) -> list[str]:
    """Options as the words of a command line; None is what was not given."""
    out = [str(x) for name, value in given.items() if value is not None for x in (name, value)]
    return out + [x for pair in pairs or () for x in ("--set", pair)]


@contextmanager
def folder(model: str | None, shape: str | None, make: Callable[[Path, str], Path]) -> Iterator[Path]:
    """A model's folder: a random one's of a shape, which `make` makes in a folder that is gone afterwards; or else the
    named one, or the demo model's."""
    from radixmesh.engine import DEMO

    if not shape:
        yield Path(model) if model else DEMO
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield make(Path(temporary), shape)


def exact(deterministic: bool) -> dict[str, Any]:
    """The flag as a key, where it was given."""
    return {"backend.deterministic": True} if deterministic else {}


def flags(
    model: str | None,
    backend: str | None,
    mesh: str | None,
    dtype: str | None,
    pairs: list[str] | None,
    deterministic: bool = False,
) -> dict[str, Any]:
    """The shared options as overrides of a configuration; None, and false, is what was not given."""
    given = {"model": model, "backend": backend, "mesh": mesh, "dtype": dtype}
    return read_set(pairs) | exact(deterministic) | {k: v for k, v in given.items() if v is not None}
