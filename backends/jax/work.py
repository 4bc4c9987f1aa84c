"""What the kernels of a TPU do in a step, as lists: tiles of queries, and pages that are written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from backends.jax.inputs import Batch
from kernels_pallas.attention import Tiles
from kernels_pallas.kv_write import Spots


def tiles(batch: Batch, before: jax.Array, size: int) -> Tiles:
    """Rows cut into tiles of up to `size` queries. before int32[R]: lengths before the step."""
    tokens, rows = batch.tokens.shape[0], batch.slot.shape[0]
    row, part, total = _expand((batch.length + size - 1) // size, min(tokens, rows + tokens // size))
    skip = part * size
    return Tiles(
        row=row,
        token=batch.first[row] + skip,
        count=jnp.minimum(size, batch.length[row] - skip),
        position=before[row] + skip,
        total=total,
    )


def spots(batch: Batch, before: jax.Array, table: jax.Array, base: jax.Array, page: int) -> Spots:
    """The pages of a group that the step writes. table int32[R, P], base int32[R]; page: tokens of one."""
    tokens, rows = batch.tokens.shape[0], batch.slot.shape[0]
    begin, end = before // page, (before + batch.length + page - 1) // page
    most = min(tokens, 2 * rows + tokens // page)
    row, part, total = _expand(jnp.where(batch.length > 0, end - begin, 0), most)
    at = (begin[row] + part) * page
    entry = (at - base[row]) // page
    found = table[row, jnp.clip(entry, 0, table.shape[1] - 1)]
    return Spots(
        page=jnp.where((entry >= 0) & (entry < table.shape[1]), found, -1),
        token=batch.first[row] + at - before[row],
        first=jnp.maximum(before[row] - at, 0),
        last=jnp.minimum(before[row] + batch.length[row] - at, page),
        total=total,
    )


def _expand(counts: jax.Array, most: int) -> tuple[Any, Any, Any]:
    """counts[r] items of each row r, in order: the row of each, its number in the row, int32[most], and how many.

    Items past the last are of the last row; there are no more than `most`.
    """
    ends, item = jnp.cumsum(counts), jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum((item[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32), counts.shape[0] - 1)
    return row, item - (ends - counts)[row], ends[-1]
