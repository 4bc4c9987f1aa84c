"""`radixmesh bench`: figures, and where they were made."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import ConfigError
from radixmesh.commands import options, proofs


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Measure, and write the figures down with the machine, versions and commit.")
    group.callback()(lambda: None)
    group.command()(offline)
    group.command()(prefix)
    group.command()(agree)
    group.command()(scheduler)
    group.command()(serve)
    group.command()(radix)
    group.command()(dispatch)
    group.command()(kernels)
    proofs.add(group)
    app.add_typer(group, name="bench")


def offline(
    model: options.Model = None,
    shape: Annotated[
        str | None, typer.Option(help="A random Llama instead: 25m or 100m; of a workload 1b, 8b or 30b-a3b.")
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="single, throughput, shared: by name instead, such as single,throughput.")
    ] = None,
    backend: Annotated[str, typer.Option(help="What runs a workload: jax or torch.")] = "jax",
    dummy: Annotated[
        bool, typer.Option(help="Random weights for a workload, whatever stands beside config.json.")
    ] = False,
    scale: Annotated[float, typer.Option(help="Shrink a workload for a dry run.")] = 1.0,
    subjects: Annotated[
        str, typer.Option(help="jax, torch or transformers, with a dtype: jax-bfloat16.")
    ] = "jax-float32,jax-bfloat16,torch-float32,torch-bfloat16,transformers-float32,transformers-bfloat16",
    batch: Annotated[str, typer.Option(help="Prompts at once, such as 1,8.")] = "1,8",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    made: Annotated[int, typer.Option(help="Tokens made for each.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed repeats after a warm-up.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of transformers.")] = 2,
    deterministic: options.Deterministic = False,
    out: options.Out = None,
    plot: options.Plot = None,
    pairs: options.Set = None,
) -> None:
    """Greedy tokens per second of backends beside transformers' generate, same checkpoint and run; or workloads."""
    from radixmesh.bench import offline as bench
    from radixmesh.bench.plot import check
    from radixmesh.bench.record import write

    check(plot)
    exact = options.read_set(pairs) | options.exact(deterministic)
    if workload is not None:
        names = [name.strip() for name in workload.split(",")]
        return workloads(model, shape, names, backend, dummy, scale, repeats, out, plot, exact)
    sizes, settings = [int(b) for b in batch.split(",")], exact
    figures: list[dict[str, Any]] = []
    with options.folder(model, shape, bench.make_model) as path:
        print(f"{'subject':24} {'batch':>5} {'first s':>8} {'whole s':>8} {'decode tok/s':>12} {'spread':>7}")
        for name in subjects.split(","):
            # a process for each: what one leaves behind (threads above all) must not slow the next
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as alone:
                speeds = alone.submit(
                    bench.measure_subject, name.strip(), path, sizes, length, made, repeats, threads, settings
                ).result()
            for speed in speeds:
                figures.append(asdict(speed) | {"model": shape or path.name, "in": length, "out": made})
                print(
                    f"{speed.subject:24} {speed.batch:5} {speed.first:8.3f} {speed.whole:8.3f} {speed.decode:12.1f} "
                    f"{speed.spread:7.1%}"
                )
    write(out, "offline", figures, plot)


def workloads(
    model: str | None,
    shape: str | None,
    names: list[str],
    backend: str,
    dummy: bool,
    scale: float,
    repeats: int,
    out: Path | None,
    plot: Path | None,
    settings: dict[str, Any],
) -> None:
    """Run workloads by name on one engine, and print a line for each."""
    from radixmesh.bench import workloads as bench
    from radixmesh.bench.record import write

    for name in names:
        bench.workload(name, scale)  # refused before anything is opened
    with options.folder(model, shape, bench.make_config) as path:
        given = {"model.weights": "dummy"} if dummy or shape else {}
        figures = bench.measure(path, backend, names, scale, repeats, given | settings)
    for f in figures:
        f["model"] = shape or path.name
        each = f", {f['ms_per_token']:.3f} ms/token" if "ms_per_token" in f else ""
        print(
            f"{f['workload']}: {f['seconds']:.3f} s (spread {f['spread']:.1%}), "
            f"{f['output_tokens_per_second']:.0f} tokens/s{each}, {f['cached']} prompt tokens from the cache; "
            f"ready after {f['ready']:.1f} s on {f['device']}"
        )
    write(out, "workloads", figures, plot)


