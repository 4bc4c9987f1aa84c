"""`radixmesh bench`: figures, and where they were made."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import ConfigError
from radixmesh.commands import options


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Measure, and write the figures down with the machine, versions and commit.")
    group.callback()(lambda: None)
    group.command()(offline)
    group.command()(agree)
    app.add_typer(group, name="bench")


def offline(
    model: options.Model = None,
    shape: Annotated[str | None, typer.Option(help="A random Llama instead: 25m or 100m.")] = None,
    subjects: Annotated[
        str, typer.Option(help="jax, torch, transformers-float32, transformers-bfloat16.")
    ] = "jax,torch,transformers-bfloat16,transformers-float32",
    batch: Annotated[str, typer.Option(help="Prompts at once, such as 1,8.")] = "1,8",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    made: Annotated[int, typer.Option(help="Tokens made for each.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed repeats after a warm-up.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of transformers.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write JSON here.")] = None,
    pairs: options.Set = None,
) -> None:
    """Greedy tokens per second of our backends beside transformers' generate, same checkpoint, same run."""
    from radixmesh.bench import offline as bench
    from radixmesh.bench.record import write
    from radixmesh.engine import DEMO

    if shape is not None and shape not in bench.SHAPES:
        raise ConfigError(f"shape: unknown {shape!r}; there are {', '.join(bench.SHAPES)}", field="shape")
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = bench.make_model(Path(folder), shape) if shape else Path(model) if model else DEMO
        print(f"{'subject':24} {'batch':>5} {'first s':>8} {'whole s':>8} {'decode tok/s':>12} {'spread':>7}")
        for name in subjects.split(","):
            for speed in _subject(bench, name.strip(), path, batch, length, made, repeats, threads, pairs):
                figures.append(asdict(speed) | {"model": shape or path.name, "in": length, "out": made})
                print(
                    f"{speed.subject:24} {speed.batch:5} {speed.first:8.3f} {speed.whole:8.3f} {speed.decode:12.1f} "
                    f"{speed.spread:7.1%}"
                )
    if out is not None:
        write(out, "offline", figures)


def agree(
    model: options.Model = None,
    subjects: Annotated[str, typer.Option(help="Two backends.")] = "jax,torch",
    count: Annotated[int, typer.Option(help="Prompts.")] = 100,
    made: Annotated[int, typer.Option(help="Tokens made for each.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write JSON here.")] = None,
    pairs: options.Set = None,
) -> None:
    """The same random prompts through two backends in float32, greedy and seeded: how many sequences are equal?"""
    from radixmesh.bench.agree import agree as compare
    from radixmesh.bench.record import write
    from radixmesh.engine import DEMO

    names = [name.strip() for name in subjects.split(",")]
    if len(names) != 2:
        raise ConfigError("subjects: give two backends, such as jax,torch", field="subjects")
    figures = compare(model or str(DEMO), names, count, made, options.read_set(pairs))
    for f in figures:
        took = ", ".join(f"{name} {f['seconds'][name]:.2f} s on {f['devices'][name]}" for name in names)
        print(f"{f['kind']}: {f['equal']} of {f['prompts']} sequences of {f['tokens']} tokens equal; {took}")
        if f["differ"]:
            print(f"  (sequence, first token that differs): {f['differ']}")
    if out is not None:
        write(out, "agree", figures)


def _subject(
    bench: Any, name: str, path: Path, batch: str, length: int, made: int, repeats: int, threads: int, pairs: Any
) -> Any:
    """Open a subject, measure it at every batch size, close it."""
    from engine.model.registry import read_spec
    from radixmesh.engine import Engine

    sizes, vocab = [int(b) for b in batch.split(",")], read_spec(path).vocab
    if name.startswith("transformers-"):
        run = bench.run_transformers(path, name.removeprefix("transformers-"), threads)
        for size in sizes:
            yield bench.measure(name, run, size, length, made, vocab, repeats)
        return
    with Engine(str(path), backend=name, skip_tokenizer=True, **options.read_set(pairs)) as engine:
        for size in sizes:
            yield bench.measure(name, bench.run_engine(engine), size, length, made, vocab, repeats)
