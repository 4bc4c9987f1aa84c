"""The programs of a configuration, compiled for a device that need not be here: what each takes, and what it says.

Runs in a process of its own (radixmesh.compile.child), since libtpu and jax read their settings once: SETTINGS of
backends.target must be in the environment. For a TPU the compiler is the real one, against a described topology.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from os import cpu_count
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from backends.api.limits import Limits, choosing
from backends.api.tiled import within
from backends.jax import bundle, hlo
from backends.jax.buckets import make_shape
from backends.jax.caches import cache_shapes, count_shape, state_shapes
from backends.jax.mesh import make_mesh, open_mesh
from backends.jax.params import shapes
from backends.jax.step import Plan
from backends.jax.warmup import REFUSED, Program, Programs, known, options
from engine.config import Resolved
from engine.model.spec import ModelSpec, eight


def plan_for(spec: ModelSpec, config: Resolved, topology: str) -> Plan:
    """The plan of a backend on the first devices of a described topology ("v6e:2x4"), or on this CPU where it is "".
    Deterministic, of the backend within."""
    config = within(spec, config) if config.deterministic else config
    if topology:
        mesh = make_mesh(config.mesh, topologies.get_topology_desc(topology, "tpu").devices)
    else:
        mesh = open_mesh(config)
    limits = Limits.of(spec, config, taps=True, **choosing(config))
    return Plan(spec=eight(spec, config.cache_dtype), config=config, limits=limits, mesh=mesh)


def examine(spec: ModelSpec, config: Resolved, topology: str, only: str, folder: str = "") -> Iterator[dict[str, Any]]:
    """Compile every program that serving would run, side by side, and tell of each as it is done.

    only: "" is all, "steps" those, "decode" the step whose bucket holds max_rows alone, "ends" also the smallest
    step, "layers" the decode step of few layers (see `few`), unrolled, with caches as large as those of all.
    folder: where all of them are written, as a bundle; "" is nowhere.

    The first record is {"held": {"weights", "cache", "state", "counts"}, "device"}, bytes on one device and what jax
    calls it. Then for each program
    {"program", "kind", "size", "tokens", "rows", "layers", "holds", "seconds"} and either "error" or what `measure`
    gives; holds: as "held", of a step of few layers. The last is {"bundle": folder, "bytes"}, unless a program failed.
    Raises ConfigError for a folder that is no place for a bundle.
    """
    plan = plan_for(spec, config, topology)
    writer = bundle.Writer(plan, Path(folder)) if folder else None
    yield {"held": held(plan), "device": plan.mesh.devices.flat[0].device_kind}
    jobs = [(plan, p, 0) for p in chosen(Programs(plan), only)]
    if only == "layers":
        decode = chosen(Programs(plan), "decode")
        jobs = [(shortened(plan, count), p, count) for count in few(spec) for p in decode]
    whole = True
    with bundle.uncached(), ThreadPoolExecutor(max(1, min(len(jobs), cpu_count() or 1))) as pool:
        running = [(_said(*job), _start(pool, writer, *job[:2])) for job in jobs]
        for said, future in running:
            found = future.result()
            whole = whole and "error" not in found
            yield said | found
    if writer is not None and whole:
        yield {"bundle": folder, "bytes": writer.close()}


def _said(at: Plan, program: Program, layers: int) -> dict[str, Any]:
    """What is known of a program before it is compiled. layers: 0 is all."""
    shape = make_shape(program.size, at.limits) if program.kind == "step" else None
    return {
        "program": str(program),
        "kind": program.kind,
        "size": program.size,
        "tokens": program.size if shape else 0,
        "rows": shape.rows if shape else 0,
        "layers": layers or len(at.spec.layers),
        "holds": held(at),
    }


def _start(
    pool: ThreadPoolExecutor, writer: bundle.Writer | None, at: Plan, program: Program
) -> Future[dict[str, Any]]:
    """Trace a program, and compile it on another thread."""
    try:
        with jax.set_mesh(at.mesh):  # what a kernel asks for the facts of its chip
            lowered = Programs(at).lower(program)
    except REFUSED as error:
        failed: Future[dict[str, Any]] = Future()
        failed.set_result(_error(0.0, error))
        return failed
    return pool.submit(_compile, lowered, options(at, program), program, writer)


def chosen(programs: Programs, only: str) -> list[Program]:
    """The programs of a plan that are asked for."""
    planned, rows = programs.planned(), programs.plan.limits.max_rows
    steps = [p for p in planned if p.kind == "step"]
    if only in ("", "steps"):
        return steps if only else planned
    some = {min(p for p in steps if p.size >= n) for n in ((1, rows) if only == "ends" else (rows,))}
    return sorted(some)


def few(spec: ModelSpec) -> tuple[int, ...]:
    """Two numbers of layers from whose steps that of all follows: 2 and 4, or one and two turns of a longer pattern."""
    layers, count = spec.layers, len(spec.layers)
    turn = next(p for p in range(1, count + 1) if all(layers[i] == layers[i - p] for i in range(p, count)))
    return tuple(n for n in ((2, 4) if turn <= 2 else (turn, 2 * turn)) if n <= count)


def shortened(plan: Plan, layers: int) -> Plan:
    """A plan of the first layers, unrolled, with caches as large as they are for all."""
    spec = replace(plan.spec, layers=plan.spec.layers[:layers])
    config = replace(plan.config, stack="list")
    limits = Limits.of(spec, config, taps=True, **choosing(config))
    at = [next(g for g, whole in enumerate(plan.limits.groups) if _alike(whole, group)) for group in limits.groups]
    pages = tuple(plan.limits.pages[g] * len(plan.limits.groups[g].layers) // len(limits.groups[i].layers)
                  for i, g in enumerate(at))  # fmt: skip
    config = replace(config, pages=pages)
    return replace(plan, spec=spec, config=config, limits=replace(limits, pages=pages))


def _alike(a: Any, b: Any) -> bool:
    return (a.window, a.kv_heads, a.head_dim) == (b.window, b.kv_heads, b.head_dim)


def held(plan: Plan) -> dict[str, int]:
    """Bytes that one device holds between steps. On a TPU state and counts lie in tiles; the cache is made to fill its
    own, so that a cache that doesn't would not be what is planned."""
    lain = tiled if plan.config.platform == "tpu" else math.prod
    return {
        "weights": _size(shapes(plan.leaves, plan.config, plan.mesh)),
        "cache": _size(cache_shapes(plan.limits, plan.config, plan.mesh)),
        "state": _size(state_shapes(plan.limits, plan.mesh), lain),
        "counts": _size(count_shape(plan.limits, plan.mesh), lain),
    }


