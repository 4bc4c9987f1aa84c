"""One configuration for every backend: frozen dataclasses read from TOML and flags. engine.resolve decides the rest."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from engine.checks import address, checked, fail, flag, ladder, one_of, or_auto, portion, text, whole
from engine.errors import ConfigError
from engine.mesh import MeshSpec
from engine.model.spec import EIGHT

BACKENDS = ("auto", "jax", "torch", "reference")
PLATFORMS = ("auto", "cpu", "gpu", "tpu")
DTYPES = ("auto", "float32", "bfloat16")
CACHES = (*DTYPES, *EIGHT)
QUANTISE = ("auto", "none", "int8", "fp8", "fp8-row")
ACTIVATIONS = ("auto", "wide", "fp8")
POLICIES = ("lpm", "fcfs", "dfs-weight")
EVICTIONS = ("lru", "lfu", "slru", "priority")
STACKS = ("auto", "scan", "list")
WEIGHTS = ("checkpoint", "dummy")
GRAPHS = ("auto", "on", "off")
CASCADES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What was decided. Backends and scheduler read this and nothing else; `resolve` makes it, with its decisions.

    backend: "jax", "torch" or "reference". platform: "cpu", "gpu" or "tpu". dtype: of weights and activations;
    cache_dtype: of keys and values ("float32", "bfloat16", "int8" or "fp8"). scales: file of a calibration that a cache
    of 8 bits has its scales from, "" = the checkpoint's. quantise: what the layers' matrices are kept in, "none",
    "int8", "fp8" or "fp8-row" (engine.model.quant); activations: "wide", or "fp8" where many rows are multiplied with
    those. page: tokens per page; pages: pages of each cache group.
    max_len: positions a request may reach. slots: requests on the device at once; max_rows, max_tokens: of one step.
    token_buckets: ladder that steps are padded to, last = max_tokens. edits: page-table edits of one step, 0 = what a
    whole table and the growth of its rows need (a backend within another is told).
    depth: steps in flight. radix: prefix cache on.
    policy, priority_preemption, ageing: of those that wait (engine.sched.scheduler.Scheduler).
    eviction: what of it goes first. events: address where its events are published, replay: where they can be had
    again; "" is none.
    deterministic: what a request gets never depends on what else runs, to the bit.
    penalties: counts for penalties are kept on the device. max_logprobs: alternatives that a token may be asked for.
    mesh: devices along each axis; devices: CPU devices that jax makes, where it runs on a CPU.
    stack: "scan" or "list", how the jax backend runs layers. programs: folder for compiled programs, "" = none. bundle:
    folder of a bundle of them to start from, "" = none. ready_early: ready with the smallest steps, larger ones follow.
    cascade: "auto", "on" or "off": whether torch reads once what rows share.
    log: file that the sizes of steps are written to, "" = none. graphs: "whole" or "pieces", how torch captures small
    steps on a GPU; "" = not.
    """

    backend: str
    platform: str
    dtype: str
    cache_dtype: str
    max_len: int
    pages: tuple[int, ...]
    page: int = 16
    slots: int = 32
    max_rows: int = 32
    max_tokens: int = 512
    token_buckets: tuple[int, ...] = (1, 8, 32, 128, 512)
    edits: int = 0
    depth: int = 2
    radix: bool = True
    scales: str = ""
    eviction: str = "lru"
    events: str = ""
    replay: str = ""
    policy: str = "lpm"
    priority_preemption: int = 10
    ageing: int = 30
    penalties: bool = True
    max_logprobs: int = 20
    mesh: MeshSpec = field(default_factory=MeshSpec)
    devices: int = 1
    deterministic: bool = False
    quantise: str = "none"
    activations: str = "wide"
    stack: str = "list"
    programs: str = ""
    bundle: str = ""
    cascade: str = "off"
    ready_early: bool = False
    log: str = ""
    graphs: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """path: a model's folder; None is the demo model that comes with the package. dtype: of weights and activations.
    quantise: the matrices of attention and feed-forward in 8 bits: "int8" or "fp8-row", with a scale for each output,
    or "fp8", with one for each 128 x 128; "none": as wide as activations; "auto": as the checkpoint has them.
    activations: what many rows are multiplied with fp8 matrices in, on a GPU that has it: "fp8", or "wide", as they
    are. max_len: positions (prompt and answer) a request may reach. weights: "checkpoint", or "dummy" random ones, for
    which config.json is enough."""

    path: str | None = checked(text, None)
    dtype: str = checked(one_of(DTYPES), "auto")
    quantise: str = checked(one_of(QUANTISE), "auto")
    activations: str = checked(one_of(ACTIVATIONS), "auto")
    max_len: int | None = checked(or_auto(whole(2)), None)
    weights: str = checked(one_of(WEIGHTS), "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Devices along each axis, as engine.mesh.MeshSpec has them."""

    dp: int = checked(whole(1), 1)
    pp: int = checked(whole(1), 1)
    tp: int = checked(whole(1), 1)
    ep: int = checked(whole(1), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """tokens: positions that the pool of pages holds. fraction: share of the device's free memory that weights and
    cache may take, where tokens is not given. page: tokens per page. dtype: of keys and values; "int8" and "fp8" have
    scales: file of `radixmesh calibrate`, or "auto", the checkpoint's or 1 (engine.model.scales). radix: keep prefixes.
    eviction: what goes first when pages are short, in the order of: last use; uses, last use; used once, last use;
    priority of the requests, last use. events: ZeroMQ address where what is cached is told (engine.run.events), replay:
    where it can be had again; "auto" is none.
    """

    tokens: int | None = checked(or_auto(whole(1)), None)
    fraction: float | None = checked(or_auto(portion), None)
    page: int | None = checked(or_auto(whole(1, 128)), None)
    dtype: str = checked(one_of(CACHES), "auto")
    scales: str | None = checked(or_auto(text), None)
    radix: bool = checked(flag, True)
    eviction: str = checked(one_of(EVICTIONS), "lru")
    events: str | None = checked(or_auto(address), None)
    replay: str | None = checked(or_auto(address), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sched:
    """slots: requests on the device at once. max_rows, max_tokens: of one step. token_buckets: the sizes that steps are
    padded to. depth: steps in flight. policy: order of waiting requests of one priority: longest cached prefix,
    arrival, or heaviest branch of the tree of prompts. priority_preemption: by how much a request's priority must be
    above a running one's to take its seat, 0 is never. ageing: seconds of waiting that count as one priority, or 0.
    penalties: keep their counts, one number a slot and token, on the device. max_logprobs: alternatives that a token
    may be asked for; 0: logprobs are refused. ready_early: be ready with small steps, while the programs of larger ones
    are made. log: file that the sizes of steps are appended to; "auto" is none.
    """

    slots: int | None = checked(or_auto(whole(1, 65536)), None)
    max_rows: int | None = checked(or_auto(whole(1, 65536)), None)
    max_tokens: int | None = checked(or_auto(whole(1, 1 << 20)), None)
    token_buckets: tuple[int, ...] | None = checked(or_auto(ladder), None)
    depth: int | None = checked(or_auto(whole(1, 8)), None)
    policy: str = checked(one_of(POLICIES), "lpm")
    priority_preemption: int = checked(whole(0), 10)
    ageing: int = checked(whole(0), 30)
    penalties: bool = checked(flag, True)
    max_logprobs: int = checked(whole(0, 1024), 20)
    ready_early: bool = checked(flag, False)
    log: str | None = checked(or_auto(text), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """The network faces.

    host, port: of HTTP; grpc_port: of gRPC, "auto" is off. name: of the model, as clients say it; "auto" is its
    folder's. api_key: what every route but the documented few wants; "auto" is none. queue, queue_tokens: requests that
    may wait, and tokens of their prompts: beyond, 503. body: bytes of a request. n: answers to one prompt. drain:
    seconds that open requests get after SIGTERM. watchdog: seconds after which a step counts as stuck.
    """

    host: str = checked(text, "127.0.0.1")
    port: int = checked(whole(0, 65535), 30000)
    grpc_port: int | None = checked(or_auto(whole(0, 65535)), None)
    name: str | None = checked(or_auto(text), None)
    api_key: str | None = checked(or_auto(text), None)
    queue: int = checked(whole(1), 1024)
    queue_tokens: int = checked(whole(1), 1 << 22)
    body: int = checked(whole(1024), 8 << 20)
    n: int = checked(whole(1, 1024), 64)
    drain: int = checked(whole(0, 86400), 30)
    watchdog: int = checked(whole(1, 86400), 300)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jax:
    """stack: "scan" over stacked layers or a "list" of layers, unrolled. cache: folder that keeps compiled programs
    from one start to the next; "auto" is one below the user's cache folder, "off" is none. bundle: folder of a bundle
    to start from (`radixmesh compile --bundle`); "auto" is none. devices: that a CPU is cut into, so that meshes can be
    tried without accelerators; "auto" is what the mesh needs."""

    stack: str = checked(one_of(STACKS), "auto")
    cache: str = checked(text, "auto")
    bundle: str | None = checked(or_auto(text), None)
    devices: int | None = checked(or_auto(whole(1, 64)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """graphs: "auto" captures small steps on a GPU at warm-up, to be replayed, where they can be captured whole; "on"
    also in pieces, between what can't be: attention over gathered pages, experts that wait for their router; "off"
    runs every step call by call.
    cascade: rows whose prompts begin alike read what they share once for all: "auto" on a GPU where it pays, "on"
    whatever it costs and on a CPU too, "off" never."""

    graphs: str = checked(one_of(GRAPHS), "auto")
    cascade: str = checked(one_of(CASCADES), "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """name: which backend; "auto" is torch on NVIDIA and AMD GPUs, jax on TPUs and CPUs. platform: on what it runs.
    deterministic: the same bits for a request whatever else runs, cold or warm, in chunks of any size."""

    name: str = checked(one_of(BACKENDS), "auto")
    platform: str = checked(one_of(PLATFORMS), "auto")
    deterministic: bool = checked(flag, False)
    jax: Jax = field(default_factory=Jax)
    torch: Torch = field(default_factory=Torch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What was asked: one table a room. None and "auto" are decided by `engine.resolve`."""

    model: Model = field(default_factory=Model)
    mesh: Mesh = field(default_factory=Mesh)
    cache: Cache = field(default_factory=Cache)
    sched: Sched = field(default_factory=Sched)
    serve: Serve = field(default_factory=Serve)
    backend: Backend = field(default_factory=Backend)


TABLES: Mapping[str, type] = {
    "": Config,
    "model": Model,
    "mesh": Mesh,
    "cache": Cache,
    "sched": Sched,
    "serve": Serve,
    "backend": Backend,
    "backend.jax": Jax,
    "backend.torch": Torch,
}
"""Dotted name of a table -> its class."""

SHORT: Mapping[str, str] = {"model": "model.path", "backend": "backend.name", "dtype": "model.dtype"}
"""Flat names that could mean more than one key."""


def keys() -> Iterator[str]:
    """Every key, dotted."""
    for name, table in TABLES.items():
        for f in fields(table):
            if "check" in f.metadata:
                yield f"{name}.{f.name}"


def dotted(name: str) -> str:
    """The key that a flat name means: "cache.page", "cache_page", or "page" where no other table has it.

    Raises ConfigError with the nearest name.
    """
    if name in SHORT:
        return SHORT[name]
    known = list(keys())
    for key in known:
        if name in (key, key.replace(".", "_")):
            return key
    short = [key for key in known if key.rpartition(".")[2] == name]
    if len(short) == 1:
        return short[0]
    if short:
        raise fail(name, f"could mean {' or '.join(short)}; write one of them")
    flat = {alias: alias for alias in (*SHORT, "mesh", *known)} | {k.rpartition(".")[2]: k for k in known}
    raise fail(name, f"unknown key{_nearest(name, flat)}")


def load(file: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a TOML file, if one is given, with flags over it.

    overrides: flat or dotted names (see `dotted`) and "mesh" as in MeshSpec.parse; None means not given.
    Raises ConfigError: a file that can't be read, an unknown key with the nearest name, a wrong type or range.
    """
    tree = read(Path(file)) if file is not None else {}
    for name, value in (overrides or {}).items():
        if value is None:
            continue
        if name == "mesh":
            sizes = MeshSpec.parse(text("mesh", value)) if value else MeshSpec()
            for f in fields(Mesh):
                tree = _put(tree, ("mesh", f.name), getattr(sizes, f.name))
        else:
            tree = _put(tree, tuple(dotted(name).split(".")), value)
    config: Config = _build(tree, "")
    return config


def read(file: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError naming the file."""
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(
            f"config {file}: {error.strerror}; give a TOML file that can be read", field="config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {file}: not valid TOML: {error}", field="config") from error


def _put(tree: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of the tree with one more value."""
    first, *rest = path
    if not rest:
        return {**tree, first: value}
    inner = tree.get(first, {})
    return {**tree, first: _put(inner if isinstance(inner, Mapping) else {}, tuple(rest), value)}


def _build(tree: Any, name: str) -> Any:
    """The dataclass of the table `name`, from what TOML or flags say."""
    if not isinstance(tree, Mapping):
        raise fail(name, f"must be a table, [{name}], not {tree!r}")
    table, values = TABLES[name], {}
    for key, value in tree.items():
        full = f"{name}.{key}" if name else str(key)
        known = next((f for f in fields(table) if f.name == key), None)
        if known is None:
            raise fail(full, f"unknown key{_hint(name, str(key))}")
        values[key] = known.metadata["check"](full, value) if "check" in known.metadata else _build(value, full)
    return table(**values)


def _hint(table: str, key: str) -> str:
    """What an unknown key of a table should have been."""
    elsewhere = [k for k in keys() if k.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    own = {f.name: f"{table}.{f.name}" if table else f"[{f.name}]" for f in fields(TABLES[table])}
    return _nearest(key, own or {k: k for k in keys()})


def _nearest(name: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {known[near[0]]}?" if near else f"; known are {', '.join(dict.fromkeys(known.values()))}"


def show(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration with its value, dotted."""
    for f in fields(config):
        value, full = getattr(config, f.name), f"{name}.{f.name}" if name else f.name
        if is_dataclass(value):
            yield from show(value, full)
        else:
            yield full, value
