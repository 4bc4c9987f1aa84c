"""From what was asked and what the device is to what is done: every decision with its reason, before any allocation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import Config, Resolved
from engine.errors import ConfigError
from engine.mesh import AXES, MeshSpec, shard_shape, share
from engine.model.groups import ITEMSIZE, CacheGroup, cache_groups
from engine.model.narrow import stored_as
from engine.model.params import params
from engine.model.quant import BY, local_bytes
from engine.model.spec import EIGHT, Experts, Layer, ModelSpec, eight

GIB = 1 << 30
SHARE = {"cpu": 0.25, "gpu": 0.85, "tpu": 0.85}
"""Of the free memory, what weights and cache take where cache.fraction is not given; on a CPU what the cache takes."""
CPU_CACHE = GIB
"""A CPU's cache takes no more, unless asked."""
SPARE = 4
"""The cache holds at most so many times what the slots can fill: prefixes of requests that ended."""
PAGES, TABLES = (16, 32, 64, 128), 896 << 10
"""Tokens of a page to choose from, and bytes that page tables may take of a TPU's scalar memory."""
STEP = {
    "cpu": (8, 256, (1, 8, 64)),
    "gpu": (256, 8192, (1, 8, 32, 64, 128, 512, 2048)),
    "tpu": (128, 2048, (8, 32, 128, 512)),
}
"""Platform -> slots, tokens of a step, and the sizes below it that steps are padded to. Each size is a program that jax
compiles before it is ready: some 5 s of a CPU's time each."""

LANES = 128
"""Numbers of a line of a TPU's registers."""
CAPTURED = (512, 256 << 20, 16 << 20)
"""Tokens of the largest step that is captured; bytes that captures take of their own, in all and for each layer."""
COPIED = ("TPU7x",)
"""Kinds of TPUs that copy stacked bfloat16 weights (docs/decisions/0017-compiled-without-the-chip.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Facts of the device that a backend would run on; `backends.probe` finds them.

    backend, why: the backend that was chosen, and why. platform: "cpu", "gpu" or "tpu". kind: the device's name.
    memory_bytes: free memory of one device. bf16: whether it has bfloat16 instructions.
    """

    backend: str
    why: str
    platform: str
    kind: str
    count: int
    memory_bytes: int
    bf16: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One field of Resolved, its value, and why."""

    field: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device: weights, the cache of each group, the counts of penalties, and what captured steps take at
    most."""

    weights: int
    cache: tuple[int, ...]
    counts: int
    graphs: int = 0

    @property
    def total(self) -> int:
        return self.weights + sum(self.cache) + self.counts + self.graphs


