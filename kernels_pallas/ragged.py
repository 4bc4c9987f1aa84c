"""The body of attention: what runs on the chip, tile by tile, and what is copied meanwhile."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.cached import narrow, widen
from kernels_pallas.form import Form, Refs
from kernels_pallas.large import attend_large, begin_large, finish_large, reset
from kernels_pallas.softmax import attend, begin, finish

Array: TypeAlias = jax.Array


def kernel(form: Form, r: Refs) -> None:
    """All tiles of a call, one after the other."""
    total = r.total[0]
    # what no copy fills is multiplied by 0: it must be a number
    r.keys[...] = jnp.zeros(r.keys.shape, r.keys.dtype)
    if form.large(form.most):
        for u in range(form.ahead):
            reset(form, r, u)

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
    low, high = _reach(form, r, i)
    first, last = _span(form, r, i)
    if form.large(size):
        begin_large(form, r, i % 2)
    else:
        begin(form, r, i, size)

    def block(b: Array, turn: Array) -> Array:
        half = turn % 2
        ends = b == last
        then = jnp.where(ends, i + 1, i)

        @pl.when(then < r.total[0])
        def _() -> None:
            _fetch(form, r, then, jnp.where(ends, _span(form, r, then)[0], b + 1), 1 - half, start=True)

        _fetch(form, r, i, b, half, start=False)
        _clear(form, r, i, b, half)
        if form.large(size):
            attend_large(form, r, i, b, (low, high), half)
        else:
            attend(form, r, i, b, half, size)
        return turn + 1

    jax.lax.fori_loop(first, last + 1, block, turn)

    @pl.when(i >= 2)
    def _() -> None:
        _give(r, i - 2, start=False)

    if form.large(size):
        finish_large(form, r, i % 2, high // form.step - low // form.step + 1)
    else:
        finish(form, r, i % 2, size)
    _give(r, i, start=True)


def _reach(form: Form, r: Refs, i: Array) -> tuple[Array, Array]:
    """First and last key that some query of tile i may see. A row that outlives its page table sees no further; any
    guess of a tree may stand right after the row's first token."""
    high = jnp.minimum(r.position[i] + r.count[i], r.base[r.row[i]] + form.entries * form.page) - 1
    if not form.window:
        return jnp.int32(0), high
    first = jnp.minimum(r.position[i], r.root[r.row[i]]) if form.tree else r.position[i]
    return jnp.clip(first - form.window + 1, 0, high), high


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
