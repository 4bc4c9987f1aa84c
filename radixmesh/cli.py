"""The command line: `radixmesh COMMAND`. A file of radixmesh.commands with a function `register(app)` is a command."""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules

import typer

from engine.errors import RadixmeshError
from radixmesh import commands


def make_app() -> typer.Typer:
    """The application with every command. Commands import what is heavy when they run."""
    app = typer.Typer(
        name="radixmesh",
        help="One inference engine for large language models, on TPUs and GPUs.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for module in iter_modules(commands.__path__):
        register = getattr(import_module(f"{commands.__name__}.{module.name}"), "register", None)
        if register is not None:
            register(app)
    return app


def _root() -> None:
    """One inference engine for large language models, on TPUs and GPUs."""


def main() -> None:
    """Run the command line. What a user can mend ends in one line on stderr and exit code 2."""
    try:
        make_app()()
    except RadixmeshError as error:
        print(f"radixmesh: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