def resolve(config: Config, spec: ModelSpec, device: Device) -> tuple[Resolved, list[Decision]]:
    """Decide every field of Resolved. Raises ConfigError naming the key that can't be honoured."""
    mesh = MeshSpec(**{axis: getattr(config.mesh, axis) for axis in AXES})
    check_mesh(mesh, spec, device)
    if device.platform == "cpu":  # whose devices are threads or processes that share its memory
        device = replace(device, memory_bytes=device.memory_bytes // mesh.size)
    quantised = _quantise(config, spec, mesh, device)
    made: list[Decision] = [
        Decision(field="backend", value=device.backend, why=device.why),
        Decision(
            field="platform",
            value=device.platform,
            why=f"{device.count} x {device.kind}, {device.memory_bytes / GIB:.1f} GiB free"
            + (" for each device" if mesh.size > 1 else ""),
        ),
        Decision(field="mesh", value=mesh, why=_split(mesh, spec, device)),
        _devices(config, mesh, device),
        *_dtypes(config, spec, device),
        _scales(config, device),
        _unaligned(quantised, spec, mesh, device),
        _activations(config, quantised.value, device),
        *_steps(config, device),
    ]
    values = {d.field: d.value for d in made}
    made.append(_page(config, spec, device, values["max_rows"]))
    values["page"] = made[-1].value
    groups = local_groups(spec, values["page"], mesh)
    quantise = values["quantise"] if device.backend != "reference" else "none"
    weights = weight_bytes(eight(spec, values["cache_dtype"]), values["dtype"], mesh, quantise)
    weights += count_bytes(spec, config.sched.penalties, values["slots"])
    made += _lengths(config, spec, device, groups, weights, values)
    made += [
        Decision(field="radix", value=config.cache.radix, why="cache.radix"),
        Decision(field="eviction", value=config.cache.eviction, why="cache.eviction"),
        *_events(config),
        Decision(field="policy", value=config.sched.policy, why="sched.policy"),
        Decision(field="deterministic", value=config.backend.deterministic, why="backend.deterministic"),
        Decision(field="penalties", value=config.sched.penalties, why="sched.penalties"),
        Decision(field="max_logprobs", value=min(config.sched.max_logprobs, spec.vocab), why="sched.max_logprobs"),
        Decision(field="priority_preemption", value=config.sched.priority_preemption, why="sched.priority_preemption"),
        Decision(field="ageing", value=config.sched.ageing, why="sched.ageing"),
        _stack(config, device, values["dtype"], values["quantise"]),
        _programs(config),
        Decision(
            field="bundle",
            value=config.backend.jax.bundle or "",
            why="backend.jax.bundle" if config.backend.jax.bundle else "auto: programs are compiled",
        ),
        _early(config, device),
        _graphs(config, spec, device, mesh),
        _cascade(config, spec, device),
        Decision(field="log", value=config.sched.log or "", why="sched.log" if config.sched.log else "auto: none"),
    ]
    return Resolved(**{d.field: d.value for d in made}), made


def weight_bytes(spec: ModelSpec, dtype: str, mesh: MeshSpec, quantise: str = "none") -> int:
    """Bytes of all parameters on one device, with the scales of those that are quantised."""
    return sum(local_bytes(p, quantise, mesh, ITEMSIZE[dtype]) for p in params(spec).values())


def count_bytes(spec: ModelSpec, penalties: bool, slots: int) -> int:
    """Bytes of the counts of penalties on one device: int32 for each token of the vocabulary and slot, and a slot that
    padding writes to."""
    return 4 * (slots + 1) * spec.vocab if penalties else 0


def local_groups(spec: ModelSpec, page: int, mesh: MeshSpec) -> tuple[CacheGroup, ...]:
    """The cache groups of a model with the heads that one device holds."""
    groups = cache_groups(spec, page)
    return tuple(replace(g, kv_heads=share(g.kv_heads, "kv_heads", mesh)) for g in groups)


def plan_memory(spec: ModelSpec, resolved: Resolved) -> Memory:
    """What weights and cache take on one device."""
    groups = local_groups(spec, resolved.page, resolved.mesh)
    quantise = resolved.quantise if resolved.backend != "reference" else "none"
    return Memory(
        weights=weight_bytes(eight(spec, resolved.cache_dtype), resolved.dtype, resolved.mesh, quantise),
        cache=tuple(n * g.page_bytes(resolved.cache_dtype) for n, g in zip(resolved.pages, groups, strict=True)),
        counts=count_bytes(spec, resolved.penalties, resolved.slots),
        graphs=graph_bytes(spec, resolved),
    )


def graph_bytes(spec: ModelSpec, resolved: Resolved) -> int:
    """What captured steps may take of a device: logits twice, what stands between the operations of the largest, and
    each capture's own. Capturing stops there."""
    if not resolved.graphs:
        return 0
    tokens = max(CAPTURED[0], resolved.max_rows)
    width = max(
        6 * spec.hidden + layer.mixer.head_dim * (layer.mixer.q_heads + 2 * layer.mixer.kv_heads) + _inside(spec, layer)
        for layer in spec.layers
    )
    between = 4 * tokens * width * ITEMSIZE[resolved.dtype]
    return 8 * resolved.max_rows * spec.vocab + between + CAPTURED[1] + CAPTURED[2] * len(spec.layers)


def _inside(spec: ModelSpec, layer: Layer) -> int:
    """Numbers of a token inside of a layer's feed-forward; each expert that it goes through gives some."""
    feed = layer.feed
    return feed.top_k * (feed.size + spec.hidden) if isinstance(feed, Experts) else 3 * feed.size


def check_mesh(mesh: MeshSpec, spec: ModelSpec, device: Device) -> None:
    """Refuse a mesh by name: an axis that is not built, devices that aren't there, a dimension that is not divided."""
    for axis in AXES:
        if axis != "tp" and getattr(mesh, axis) > 1:
            raise ConfigError(
                f"mesh: {axis}={getattr(mesh, axis)} is not built yet; only tp is, on one host", field="mesh"
            )
    if mesh.size > 1 and device.backend == "reference":
        raise ConfigError(f"mesh: the reference backend runs on one device, not {mesh}", field="mesh")
    if device.platform != "cpu" and mesh.size > device.count:
        raise ConfigError(
            f"mesh: {mesh} needs {mesh.size} devices, this host has {device.count} x {device.kind}", field="mesh"
        )
    for p in params(spec).values():
        try:
            shard_shape(p.shape, p.axes, mesh)
        except ConfigError as error:
            raise ConfigError(f"{error} (parameter {p.name} of this model)", field="mesh") from error


def _split(mesh: MeshSpec, spec: ModelSpec, device: Device) -> str:
    """What a mesh does to a model, in words."""
    if mesh.size == 1:
        return "one device"
    heads = {layer.mixer.kv_heads for layer in spec.layers}
    repeated = sorted(n for n in heads if n < mesh.tp)
    said = [f"query heads, feed-forward and vocabulary in {mesh.tp} parts"]
    if repeated:
        said.append(f"each kv head on {mesh.tp // repeated[0]} devices")
    if spec.vocab % mesh.tp:
        said.append(f"the vocabulary of {spec.vocab} padded")
    return ", ".join([*said, "a process each" if device.backend == "torch" else "one process"])


def _devices(config: Config, mesh: MeshSpec, device: Device) -> Decision:
    """CPU devices that jax is to make."""
    asked = config.backend.jax.devices
    if (device.backend, device.platform) != ("jax", "cpu") or asked is None:
        return Decision(field="devices", value=mesh.size, why="as the mesh needs")
    if asked < mesh.size:
        raise ConfigError(
            f"backend.jax.devices: {asked} is less than the {mesh.size} of {mesh}", field="backend.jax.devices"
        )
    return Decision(field="devices", value=asked, why="backend.jax.devices")


def _dtypes(config: Config, spec: ModelSpec, device: Device) -> list[Decision]:
    asked, cache = config.model.dtype, config.cache.dtype
    if asked != "auto":
        dtype, why = asked, "model.dtype"
    elif spec.dtype == "float32":
        dtype, why = "float32", "the checkpoint's"
    elif device.platform == "cpu":
        dtype, why = "float32", f"{spec.dtype} in the checkpoint; on a CPU float32 is exact, the same on every backend"
    elif not device.bf16:
        dtype, why = "float32", f"{device.kind} has no bfloat16"
    elif spec.dtype == "bfloat16":
        dtype, why = "bfloat16", "the checkpoint's"
    else:
        dtype, why = "bfloat16", f"{spec.dtype} in the checkpoint, which is not built: the same size, wider range"
    if cache == "auto":
        return [
            Decision(field="dtype", value=dtype, why=why),
            Decision(field="cache_dtype", value=dtype, why="as the weights"),
        ]
    return [
        Decision(field="dtype", value=dtype, why=why),
        Decision(field="cache_dtype", value=cache, why="cache.dtype" + (": 1 byte a number" if cache in EIGHT else "")),
    ]


def _scales(config: Config, device: Device) -> Decision:
    """Where a cache of 8 bits has its scales from."""
    asked, dtype = config.cache.scales, config.cache.dtype
    if dtype not in EIGHT:
        if asked is not None:
            raise ConfigError(
                f"cache.scales: a cache has scales in {' or '.join(EIGHT)}; set cache.dtype, or leave it out",
                field="cache.scales",
            )
        return Decision(field="scales", value="", why="none: keys and values are kept as they are")
    if asked is not None:
        return Decision(field="scales", value=asked, why="cache.scales: the largest of each layer and head")
    if config.model.weights == "dummy":
        return Decision(field="scales", value="", why="auto: dummy weights have one that suits them")
    if dtype == "int8":
        raise ConfigError(
            "cache.scales: int8 needs the largest key and value of each layer and head: radixmesh calibrate "
            "--model DIR --out FILE, then cache.scales = FILE; or use fp8",
            field="cache.scales",
        )
    return Decision(field="scales", value="", why="auto: the checkpoint's, 1 where it has none")


def _quantise(config: Config, spec: ModelSpec, mesh: MeshSpec, device: Device) -> Decision:
    """Which numbers the layers' matrices are kept in."""
    asked = config.model.quantise
    kind = stored_as(spec.narrow) if asked == "auto" and spec.narrow else "none" if asked == "auto" else asked
    why = "model.quantise" if asked != "auto" else "auto, as in the checkpoint" if spec.narrow else "auto"
    if kind != "none" and asked == "auto":
        try:
            weight_bytes(spec, "bfloat16", mesh, kind)
        except ConfigError:  # which a narrower mesh would not need
            return Decision(field="quantise", value="none", why=f"auto: {mesh} would cut blocks apart")
    if kind == "none":
        return Decision(field="quantise", value="none", why=f"{why}: as wide as activations")
    each = "output" if BY[kind] == "row" else "128 x 128"
    why += f": matrices of attention and feed-forward, a scale for each {each}"
    if device.backend == "reference":
        why += "; the reference computes with what they stand for, in float32"
    return Decision(field="quantise", value=kind, why=why)


def _activations(config: Config, kind: str, device: Device) -> Decision:
    """What rows are multiplied with quantised matrices in."""
    asked = config.model.activations
    reasons = {
        f"matrices are {kind}": not kind.startswith("fp8"),
        f"{device.backend} on a {device.platform} widens": (device.backend, device.platform) != ("torch", "gpu"),
        "backend.deterministic": config.backend.deterministic,
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    if asked == "fp8" and why:
        raise ConfigError(f"model.activations = fp8: {why}; leave it out", field="model.activations")
    said = "auto" if asked == "auto" else "model.activations"
    if asked == "wide" or why:
        return Decision(field="activations", value="wide", why=said if asked == "wide" else f"auto: {why}")
    why = f"{said}: many rows times fp8 matrices, each row with a scale of its own, where the GPU multiplies fp8"
    return Decision(field="activations", value="fp8", why=why)


def _unaligned(made: Decision, spec: ModelSpec, mesh: MeshSpec, device: Device) -> Decision:
    """The same, which says of experts that no kernel of a TPU reads: models_jax/experts.py leaves them to XLA."""
    if device.backend != "jax" or device.platform != "tpu":
        return made
    experts = (p for p in params(spec).values() if p.axes[0] == "experts" and len(p.axes) == 3)
    odd = sorted({n for p in experts if (n := shard_shape(p.shape, p.axes, mesh)[-1]) % LANES})
    if not odd:
        return made
    why = (
        f"; experts of {' and '.join(map(str, odd))} inputs on a device, no multiple of {LANES}, are multiplied by XLA"
    )
    cost = "" if made.value == "none" else ", which widens them all in each step: a smaller mesh or none may be faster"
    return replace(made, why=made.why + why + cost)


def _steps(config: Config, device: Device) -> list[Decision]:
    """Sizes of a step: what was asked, else what suits the platform."""
    s, usual = config.sched, f"usual on a {device.platform}"
    slots, max_tokens, ladder = STEP[device.platform]
    out = [Decision(field="slots", value=s.slots or slots, why="sched.slots" if s.slots else usual)]
    slots = out[0].value
    if s.max_rows is not None and s.max_rows > slots:
        raise ConfigError(f"sched.max_rows: {s.max_rows} is more than the {slots} slots", field="sched.max_rows")
    rows = s.max_rows or slots
    out.append(Decision(field="max_rows", value=rows, why="sched.max_rows" if s.max_rows else "every slot in a step"))
    if s.max_tokens is not None and s.max_tokens < rows:
        raise ConfigError(
            f"sched.max_tokens: {s.max_tokens} is less than the {rows} rows of a step; raise it or lower sched.slots",
            field="sched.max_tokens",
        )
    tokens = s.max_tokens or max(max_tokens, rows)
    out.append(Decision(field="max_tokens", value=tokens, why="sched.max_tokens" if s.max_tokens else usual))
    if s.token_buckets is None:
        steps, why = tuple(sorted({b for b in (*ladder, rows) if b < tokens} | {tokens})), f"{usual}, with max_rows"
    elif s.token_buckets[-1] != tokens:
        raise ConfigError(
            f"sched.token_buckets: ends with {s.token_buckets[-1]}, but a step has up to {tokens} tokens; "
            f"end it with {tokens}, or set sched.max_tokens",
            field="sched.token_buckets",
        )
    else:
        steps, why = s.token_buckets, "sched.token_buckets"
    out.append(Decision(field="token_buckets", value=steps, why=why))
    why = "sched.depth" if s.depth else "the host plans a step while the device runs another"
    out.append(Decision(field="depth", value=s.depth or 2, why=why))
    return out


def _page(config: Config, spec: ModelSpec, device: Device, rows: int) -> Decision:
    """Tokens of a page. A TPU's attention keeps the page tables of a step in a memory that holds few numbers."""
    if config.cache.page is not None:
        return Decision(field="page", value=config.cache.page, why="cache.page")
    if device.platform != "tpu":
        return Decision(field="page", value=PAGES[0], why="auto: prefixes are shared in small pages")
    reach = min(config.model.max_len or spec.max_len, spec.max_len)
    sizes = [n for n in PAGES if n >= 32] if config.cache.dtype in EIGHT else PAGES  # as lines share a register
    size = next((n for n in sizes if 4 * rows * -(-reach // n) <= TABLES), PAGES[-1])
    why = f"page tables of {rows} rows of {reach} tokens are kept in {TABLES >> 10} KiB of a TPU"
    why += ", which moves 32 lines of 8 bits at once" if config.cache.dtype in EIGHT else ""
    return Decision(field="page", value=size, why=why)


def _lengths(
    config: Config,
    spec: ModelSpec,
    device: Device,
    groups: Sequence[CacheGroup],
    weights: int,
    values: dict[str, Any],
) -> list[Decision]:
    """max_len and pages: how far one request may reach, and how many tokens the cache holds. weights: bytes, with the
    counts of penalties."""
    page, asked = values["page"], config.model.max_len
    if asked is not None and asked > spec.max_len:
        raise ConfigError(
            f"model.max_len: {asked} is past the {spec.max_len} positions that the model was made for; lower it",
            field="model.max_len",
        )
    reach, why = asked or spec.max_len, "model.max_len" if asked else "the model's"
    costs = [g.page_bytes(values["cache_dtype"]) for g in groups]
    free = device.memory_bytes - weights
    tokens, reason = _tokens(config, device, reach, groups, costs, free, values)
    pages = _pages(tokens, groups, values)
    held = min((n * page for n, g in zip(pages, groups, strict=True) if not g.window), default=reach)
    if held < reach:
        if asked is not None:
            raise ConfigError(
                f"model.max_len: {asked} tokens do not fit the cache of {held}; lower it, or raise cache.tokens",
                field="model.max_len",
            )
        reach, why = held, f"what the cache holds; the model's is {spec.max_len}"
    need = sum(n * c for n, c in zip(pages, costs, strict=True))
    if need > free:
        raise ConfigError(
            f"cache.tokens: {weights / GIB:.2f} GiB of weights and counts and {need / GIB:.2f} GiB of cache do not fit "
            f"the {device.memory_bytes / GIB:.2f} GiB that are free; lower cache.tokens or model.max_len",
            field="cache.tokens",
        )
    return [
        Decision(field="max_len", value=reach, why=why),
        Decision(field="pages", value=pages, why=reason),
    ]


def _tokens(
    config: Config,
    device: Device,
    reach: int,
    groups: Sequence[CacheGroup],
    costs: Sequence[int],
    free: int,
    values: dict[str, Any],
) -> tuple[int, str]:
    """Tokens that the cache shall hold, and why. free: bytes that the weights leave."""
    asked, page = config.cache.tokens, values["page"]
    if asked is not None:
        return asked, "cache.tokens"
    portion = config.cache.fraction or SHARE[device.platform]
    weights = device.memory_bytes - free
    if device.platform == "cpu":
        limit = free if config.cache.fraction else CPU_CACHE // values["mesh"].size
        room = min(int(portion * free), limit)
        source = f"{room / GIB:.2f} GiB of the CPU's free memory"
    else:
        room = int(portion * device.memory_bytes) - weights
        source = f"{portion:.0%} of the free memory, less {weights / GIB:.2f} GiB of weights and counts"
    fixed = sum(c * n for c, n, g in zip(costs, _pages(1 << 40, groups, values), groups, strict=True) if g.window)
    each = sum(c for c, g in zip(costs, groups, strict=True) if not g.window)
    most = SPARE * values["slots"] * reach
    fits = max(0, room - fixed) // each * page if each else most
    if fits < page:
        raise ConfigError(
            f"cache.fraction: nothing is left for the cache: {room / GIB:.2f} GiB of {device.memory_bytes / GIB:.2f} "
            "GiB free; use a smaller model, or free memory",
            field="cache.fraction",
        )
    if fits < most:
        return fits, source
    return most, f"{SPARE} times what {values['slots']} slots of {reach} tokens can fill"


def _pages(tokens: int, groups: Sequence[CacheGroup], values: dict[str, Any]) -> tuple[int, ...]:
    """Pages of each group for `tokens` tokens. A window group needs no more than its slots can see, as much again for
    prefixes of requests that ended, and what the steps that are out feed."""
    out = []
    for g in groups:
        pages = -(-tokens // g.page)
        if g.window:
            seen = 2 * values["slots"] * (-(-g.window // g.page) + 2)
            pages = min(pages, seen + -(-values["depth"] * values["max_tokens"] // g.page))
        out.append(pages)
    return tuple(out)


def _events(config: Config) -> list[Decision]:
    cache = config.cache
    if cache.events is not None and not cache.radix:
        raise ConfigError("cache.events: there is nothing to tell without cache.radix", field="cache.events")
    if cache.replay is not None and cache.events is None:
        raise ConfigError("cache.replay: there is nothing to tell again without cache.events", field="cache.replay")
    return [
        Decision(field=name, value=getattr(cache, name) or "", why=f"cache.{name}" if getattr(cache, name) else "off")
        for name in ("events", "replay")
    ]


def _programs(config: Config) -> Decision:
    asked = config.backend.jax.cache
    if asked == "off":
        return Decision(field="programs", value="", why="backend.jax.cache")
    if asked != "auto":
        return Decision(field="programs", value=asked, why="backend.jax.cache")
    try:
        home = Path.home()
    except RuntimeError:
        return Decision(field="programs", value="", why="auto: the user has no home folder")
    return Decision(
        field="programs", value=str(home / ".cache" / "radixmesh" / "jax"), why="auto: the user's cache folder"
    )


def _early(config: Config, device: Device) -> Decision:
    """Whether only jax's first programs are waited for; the others have none to wait for."""
    asked = config.sched.ready_early
    if asked and device.backend != "jax":
        return Decision(field="ready_early", value=False, why=f"{device.backend} compiles no programs ahead")
    return Decision(field="ready_early", value=asked, why="sched.ready_early")


def _graphs(config: Config, spec: ModelSpec, device: Device, mesh: MeshSpec) -> Decision:
    """Whether torch captures small steps."""

    def no(why: str) -> Decision:
        return Decision(field="graphs", value=False, why=why)

    if (device.backend, device.platform) != ("torch", "gpu"):
        return no("only torch on a GPU has graphs to capture")
    if config.backend.torch.graphs == "off":
        return no("backend.torch.graphs")
    if config.backend.deterministic and any(layer.mixer.window for layer in spec.layers):
        return no("auto: deterministic attention over a window gathers its pages, call by call")
    if mesh.size > 1:
        return no("auto: steps over several devices are run call by call")
    return Decision(field="graphs", value=True, why="auto: steps of few tokens are captured at warm-up and replayed")


def _cascade(config: Config, spec: ModelSpec, device: Device) -> Decision:
    """Whether torch reads once, for all rows of a group, what their prompts have in common."""
    asked = config.backend.torch.cascade

    def no(why: str) -> Decision:
        if asked == "on":
            raise ConfigError(f'backend.torch.cascade: can\'t be "on": {why}', field="backend.torch.cascade")
        return Decision(field="cascade", value="off", why=f"auto: {why}")

    mixers = [layer.mixer for layer in spec.layers if layer.mixer.window is None]
    full = {mixer.q_heads // mixer.kv_heads for mixer in mixers}
    if device.backend != "torch":
        return Decision(field="cascade", value="off", why="only torch reads shared prefixes once for several rows")
    if asked == "off":
        return Decision(field="cascade", value="off", why="backend.torch.cascade")
    if config.backend.deterministic:
        return no("deterministic attention reduces over each row's own blocks")
    if len(full) != 1:
        return no(f"{len(full)} kinds of layers see all of a prompt; it must be one")
    if asked == "on":
        return Decision(field="cascade", value="on", why="backend.torch.cascade")
    if device.platform != "gpu":
        return no("a CPU gains nothing by it")
    return Decision(field="cascade", value="auto", why="auto: where a step's rows share so much that it pays")


def _stack(config: Config, device: Device, dtype: str, quantise: str) -> Decision:
    asked = config.backend.jax.stack
    if asked != "auto":
        return Decision(field="stack", value=asked, why="backend.jax.stack")
    if device.platform != "tpu":
        return Decision(field="stack", value="list", why="off a TPU a scan copies each layer's weights")
    if device.kind in COPIED and dtype == "bfloat16" and quantise == "none":
        return Decision(
            field="stack", value="list", why=f"on a {device.kind} a scan copies stacked {dtype} weights in each step"
        )
    return Decision(field="stack", value="scan", why="on a TPU stacked layers are scanned without copies")
