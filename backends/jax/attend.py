"""Paged attention in plain XLA, for every device: online softmax over fixed blocks of the cache.

Loops have dynamic trip counts, so that one program per bucket does work in proportion to the real lengths. In a small
bucket each token reads the cache for itself. In a large one rows with one token are attended together, and rows with
more are cut into tiles of queries, each of one row (buckets.TILE).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from backends.api.limits import Limits
from backends.jax.buckets import TILE
from backends.jax.caches import State, columns
from backends.jax.inputs import Batch
from engine.config import Resolved
from engine.model.groups import Place
from engine.model.spec import Attention
from models_jax.ops import precision

BLOCK = 128
"""Positions of the cache that one turn of a loop reads."""
FAR = -1e30
"""Score of what a query does not see: finite, so that no difference of scores is NaN."""
Array: TypeAlias = jax.Array


class Pages(NamedTuple):
    """One cache group as a step sees it. table int32[R, P]; base int32[R]: position of its index 0; page, offset
    int32[T]: where each token's key and value go, page = -1 for padding. size: tokens a page; count: pages a layer."""

    table: Any
    base: Any
    page: Any
    offset: Any
    size: int
    count: int


class View(NamedTuple):
    """What attention knows of a step. before int32[R]: lengths before it; position int32[T]; tiled: it has tiles."""

    batch: Batch
    before: Any
    position: Any
    groups: tuple[Pages, ...]
    tiled: bool


Kernel: TypeAlias = Callable[[Attention, Array, Array, Array, Array, Any, Pages, View], tuple[Array, Array]]


def choose(a: Attention, config: Resolved) -> tuple[Kernel, str]:
    """The kernel for a layer, and why."""
    return plain, f"plain XLA, head {a.head_dim}, {config.cache_dtype} cache: no other kernel is built for jax yet"


def locate(batch: Batch, state: State, position: Array, limits: Limits) -> tuple[Pages, ...]:
    """The cache groups as this step sees them; state.tables holds the step's edits already."""
    out = []
    for g, (group, column) in enumerate(zip(limits.groups, columns(limits), strict=True)):
        width = limits.max_row_pages[g]
        table, base = state.tables[batch.slot, column : column + width], batch.base[g]
        entry = (position - base[batch.row]) // group.page
        page = table[batch.row, jnp.clip(entry, 0, width - 1)]
        ok = batch.real & (entry >= 0) & (entry < width)
        out.append(
            Pages(
                table=table,
                base=base,
                page=jnp.where(ok, page, -1),
                offset=position % group.page,
                size=group.page,
                count=limits.pages[g],
            )
        )
    return tuple(out)


class Attend:
    """The `attend` of models_jax: caches are a tuple with one array a group."""

    def __init__(self, config: Resolved, view: View) -> None:
        self.config, self.view = config, view

    def __call__(
        self, a: Attention, q: Array, k: Array, v: Array, cache: tuple[Array, ...], place: Place
    ) -> tuple[Array, tuple[Array, ...]]:
        g = place.group
        kernel, _ = choose(a, self.config)
        o, one = kernel(a, q, k, v, cache[g], place.rank, self.view.groups[g], self.view)
        return o, (*cache[:g], one, *cache[g + 1 :])


def plain(
    a: Attention, q: Array, k: Array, v: Array, cache: Array, rank: Any, pages: Pages, view: View
) -> tuple[Array, Array]:
    """Write k, v [T, kv_heads, head_dim] to the cache [layers * pages, page, 2, kv_heads, head_dim] and attend.

    rank: of the layer in its group. q [T, q_heads, head_dim] -> ([T, q_heads, head_dim], cache).
    """
    at = rank * pages.count
    where = jnp.where(pages.page >= 0, pages.page + at, cache.shape[0])  # past the end: dropped
    cache = cache.at[where, pages.offset].set(jnp.stack([k, v], axis=1).astype(cache.dtype), mode="drop")

    kv_heads, batch = k.shape[1], view.batch
    grouped = q.reshape(q.shape[0], kv_heads, -1, q.shape[2])
    if not view.tiled:
        position = jnp.where(batch.real, view.position, -1)[:, None]
        table, base = pages.table[batch.row], pages.base[batch.row]
        o = blocks(a, grouped[:, None], position, table, base, cache, at, pages.size)
    else:
        single = batch.length == 1
        position = jnp.where(single, view.before, -1)[:, None]
        alone = blocks(a, grouped[batch.first][:, None], position, pages.table, pages.base, cache, at, pages.size)
        many = tiles(a, grouped, cache, at, pages, view)
        o = jnp.where(single[batch.row][:, None, None, None], alone[batch.row, 0], many)
    return o.reshape(q.shape).astype(q.dtype), cache


