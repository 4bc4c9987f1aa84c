"""Ragged paged attention: decode rows, chunks of prompts and rows to verify in one call, from one source.

A loop over tiles (queries of one row) and, in each, over blocks of its keys. Keys and values of the next block, be it
the next tile's, are on their way from the cache while this one is computed. The cache is read as it lies: a page is one
copy, a head's keys are a slice of 128 lanes. Query heads that share a key-value head are rows of one product; where
they are fewer than the 8 rows of a register, `fold` key-value heads are folded into one product of `fold` times the
depth, block-diagonal in the queries: as many weights are pushed, and the softmax works on full registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2, e
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.chip import Chip, chip

Array: TypeAlias = jax.Array
LANES, SUBLANES = 128, 8
FAR = -1e30
"""Score of what a query does not see: finite, so that no difference of scores is NaN."""
SPARE = 16 << 10
"""Bytes of SMEM that tables leave to the compiler."""
TYPES = {"float32": 4, "bfloat16": 2}
"""Caches that can be read, and the bytes of a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """queries: sizes of tiles, rising; a tile runs as the smallest that holds it. keys: of one turn of the loop."""

    queries: tuple[int, ...]
    keys: int


class Tiles(NamedTuple):
    """The work of a step. row, token, count, position int32[N]: a tile is `count` queries of one row, from token
    `token` on, the first of which stands at `position`. total int32[]: how many tiles there are."""

    row: Any
    token: Any
    count: Any
    position: Any
    total: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is fixed when a call is compiled. head: head_dim; entries: of a row's page table; page: tokens."""

    q_heads: int
    kv_heads: int
    head: int
    page: int
    entries: int
    scale: float
    window: int | None
    cap: float | None
    blocks: Blocks

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.q_heads // self.kv_heads

    @property
    def fold(self) -> int:
        """Key-value heads of one product."""
        full = (f for f in range(1, self.kv_heads + 1) if not self.kv_heads % f and not f * self.group % SUBLANES)
        return next(full, self.kv_heads)

    @property
    def products(self) -> int:
        return self.kv_heads // self.fold

    @property
    def rows(self) -> int:
        """Of one query in one product, padded to whole registers."""
        return -(-self.fold * self.group // SUBLANES) * SUBLANES

    @property
    def lanes(self) -> int:
        """Of one head's keys, widened to whole registers: a head of 64 takes its values' lanes along."""
        return -(-self.head // LANES) * LANES

    @property
    def line(self) -> int:
        """Numbers of one token in the cache."""
        return self.kv_heads * 2 * self.head


def supports(
    *, q_heads: int, kv_heads: int, head: int, page: int, rows: int, entries: int, dtype: str, on: Chip | None = None
) -> str:
    """"" where the kernel can be compiled, else why not. rows, entries: of the page tables."""
    on = on or chip()
    if dtype not in TYPES:
        return f"a {dtype} cache is not built"
    if head % 64:
        return f"head {head} is no multiple of 64"
    if q_heads % kv_heads:
        return f"{kv_heads} kv heads do not divide {q_heads} heads"
    if page % (32 // TYPES[dtype]):
        return f"pages of {page} tokens are no multiple of {32 // TYPES[dtype]}, the rows of a {dtype} tile"
    need = 4 * rows * entries + SPARE
    if need > on.smem:
        return f"page tables of {rows} rows x {entries} pages take {need} bytes, {on.name} has {on.smem} of SMEM"
    return ""


def attention(
    q: Array,
    cache: Array,
    tiles: Tiles,
    table: Array,
    base: Array,
    at: Any,
    sinks: Array | None = None,
    *,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    blocks: Blocks,
    interpret: Any = False,
) -> Array:
    """Attend with q [T, q_heads, head_dim] over what the cache holds of each tile's row, up to each query's position.

    cache [pages, page, kv_heads * 2 * head_dim]: of a head first the key, then the value. table int32[R, E], base
    int32[R]: pages of a row, and the position of the first one's first token; at: what is added to pages (the first
    page of a layer). sinks [q_heads]. -> [T, q_heads, head_dim]; tokens that are in no tile hold anything.
    Cached tokens that no query of a tile sees may hold anything, NaN too. Raises ValueError for what can't be compiled.
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
        blocks=blocks,
    )
    why = supports(
        q_heads=form.q_heads,
        kv_heads=kv_heads,
        head=form.head,
        page=form.page,
        rows=table.shape[0],
        entries=form.entries,
        dtype=str(cache.dtype),
    )
    if why:
        raise ValueError(f"attention: {why}")
    kind = jnp.promote_types(q.dtype, cache.dtype)
    spread = _spread(form, q)
    most, rows, depth = blocks.queries[-1], form.rows, form.fold * form.lanes
    held = form.products * rows
    stat = pltpu.VMEM((form.products, most * rows, LANES), jnp.float32)
    call = pl.pallas_call(
        lambda *refs: _kernel(form, Refs(*refs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(1,),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((held, LANES), lambda *_: (0, 0)),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((2, most, held, form.lanes), q.dtype),
                pltpu.VMEM((2, blocks.keys, form.line), cache.dtype),
                pltpu.VMEM((2, most, held, form.lanes), q.dtype),
                pltpu.VMEM((form.products, most * rows, depth), kind),
                stat,
                stat,
                pltpu.VMEM((form.products, most * rows, depth), jnp.float32),
                pltpu.SemaphoreType.DMA((3, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(spread.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=chip().vmem * 3 // 4
        ),
        cost_estimate=cost(form, q.shape[0], tiles.row.shape[0], cache.dtype.itemsize, q.dtype.itemsize),
        interpret=interpret,
        name="attention",
    )
    numbers = [x.astype(jnp.int32) for x in (tiles.row, tiles.token, tiles.count, tiles.position)]
    total, first = (jnp.asarray(x, jnp.int32).reshape(1) for x in (tiles.total, at))
    out = call(*numbers, total, first, table.reshape(-1), base, spread, cache, _sink(form, sinks))
    return _gather(form, out)


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


def _sink(form: Form, sinks: Array | None) -> Array:
    """Of each row of a query its sink as a score in bits, float32[products * rows, LANES]."""
    if sinks is None:
        flat = jnp.full((form.products, form.rows), FAR, jnp.float32)
    else:
        flat = sinks.astype(jnp.float32).reshape(form.products, -1) * log2(e)
        flat = jnp.pad(flat, ((0, 0), (0, form.rows - flat.shape[1])))
    return jnp.broadcast_to(flat.reshape(-1, 1), (flat.size, LANES))


class Refs(NamedTuple):
    """What the kernel reads and writes. Buffers have two halves; done: semaphores of (queries, keys, output)."""

    row: Any
    token: Any
    count: Any
    position: Any
    total: Any
    at: Any
    table: Any
    base: Any
    q: Any
    cache: Any
    sinks: Any
    out: Any
    asked: Any
    keys: Any
    made: Any
    query: Any
    top: Any
    sum: Any
    acc: Any
    done: Any


def _kernel(form: Form, r: Refs) -> None:
    total = r.total[0]
    # what no copy fills is multiplied by 0: it must be a number
    r.keys[...] = jnp.zeros(r.keys.shape, r.keys.dtype)

    @pl.when(total > 0)
    def _() -> None:
        _ask(r, 0, start=True)
        _fetch(form, r, 0, _span(form, r, 0)[0], 0, start=True)

    def tile(i: Array, turn: Array) -> Array:
        _ask(r, i, start=False)

        @pl.when(i + 1 < total)
        def _() -> None:
            _ask(r, i + 1, start=True)

        least = 0
        for size in form.blocks.queries:

            @pl.when((r.count[i] > least) & (r.count[i] <= size))
            def _(size: int = size) -> None:
                _tile(form, r, i, turn, size)

            least = size
        first, last = _span(form, r, i)
        return turn + last - first + 1

    jax.lax.fori_loop(0, total, tile, 0)
    for back in (2, 1):

        @pl.when(total >= back)
        def _(back: int = back) -> None:
            _give(r, total - back, start=False)


def _tile(form: Form, r: Refs, i: Array, turn: Array, size: int) -> None:
    """One tile, computed as `size` queries. turn: blocks before it; the block of turn t is in half t % 2."""
    first, last = _span(form, r, i)
    _begin(form, r, i % 2, size)

    def block(b: Array, turn: Array) -> Array:
        half = turn % 2
        ends = b == last
        then = jnp.where(ends, i + 1, i)

        @pl.when(then < r.total[0])
        def _() -> None:
            _fetch(form, r, then, jnp.where(ends, _span(form, r, then)[0], b + 1), 1 - half, start=True)

        _fetch(form, r, i, b, half, start=False)
        _clear(form, r, i, b, half)
        _attend(form, r, i, b, half, size)
        return turn + 1

    jax.lax.fori_loop(first, last + 1, block, turn)

    @pl.when(i >= 2)
    def _() -> None:
        _give(r, i - 2, start=False)

    _finish(form, r, i % 2, size)
    _give(r, i, start=True)


def _reach(form: Form, r: Refs, i: Array) -> tuple[Array, Array]:
    """First and last key that some query of tile i sees."""
    high = r.position[i] + r.count[i] - 1
    return (jnp.maximum(r.position[i] - form.window + 1, 0) if form.window else jnp.int32(0)), high


def _span(form: Form, r: Refs, i: Array) -> tuple[Array, Array]:
    """First and last block of tile i. Past the last tile: of the last."""
    low, high = _reach(form, r, jnp.minimum(i, r.total[0] - 1))
    return low // form.blocks.keys, high // form.blocks.keys


def _ask(r: Refs, i: Array, *, start: bool) -> None:
    """Start to copy the queries of tile i, or wait for them."""

    def one(t: Array, _: None) -> None:
        copy = pltpu.make_async_copy(r.q.at[r.token[i] + t], r.asked.at[i % 2, t], r.done.at[0, i % 2])
        copy.start() if start else copy.wait()

    jax.lax.fori_loop(0, r.count[i], one, None)


def _give(r: Refs, i: Array, *, start: bool) -> None:
    """Start to copy the output of tile i, or wait for that."""

    def one(t: Array, _: None) -> None:
        copy = pltpu.make_async_copy(r.made.at[i % 2, t], r.out.at[r.token[i] + t], r.done.at[2, i % 2])
        copy.start() if start else copy.wait()

    jax.lax.fori_loop(0, r.count[i], one, None)


def _fetch(form: Form, r: Refs, i: Array, b: Array, half: Array, *, start: bool) -> None:
    """Start to copy the pages of block b that tile i sees, or wait for them."""
    low, high = _reach(form, r, i)
    keys, page = form.blocks.keys, form.page
    first, last = jnp.maximum(low, b * keys) // page, jnp.minimum(high, b * keys + keys - 1) // page

    def one(p: Array, _: None) -> None:
        row = r.row[i]
        source = r.table[row * form.entries + p - r.base[row] // page] + r.at[0] if start else 0
        into = r.keys.at[half, pl.ds(pl.multiple_of(p * page - b * keys, page), page)]
        copy = pltpu.make_async_copy(r.cache.at[source], into, r.done.at[1, half])
        copy.start() if start else copy.wait()

    jax.lax.fori_loop(first, last + 1, one, None)


def _clear(form: Form, r: Refs, i: Array, b: Array, half: Array) -> None:
    """Zero what of the first and the last page no query of tile i sees: it may be NaN."""
    low, high = _reach(form, r, i)
    page, begin = form.page, b * form.blocks.keys

    def clear(page_of: Array) -> None:
        at = page_of // page * page - begin
        into = pl.ds(pl.multiple_of(at, page), page)
        key = jax.lax.broadcasted_iota(jnp.int32, (page, form.line), 0) + at + begin
        lines = r.keys[half, into, :].astype(jnp.float32)
        lines = jnp.where((key >= low) & (key <= high), lines, 0)
        r.keys[half, into, :] = lines.astype(r.keys.dtype)

    @pl.when((high < begin + form.blocks.keys) & ((high + 1) % page != 0))
    def _() -> None:
        clear(high)

    if form.window:

        @pl.when((low >= begin) & (low % page != 0))
        def _() -> None:
            clear(low)


def _begin(form: Form, r: Refs, half: Array, size: int) -> None:
    """The queries of a tile as block-diagonal matrices, and nothing seen but sinks."""
    rows, wide = form.rows, form.lanes
    head = jax.lax.broadcasted_iota(jnp.int32, (size * rows, wide), 0) % rows // form.group
    for j in range(form.products):
        x = r.asked[half, :size, j * rows : (j + 1) * rows, :].astype(jnp.float32).reshape(size * rows, wide)
        parts = [jnp.where(head == k, x, 0) for k in range(form.fold)] if form.fold > 1 else [x]
        r.query[j, : size * rows, :] = jnp.concatenate(parts, axis=1).astype(r.query.dtype)
        sink = r.sinks[j * rows : (j + 1) * rows, :]
        r.top[j, : size * rows, :] = jnp.concatenate([sink] * size, axis=0)
    r.sum[:, : size * rows, :] = jnp.ones((form.products, size * rows, LANES), jnp.float32)
    r.acc[:, : size * rows, :] = jnp.zeros((form.products, size * rows, form.fold * wide), jnp.float32)


def _attend(form: Form, r: Refs, i: Array, b: Array, half: Array, size: int) -> None:
    """One block of keys of tile i: online softmax, in bits (powers of two)."""
    many, keys = size * form.rows, form.blocks.keys
    shape = many, keys
    query = r.position[i] + jax.lax.broadcasted_iota(jnp.int32, shape, 0) // form.rows
    key = b * keys + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = key <= query
    if form.window:
        seen &= key > query - form.window
    kind = r.query.dtype
    exact = jax.lax.Precision.HIGHEST if kind == jnp.float32 else jax.lax.Precision.DEFAULT
    for j in range(form.products):
        k, v = (_part(form, r, half, j, value).astype(kind) for value in (False, True))
        s = jax.lax.dot_general(
            r.query[j, :many, :], k, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
        )
        if form.cap is None:
            s *= form.scale * log2(e)
        else:
            s = jnp.tanh(s * (form.scale / form.cap)) * (form.cap * log2(e))
        s = jnp.where(seen, s, FAR)
        # where a query saw nothing yet, top is FAR and p is 1: the first real score fades that to nothing
        top = r.top[j, :many, :]
        peak = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
        p, fade = jnp.exp2(s - _wide(peak, keys)), jnp.exp2(top - peak)
        r.top[j, :many, :] = peak
        r.sum[j, :many, :] = r.sum[j, :many, :] * fade + jnp.sum(p, axis=1, keepdims=True)
        o = jax.lax.dot_general(
            p.astype(kind), v, (((1,), (0,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
        )
        r.acc[j, :many, :] = r.acc[j, :many, :] * _wide(fade, o.shape[1]) + o


def _part(form: Form, r: Refs, half: Array, j: int, value: bool) -> Array:
    """Keys or values of the heads of product j side by side, [keys, fold * lanes]: slices of whole registers."""
    parts = []
    for h in range(j * form.fold, (j + 1) * form.fold):
        start = (h * 2 + 2) * form.head - form.lanes if value else h * 2 * form.head
        parts.append(r.keys[half, :, start : start + form.lanes])
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _wide(x: Array, lanes: int) -> Array:
    """x [M, LANES], equal in all lanes, as [M, lanes]."""
    return jnp.concatenate([x] * (lanes // LANES), axis=1)


def _finish(form: Form, r: Refs, half: Array, size: int) -> None:
    """Output of a tile: of each row the lanes of its own head, divided by the sum."""
    rows, wide = form.rows, form.lanes
    many = size * rows
    head = jax.lax.broadcasted_iota(jnp.int32, (many, wide), 0) % rows // form.group
    for j in range(form.products):
        acc = r.acc[j, :many, :]
        o = acc[:, :wide]
        for k in range(1, form.fold):
            o = jnp.where(head == k, acc[:, k * wide : (k + 1) * wide], o)
        o = o / _wide(r.sum[j, :many, :], wide)
        r.made[half, :size, j * rows : (j + 1) * rows, :] = o.reshape(size, rows, wide).astype(r.made.dtype)
