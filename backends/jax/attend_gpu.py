"""Paged attention on a GPU: what a step says, as kernels_pallas.gpu_attention wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from backends.jax.caches import HELD
from backends.jax.params import DTYPES
from engine.config import Resolved
from engine.model.spec import Attention
from kernels_pallas import gpu_attention as kernel

if TYPE_CHECKING:
    from backends.jax.attend import Pages, View


def refuses(a: Attention, config: Resolved) -> str:
    """Why the kernels are not for a layer; "" where they are."""
    return kernel.supports(a.head_dim, a.q_heads // a.kv_heads, DTYPES[config.dtype], HELD[config.cache_dtype])


def paged(
    a: Attention,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    cache: jax.Array,
    rank: Any,
    pages: Pages,
    view: View,
    scales: tuple[jax.Array, jax.Array] | None = None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """backends.jax.attend.Kernel: each token by itself in a small bucket; in others rows of one token by themselves,
    and longer ones in tiles. They read no cache of 8 bits."""
    assert scales is None
    at = jnp.asarray(rank * pages.count, jnp.int32).reshape(1)
    cache = kernel.write(k, v, cache, pages.page, pages.offset, at, interpret=interpret)
    batch, count = view.batch, q.shape[0]
    o = q.reshape(count, k.shape[1], -1, q.shape[2])
    form = kernel.Form(scale=a.scale, cap=a.cap, window=a.window or None)
    held = kernel.Pages(pages.table, pages.base, at)
    if view.size == 1:
        token = jnp.arange(count, dtype=jnp.int32)
        items = kernel.Items(token, batch.row, jnp.where(batch.real, view.position, -1))
        return kernel.single(o, cache, items, held, sinks, form, interpret=interpret).reshape(q.shape), cache
    size = kernel.width(o.shape[2], kernel.sizes(q.dtype, cache.dtype)[0])
    row = jnp.arange(batch.length.shape[0], dtype=jnp.int32)
    items = kernel.Items(batch.first, row, jnp.where(batch.length == 1, view.before, -1))
    tiles = kernel.plan_tiles(batch.length, batch.first, view.before, count, size)
    o = kernel.single(o, cache, items, held, sinks, form, interpret=interpret)
    return kernel.tiled(o, cache, tiles, held, sinks, form, interpret=interpret).reshape(q.shape), cache
