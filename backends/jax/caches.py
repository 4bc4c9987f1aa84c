"""What the device keeps between steps: the caches of keys and values, and what it knows of each slot."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from backends.api.limits import Limits
from backends.jax.mesh import CACHE, laid, replicated
from backends.jax.params import DTYPES
from engine.config import Resolved

HELD: dict[str, Any] = DTYPES | {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
"""What keys and values may be kept in."""
BITS = {"bfloat16": np.dtype(np.uint16), "fp8": np.dtype(np.uint8)}
"""What stands for their bits on a CPU."""


class State(NamedTuple):
    """Per slot; row `slots` takes what padding writes. length int32[slots+1]: cached positions. last int32[slots+1]:
    the last accepted token. tables int32[slots+1, columns]: page tables of all groups side by side."""

    length: Any
    last: Any
    tables: Any


def columns(limits: Limits) -> tuple[int, ...]:
    """First column of each group's page table in State.tables."""
    return tuple(sum(limits.max_row_pages[:g]) for g in range(len(limits.groups)))


def state_shapes(limits: Limits, mesh: Mesh) -> State:
    """Shapes of the state."""
    slots, sharding = limits.slots + 1, replicated(mesh)
    one = jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=sharding)
    tables = jax.ShapeDtypeStruct((slots, sum(limits.max_row_pages)), jnp.int32, sharding=sharding)
    return State(one, one, tables)


def count_shape(limits: Limits, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What penalties look at, int32[slots+1, V] as backends.api.seats.tally has it; one number where there are none."""
    shape = (limits.slots + 1, limits.vocab) if limits.max_history else (1, 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(mesh))


def cache_shapes(limits: Limits, config: Resolved, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of the caches, one flat array a group: [layers * pages, page, kv_heads * 2 * head_dim], 2 = key and value.

    Page p of the group's layer of rank i is entry i * pages + p: one array that no layer slices is never copied. A
    token is one line: with dimensions for heads, TPUs pad small heads and copy the cache to do so. A mesh splits the
    line; where it has more devices than there are heads, the line holds heads several times.
    """
    out = []
    for g, pages in zip(limits.groups, limits.pages, strict=True):
        (heads,) = laid((g.kv_heads,), ("kv_heads",), config.mesh)
        shape = len(g.layers) * pages, g.page, heads * 2 * g.head_dim
        out.append(jax.ShapeDtypeStruct(shape, _held(config), sharding=NamedSharding(mesh, CACHE)))
    return tuple(out)


def _held(config: Resolved) -> Any:
    """The dtype of the array. XLA for CPUs widens all of a bfloat16 array that it scatters to, at every layer: there
    the cache holds the bits of bfloat16 (docs/decisions/0005-dtypes-on-cpu.md), and of fp8."""
    held = HELD[config.cache_dtype]
    return BITS.get(config.cache_dtype, held) if config.platform == "cpu" else held


def to_lines(kv: jax.Array, cache: jax.Array, inverses: jax.Array | None = None) -> jax.Array:
    """Keys and values [T, kv_heads, 2, head_dim] in the form that the cache holds.

    inverses float32[2, kv_heads]: of the scales, where it has 8 bits; times these in float32, clamped, rounded to the
    nearest, ties to even. NaN stays what it is in fp8, and becomes 0 in int8, which has none.
    """
    if inverses is not None:
        kv = kv.astype(jnp.float32) * inverses.T[:, :, None]
        most = 127 if cache.dtype == jnp.int8 else 448
        kv = jnp.clip(kv, -most, most)
        if cache.dtype == jnp.int8:
            kv = jnp.rint(jnp.where(jnp.isnan(kv), 0, kv))
    if cache.dtype == jnp.uint8:
        return jax.lax.bitcast_convert_type(kv.astype(jnp.float8_e4m3fn), jnp.uint8)
    if cache.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(kv.astype(jnp.bfloat16), jnp.uint16)
    return kv.astype(cache.dtype)


def from_lines(lines: jax.Array) -> jax.Array:
    """Keys and values as numbers, of what was read from a cache; of one of 8 bits still to be scaled."""
    if lines.dtype == jnp.uint8:
        return jax.lax.bitcast_convert_type(lines, jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(lines, jnp.bfloat16) if lines.dtype == jnp.uint16 else lines


def specs(limits: Limits) -> tuple[tuple[PartitionSpec, ...], State]:
    """How caches and state are split over the mesh."""
    whole = PartitionSpec()
    return (CACHE,) * len(limits.groups), State(whole, whole, whole)


def lower_empty(limits: Limits, config: Resolved, mesh: Mesh) -> Any:
    """The program that makes empty caches, state and counts on the device: () -> (caches, state, counts)."""
    want = cache_shapes(limits, config, mesh), state_shapes(limits, mesh), count_shape(limits, mesh)
    shardings = jax.tree.map(lambda s: s.sharding, want)
    make = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), want)  # noqa: E731
    return jax.jit(make, out_shardings=shardings).lower()


def lower_copy(limits: Limits, config: Resolved, mesh: Mesh) -> Any:
    """The program ahead of a step with page copies: (caches, int32[1 + max_copies, 3]) -> caches, which are donated.

    The first entry is (how many, 0, 0), the rest (group, source, target), done in order.
    """
    want = cache_shapes(limits, config, mesh)

    def copy(given: tuple[Any, ...], copies: jax.Array) -> tuple[Any, ...]:
        def one(i: Any, caches: tuple[Any, ...]) -> tuple[Any, ...]:
            # XLA for CPUs fails on these numbers fused into the copy of a group with one layer
            group, source, target = jax.lax.optimization_barrier(copies[i])
            out = []
            for g, (cache, pages) in enumerate(zip(caches, limits.pages, strict=True)):
                mine = group == g  # for the others page 0 stays what it is
                at, to = jnp.where(mine, source, 0), jnp.where(mine, target, 0)
                layers = cache.reshape(-1, pages, *cache.shape[1:])
                page = jax.lax.dynamic_slice_in_dim(layers, at, 1, axis=1)
                out.append(jax.lax.dynamic_update_slice_in_dim(layers, page, to, axis=1).reshape(cache.shape))
            return tuple(out)

        return jax.lax.fori_loop(1, copies[0, 0] + 1, one, given)

    shape = jax.ShapeDtypeStruct((1 + limits.max_copies, 3), jnp.int32, sharding=replicated(mesh))
    return jax.jit(copy, donate_argnums=0, out_shardings=jax.tree.map(lambda s: s.sharding, want)).lower(want, shape)
