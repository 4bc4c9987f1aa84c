"""Ragged paged attention: decode rows, chunks of prompts and rows to verify in one call, from one source.

A loop over tiles (queries of one row) and, in each, over blocks of its keys. Keys and values of the next block, be it
the next tile's, are on their way from the cache while this one is computed. The cache is read as it lies: a page is one
copy, a head's keys are a slice of 128 lanes. Query heads that share a key-value head are rows of one product; where
they are fewer than the 8 rows of a register, `fold` key-value heads are folded into one product of `fold` times the
depth, block-diagonal in the queries: as many weights are pushed, and the softmax works on full registers.
"""

from __future__ import annotations

from dataclasses import replace
from math import e, log2
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.blocks import LEAST, TREE, Blocks, need, pick
from kernels_pallas.cached import TYPES
from kernels_pallas.chip import Chip, chip
from kernels_pallas.form import LANES, SUBLANES, Form, Refs
from kernels_pallas.ragged import kernel
from kernels_pallas.softmax import FAR

Array: TypeAlias = jax.Array
SPARE = 16 << 10
"""Bytes of SMEM that tables leave to the compiler."""


class Tiles(NamedTuple):
    """The work of a step. row, token, count, position int32[N]: a tile is `count` queries of one row, from token
    `token` on, the first of which stands at `position`. total int32[]: how many tiles there are."""

    row: Any
    token: Any
    count: Any
    position: Any
    total: Any


class Tree(NamedTuple):
    """Guesses as trees, of rows that feed up to 64 tokens, in tiles of no more queries than `Blocks.small`.

    root int32[R]: the position of a row's first token; past all positions where the row is no tree. stands int32[T]:
    the position of each token, one past that of whom it follows; in the cache they lie in the order they are fed.
    bits int32[2, T]: of a tree's token, which of its row's tokens it sees, itself among them: bit j of 64, in words.
    """

    root: Any
    stands: Any
    bits: Any


