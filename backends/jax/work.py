"""What the kernels of a TPU do in a step, as lists: tiles of queries, and pages that are written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backends.jax.inputs import Batch
from kernels_pallas.attention import Tiles, Tree
from kernels_pallas.blocks import SMALL, TREE
from kernels_pallas.kv_write import Spots, step

PAST = 1 << 30
"""A position past all others."""


def tiles(batch: Batch, before: jax.Array, most: int, parents: jax.Array | None = None) -> Tiles:
    """Rows cut into tiles of up to `most` queries, trees into small ones. before int32[R]: lengths before the step."""
    tokens, rows = batch.tokens.shape[0], batch.slot.shape[0]
    least = most if parents is None else min(most, SMALL[-1])
    size = most if parents is None else jnp.where(trees(batch, parents), least, most)
    row, number, total = _expand((batch.length + size - 1) // size, min(tokens, rows + tokens // least))
    size = jnp.broadcast_to(size, rows)[row]
    skip = number * size
    return Tiles(
        row=row,
        token=batch.first[row] + skip,
        count=jnp.minimum(size, batch.length[row] - skip),
        position=before[row] + skip,
        total=total,
    )


def trees(batch: Batch, parents: jax.Array) -> jax.Array:
    """bool[R]: the rows that are trees. parents int32[T]: as in backends.api.step.ScheduleStep."""
    return jnp.zeros(batch.slot.shape, bool).at[batch.row].max(batch.real & (parents >= 0))


def tree(batch: Batch, before: jax.Array, parents: jax.Array, window: int) -> Tree:
    """Which tokens of its row each token of a tree sees: those at the last `window` positions, or all where that is 0.

    They are found in strides: of the 2**k from each token on, itself the first, which they are, and whom the last of
    them follows.
    """
    count, found = parents.shape[0], trees(batch, parents)
    at = jnp.arange(count)
    place = at - batch.first[batch.row]
    up = batch.first[batch.row] + jnp.where(parents >= 0, parents, place - 1)
    up = jnp.append(jnp.where(place > 0, up, count), count)  # `count` is nobody
    one = jnp.where(place[None] // 32 == jnp.array([[0], [1]]), 1 << (place & 31), 0)
    bits, near, end = jnp.pad(one, ((0, 0), (0, 1))), jnp.zeros_like(one), at
    left = min(window or TREE, TREE)
    for k in range(TREE.bit_length()):
        if left >> k & 1:
            near, end = near | bits[:, end], up[end]
        if 2 << k <= TREE:
            bits, up = bits | bits[:, up], up[up]
    depth = jax.lax.population_count(bits[:, :count]).sum(0) - 1
    return Tree(
        root=jnp.where(found, before, PAST),
        stands=before[batch.row] + jnp.where(found[batch.row], depth, place),
        bits=near,
    )


def unit(page: int, dtype: str) -> int:
    """Tokens of a page that are written together: all of a small one. dtype: of the cache."""
    least = step(dtype)
    return least if page % least == 0 else page


def spots(batch: Batch, before: jax.Array, table: jax.Array, base: jax.Array, page: int, dtype: str) -> Spots:
    """The parts of a group's pages that the step writes; of page p they are p * n to p * n + n - 1.

    table int32[R, P], base int32[R]; page: tokens of one; dtype: of the cache.
    """
    tokens, rows, size = batch.tokens.shape[0], batch.slot.shape[0], unit(page, dtype)
    begin, end = before // size, (before + batch.length + size - 1) // size
    most = min(tokens, 2 * rows + tokens // size)
    row, number, total = _expand(jnp.where(batch.length > 0, end - begin, 0), most)
    at = (begin[row] + number) * size
    entry, inside = (at - base[row]) // page, (at - base[row]) % page // size
    found = table[row, jnp.clip(entry, 0, table.shape[1] - 1)] * (page // size) + inside
    return Spots(
        page=jnp.where((entry >= 0) & (entry < table.shape[1]), found, -1),
        token=batch.first[row] + at - before[row],
        first=jnp.maximum(before[row] - at, 0),
        last=jnp.minimum(before[row] + batch.length[row] - at, size),
        total=total,
    )


def _expand(counts: jax.Array, most: int) -> tuple[Any, Any, Any]:
    """counts[r] items of each row r, in order: the row of each, its number in the row, int32[most], and how many.

    Items past the last are of the last row; there are no more than `most`.
    """
    ends, item = jnp.cumsum(counts), jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum((item[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32), counts.shape[0] - 1)
    return row, item - (ends - counts)[row], ends[-1]
