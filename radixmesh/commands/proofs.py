"""`radixmesh bench parity`, `deterministic`, `latency` and `start`: what an engine promises, and how long it takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.errors import ConfigError
from radixmesh.commands import options
from radixmesh.parity.thresholds import FILE

if TYPE_CHECKING:
    from radixmesh.parity.served import Model

WIDE, DEMO_NAME = "wide", "demo"
HEADS = ("first p50/p90/p99", "between p50/p90/p99", "last p50/p90/p99")


def add(group: typer.Typer) -> None:
    """Add the commands to those of bench."""
    group.command()(parity)
    group.command()(deterministic)
    group.command()(latency)
    group.command()(start)


def parity(
    models: Annotated[
        str, typer.Option(help="demo, wide (random, heads of 128, 4 to a kv head), or folders of models.")
    ] = f"{DEMO_NAME},{WIDE}",
    only: Annotated[str, typer.Option(help="Cases whose name holds this.")] = "",
    limits: options.Thresholds = FILE,
    out: options.Out = None,
    pairs: options.Set = None,
) -> None:
    """torch as it serves on the device that is here, in every setting (dtype, captured steps, shared prefixes, 8 bits),
    against float32 on a CPU: tokens decoded through the cache, many texts at once.

    Exit code 1 past a threshold, or where steps did not run as they were set."""
    from radixmesh.bench.record import write
    from radixmesh.parity import served

    names = [n for n in served.here() if only in n]
    if not names:
        raise ConfigError(f"only: no case holds {only!r}; there are {', '.join(served.here())}", field="only")
    figures: list[dict[str, Any]] = []
    heads = ("KL mean", "p99", "max", "top-1", "top-10", "flips", "replayed", "together", "called")
    for name in (n.strip() for n in models.split(",")):
        with _model(name) as model:
            print(f"{name:24}" + "".join(f"{head:>10}" for head in heads))
            for case, s in served.compare(model, names, options.read_set(pairs), limits):
                figures.append({"model": name} | asdict(s) | {"ok": s.ok})
                f, bad = s.summary, [f"{c.metric} {c.value:.2g} past {c.limit:.2g}" for c in s.checks if not c.ok]
                told = [f"{x:.1e}" for x in (f.kl_mean, f.kl_p99, f.kl_max)]
                told += [f"{x:.2%}" for x in (f.top1, f.overlap[served.TEN], f.flips)]
                told += [str(s.ran.get(way, 0)) for way in ("replayed", "together", "called")]
                bad += [] if s.asked else ["steps did not run as they were set"]
                said = f"  NOT OK: {'; '.join(bad)}" if bad else "  ok"
                print(f"{case:24}" + "".join(f"{x:>10}" for x in told) + said, flush=True)
    write(out, "parity", figures)
    if not all(f["ok"] for f in figures):
        raise typer.Exit(1)


@contextmanager
def _model(name: str) -> Iterator[Model]:
    """The demo model, the wide one in a folder of its own, or a folder."""
    from radixmesh.bench.workloads import make_config
    from radixmesh.engine import DEMO
    from radixmesh.parity.served import Model

    if name == DEMO_NAME:
        yield Model(path=DEMO)
    elif name == WIDE:
        with tempfile.TemporaryDirectory() as folder:
            yield Model(path=make_config(Path(folder), WIDE), dummy=True)
    else:
        yield Model(path=Path(name))


def deterministic(
    model: options.Model = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of a shape instead: wide, 1b or 8b.")] = None,
    backend: Annotated[str, typer.Option(help="jax or torch.")] = "torch",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16.")] = "float32,bfloat16",
    requests: Annotated[int, typer.Option(min=2, max=72, help="In the batch.")] = 64,
    made: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    alone: Annotated[int, typer.Option(min=1, help="Of them, how many are also asked for alone.")] = 4,
    out: options.Out = None,
    pairs: options.Set = None,
) -> None:
    """Deterministic mode: tokens and logprobs of requests alone, in a batch, cold, warm and with other chunks, to the
    bit; and what the mode costs. Exit code 1 where a bit differs."""
    from radixmesh.bench import deterministic as bench
    from radixmesh.bench.record import write
    from radixmesh.bench.workloads import make_config

    figures = []
    with options.folder(model, shape, make_config) as path:
        settings = options.read_set(pairs) | ({"model.weights": "dummy"} if shape else {})
        for dtype in dtypes.split(","):
            f = bench.measure(path, backend, dtype.strip(), requests, made, min(alone, requests), settings)
            figures.append(f | {"model": shape or path.name})
            print(f"{shape or path.name}, {f['dtype']}, {backend} on {f['device']}: {requests} requests")
            for run, r in f["runs"].items():
                print(f"  {run:44} {r['tokens']:3} of {r['of']} equal in tokens, {r['logprobs']:3} in logprobs")
            for mode, c in f["cost"].items():
                print(f"  {mode:14} {c['tokens_per_second']:9.1f} tokens/s, {c['ms_per_token']:8.3f} ms/token alone")
            print(f"  {'every bit equal' if f['equal'] else 'NOT EQUAL'}", flush=True)
    write(out, "deterministic", figures)
    if not all(f["equal"] for f in figures):
        raise typer.Exit(1)


def latency(
    model: options.Model = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of a shape instead: 1b or 8b.")] = None,
    workload: Annotated[str, typer.Option(help="single, throughput, shared: whose prompts, in turn.")] = "throughput",
    backend: Annotated[str, typer.Option(help="jax or torch.")] = "torch",
    concurrency: Annotated[str, typer.Option(help="Requests that are open at once, such as 1,16,64.")] = "",
    rate: Annotated[str, typer.Option(help="Or arrivals a second, at random, such as 4,16.")] = "",
    requests: Annotated[int, typer.Option(min=1, help="Of each point of load.")] = 256,
    scale: Annotated[float, typer.Option(help="Shrink the workload for a dry run.")] = 1.0,
    out: options.Out = None,
    plot: options.Plot = None,
    pairs: options.Set = None,
) -> None:
    """Percentiles of the time to the first token, between tokens and to the last, at points of load, in one engine."""
    from radixmesh.bench import latency as bench
    from radixmesh.bench.plot import check
    from radixmesh.bench.record import write
    from radixmesh.bench.workloads import make_config

    check(plot)
    points = bench.loads(concurrency or ("" if rate else "1,16,64"), rate)
    names = [name.strip() for name in workload.split(",")]
    figures: list[dict[str, Any]] = []
    with options.folder(model, shape, make_config) as path:
        settings = options.read_set(pairs) | ({"model.weights": "dummy"} if shape else {})
        print(f"{'workload':11} {'load':>14} {'tokens/s':>9}  ms: " + " ".join(f"{h:>23}" for h in HEADS))
        for f in bench.measure(path, backend, names, points, requests, scale, settings):
            figures.append(f | {"model": shape or path.name})
            told = [
                "/".join(f"{1e3 * f[what][p]:.1f}" for p in ("p50", "p90", "p99")) if what in f else "-"
                for what in ("ttft", "itl", "e2e")
            ]
            speed = f["output_tokens_per_second"]
            print(
                f"{f['workload']:11} {f['load']:>14} {speed:9.0f}      " + " ".join(f"{t:>23}" for t in told),
                flush=True,
            )
    write(out, "latency", figures, plot)


def start(
    backend: Annotated[str, typer.Option(help="jax or torch.")] = "jax",
    cases: Annotated[str, typer.Option(help="cold, kept, and on jax bundle, early; all if left out.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Starts of each.")] = 3,
    model: options.Model = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of a shape instead: wide, 1b or 8b.")] = None,
    mesh: options.Mesh = None,
    out: options.Out = None,
    pairs: options.Set = None,
) -> None:
    """Seconds until `serve` is ready: with nothing kept, with programs kept by an earlier start, and on jax from a
    bundle, and ready early."""
    from radixmesh.bench import start as bench
    from radixmesh.bench.record import write

    if backend not in bench.CASES:
        raise ConfigError(f"backend: {backend!r}: there are {', '.join(bench.CASES)}", field="backend")
    known = bench.CASES[backend]
    names = [name.strip() for name in cases.split(",")] if cases else list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"cases: unknown {name!r}; {backend} has {', '.join(known)}", field="cases")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        if shape:
            model, pairs = str(bench.make_model(Path(folder), shape)), ["model.weights=dummy", *(pairs or ())]
        flags = options.words({"--model": model, "--mesh": mesh}, pairs)
        for name in names:
            s = bench.measure(backend, name, repeats, flags)
            figures.append(asdict(s) | {"model": shape or model or "demo"})
            stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in s.stages.items())
            rate = f"; weights at {s.weights_gibs:.1f} GiB/s"
            head = f"{s.case:7} ready in {s.ready:6.2f} s (least {s.least:.2f}, processor {s.cpu:.1f})"
            print(f"{head}: {stages}{rate}", flush=True)
    write(out, "start", figures)
