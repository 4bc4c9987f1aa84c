"""Ragged paged attention on GPUs, in Pallas by way of Triton: rows of one query, and tiles of queries of one row.

The cache is flat, [pages of all layers, page, kv_heads * 2 * head_dim], as backends.jax.caches has it. A program owns
one kv head: its query heads are the rows of one matrix product, so that keys and values are read once for all of them.
Online softmax in float32, in powers of two. Output is written over the queries: a token that no item names keeps its
query.

One query alone would leave most of a GPU idle, so its keys are cut into parts, a program each, and `_join` adds the
parts up. What no query sees may hold anything, NaN too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

Array: TypeAlias = jax.Array
LEAST = 16
"""Rows of the smallest matrix product that Triton makes."""
BLOCK = 64
"""Keys of a turn for rows of one query."""
TILE = 128, 32
"""Queries times heads of a tile, and keys of its turn."""
EXACT = 16, 32
"""The same in float32, which is multiplied without tensor cores, every product written out: larger ones compile for
minutes."""
PROGRAMS = 512
"""What fills a GPU of 132 processors, some four programs each: fewer items are cut into parts."""
PARTS = 16
"""Parts at most."""
FAR = -1e30
"""Score of what a query does not see: finite, so that no difference of scores is NaN."""
LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What of a layer is compiled in. scale: of scores; cap: soft cap of scores; window: keys that a query sees."""

    scale: float
    cap: float | None = None
    window: int | None = None


class Items(NamedTuple):
    """Rows of one query, int32[N] each: its token, its row in the page table, its position (-1 = nothing to do)."""

    token: Any
    row: Any
    position: Any


class Tiles(NamedTuple):
    """Tiles of `width` queries at most, int32[N] each: row in the page table, first token, how many (0 = nothing to
    do), position of the first."""

    row: Any
    first: Any
    count: Any
    position: Any


class Pages(NamedTuple):
    """table int32[R, P]; base int32[R]: position of a row's index 0; at int32[1]: first page of the layer."""

    table: Any
    base: Any
    at: Any


def supports(head_dim: int, group: int, dtype: Any, cache_dtype: Any) -> str:
    """Why these kernels are not for a layer; "" where they are. group: query heads of a kv head."""
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        return f"head {head_dim} is no power of two from 16 to 256"
    if group > EXACT[0]:
        return f"{group} query heads of one kv head are more than {EXACT[0]}"
    for kind in (dtype, cache_dtype):
        if jnp.dtype(kind) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
            return f"{jnp.dtype(kind)} is not read"
    return ""


def sizes(*dtypes: Any) -> tuple[int, int]:
    """Rows of a tile, and keys of its turn, for queries and a cache of these dtypes."""
    return EXACT if any(jnp.dtype(d) == jnp.float32 for d in dtypes) else TILE


def width(group: int, rows: int) -> int:
    """Queries of a tile of `rows`. group: query heads of a kv head."""
    return rows // pl.next_power_of_2(group)