def tiled(shape: Sequence[int]) -> int:
    """Entries that an int32 array of one or two dimensions takes on a TPU: tiles of up to 8 lines of 128, and of 1024
    entries in one dimension. A side shorter than that is rounded up to a power of two."""

    def up(size: int, most: int) -> int:
        return -(-size // most) * most if size > most else 1 << (size - 1).bit_length()

    if len(shape) == 1:
        return max(128, up(shape[0], 1024))
    return up(shape[0], 8) * -(-shape[1] // 128) * 128


def _size(tree: Any, entries: Callable[[Sequence[int]], int] = math.prod) -> int:
    return sum(s.dtype.itemsize * entries(s.sharding.shard_shape(s.shape)) for s in jax.tree.leaves(tree))


def _compile(
    lowered: jax.stages.Lowered, options: Any, program: Program, writer: bundle.Writer | None
) -> dict[str, Any]:
    """Seconds, and what came of it."""
    start = time.monotonic()
    try:
        made = lowered.compile(known(options))
    except jax.errors.JaxRuntimeError as error:  # out of memory, or a kernel that the compiler won't take
        return _error(time.monotonic() - start, error)
    took = time.monotonic() - start
    if writer is not None:
        writer.add(program, lowered, made)
    return {"seconds": took} | measure(made)


def _error(seconds: float, error: Exception) -> dict[str, Any]:
    return {"seconds": seconds, "error": " ".join(str(error).split())[:400]}


def measure(made: jax.stages.Compiled) -> dict[str, Any]:
    """Bytes on one device (arguments, what of them is changed in place, temporaries, code, peak), cycles and
    collectives of one program."""
    memory, text = made.memory_analysis(), made.as_text() or ""
    found = hlo.read(text)
    return {
        "arguments": memory.argument_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "cycles": found.cycles,
        "dearest": found.dearest,
        "turning": found.turning,
        "loops": found.loops,
        "kernels": found.kernels,
        "collectives": {name: {"count": n, "bytes": size} for name, (n, size) in sorted(found.collectives.items())},
    }