def prefix(
    model: options.Model = None,
    shape: Annotated[str | None, typer.Option(help="A random Llama instead: 25m or 100m.")] = None,
    subjects: Annotated[str, typer.Option(help="Backends.")] = "jax,torch",
    requests: Annotated[int, typer.Option(help="Prompts, all at once.")] = 64,
    shared: Annotated[int, typer.Option(help="Tokens that all prompts begin with.")] = 1024,
    own: Annotated[int, typer.Option(help="Tokens of each prompt's own.")] = 16,
    made: Annotated[int, typer.Option(help="Tokens made for each.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed repeats, each with a fresh prefix.")] = 2,
    out: options.Out = None,
    pairs: options.Set = None,
) -> None:
    """Requests with one prefix, with the prefix cache and without: how many times faster is it?"""
    from radixmesh.bench import offline as models
    from radixmesh.bench.prefix import measure
    from radixmesh.bench.record import write

    figures: list[dict[str, Any]] = []
    with options.folder(model, shape, models.make_model) as path:
        for name in subjects.split(","):
            both = []
            for radix in (True, False):
                given = (path, name.strip(), radix, requests, shared, own, made, repeats, options.read_set(pairs))
                with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as alone:
                    both.append(alone.submit(measure, *given).result() | {"model": shape or path.name})
            figures += both
            times, took = both[1]["seconds"] / both[0]["seconds"], [b["seconds"] for b in both]
            print(
                f"{name}: {took[0]:.2f} s with the cache ({both[0]['cached']} of {both[0]['prompt_tokens']} prompt "
                f"tokens from it), {took[1]:.2f} s without: {times:.1f} times faster"
            )
    write(out, "prefix", figures)


