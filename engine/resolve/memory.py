"""Bytes on one device: weights, cache, counts, captured steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config import Resolved
from engine.mesh import MeshSpec, share
from engine.model.groups import ITEMSIZE, CacheGroup, cache_groups
from engine.model.params import params
from engine.model.quant import local_bytes
from engine.model.spec import Experts, Layer, ModelSpec, eight

GIB = 1 << 30
CAPTURED = (512, 256 << 20, 16 << 20)
"""Tokens of the largest step that is captured; bytes that captures take of their own, in all and for each layer."""


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


def plan_memory(spec: ModelSpec, resolved: Resolved) -> Memory:
    """What weights and cache take on one device."""
    groups = local_groups(spec, resolved.page, resolved.mesh)
    return Memory(
        weights=loaded_bytes(
            spec,
            backend=resolved.backend,
            dtype=resolved.dtype,
            cache_dtype=resolved.cache_dtype,
            quantise=resolved.quantise,
            mesh=resolved.mesh,
        ),
        cache=tuple(n * g.page_bytes(resolved.cache_dtype) for n, g in zip(resolved.pages, groups, strict=True)),
        counts=count_bytes(spec, resolved.penalties, resolved.slots),
        graphs=graph_bytes(spec, resolved),
    )


def loaded_bytes(spec: ModelSpec, *, backend: str, dtype: str, cache_dtype: str, quantise: str, mesh: MeshSpec) -> int:
    """Bytes of all that a backend loads on one device, with the scales of a cache of 8 bits. The reference keeps no
    quantised matrices."""
    kind = quantise if backend != "reference" else "none"
    return weight_bytes(eight(spec, cache_dtype), dtype, mesh, kind)


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
    if resolved.graphs == "pieces":  # what stands between them, of every shape
        padded = tokens + sum(range(32, resolved.max_rows + 32, 32)) + 2 * CAPTURED[0]
        kept = sum(2 * spec.hidden + 2 * layer.mixer.q_heads * layer.mixer.head_dim for layer in spec.layers)
        between += padded * kept * ITEMSIZE[resolved.dtype]
    return 8 * resolved.max_rows * spec.vocab + between + CAPTURED[1] + CAPTURED[2] * len(spec.layers)


def _inside(spec: ModelSpec, layer: Layer) -> int:
    """Numbers of a token inside of a layer's feed-forward; each expert that it goes through gives some."""
    feed = layer.feed
    return feed.top_k * (feed.size + spec.hidden) if isinstance(feed, Experts) else 3 * feed.size