def tiles(a: Attention, q: Array, cache: Array, at: Any, pages: Pages, view: View) -> Array:
    """Attention of the tokens of rows with more than one token. q [T, kv_heads, G, head_dim] -> the same shape."""
    batch, step = view.batch, jnp.arange(TILE)
    # a tile may reach past the last token: slices of the padded arrays are never moved to fit
    room = jnp.pad(q, ((0, TILE), (0, 0), (0, 0), (0, 0)))

    def one(i: Array, out: Array) -> Array:
        row, first, count = batch.tiles[i]
        position = view.before[row] + first - batch.first[row] + step
        mine = step < count
        query = jax.lax.dynamic_slice_in_dim(room, first, TILE)
        table, base = pages.table[row][None], pages.base[row][None]
        o = blocks(a, query[None], jnp.where(mine, position, -1)[None], table, base, cache, at, pages.size)[0]
        old = jax.lax.dynamic_slice_in_dim(out, first, TILE)
        new = jnp.where(mine[:, None, None, None], o.astype(out.dtype), old)
        return jax.lax.dynamic_update_slice_in_dim(out, new, first, 0)

    return jax.lax.fori_loop(0, batch.tile_count, one, jnp.zeros_like(room))[: q.shape[0]]


def blocks(
    a: Attention, q: Array, position: Array, table: Array, base: Array, cache: Array, at: Any, size: int
) -> Array:
    """N groups of Q queries, each over the pages of its own table: float32 [N, Q, kv_heads, G, head_dim].

    q [N, Q, kv_heads, G, head_dim]; position int32[N, Q], -1 = sees nothing; table int32[N, P]; base int32[N]; at:
    first page of the layer; size: tokens a page. What no query sees may hold anything, NaN too.
    """
    n, queries, kv_heads, group, head = q.shape
    entries = min(max(BLOCK // size, 1), table.shape[1])
    block = entries * size
    kind = jnp.promote_types(q.dtype, cache.dtype)
    exact = precision(kind)

    def one(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, acc = carry
        entry = (j * block - base[:, None]) // size + jnp.arange(entries)
        page = jnp.take_along_axis(table, jnp.clip(entry, 0, table.shape[1] - 1), axis=1)
        kv = cache[page + at].reshape(n, block, 2, kv_heads, head).astype(kind)
        key = j * block + jnp.arange(block)
        seen = key <= position[:, :, None]
        if a.window:
            seen &= key > position[:, :, None] - a.window
        values = jnp.where(seen.any(1)[:, :, None, None], kv[:, :, 1], 0)
        s = jnp.einsum(
            "nqkgd,nbkd->nkgqb", q.astype(kind), kv[:, :, 0], precision=exact, preferred_element_type=jnp.float32
        )
        here = seen[:, None, None]
        s = jnp.where(here, s * a.scale, FAR)
        peak = jnp.maximum(top, s.max(-1))
        p = jnp.where(here, jnp.exp(s - peak[..., None]), 0)
        fade = jnp.exp(top - peak)
        acc = acc * fade[..., None] + jnp.einsum(
            "nkgqb,nbkd->nkgqd", p.astype(kind), values, precision=exact, preferred_element_type=jnp.float32
        )
        return peak, total * fade + p.sum(-1), acc

    low = jnp.int32(0)
    if a.window:
        earliest = jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max).min()
        low = jnp.maximum(earliest - (a.window - 1), 0) // block
    high = position.max() // block + 1
    shape = (n, kv_heads, group, queries)
    empty = jnp.full(shape, FAR, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, head), jnp.float32)
    _, total, acc = jax.lax.fori_loop(low, high, one, empty)
    o = acc / jnp.where(total == 0, 1, total)[..., None]
    return o.transpose(0, 3, 1, 2, 4)