def agree(
    model: options.Model = None,
    subjects: Annotated[str, typer.Option(help="Two backends.")] = "jax,torch",
    count: Annotated[int, typer.Option(help="Prompts.")] = 100,
    made: Annotated[int, typer.Option(help="Tokens made for each.")] = 64,
    out: options.Out = None,
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
    write(out, "agree", figures)


def scheduler(
    running: Annotated[int, typer.Option(min=1, help="Requests that run.")] = 256,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that wait.")] = 10000,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 400,
    policies: Annotated[str, typer.Option(help="lpm, fcfs, dfs-weight.")] = "lpm,fcfs,dfs-weight",
    scale: Annotated[int, typer.Option(min=1, help="Divide the prompts of the shared workload by this.")] = 1,
    out: options.Out = None,
) -> None:
    """Microseconds of a step's plan and commit, on a device that computes nothing; and what shared prefixes save."""
    from engine.config import POLICIES
    from radixmesh.bench import scheduler as bench
    from radixmesh.bench.record import write

    names = [name.strip() for name in policies.split(",")]
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"policies: unknown {name!r}; there are {', '.join(POLICIES)}", field="policies")
    figures: list[dict[str, Any]] = []
    heads = " ".join(f"{head:>7}" for head in ("running", "waiting", "plan", "commit", "least", "median"))
    print(f"{'case':8} {'policy':10} {heads} us")
    for name in names:
        for case, queued in (("decode", 0), *((case, waiting) for case in bench.CASES)):
            c = bench.measure(case, name, running, queued, steps)
            figures.append(asdict(c))
            told = (c.running, c.waiting, c.plan, c.commit, c.least, c.median)
            print(f"{case:8} {name:10} " + " ".join(f"{x:7.0f}" for x in told))
    print(f"{'order':12} {'policy':10} {'shared':>8} {'cached':>8} {'fed':>8}")
    for name in names:
        for order in bench.ORDERS:
            s = bench.share(order, name, prefix=2048 // scale, own=128 // scale)
            figures.append(asdict(s))
            print(f"{order:12} {name:10} {s.shared:8} {s.cached:8} {s.fed:8}")
    write(out, "scheduler", figures)


def kernels(
    target: Annotated[
        str, typer.Option(help="tpu:v6e, tpu:v5e, tpu:v5p, tpu:7x, several, all; or gpu: the one that is here.")
    ] = "all",
    only: Annotated[str, typer.Option(help="Cases whose name holds this; of TPUs, one of several.")] = "",
    peers: Annotated[Path | None, typer.Option(help="Folder with the tpu-inference package, for its kernel.")] = None,
    out: options.Out = None,
    plot: options.Plot = None,
) -> None:
    """Compile the Pallas kernels for TPUs, with none here: seconds, VMEM, spills, cycles; and jax's own beside them."""
    from radixmesh.bench import kernels as bench
    from radixmesh.bench.plot import check
    from radixmesh.bench.record import write

    check(plot)
    if target == "gpu":
        return _kernels_gpu(only, peers, out, plot)
    chips = list(bench.TOPOLOGY) if target == "all" else [name.removeprefix("tpu:") for name in target.split(",")]
    for chip in chips:
        if chip not in bench.TOPOLOGY:
            raise ConfigError(f"target: unknown {chip!r}; there are {', '.join(bench.TOPOLOGY)}", field="target")
    figures: list[dict[str, Any]] = []
    fields = (
        "compile_s",
        "vmem",
        "spills",
        "spilled",
        "turn",
        "schedule_cycles",
        "roofline_cycles",
        "estimated_cycles",
    )
    print(f"{'case':34} {'chip':5} " + " ".join(f"{field:>16}" for field in fields))
    with ThreadPoolExecutor(2) as pool:  # each is a process, whose compiler uses one core mostly
        for row in chain.from_iterable(pool.map(lambda chip: bench.run(chip, str(peers or ""), only), chips)):
            figures.append(row)
            said = row.get("error") or " ".join(f"{row.get(field, '-'):>16}" for field in fields)
            print(f"{row['case']:34} {row['chip']:5} {said}", flush=True)
    write(out, "kernels", figures, plot)


def _kernels_gpu(only: str, peers: Path | None, out: Path | None, plot: Path | None) -> None:
    """Attention and experts on the present GPU."""
    from importlib.util import find_spec

    from radixmesh.bench.record import write

    if peers is not None:
        raise ConfigError("peers: are kernels of TPUs", field="peers")
    if find_spec("torch") is None or find_spec("triton") is None:
        raise ConfigError("target gpu: torch and triton are needed: pip install 'radixmesh[cuda]'", field="target")
    import torch

    from radixmesh.bench import experts_gpu, kernels_gpu

    if not torch.cuda.is_available():
        raise ConfigError("target gpu: this torch sees no GPU", field="target")
    figures: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        figures.append(row)
        print(f"{row['case']:32} " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "case"), flush=True)

    for row in kernels_gpu.measure(only):
        keep(row)
    for row in experts_gpu.measure(only, figures[0]):
        keep(row)
    write(out, "kernels", figures, plot)


def radix(
    pages: Annotated[str, typer.Option(help="Tokens per page, such as 1,16.")] = "1,16",
    requests: Annotated[int, typer.Option(min=1, help="Requests of 512 to 4,096 tokens.")] = 2000,
    capacity: Annotated[int, typer.Option(min=8192, help="Tokens that the cache holds.")] = 500_000,
    repeats: Annotated[int, typer.Option(min=1, help="Times that the whole is served, each from an empty cache.")] = 7,
    out: options.Out = None,
) -> None:
    """CPU microseconds of the prefix cache a request: match, lock, evict, take, insert, unlock. No model is needed."""
    from radixmesh.bench import radix as bench
    from radixmesh.bench.record import write

    sizes = [p for p in pages.split(",") if p.strip().isdigit() and 1 <= int(p) <= 128]
    if sizes != pages.split(","):
        raise ConfigError(f"pages: {pages!r}: give sizes from 1 to 128, such as 1,16", field="pages")
    figures = []
    print(f"{'page':>4} {'us/request':>10} {'best':>7} {'match':>7} {'best':>7} {'key':>7} {'cached':>7}")
    for page in sizes:
        cost = bench.measure(int(page), requests, capacity, repeats)
        figures.append(asdict(cost) | {"requests": requests, "capacity": capacity, "repeats": repeats})
        print(
            f"{cost.page:4} {cost.total:10.1f} {cost.best:7.1f} {cost.match:7.1f} {cost.match_best:7.1f} "
            f"{cost.key:7.1f} {cost.cached:7.1%}"
        )
    write(out, "radix", figures)


