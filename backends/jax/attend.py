"""Paged attention: Pallas kernels on TPUs (`paged`), and plain XLA for every device, online softmax over fixed blocks.

Rows are cut into tiles, queries of one row that read the cache together (buckets.Shape). Loops have dynamic trip
counts, so that one program per bucket does work in proportion to the real lengths. One call of `blocks` a layer keeps
the time to compile down: XLA's CPU compiler takes 10 to 30 ms for each of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from backends.api.limits import Limits
from backends.jax import attend_gpu
from backends.jax.buckets import Shape
from backends.jax.caches import HELD, State, columns, from_lines, to_lines
from backends.jax.inputs import Batch
from backends.jax.work import spots, tree, unit
from backends.jax.work import tiles as cut
from engine.config import Resolved
from engine.mesh import share
from engine.model.groups import Place
from engine.model.spec import Attention
from kernels_pallas import attention, kv_write
from kernels_pallas import blocks as sizes
from kernels_pallas.chip import Chip, chip
from models_jax.ops import precision, rotate

BLOCK = 128
"""Positions of the cache that one turn of a loop reads."""
GROUP = 4
"""Tiles attended at once on a CPU, where work on empty tiles is not free; elsewhere all are."""
FAR = -1e30
"""Score of what a query does not see: finite, so that no difference of scores is NaN."""
Array: TypeAlias = jax.Array


class Pages(NamedTuple):
    """One cache group as a step sees it. table int32[R, P]; base int32[R]: position of its index 0; page, offset
    int32[T]: where each token's key and value go, page = -1 for padding. size: tokens a page; count: pages a layer;
    window: positions that a token sees, 0 = all. spots: on a TPU the pages that are written. tree: where guesses may be
    trees, what they see."""

    table: Any
    base: Any
    page: Any
    offset: Any
    size: int
    count: int
    window: int = 0
    spots: kv_write.Spots | None = None
    tree: attention.Tree | None = None


class View(NamedTuple):
    """What attention knows of a step. before int32[R]: lengths before it; position int32[T]: where tokens stand, those
    of a tree below whom they follow.

    tiles int32[N, 3]: as in Batch, `size` queries each; group: how many are attended at once. work: on a TPU the
    tiles of its kernel.
    """

    batch: Batch
    before: Any
    position: Any
    groups: tuple[Pages, ...]
    tiles: Any
    size: int
    group: int
    work: attention.Tiles | None = None


Scales: TypeAlias = tuple[Array, Array] | None
"""Where the cache has 8 bits: what is read of it is multiplied by the first, what is written by the second, float32[2,
kv_heads] each, keys and values."""
Kernel: TypeAlias = Callable[
    [Attention, Array, Array, Array, Array | None, Array, Any, Pages, View, Scales], tuple[Array, Array]
]


def choose(a: Attention, config: Resolved, on: Chip | None = None, tree: int = 0) -> tuple[Kernel, str]:
    """The kernel for a layer, and why. on: a TPU that is only described; else the one that is compiled for. tree: the
    most tokens that a row feeds as a tree."""
    shape = f"head {a.head_dim}, {config.cache_dtype} cache"
    if config.platform == "gpu":
        why = "guesses as trees are not built" if tree else attend_gpu.refuses(a, config)
        return (plain, f"plain XLA, {shape}: {why}") if why else (attend_gpu.paged, f"Pallas by way of Triton, {shape}")
    if config.platform != "tpu":
        return plain, f"plain XLA, {shape}: the Pallas kernels are for accelerators, not for a {config.platform}"
    kv_heads, held = share(a.kv_heads, "kv_heads", config.mesh), HELD[config.cache_dtype].name
    why = attention.supports(
        q_heads=share(a.q_heads, "q_heads", config.mesh),
        kv_heads=kv_heads,
        head=a.head_dim,
        page=config.page,
        rows=config.max_rows,
        entries=-(-config.max_len // config.page),
        dtype=held,
        tokens=config.max_tokens,
        tree=tree,
        on=on,
    ) or kv_write.supports(page=unit(config.page, held), line=kv_heads * 2 * a.head_dim, dtype=held, on=on)
    if why:
        return plain, f"plain XLA, {shape}: {why}"
    return paged, f"Pallas, {shape}: ragged pages, written and read in place"


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
                window=group.window,
            )
        )
    return tuple(out)


def look(
    batch: Batch,
    before: Array,
    position: Array,
    groups: tuple[Pages, ...],
    shape: Shape,
    config: Resolved,
    parents: Array | None = None,
) -> View:
    """The view of a step. A bucket of one-query tiles is attended at once. position int32[T]: in the cache. parents: as
    in backends.api.step.ScheduleStep."""
    work = None
    if parents is not None:
        groups = tuple(p._replace(tree=tree(batch, before, parents, p.window)) for p in groups)
        position = groups[0].tree.stands
    if config.platform == "tpu":
        work = cut(batch, before, sizes.tile(shape.tokens, chip()), parents)
        held = HELD[config.cache_dtype].name
        groups = tuple(p._replace(spots=spots(batch, before, p.table, p.base, p.size, held)) for p in groups)
    group = GROUP if config.platform == "cpu" and shape.tile > 1 else shape.tiles
    spare = jnp.zeros((-shape.tiles % group, 3), jnp.int32)  # whole groups: a slice is never moved to fit
    tiles = jnp.concatenate([batch.tiles, spare])
    return View(batch, before, position, groups, tiles, shape.tile, group, work)


class Attend:
    """The `attend` of models_jax: caches are a tuple with one array a group."""

    def __init__(self, config: Resolved, view: View) -> None:
        self.config, self.view = config, view

    def __call__(
        self,
        a: Attention,
        q: Array,
        k: Array,
        v: Array,
        cache: tuple[Array, ...],
        place: Place,
        sinks: Array | None = None,
        scales: Scales = None,
        turn: tuple[Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, ...]]:
        g = place.group
        kernel, _ = choose(a, self.config, tree=0 if self.view.groups[g].tree is None else sizes.TREE)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        o, one = kernel(a, q, k, v, sinks, cache[g], place.rank, self.view.groups[g], self.view, scales)
        return o, (*cache[:g], one, *cache[g + 1 :])


def paged(
    a: Attention,
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    cache: Array,
    rank: Any,
    pages: Pages,
    view: View,
    scales: Scales = None,
) -> tuple[Array, Array]:
    """As `plain`, by the kernels of `kernels_pallas`."""
    assert view.work is not None
    assert pages.spots is not None
    at = rank * pages.count
    lines = to_lines(jnp.stack([k, v], axis=2), cache, scales and scales[1]).reshape(k.shape[0], -1)
    size = unit(pages.size, cache.dtype.name)
    parts = kv_write.write(lines, cache.reshape(-1, size, cache.shape[2]), pages.spots, at * (pages.size // size))
    cache = parts.reshape(cache.shape)
    o = attention.attention(
        q,
        cache,
        view.work,
        pages.table,
        pages.base,
        at,
        sinks,
        scales and scales[0],
        pages.tree,
        kv_heads=k.shape[1],
        scale=a.scale,
        window=a.window,
        cap=a.cap,
    )
    return jnp.where(view.batch.real[:, None, None], o, 0), cache


def plain(
    a: Attention,
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    cache: Array,
    rank: Any,
    pages: Pages,
    view: View,
    scales: Scales = None,
) -> tuple[Array, Array]:
    """Write k, v [T, kv_heads, head_dim] to the cache [layers * pages, page, kv_heads * 2 * head_dim] and attend.

    rank: of the layer in its group.
    q [T, q_heads, head_dim] -> ([T, q_heads, head_dim], cache).
    """
    at = rank * pages.count
    where = jnp.where(pages.page >= 0, pages.page + at, cache.shape[0])  # past the end: dropped
    lines = to_lines(jnp.stack([k, v], axis=2), cache, scales and scales[1]).reshape(k.shape[0], -1)
    cache = cache.at[where, pages.offset].set(lines, mode="drop", wrap_negative_indices=False)
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    count, group = view.tiles.shape[0], view.group
    if count <= group:
        out = tiles(a, grouped, sinks, scales, jnp.zeros_like(grouped), view.tiles, cache, at, pages, view)
        return out.reshape(q.shape), cache

    def some(i: Array, out: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(view.tiles, i * group, group)
        return tiles(a, grouped, sinks, scales, out, part, cache, at, pages, view)

    turns = (view.batch.tile_count + group - 1) // group
    return jax.lax.fori_loop(0, turns, some, jnp.zeros_like(grouped)).reshape(q.shape), cache


def tiles(
    a: Attention,
    q: Array,
    sinks: Array | None,
    scales: Scales,
    out: Array,
    tiles: Array,
    cache: Array,
    at: Any,
    pages: Pages,
    view: View,
) -> Array:
    """Attention of the queries of tiles int32[N, 3], put into out. q, out [T, kv_heads, G, head_dim]."""
    batch, step = view.batch, jnp.arange(view.size)
    row, first, count = tiles[:, 0], tiles[:, 1], tiles[:, 2]
    token = first[:, None] + step
    position = (view.before[row] + first - batch.first[row])[:, None] + step
    mine, token = step < count[:, None], jnp.minimum(token, q.shape[0] - 1)
    mask = masks(a, jnp.where(mine, position, -1), pages.tree and _of(pages.tree, row, token))
    o = blocks(
        a,
        q[token],
        sinks,
        scales,
        mask,
        pages.table[row],
        pages.base[row],
        cache,
        at,
        pages.size,
    )
    if view.size == 1:  # tile i is token i
        return o[:, 0].astype(out.dtype)
    return out.at[jnp.where(mine, token, q.shape[0])].set(o.astype(out.dtype), mode="drop")


def blocks(
    a: Attention,
    q: Array,
    sinks: Array | None,
    scales: Scales,
    mask: tuple[Array, Array, Callable[[Array], Array]],
    table: Array,
    base: Array,
    cache: Array,
    at: Any,
    size: int,
) -> Array:
    """N tiles of Q queries, each over the pages of its own table: float32 [N, Q, kv_heads, G, head_dim].

    q [N, Q, kv_heads, G, head_dim]; sinks [kv_heads * G]; mask: as `masks` has it; table int32[N, P]; base int32[N];
    at: first page of the layer; size: tokens a page. What no query of a tile sees may hold anything, NaN too. Numbers
    of 8 bits are multiplied as they are, exact in every dtype, and the scores and sums of values by their scales, in
    float32.
    """
    n, queries, kv_heads, group, head = q.shape
    entries = min(max(BLOCK // size, 1), table.shape[1])
    block, batch, many = entries * size, n * kv_heads, queries * group
    # a CPU, where the cache may hold bits, is slow at small products of bfloat16
    bits = cache.dtype in (jnp.uint16, jnp.uint8)
    kind = jnp.float32 if bits else q.dtype if scales is not None else jnp.promote_types(q.dtype, cache.dtype)
    score, value = a.scale, 1
    if scales is not None:
        score, value = (jnp.tile(x, n)[:, None, None] for x in (a.scale * scales[0][0], scales[0][1]))
    exact = precision(kind)
    q = q.transpose(0, 2, 1, 3, 4).reshape(batch, many, head).astype(kind)
    low, high, seen = mask

    def one(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, acc = carry
        key = j * block + jnp.arange(block)
        entry = (j * block - base[:, None]) // size + jnp.arange(entries)
        page = jnp.take_along_axis(table, jnp.clip(entry, 0, table.shape[1] - 1), axis=1)
        kv = cache[page + at].reshape(n, block, -1)
        read = ((key > low[:, None]) & (key <= high[:, None]))[:, :, None]
        kv = from_lines(jnp.where(read, kv, 0)).astype(kind).reshape(n, block, kv_heads, 2, head)
        kv = kv.transpose(3, 0, 2, 1, 4).reshape(2, batch, block, head)
        bias = jnp.where(seen(key), jnp.float32(0), jnp.float32(FAR))[:, None, :, None]
        bias = jnp.broadcast_to(bias, (n, kv_heads, queries, group, block)).reshape(batch, many, block)
        s = _product(q, kv[0], 2, exact) * score
        s = (s if a.cap is None else a.cap * jnp.tanh(s / a.cap)) + bias
        # where a query saw nothing yet, top is FAR and p is 1: the first real score fades that to nothing
        peak = jnp.maximum(top, s.max(-1, keepdims=True))
        p, fade = jnp.exp(s - peak), jnp.exp(top - peak)
        acc = acc * fade + _product(p.astype(kind), kv[1], 1, exact)
        return peak, total * fade + p.sum(-1, keepdims=True), acc

    first = jnp.where(high >= 0, low + 1, jnp.iinfo(jnp.int32).max).min() // block if a.window else jnp.int32(0)
    top, total = jnp.full((batch, many, 1), FAR, jnp.float32), jnp.zeros((batch, many, 1), jnp.float32)
    if sinks is not None:  # seen before any key, with a value of nothing
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, 1, group)
        top, total = jnp.broadcast_to(sink, (n, kv_heads, queries, group)).reshape(top.shape), total + 1
    empty = top, total, jnp.zeros((batch, many, head), jnp.float32)
    _, total, acc = jax.lax.fori_loop(first, high.max() // block + 1, one, empty)
    o = acc / jnp.where(total == 0, 1, total) * value
    return o.reshape(n, kv_heads, queries, group, head).transpose(0, 2, 1, 3, 4)


def _of(tree: attention.Tree, row: Array, token: Array) -> attention.Tree:
    """A tree as tiles see it: root [N], stands [N, Q], bits [2, N, Q]. row int32[N]; token int32[N, Q]."""
    return attention.Tree(tree.root[row], tree.stands[token], tree.bits[:, token])


def masks(a: Attention, position: Array, tree: attention.Tree | None) -> tuple[Array, Array, Callable[[Array], Array]]:
    """Of the queries of each tile, position int32[N, Q] in the cache, -1 = sees nothing: some query sees low < key <=
    high, int32[N] each; and which keys int32[B] each query sees, bool[N, Q, B]. tree: as `_of` has it."""
    high, ends = position.max(1), position[:, :, None]
    stands = position if tree is None else tree.stands
    low = jnp.full_like(high, -1)
    if a.window:
        earliest = jnp.where(position >= 0, stands, jnp.iinfo(jnp.int32).max).min(1)
        low = jnp.maximum(earliest - a.window, -1)

    def seen(key: Array) -> Array:
        out = key <= ends
        if a.window:
            out &= key > stands[:, :, None] - a.window
        if tree is not None:
            bit = key - tree.root[:, None, None]
            word = jnp.where(bit < 32, tree.bits[0, :, :, None], tree.bits[1, :, :, None])
            out &= (bit < 0) | (word >> (bit & 31) & 1 != 0)
        return out

    return low, high, seen


def _product(x: Array, y: Array, dim: int, exact: jax.lax.Precision) -> Array:
    """x [B, M, C] times y, summed over the last dimension of x and dimension `dim` of y [B, ., .], in float32."""
    dims = ((2,), (dim,)), ((0,), (0,))
    return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)
