"""The body of attention: what runs on the chip."""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.blocks import Blocks
from kernels_pallas.cached import narrow, widen

Array: TypeAlias = jax.Array
LANES, SUBLANES = 128, 8
FAR = -1e30
"""Score of what a query does not see: finite, so that no difference of scores is NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is fixed when a call is compiled. head: head_dim; entries: of a row's page table; page: tokens; scaled: the
    cache holds numbers over their scales."""

    q_heads: int
    kv_heads: int
    head: int
    page: int
    entries: int
    scale: float = 1.0
    window: int | None = None
    cap: float | None = None
    scaled: bool = False
    blocks: Blocks | None = None

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


class Refs(NamedTuple):
    """What the kernel reads and writes. Of each row of a query, heads holds its sink and the scales of its keys and its
    values. Buffers have two halves; done: semaphores of (queries, keys, output)."""

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
    heads: Any
    out: Any
    asked: Any
    keys: Any
    made: Any
    query: Any
    top: Any
    sum: Any
    acc: Any
    done: Any


def kernel(form: Form, r: Refs) -> None:
    """All tiles of a call, one after the other."""
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
    """First and last key that some query of tile i sees. A row that outlives its page table sees no further."""
    high = jnp.minimum(r.position[i] + r.count[i], r.base[r.row[i]] + form.entries * form.page) - 1
    low = jnp.clip(r.position[i] - form.window + 1, 0, high) if form.window else jnp.int32(0)
    return low, high


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

    many, row = keys // page, r.row[i]
    entry = row * form.entries - r.base[row] // page if start else 0

    def one(p: Array, _: None) -> None:
        source = r.table[entry + p] + r.at[0] if start else 0
        into = r.keys.at[half, pl.ds(pl.multiple_of(p * page - b * keys, page), page)]
        copy = pltpu.make_async_copy(r.cache.at[source], into, r.done.at[1, half])
        copy.start() if start else copy.wait()

    whole = last - first + 1 == many

    @pl.when(whole)
    def _() -> None:
        if not start:  # semaphores count bytes
            pltpu.make_async_copy(r.keys.at[half], r.keys.at[half], r.done.at[1, half]).wait()
            return
        for k in range(many):  # without a loop's jumps: scalars of a page are few, and there are many pages
            source = r.cache.at[r.table[entry + b * many + k] + r.at[0]]
            pltpu.make_async_copy(source, r.keys.at[half, pl.ds(k * page, page)], r.done.at[1, half]).start()

    @pl.when(~whole)
    def _() -> None:
        jax.lax.fori_loop(first, last + 1, one, None)


def _clear(form: Form, r: Refs, i: Array, b: Array, half: Array) -> None:
    """Zero what of the first and the last page no query of tile i sees: it may be NaN."""
    low, high = _reach(form, r, i)
    page, begin = form.page, b * form.blocks.keys

    def clear(page_of: Array) -> None:
        at = page_of // page * page - begin
        into = pl.ds(pl.multiple_of(at, page), page)
        key = jax.lax.broadcasted_iota(jnp.int32, (page, form.line), 0) + at + begin
        lines = widen(r.keys[half, into, :])
        r.keys[half, into, :] = narrow(jnp.where((key >= low) & (key <= high), lines, 0), r.keys.dtype)

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
        if form.scaled:
            x *= _wide(_each(form, r, 1, j, size), wide)
        parts = [jnp.where(head == k, x, 0) for k in range(form.fold)] if form.fold > 1 else [x]
        r.query[j, : size * rows, :] = jnp.concatenate(parts, axis=1).astype(r.query.dtype)
        r.top[j, : size * rows, :] = _each(form, r, 0, j, size)
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


def _each(form: Form, r: Refs, what: int, j: int, size: int) -> Array:
    """What r.heads holds of product j, for each of `size` queries: [size * rows, LANES]."""
    return jnp.concatenate([r.heads[what, j * form.rows : (j + 1) * form.rows, :]] * size, axis=0)


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
        if form.scaled:
            o *= _wide(_each(form, r, 2, j, size), wide)
        r.made[half, :size, j * rows : (j + 1) * rows, :] = o.reshape(size, rows, wide).astype(r.made.dtype)
