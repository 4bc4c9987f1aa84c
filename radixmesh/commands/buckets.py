"""`radixmesh buckets`: the sizes to pad steps to, chosen from what a server saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from radixmesh.commands import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(buckets)


def buckets(
    log: Annotated[list[Path], typer.Argument(help="What servers wrote with --set sched.log=FILE.")],
    most: Annotated[int, typer.Option(min=1, max=12, help="Sizes at most: each is a program.")] = 12,
    as_json: options.Json = False,
) -> None:
    """Print how much of what was computed was padding, and the ladders that pad the same steps least."""
    from engine.run.sizes import read, suggest

    traffic = read(log)
    ladders = suggest(traffic, most)
    if as_json:
        told = [{"token_buckets": x, "waste": traffic.waste(x)} for x in (traffic.ladder, *ladders)]
        print(json.dumps({"steps": traffic.steps, "tokens": traffic.tokens, "now": told[0], "best": told[1:]}))
        return
    print(f"{traffic.steps} steps of {traffic.tokens} tokens")
    print(f"{'':>5} {'padding':>8}  sizes")
    for name, ladder in (("now", traffic.ladder), *((str(len(x)), x) for x in ladders)):
        print(f"{name:>5} {traffic.waste(ladder):8.1%}  {', '.join(map(str, ladder))}")
    print(f"--set sched.token_buckets='{list(ladders[-1])}'")