def dispatch(
    mesh: options.Mesh = "tp=8",
    rows: Annotated[int, typer.Option(min=1, max=4096, help="Rows that decode in each step.")] = 256,
    steps: Annotated[int, typer.Option(min=1, max=4096, help="Steps that are timed.")] = 100,
    stacks: Annotated[str, typer.Option(help="scan, as on TPUs; list, as elsewhere.")] = "scan,list",
    out: options.Out = None,
    pairs: options.Set = None,
) -> None:
    """Milliseconds that the host takes to send a step to jax's devices; a CPU is cut into as many as the mesh has."""
    from radixmesh.bench import dispatch as bench
    from radixmesh.bench.record import write

    figures = []
    print(f"{'mesh':10} {'stack':5} {'rows':>5} {'host':>7} {'90%':>7} {'clock':>7} {'90%':>7} {'turn':>8} ms")
    for stack in stacks.split(","):
        settings = {"backend.jax.stack": stack.strip()} | options.read_set(pairs)
        # a process for each: threads that one leaves behind must not slow the next
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as alone:
            d = alone.submit(bench.measure, mesh or "", rows, steps, settings).result()
        figures.append(asdict(d))
        told = f"{d.host:7.3f} {d.host_high:7.3f} {d.wall:7.3f} {d.wall_high:7.3f} {d.turn:8.2f}"
        print(f"{d.mesh:10} {d.stack:5} {d.rows:5} {told}", flush=True)
    write(out, "dispatch", figures)


def serve(
    url: Annotated[str | None, typer.Option(help="A server that runs; one is started if left out.")] = None,
    api_key: Annotated[str | None, typer.Option(help="The key that it wants.")] = None,
    model: options.Model = None,
    backend: options.Backend = None,
    mesh: options.Mesh = None,
    dtype: options.Dtype = None,
    config: options.File = None,
    pairs: options.Set = None,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 128,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long new answers are asked for.")] = 60.0,
    made: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    workload: Annotated[
        str | None, typer.Option(help="single, throughput, shared: each of its requests once, instead of seconds.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Shrink a workload for a dry run.")] = 1.0,
    bare: Annotated[bool, typer.Option(help="Measure a bare uvicorn beside it.")] = True,
    out: options.Out = None,
) -> None:
    """Streams of completions over HTTP: errors, speed, CPU by process, and whether all is given back afterwards."""
    from radixmesh.bench import serve as bench
    from radixmesh.bench import workloads
    from radixmesh.bench.record import write

    if workload is not None:
        workloads.workload(workload, scale)  # refused before anything is opened
    if url is not None:
        figures = {"radixmesh": bench.measure(bench.peer_at(url, api_key), streams, seconds, made, workload, scale)}
    else:
        given = {"--model": model, "--backend": backend, "--mesh": mesh, "--dtype": dtype, "--config": config}
        flags = options.words(given, pairs)
        if api_key is not None:
            flags += ["--set", f"serve.api_key={api_key}"]
        with bench.started(["-m", "radixmesh", "serve", "--port", "0", *flags], api_key) as peer:
            figures = {"radixmesh": bench.measure(peer, streams, seconds, made, workload, scale)}
    if bare:
        f = figures["radixmesh"]
        figures["bare uvicorn"] = bench.measure_bare(streams, made, round(f["bytes_per_event"]), f["events"])
    for line in bench.table(figures):
        print(line)
    write(out, "serve", figures)
    if figures["radixmesh"]["errors"] or figures["radixmesh"]["held_after"] not in (None, (0, 0)):
        raise typer.Exit(1)
