"""One configuration for every backend: frozen dataclasses read from TOML and flags. engine.resolve decides the rest."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from engine.errors import ConfigError
from engine.mesh import MeshSpec
from engine.model.spec import EIGHT

Check: TypeAlias = Callable[[str, Any], Any]
"""(key, value) -> the value as it is kept. Raises ConfigError naming the key."""

MOST = 2**31 - 1
MOST_BUCKETS = 12
"""Sizes that steps are padded to: each is a program."""
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
GRAPHS = ("auto", "off")
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
    token_buckets: ladder that steps are padded to, last = max_tokens. depth: steps in flight. radix: prefix cache on.
    policy, priority_preemption, ageing: of those that wait (engine.sched.scheduler.Scheduler).
    eviction: what of it goes first. events: address where its events are published, replay: where they can be had
    again; "" is none.
    deterministic: what a request gets never depends on what else runs, to the bit.
    penalties: counts for penalties are kept on the device. max_logprobs: alternatives that a token may be asked for.
    mesh: devices along each axis; devices: CPU devices that jax makes, where it runs on a CPU.
    stack: "scan" or "list", how the jax backend runs layers. programs: folder for compiled programs, "" = none. bundle:
    folder of a bundle of them to start from, "" = none. ready_early: ready with the smallest steps, larger ones follow.
    cascade: "auto", "on" or "off": whether torch reads once what rows share.
    log: file that the sizes of steps are written to, "" = none. graphs: torch captures small steps on a GPU.
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
    graphs: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _fail(key: str, what: str) -> ConfigError:
    return ConfigError(f"{key}: {what}", field=key)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _fail(key, f"must be a string, not {value!r}")
    return value


def _address(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.startswith(("tcp://", "ipc://")):
        raise _fail(key, f'must be an address such as "tcp://127.0.0.1:5557" or "ipc:///tmp/events", not {value!r}')
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _fail(key, f"must be true or false, not {value!r}")
    return value


def _whole(low: int, high: int = MOST) -> Check:
    def check(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _fail(key, f"must be an integer, not {value!r}")
        if not low <= value <= high:
            raise _fail(key, f"must be between {low} and {high}, not {value}")
        return value

    return check


def _share(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _fail(key, f"must be a number, not {value!r}")
    if not 0 < value <= 1:
        raise _fail(key, f"must be above 0 and at most 1, not {value:g}")
    return float(value)


def _one_of(names: tuple[str, ...]) -> Check:
    def check(key: str, value: Any) -> str:
        if value in names:
            return str(value)
        near = difflib.get_close_matches(str(value), names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise _fail(key, f"must be one of {', '.join(names)}, not {value!r}{hint}")

    return check


def _ladder(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise _fail(key, f"must be a list of integers, not {value!r}")
    steps = tuple(_whole(1)(key, v) for v in value)
    if any(a >= b for a, b in pairwise(steps)):
        raise _fail(key, f"must rise, not {list(steps)}")
    if len(steps) > MOST_BUCKETS:
        raise _fail(key, f"at most {MOST_BUCKETS} sizes, not {len(steps)}; radixmesh buckets chooses them from a log")
    return steps


def _or_auto(check: Check) -> Check:
    """A key that is decided when it is left out or "auto"."""
    return lambda key, value: None if value == "auto" else check(key, value)


def _key(check: Check, default: Any) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """path: a model's folder; None is the demo model that comes with the package. dtype: of weights and activations.
    quantise: the matrices of attention and feed-forward in 8 bits: "int8" or "fp8-row", with a scale for each output,
    or "fp8", with one for each 128 x 128; "none": as wide as activations; "auto": as the checkpoint has them.
    activations: what many rows are multiplied with fp8 matrices in, on a GPU that has it: "fp8", or "wide", as they
    are. max_len: positions (prompt and answer) a request may reach. weights: "checkpoint", or "dummy" random ones, for
    which config.json is enough."""

    path: str | None = _key(_text, None)
    dtype: str = _key(_one_of(DTYPES), "auto")
    quantise: str = _key(_one_of(QUANTISE), "auto")
    activations: str = _key(_one_of(ACTIVATIONS), "auto")
    max_len: int | None = _key(_or_auto(_whole(2)), None)
    weights: str = _key(_one_of(WEIGHTS), "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Devices along each axis, as engine.mesh.MeshSpec has them."""

    dp: int = _key(_whole(1), 1)
    pp: int = _key(_whole(1), 1)
    tp: int = _key(_whole(1), 1)
    ep: int = _key(_whole(1), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """tokens: positions that the pool of pages holds. fraction: share of the device's free memory that weights and
    cache may take, where tokens is not given. page: tokens per page. dtype: of keys and values; "int8" and "fp8" have
    scales: file of `radixmesh calibrate`, or "auto", the checkpoint's or 1 (engine.model.scales). radix: keep prefixes.
    eviction: what goes first when pages are short, in the order of: last use; uses, last use; used once, last use;
    priority of the requests, last use. events: ZeroMQ address where what is cached is told (engine.run.events), replay:
    where it can be had again; "auto" is none.
    """

    tokens: int | None = _key(_or_auto(_whole(1)), None)
    fraction: float | None = _key(_or_auto(_share), None)
    page: int | None = _key(_or_auto(_whole(1, 128)), None)
    dtype: str = _key(_one_of(CACHES), "auto")
    scales: str | None = _key(_or_auto(_text), None)
    radix: bool = _key(_flag, True)
    eviction: str = _key(_one_of(EVICTIONS), "lru")
    events: str | None = _key(_or_auto(_address), None)
    replay: str | None = _key(_or_auto(_address), None)


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

    slots: int | None = _key(_or_auto(_whole(1, 65536)), None)
    max_rows: int | None = _key(_or_auto(_whole(1, 65536)), None)
    max_tokens: int | None = _key(_or_auto(_whole(1, 1 << 20)), None)
    token_buckets: tuple[int, ...] | None = _key(_or_auto(_ladder), None)
    depth: int | None = _key(_or_auto(_whole(1, 8)), None)
    policy: str = _key(_one_of(POLICIES), "lpm")
    priority_preemption: int = _key(_whole(0), 10)
    ageing: int = _key(_whole(0), 30)
    penalties: bool = _key(_flag, True)
    max_logprobs: int = _key(_whole(0, 1024), 20)
    ready_early: bool = _key(_flag, False)
    log: str | None = _key(_or_auto(_text), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """The network faces.

    host, port: of HTTP; grpc_port: of gRPC, "auto" is off. name: of the model, as clients say it; "auto" is its
    folder's. api_key: what every route but the documented few wants; "auto" is none. queue, queue_tokens: requests that
    may wait, and tokens of their prompts: beyond, 503. body: bytes of a request. n: answers to one prompt. drain:
    seconds that open requests get after SIGTERM. watchdog: seconds after which a step counts as stuck.
    """

    host: str = _key(_text, "127.0.0.1")
    port: int = _key(_whole(0, 65535), 30000)
    grpc_port: int | None = _key(_or_auto(_whole(0, 65535)), None)
    name: str | None = _key(_or_auto(_text), None)
    api_key: str | None = _key(_or_auto(_text), None)
    queue: int = _key(_whole(1), 1024)
    queue_tokens: int = _key(_whole(1), 1 << 22)
    body: int = _key(_whole(1024), 8 << 20)
    n: int = _key(_whole(1, 1024), 64)
    drain: int = _key(_whole(0, 86400), 30)
    watchdog: int = _key(_whole(1, 86400), 300)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jax:
    """stack: "scan" over stacked layers or a "list" of layers, unrolled. cache: folder that keeps compiled programs
    from one start to the next; "auto" is one below the user's cache folder, "off" is none. bundle: folder of a bundle
    to start from (`radixmesh compile --bundle`); "auto" is none. devices: that a CPU is cut into, so that meshes can be
    tried without accelerators; "auto" is what the mesh needs."""

    stack: str = _key(_one_of(STACKS), "auto")
    cache: str = _key(_text, "auto")
    bundle: str | None = _key(_or_auto(_text), None)
    devices: int | None = _key(_or_auto(_whole(1, 64)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """graphs: "auto" captures small steps on a GPU at warm-up, to be replayed; "off" runs every step call by call.
    cascade: rows whose prompts begin alike read what they share once for all: "auto" on a GPU where it pays, "on"
    whatever it costs and on a CPU too, "off" never."""

    graphs: str = _key(_one_of(GRAPHS), "auto")
    cascade: str = _key(_one_of(CASCADES), "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """name: which backend; "auto" is torch on NVIDIA and AMD GPUs, jax on TPUs and CPUs. platform: on what it runs.
    deterministic: the same bits for a request whatever else runs, cold or warm, in chunks of any size."""

    name: str = _key(_one_of(BACKENDS), "auto")
    platform: str = _key(_one_of(PLATFORMS), "auto")
    deterministic: bool = _key(_flag, False)
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
        raise _fail(name, f"could mean {' or '.join(short)}; write one of them")
    flat = {alias: alias for alias in (*SHORT, "mesh", *known)} | {k.rpartition(".")[2]: k for k in known}
    raise _fail(name, f"unknown key{_nearest(name, flat)}")


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
            sizes = MeshSpec.parse(_text("mesh", value)) if value else MeshSpec()
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
        raise _fail(name, f"must be a table, [{name}], not {tree!r}")
    table, values = TABLES[name], {}
    for key, value in tree.items():
        full = f"{name}.{key}" if name else str(key)
        known = next((f for f in fields(table) if f.name == key), None)
        if known is None:
            raise _fail(full, f"unknown key{_hint(name, str(key))}")
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