def supports(
    *,
    q_heads: int,
    kv_heads: int,
    head: int,
    page: int,
    rows: int,
    entries: int,
    dtype: str,
    tokens: int = 1 << 20,
    tree: int = 0,
    on: Chip | None = None,
) -> str:
    """Why the kernel can't be compiled; nothing where it can.

    rows, entries: of the page tables. tokens: the most that a call holds. tree: the most that a row feeds as a tree.
    """
    on = on or chip()
    if tree > TREE:
        return f"trees of {tree} tokens are not built, the most is {TREE}"
    if dtype not in TYPES:
        return f"a {dtype} cache is not built"
    if head % 64:
        return f"head {head} is no multiple of 64"
    if q_heads % kv_heads:
        return f"{kv_heads} kv heads do not divide {q_heads} heads"
    if page % (32 // TYPES[dtype]) or LEAST % page:
        return f"pages of {page} tokens are no multiple of {32 // TYPES[dtype]} that divides {LEAST}"
    smem = 4 * rows * (entries + 8) + (16 * tokens if tree else 0) + SPARE
    if smem > on.smem:
        also = f" and trees of {tokens} tokens" if tree else ""
        return f"page tables of {rows} rows x {entries} pages{also} take {smem} bytes, {on.name} has {on.smem} of SMEM"
    form = Form(q_heads=q_heads, kv_heads=kv_heads, head=head, page=page, entries=entries)
    if choose(form, tokens, TYPES[dtype], on) is None:
        return f"{q_heads} heads of {head} over {kv_heads} kv heads do not fit the {on.vmem} bytes of VMEM of {on.name}"
    return ""


def choose(form: Form, tokens: int, size: int, on: Chip) -> Blocks | None:
    """Block sizes for a chip. size: bytes of a number in the cache."""
    fixed, each = _bytes(form, size)
    return pick(tokens, on, line=form.line, size=size, fixed=fixed, each=each)


def vmem(form: Form, size: int) -> int:
    """Bytes of VMEM of a call with the blocks of `form`, temporaries included."""
    fixed, each = _bytes(form, size)
    return need(form.blocks.queries[-1], form.blocks.keys, form.line, size, fixed, each)


def _bytes(form: Form, size: int) -> tuple[int, int]:
    """VMEM for each query of the largest tile: whatever its keys, and for each key (scores, weights of two products).

    Counted for float32 queries where the cache is, or is of 8 bits.
    """
    held, depth, wide = form.products * form.rows, form.fold * form.lanes, 4 if size == 1 else size
    return held * (4 * form.lanes * wide + depth * (wide + 4) + 2 * LANES * 4), 2 * form.rows * (4 + 4 + wide)


def attention(
    q: Array,
    cache: Array,
    tiles: Tiles,
    table: Array,
    base: Array,
    at: Any,
    sinks: Array | None = None,
    scales: Array | None = None,
    tree: Tree | None = None,
    *,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Array:
    """Attend with q [T, q_heads, head_dim] over what the cache holds of each tile's row, up to each query's position.

    cache [pages, page, kv_heads * 2 * head_dim]: of a head first the key, then the value. table int32[R, E], base
    int32[R]: pages of a row, and the position of the first one's first token; at: what is added to pages (the first
    page of a layer). sinks [q_heads]. scales float32[2, kv_heads]: of keys and of values, what a number of the cache is
    to be multiplied by. tree: where a row's tokens may follow another than the one before. -> [T, q_heads, head_dim];
    tokens that are in no tile hold anything.
    No tile holds more queries than the largest of blocks, by default what `blocks.tile` says for T tokens on this chip.
    Cached tokens before and behind all that a tile sees (of a tree: a row) may hold anything, NaN too. Raises
    ValueError for what can't be compiled.
    """
    form = Form(
        q_heads=q.shape[1],
        kv_heads=kv_heads,
        head=q.shape[2],
        page=cache.shape[1],
        entries=table.shape[1],
        scale=scale,
        window=window,
        cap=cap,
        scaled=scales is not None,
        tree=tree is not None,
    )
    why = supports(
        q_heads=form.q_heads,
        kv_heads=kv_heads,
        head=form.head,
        page=form.page,
        rows=table.shape[0],
        entries=form.entries,
        dtype=str(cache.dtype),
        tokens=q.shape[0],
        tree=TREE if form.tree else 0,
    )
    if why:
        raise ValueError(f"attention: {why}")
    blocks = blocks or choose(form, q.shape[0], cache.dtype.itemsize, chip())
    form = replace(form, blocks=blocks)
    kind = q.dtype if cache.dtype.itemsize == 1 else jnp.promote_types(q.dtype, cache.dtype)
    spread = _spread(form, q)
    most, held = form.most, form.products * form.rows
    call = pl.pallas_call(
        lambda *refs: kernel(form, Refs.of(form, refs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=11 if form.tree else 8,
            grid=(1,),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((3, held, LANES), lambda *_: (0, 0, 0)),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((2, most, held, form.lanes), q.dtype),
                pltpu.VMEM((2, blocks.keys, form.line), cache.dtype),
                pltpu.VMEM((2, most, held, form.lanes), q.dtype),
                *_small(form, kind),
                *_large(form, kind),
                *([pltpu.VMEM((3, blocks.small * form.rows, LANES), jnp.int32)] if form.tree else ()),
                pltpu.SemaphoreType.DMA((3, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(spread.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=chip().vmem * 3 // 4,
            disable_bounds_checks=True,  # they are two thirds of what starts a copy
        ),
        cost_estimate=cost(form, q.shape[0], tiles.row.shape[0], cache.dtype.itemsize, q.dtype.itemsize),
        interpret=interpret,
        name="attention",
    )
    numbers = [x.astype(jnp.int32) for x in (tiles.row, tiles.token, tiles.count, tiles.position)]
    total, first = (jnp.asarray(x, jnp.int32).reshape(1) for x in (tiles.total, at))
    nodes = [x.reshape(-1) for x in tree] if tree is not None else []
    out = call(*numbers, total, first, table.reshape(-1), base, *nodes, spread, cache, _heads(form, sinks, scales))
    return _gather(form, out)


def _small(form: Form, kind: Any) -> list[Any]:
    """Buffers of tiles that are not large, in the order of Refs."""
    rows, depth = (
        max([n * form.rows for n in form.blocks.queries if not form.large(n)], default=8),
        form.fold * form.lanes,
    )
    stat = pltpu.VMEM((form.products, rows, LANES), jnp.float32)
    out = pltpu.VMEM((form.products, rows, depth), jnp.float32)
    scores = pltpu.VMEM((rows, form.blocks.keys), jnp.float32)
    return [pltpu.VMEM((form.products, rows, depth), kind), stat, stat, out, stat, scores, scores]


def _large(form: Form, kind: Any) -> list[Any]:
    """Buffers of large tiles, in the order of Refs; as small as can be where there are none."""
    if not form.large(form.most):
        return [pltpu.VMEM((SUBLANES, LANES), jnp.float32)] * 9
    pieces, ahead, many, depth, step = form.pieces, form.ahead, form.many, form.depth, form.step
    stat = pltpu.VMEM((pieces, SUBLANES, many), jnp.float32)
    return [
        pltpu.VMEM((pieces, many, depth), kind),
        stat,
        stat,
        pltpu.VMEM((pieces, depth, many), jnp.float32),
        pltpu.VMEM((ahead, step // SUBLANES, SUBLANES, many), jnp.float32),
        pltpu.VMEM((ahead, step, many), kind),
        pltpu.VMEM((2, ahead, depth, step), kind),
        pltpu.VMEM((ahead, 3, SUBLANES, many), jnp.float32),
        pltpu.VMEM((SUBLANES, many), jnp.int32),
    ]


def cost(form: Form, tokens: int, tiles: int, cached: int, size: int) -> pl.CostEstimate:
    """What a call costs whose tiles reach half of their table (or window). cached, size: bytes of a number."""
    reach = min(form.entries * form.page // 2, form.window or form.entries * form.page)
    scores = tokens * form.q_heads * reach
    return pl.CostEstimate(
        flops=4 * scores * form.head,
        transcendentals=scores,
        bytes_accessed=tiles * reach * form.line * cached + 2 * tokens * form.q_heads * form.head * size,
    )


def _spread(form: Form, q: Array) -> Array:
    """q [T, q_heads, head] with a head's lanes and a product's rows padded: [T, products * rows, lanes]."""
    q = q.reshape(q.shape[0], form.products, form.fold * form.group, form.head)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, form.rows - q.shape[2]), (0, form.lanes - form.head)))
    return q.reshape(q.shape[0], -1, form.lanes)


def _gather(form: Form, out: Array) -> Array:
    """The inverse; a head's values are the last of its lanes."""
    out = out.reshape(out.shape[0], form.products, form.rows, form.lanes)
    out = out[:, :, : form.fold * form.group, form.lanes - form.head :]
    return out.reshape(out.shape[0], form.q_heads, form.head)


def _heads(form: Form, sinks: Array | None, scales: Array | None) -> Array:
    """Of each row of a query its sink as a score in bits, and the scales of its keys and values: float32[3, products *
    rows, LANES]."""
    flat = jnp.stack(
        [
            jnp.full(form.q_heads, FAR, jnp.float32) if sinks is None else sinks.astype(jnp.float32) * log2(e),
            *(jnp.ones((2, form.q_heads)) if scales is None else jnp.repeat(scales, form.group, axis=1)),
        ]
    ).reshape(3, form.products, -1)
    flat = jnp.pad(flat, ((0, 0), (0, 0), (0, form.rows - flat.shape[2]))).reshape(3, -1, 1)
    return jnp.broadcast_to(flat, (*flat.shape[:2], LANES))
