"""What a step can't be faster than: bytes over bandwidth, operations over their peak, and what goes between chips.

Arithmetic on the description of a model alone; nothing is compiled. Not counted: that real kernels reach a part of the
peak, activations, sampling, the start of each collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from engine.config import Resolved
from engine.mesh import shard_shape, share
from engine.model.groups import ITEMSIZE
from engine.model.params import params
from engine.model.spec import Experts, ModelSpec
from engine.resolve.memory import local_groups
from engine.target import Chip


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one device does in a step: bytes of weights and of cache that it reads, operations, and seconds on its chip
    of reading, of computing and of the links to others."""

    weights: int
    cache: int
    flops: int
    memory_s: float
    compute_s: float
    link_s: float

    @property
    def seconds(self) -> float:
        """Of the step: memory and matrix units work at once, collectives stand between."""
        return max(self.memory_s, self.compute_s) + self.link_s


def load(spec: ModelSpec, config: Resolved, chip: Chip, tokens: int, rows: int, context: int) -> Load:
    """Of a step of `tokens` tokens in `rows` rows that each see `context` positions."""
    weights, products = _weights(spec, config, tokens, rows)
    cache, scores = _attention(spec, config, tokens, rows, context)
    parts = config.mesh.tp
    moved = sum(
        count * size * (2 if name == "all-reduce" else 1) * (parts - 1) / parts
        for name, count, size in collectives(spec, config, tokens, rows)
    )
    return Load(
        weights=weights,
        cache=cache,
        flops=2 * products + scores,
        memory_s=(weights + cache) / chip.bandwidth,
        compute_s=(2 * products + scores) / chip.flops[config.dtype],
        link_s=moved / (chip.ici / 2),
    )


def collectives(spec: ModelSpec, config: Resolved, tokens: int, rows: int) -> Iterator[tuple[str, int, int]]:
    """(operation, how many, bytes that each gives one device) of a step on a mesh: a sum for the embedding and two for
    each layer; the logits, whose rows are dealt out; a sum that joins what is chosen, a token and a status a row."""
    tp = config.mesh.tp
    if tp == 1:
        return
    each = -(-rows // tp)
    yield "all-reduce", 1 + 2 * len(spec.layers), tokens * spec.hidden * ITEMSIZE[config.dtype]
    yield "all-to-all", 1, each * share(spec.vocab, "vocab", config.mesh) * tp * 4
    yield "all-reduce", 1, each * tp * 2 * 4


def _weights(spec: ModelSpec, config: Resolved, tokens: int, rows: int) -> tuple[int, int]:
    """Bytes of weights that a device reads, and its multiplications. Of experts, as many as tokens can choose; of an
    embedding, the rows of the tokens."""
    read = products = 0
    for name, p in params(spec).items():
        size = prod(shard_shape(p.shape, p.axes, config.mesh))
        layer = spec.layers[int(name.split(".")[1])] if name.startswith("layers.") else None
        if name == "embed" and not spec.tied:
            read += min(size, tokens * spec.hidden)
        elif layer is not None and p.axes[0] == "experts" and isinstance(layer.feed, Experts) and "router" not in name:
            e = layer.feed
            read += size * min(e.count, tokens * e.top_k) // e.count
            products += size * tokens * e.top_k // e.count
        else:
            read += size
            products += size * (rows if name in ("head", "embed") else tokens) * (len(p.shape) > 1)
    return read * ITEMSIZE[config.dtype], products


def _attention(spec: ModelSpec, config: Resolved, tokens: int, rows: int, context: int) -> tuple[int, int]:
    """Bytes of the cache that a device reads, and operations on them."""
    size = 0
    for g in local_groups(spec, config.page, config.mesh):
        seen = min(context, g.window or context)
        size += rows * seen * g.page_bytes(config.cache_dtype) // g.page
    heads = sum(
        share(layer.mixer.q_heads, "q_heads", config.mesh)
        * layer.mixer.head_dim
        * min(context, layer.mixer.window or context)
        for layer in spec.layers
    )
    return size, 4 * tokens * heads