def parts(items: int, kv_heads: int) -> int:
    """Parts that the keys of each item are cut into, a power of two."""
    return min(PARTS, 1 << max(PROGRAMS // (items * kv_heads), 1).bit_length() - 1)


@partial(jax.jit, static_argnames=("interpret",))
def write(k: Array, v: Array, cache: Array, page: Array, offset: Array, at: Array, *, interpret: bool = False) -> Array:
    """The cache with k, v [T, kv_heads, D] in it, changed in place. page, offset int32[T]: where each token goes, page
    -1 = nowhere; at int32[1]: first page of the layer."""
    lines = cache.reshape(-1, cache.shape[-1])
    flat = (x.astype(cache.dtype).reshape(x.shape[0], -1) for x in (k, v))
    body = partial(_write, size=k.shape[2], page=cache.shape[1])
    given = (jnp.stack([page, offset], 1), at, *flat, lines)
    like = jax.ShapeDtypeStruct(lines.shape, lines.dtype)
    return _call(body, given, like, over=4, name="write", grid=(k.shape[0],), warps=4, interpret=interpret).reshape(
        cache.shape
    )


@partial(jax.jit, static_argnames=("form", "cuts", "interpret"))  # traced once for all layers of a form
def single(
    q: Array,
    cache: Array,
    items: Items,
    pages: Pages,
    sinks: Array | None,
    form: Form,
    *,
    cuts: int | None = None,
    interpret: bool = False,
) -> Array:
    """Attention of one query a row, written over q.

    q [T, kv_heads, G, D]; cache [pages, page, kv_heads * 2 * D]; sinks [kv_heads * G] or None; cuts: parts of an item's
    keys, a power of two, as `parts` has it if left out. Returns [T, kv_heads, G, D].
    """
    heads, group, head = q.shape[1:]
    count = items.token.shape[0]
    cuts = parts(count, heads) if cuts is None else cuts
    flat, lines = _flat(q, cache)
    given = (jnp.stack([*items, pages.base[items.row]], 1), pages.table, pages.at, *_sinks(sinks))
    block = min(BLOCK, EXACT[1]) if sizes(q.dtype, cache.dtype) == EXACT else BLOCK
    shape = _Shape(heads=heads, group=group, page=cache.shape[1], block=block, sunk=sinks is not None)
    body = partial(_single, form=form, shape=shape, cuts=cuts)
    like = jax.ShapeDtypeStruct(flat.shape, flat.dtype)
    call = partial(_call, name="single", grid=(heads, cuts, count), warps=4, interpret=interpret)
    if cuts == 1:
        return call(body, (*given, lines, flat), like, over=len(given) + 1).reshape(q.shape)
    rows = count * cuts * heads * group
    partial_sums = (
        jax.ShapeDtypeStruct((rows, head), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    sums, weights = call(body, (*given, lines, flat), partial_sums)
    join = partial(_join, cuts=cuts, many=heads * group)
    grid = (heads * group, count)
    out = _call(
        join, (given[0], sums, weights, flat), like, over=3, name="join", grid=grid, warps=1, interpret=interpret
    )
    return out.reshape(q.shape)


@partial(jax.jit, static_argnames=("form", "interpret"))
def tiled(
    q: Array,
    cache: Array,
    tiles: Tiles,
    pages: Pages,
    sinks: Array | None,
    form: Form,
    *,
    interpret: bool = False,
) -> Array:
    """Attention of tiles of `width(G, rows)` queries, rows as `sizes` has them, written over q.
    Shapes as `single` has them."""
    heads, group = q.shape[1:3]
    flat, lines = _flat(q, cache)
    given = (jnp.stack([*tiles, pages.base[tiles.row]], 1), pages.table, pages.at, *_sinks(sinks))
    rows, block = sizes(q.dtype, cache.dtype)
    shape = _Shape(heads=heads, group=group, page=cache.shape[1], block=block, sunk=sinks is not None)
    body = partial(_tile, form=form, shape=shape, rows=rows)
    like = jax.ShapeDtypeStruct(flat.shape, flat.dtype)
    grid = (heads, tiles.row.shape[0])
    out = _call(
        body,
        (*given, lines, flat),
        like,
        over=len(given) + 1,
        name="tile",
        grid=grid,
        warps=4,
        stages=3,
        interpret=interpret,
    )
    return out.reshape(q.shape)


def plan_tiles(length: Array, first: Array, before: Array, tokens: int, size: int) -> Tiles:
    """Cut rows of more than one token into tiles of `size`, on the device. length, first, before int32[R]: tokens of a
    row, its first token, cached positions before it; tokens: of the bucket. As many tiles as any step of the bucket can
    need."""
    counts = jnp.where(length > 1, (length + size - 1) // size, 0)
    ends = jnp.cumsum(counts)
    tile = jnp.arange(tokens // size + min(length.shape[0], tokens // 2), dtype=jnp.int32)
    row = jnp.minimum((ends[None, :] <= tile[:, None]).sum(1, dtype=jnp.int32), length.shape[0] - 1)
    begin = (tile - (ends - counts)[row]) * size
    count = jnp.where(tile < ends[-1], jnp.clip(length[row] - begin, 0, size), 0)
    return Tiles(row, first[row] + begin, count, before[row] + begin)


def _flat(q: Array, cache: Array) -> tuple[Array, Array]:
    """Queries as [T * q_heads, D], and the cache as one line a token: views, that nothing is copied for."""
    return q.reshape(-1, q.shape[-1]), cache.reshape(-1, cache.shape[-1])


def _sinks(sinks: Array | None) -> tuple[Array, ...]:
    return () if sinks is None else (sinks.astype(jnp.float32),)


def _call(
    body: Callable[..., None],
    given: tuple[Array, ...],
    out: Any,
    *,
    name: str,
    grid: tuple[int, ...],
    warps: int,
    interpret: bool,
    over: int | None = None,
    stages: int = 2,
) -> Any:
    """Run a kernel whose references are whole arrays. over: which of those given the output replaces. stages:
    turns whose loads are under way at once."""
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=grid,
        input_output_aliases={} if over is None else {over: 0},
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=f"paged_{name}",
    )(*given)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What a kernel is written for. heads: kv heads; group: query heads of each; block: keys of a turn; sunk: whether
    there are sinks."""

    heads: int
    group: int
    page: int
    block: int
    sunk: bool


class _Sight(NamedTuple):
    """Which keys a program's queries see. position [M, 1]: of each query; low, high: the least and the last key that
    any of them sees; full: keys below it are seen by all, where there is no window."""

    position: Any
    low: Any
    high: Any
    full: Any


def _attend(
    q: Array,
    refs: tuple[Any, Any, Any],
    row: Array,
    base: Array,
    sight: _Sight,
    begin: Array,
    end: Array,
    start: tuple[Array, Array],
    head: Array,
    form: Form,
    shape: _Shape,
) -> tuple[Array, Array, Array]:
    """The queries q [M, D] over blocks begin <= j < end of keys. start: top and total [M] before any key. Gives the top
    score, the total and the sum of values, unscaled: [M], [M], [M, D]."""
    table, at, cache = refs
    size, entries, page, block = q.shape[1], table.shape[1], shape.page, shape.block
    kind = jnp.promote_types(q.dtype, cache.dtype)
    exact = jax.lax.Precision.HIGHEST if kind == jnp.float32 else jax.lax.Precision.DEFAULT
    first_page, q = at[0], q.astype(kind)
    side = (head * 2 * size + jnp.arange(size, dtype=jnp.int32))[None, :]

    def product(x: Array, y: Array, dim: int) -> Array:
        dims = ((1,), (dim,)), ((), ())
        return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)

    def turn(j: Array, carry: tuple[Array, Array, Array], *, edge: bool) -> tuple[Array, Array, Array]:
        top, total, acc = carry
        key = j * block + jnp.arange(block, dtype=jnp.int32)
        held = plt.load(table.at[row, jnp.clip((key - base) // page, 0, entries - 1)])
        line = (held + first_page) * page + key % page
        read = ((key >= sight.low) & (key <= sight.high))[:, None] if edge else None
        other = 0.0 if edge else None
        k = plt.load(cache.at[line[:, None], side], mask=read, other=other).astype(kind)
        s = product(q, k, 1) * form.scale
        if form.cap is not None:
            s = form.cap * jnp.tanh(s / form.cap)
        s = s * LOG2E
        if edge:
            seen = key[None, :] <= sight.position
            if form.window is not None:
                seen = seen & (key[None, :] > sight.position - form.window)
            s = jnp.where(seen, s, FAR)
        # where a query saw nothing yet, top is FAR and p is 1: the first real score fades that to nothing
        peak = jnp.maximum(top, s.max(1))
        p, fade = jnp.exp2(s - peak[:, None]), jnp.exp2(top - peak)
        v = plt.load(cache.at[line[:, None], side + size], mask=read, other=other).astype(kind)
        acc = acc * fade[:, None] + product(p.astype(kind), v, 0)
        return peak, total * fade + p.sum(1), acc

    carry = (*start, jnp.zeros(q.shape, jnp.float32))
    inner = begin
    if form.window is None:  # with one, blocks have an edge at either end
        inner = jnp.clip(sight.full // block, begin, end)
        carry = jax.lax.fori_loop(begin, inner, partial(turn, edge=False), carry)
    return jax.lax.fori_loop(inner, end, partial(turn, edge=True), carry)


def _blocks(sight: _Sight, block: int) -> tuple[Array, Array]:
    """The blocks of keys that a program reads: first, and one past the last."""
    return jnp.maximum(sight.low, 0) // block, sight.high // block + 1


def _start(sinks: Any, index: Array, mine: Array) -> tuple[Array, Array]:
    """Top and total before any key: a sink is seen first, with a value of nothing. index int32[M]: the query head of a
    row; mine bool[M]: whether there is one."""
    if sinks is None:
        return jnp.full(mine.shape, FAR, jnp.float32), jnp.zeros(mine.shape, jnp.float32)
    return plt.load(sinks.at[index], mask=mine, other=0.0) * LOG2E, jnp.ones(mine.shape, jnp.float32)


def _write(places: Any, at: Any, k: Any, v: Any, cache: Any, out: Any, *, size: int, page: int) -> None:
    """A program: one token. cache is where the output goes."""
    del cache
    i = pl.program_id(0)
    many = k.shape[1]
    r = jnp.arange(pl.next_power_of_2(many), dtype=jnp.int32)
    line = (places[i, 0] + at[0]) * page + places[i, 1]
    to = r // size * 2 * size + r % size

    @pl.when(places[i, 0] >= 0)
    def _() -> None:
        for side, one in enumerate((k, v)):
            plt.store(out.at[line, to + side * size], plt.load(one.at[i, r], mask=r < many), mask=r < many)


def _lines(ref: Any, index: Array) -> Any:
    """Lines index int32[M] of a reference [N, D]."""
    return ref.at[index[:, None], jnp.arange(ref.shape[1], dtype=jnp.int32)[None, :]]


def _single(items: Any, table: Any, at: Any, *rest: Any, form: Form, shape: _Shape, cuts: int) -> None:
    """A program: one kv head, one part of the keys, one item."""
    sinks, rest = (rest[0], rest[1:]) if shape.sunk else (None, rest)
    cache, q, *out = rest
    heads, group = shape.heads, shape.group
    head, cut, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    token, row, position, base = (items[i, c] for c in range(4))
    rows = max(LEAST, pl.next_power_of_2(group))
    g = jnp.arange(rows, dtype=jnp.int32)
    index, mine = head * group + g, g < group
    low = jnp.int32(0) if form.window is None else position - form.window + 1
    sight = _Sight(position, low, position, position + 1)
    begin, end = _blocks(sight, shape.block)
    each = (end - begin + cuts - 1) // cuts
    begin = jnp.minimum(begin + cut * each, end)
    end = jnp.minimum(begin + each, end)

    @pl.when((position >= 0) & ((end > begin) | (cut == 0)))
    def _() -> None:
        query = plt.load(_lines(q, token * heads * group + index), mask=mine[:, None], other=0.0)
        top, total = _start(sinks, index, mine)
        if cuts > 1 and shape.sunk:  # the first part has the sink; in others its total fades with FAR
            top = jnp.where(cut == 0, top, FAR)
        top, total, acc = _attend(
            query, (table, at, cache), row, base, sight, begin, end, (top, total), head, form, shape
        )
        o = acc / jnp.where(total == 0, 1, total)[:, None]
        if cuts == 1:
            to = _lines(out[0], token * heads * group + index)
            plt.store(to, o.astype(out[0].dtype), mask=mine[:, None])
        else:
            to = (i * cuts + cut) * heads * group + index
            plt.store(_lines(out[0], to), o, mask=mine[:, None])
            plt.store(out[1].at[to], top + jnp.log2(jnp.where(total == 0, 1, total)), mask=mine)

    if cuts > 1:

        @pl.when((position >= 0) & (end <= begin) & (cut > 0))
        def _() -> None:
            to = (i * cuts + cut) * heads * group + index
            plt.store(out[1].at[to], jnp.full(rows, FAR, jnp.float32), mask=mine)


def _join(items: Any, sums: Any, weights: Any, q: Any, out: Any, *, cuts: int, many: int) -> None:
    """A program: one query head of one item, its parts weighed and added. q is where the output goes."""
    del q
    head, i = pl.program_id(0), pl.program_id(1)

    @pl.when(items[i, 2] >= 0)
    def _() -> None:
        at = (i * cuts + jnp.arange(cuts, dtype=jnp.int32)) * many + head
        weight = plt.load(weights.at[at])
        weight = jnp.exp2(weight - weight.max(0))
        # an empty part wrote no sums
        part = plt.load(_lines(sums, at), mask=(weight > 0)[:, None], other=0.0)
        o = (part * weight[:, None]).sum(0) / weight.sum(0)
        plt.store(out.at[items[i, 0] * many + head, :], o.astype(out.dtype))


def _tile(tiles: Any, table: Any, at: Any, *rest: Any, form: Form, shape: _Shape, rows: int) -> None:
    """A program: one kv head of one tile. Row r is query r // g of the tile and query head r % g of the kv head's."""
    sinks, (cache, q, out) = (rest[0], rest[1:]) if shape.sunk else (None, rest)
    heads, group = shape.heads, shape.group
    head, i = pl.program_id(0), pl.program_id(1)
    row, first, count, position, base = (tiles[i, c] for c in range(5))
    near = pl.next_power_of_2(group)
    r = jnp.arange(rows, dtype=jnp.int32)
    query, g = r // near, r % near
    mine = (query < count) & (g < group)
    low = jnp.int32(0) if form.window is None else position - form.window + 1
    last = position + jnp.minimum(query, count - 1)
    sight = _Sight(last[:, None], low, position + count - 1, position + 1)

    @pl.when(count > 0)
    def _() -> None:
        to = (first + query) * heads * group + head * group + g
        asked = plt.load(_lines(q, to), mask=mine[:, None], other=0.0)
        (begin, end), start = _blocks(sight, shape.block), _start(sinks, head * group + g, mine)
        _, total, acc = _attend(asked, (table, at, cache), row, base, sight, begin, end, start, head, form, shape)
        o = acc / jnp.where(total == 0, 1, total)[:, None]
        plt.store(_lines(out, to), o.astype(out.dtype), mask=mine[:, None])
