"""`radixmesh parity`: the same token ids through several backends and Hugging Face, layer by layer, in float32."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from backends import NAMES
from engine.config import load
from engine.errors import ConfigError, InvalidRequest
from engine.run.start import Decided, decide
from radixmesh.commands import options
from radixmesh.engine import DEMO
from radixmesh.parity.compare import Verdict, compare
from radixmesh.parity.readings import ORACLE, Reading, read_model, read_oracle

TEXT = "def parse(text: str) -> dict[str, int]:\n    "


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(parity)


def parity(
    model: options.Model = None,
    backends: Annotated[
        str, typer.Option(help="Subjects, the judge among them: hf, else the first.")
    ] = "jax,torch,reference,hf",
    prompt: Annotated[str | None, typer.Option(help="Text to feed; needs a tokenizer.")] = None,
    tokens: Annotated[int, typer.Option(help="Feed so many random ids instead of a text.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random ids.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Greedy tokens to compare.")] = 32,
    file: options.File = None,
    pairs: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Where do backends first differ, and by how much? Exit code 1 when one is out of tolerance."""
    subjects = _subjects(backends)
    given = options.read_set(pairs) | {"dtype": "float32", "sched.slots": 1} | ({"model": model} if model else {})
    decided = {name: decide(load(file, given | {"backend": name}), DEMO) for name in subjects if name != ORACLE}
    first = next(iter(decided.values()), None) or decide(load(file, given), DEMO)
    ids = _ids(first, prompt, tokens, seed, max_new_tokens)
    readings = {
        name: read_oracle(first.spec, first.path, ids, max_new_tokens)
        if name == ORACLE
        else read_model(decided[name], ids, max_new_tokens)
        for name in subjects
    }
    judge = readings.pop(ORACLE if ORACLE in readings else subjects[0])
    verdicts = [compare(judge, reading) for reading in readings.values()]
    if as_json:
        print(json.dumps(report(str(first.path), ids, judge, verdicts)))
    else:
        show(str(first.path), ids, judge, verdicts)
    sys.exit(0 if all(v.ok for v in verdicts) else 1)


def _subjects(text: str) -> list[str]:
    subjects = [name.strip() for name in text.split(",") if name.strip()]
    for name in subjects:
        if name not in (*NAMES, ORACLE):
            raise ConfigError(
                f"backends: unknown name {name!r}; there are {', '.join((*NAMES, ORACLE))}", field="backends"
            )
    if len(set(subjects)) < 2:
        raise ConfigError("backends: give at least two, such as jax,hf", field="backends")
    return list(dict.fromkeys(subjects))


def _ids(first: Decided, prompt: str | None, tokens: int, seed: int, count: int) -> list[int]:
    """The token ids to feed. Raises InvalidRequest when they do not fit."""
    if tokens:
        ids = np.random.default_rng(seed).integers(0, first.spec.vocab, tokens).tolist()
    else:
        from engine.text.tokenizer import Tokenizer

        ids = Tokenizer.open(first.path).encode(prompt or TEXT)
    if not ids or count < 1 or len(ids) + count > first.resolved.max_len:
        raise InvalidRequest(
            f"prompt: {len(ids)} tokens and {count} new ones must be at least 1 each and fit {first.resolved.max_len}",
            field="prompt",
        )
    return list(ids)


def report(model: str, ids: Sequence[int], judge: Reading, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "model": Path(model).name,
        "judge": judge.name,
        "prompt_tokens": len(ids),
        "greedy_tokens": judge.tokens,
        "ok": all(v.ok for v in verdicts),
        "subjects": [asdict(v) | {"ok": v.ok} for v in verdicts],
    }


def show(model: str, ids: Sequence[int], judge: Reading, verdicts: Sequence[Verdict]) -> None:
    """The result as a table: one line a value, one column a subject."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {len(ids)} tokens, max |difference| from {judge.name}")
    table.add_column("value")
    for verdict in verdicts:
        table.add_column(verdict.name, justify="right")
    table.add_column("allowed", justify="right")
    for i, name in enumerate(judge.values):
        cells = [f"{v.gaps[i].worst:.1e}" + ("" if v.gaps[i].ok else " !") for v in verdicts]
        table.add_row(name, *cells, f"{verdicts[0].gaps[i].allowed:.1e}")
    console = Console()
    console.print(table)
    for v in verdicts:
        where = "every value within tolerance" if v.first is None else f"first differs at {v.first}"
        greedy = f"{len(judge.tokens)} greedy tokens equal"
        if v.differs is not None:
            greedy = f"greedy tokens differ from {v.differs} on" + (" (a near-tie)" if v.tie else "")
        console.print(f"{v.name}: {where}; {greedy}: {'ok' if v.ok else 'NOT OK'}")
