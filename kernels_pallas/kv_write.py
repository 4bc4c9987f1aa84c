"""Keys and values of a step into their pages: read, merged and written a page at a time.

A page belongs to one row of a step, so pages are independent; several are on their way at once. A token is one line of
a page, and lines of bfloat16 share registers by two, of 8 bits by four: whole pages move, and the merge happens in 32
bits, where lines can be turned by any number. Pages that a step fills whole are not read.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.cached import TYPES, narrow, widen
from kernels_pallas.chip import Chip, chip

Array: TypeAlias = jax.Array
RING, AHEAD = 8, 4
"""Pages in VMEM, and how many of them are being read."""
STEP = 16
"""Copies of lines start at multiples of it, in caches of 16 or 32 bits a number."""
PART = 32 * 1024
"""Numbers of lines that are merged at once: registers hold twice as many, and whole pages would spill."""


class Spots(NamedTuple):
    """Pages that a step writes, each at most once. page int32[M]: -1 = none; token int32[M]: the token that would stand
    in the page's first place, perhaps before the first one; first, last int32[M]: the places [first, last) are written.
    total int32[]: how many there are."""

    page: Any
    token: Any
    first: Any
    last: Any
    total: Any


class Refs(NamedTuple):
    """What the kernel reads and writes. done: semaphores of (lines, pages read, pages written)."""

    page: Any
    token: Any
    first: Any
    last: Any
    total: Any
    at: Any
    lines: Any
    given: Any
    cache: Any
    fresh: Any
    held: Any
    done: Any


def step(dtype: str) -> int:
    """Copies of lines start at multiples of it: lines of 8 bits share a register by four, of 16 bits by two."""
    return 2 * STEP if TYPES[dtype] == 1 else STEP


def supports(*, page: int, line: int, dtype: str, on: Chip | None = None) -> str:
    """Why the kernel can't be compiled; nothing where it can. line: numbers of one token."""
    on = on or chip()
    if dtype not in TYPES:
        return f"a {dtype} cache is not built"
    if page % step(dtype) or line % 128:
        return f"pages of {page} lines of {line} are no multiple of {step(dtype)} lines of 128"
    need = vmem(page, line, TYPES[dtype])
    if need > on.vmem // 2:
        return f"{RING} pages of {page} x {line} take {need} bytes, {on.name} has {on.vmem} of VMEM"
    return ""


def part(lines: int, line: int) -> int:
    """Numbers of a line that are merged at once: the most of 128 to 1,024 that divide it and that PART allows."""
    return next(n for n in (1024, 512, 256, 128) if n == 128 or (line % n == 0 and lines * n <= PART))


def vmem(page: int, line: int, size: int) -> int:
    """Bytes of the buffers. size: of a number."""
    return RING * (2 * page + (2 if size == 1 else 1) * STEP) * line * size


def write(lines: Array, cache: Array, spots: Spots, at: Any, *, interpret: Any = False) -> Array:
    """Put lines [T, L] into the cache [pages, page, L], in place where it is donated. at: added to pages.

    Lines are what the cache is to hold: of 8 bits, numbers over their scales. Raises ValueError for what can't be
    compiled.
    """
    page, line = cache.shape[1:]
    why = supports(page=page, line=line, dtype=str(cache.dtype))
    if why:
        raise ValueError(f"kv_write: {why}")
    # whatever place a page begins at, what is copied for it is there
    lines = lines.astype(cache.dtype)
    unit = step(str(cache.dtype))
    lines = jnp.pad(lines, ((page, page + unit + (-lines.shape[0]) % unit), (0, 0)))
    count, size = spots.page.shape[0], cache.dtype.itemsize
    call = pl.pallas_call(
        lambda *refs: _kernel(page, unit, Refs(*refs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((RING, page + unit, line), cache.dtype),
                pltpu.VMEM((RING, page, line), cache.dtype),
                pltpu.SemaphoreType.DMA((3, RING)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={7: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=chip().vmem * 3 // 4),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=count * (3 * page + unit) * line * size
        ),
        interpret=interpret,
        name="kv_write",
    )
    numbers = [jnp.asarray(x, jnp.int32).reshape(-1) for x in (*spots, at)]
    return call(*numbers, lines, cache)


def _kernel(page: int, unit: int, r: Refs) -> None:
    total = r.total[0]

    def begin(i: Array, _: None) -> None:
        _read(page, unit, r, i, start=True)

    jax.lax.fori_loop(0, jnp.minimum(AHEAD, total), begin, None)

    def one(i: Array, _: None) -> None:
        then = i + AHEAD

        @pl.when(then < total)
        def _() -> None:
            @pl.when(then >= RING)
            def _() -> None:
                _write(r, then - RING, start=False)

            _read(page, unit, r, then, start=True)

        _read(page, unit, r, i, start=False)
        _merge(page, unit, r, i)
        _write(r, i, start=True)

    jax.lax.fori_loop(0, total, one, None)

    def end(i: Array, _: None) -> None:
        _write(r, i, start=False)

    jax.lax.fori_loop(jnp.maximum(total - RING, 0), total, end, None)


def _place(page: int, unit: int, r: Refs, i: Array) -> tuple[Array, Array]:
    """Where the copy of a page's lines starts, and how many lines after that the page does."""
    begin = r.token[i] + page
    at = begin // unit * unit
    return pl.multiple_of(at, unit), begin - at


def _read(page: int, unit: int, r: Refs, i: Array, *, start: bool) -> None:
    """Start to copy the lines of page i, and what it holds unless all is new; or wait for them."""
    k = i % RING

    def move(copy: Any) -> None:
        copy.start() if start else copy.wait()

    @pl.when(r.page[i] >= 0)
    def _() -> None:
        at, _ = _place(page, unit, r, i)
        move(pltpu.make_async_copy(r.lines.at[pl.ds(at, page + unit)], r.fresh.at[k], r.done.at[0, k]))

        @pl.when(r.last[i] - r.first[i] < page)
        def _() -> None:
            move(pltpu.make_async_copy(r.cache.at[r.page[i] + r.at[0]], r.held.at[k], r.done.at[1, k]))


def _merge(page: int, unit: int, r: Refs, i: Array) -> None:
    k, lines, (_, _, line) = i % RING, page + unit, r.held.shape
    wide = part(lines, line)

    @pl.when(r.page[i] >= 0)
    def _() -> None:
        _, shift = _place(page, unit, r, i)
        kind = r.held.dtype

        def some(j: Array, _: None) -> None:
            here = pl.ds(pl.multiple_of(j * wide, wide), wide)
            fresh, held = (widen(x[k, :, here]) for x in (r.fresh, r.held))
            fresh = pltpu.roll(fresh, (lines - shift) % lines, 0)[:page]
            place = jax.lax.broadcasted_iota(jnp.int32, fresh.shape, 0)
            merged = jnp.where((place >= r.first[i]) & (place < r.last[i]), fresh, held)
            r.held[k, :, here] = narrow(merged, kind)

        jax.lax.fori_loop(0, line // wide, some, None)


def _write(r: Refs, i: Array, *, start: bool) -> None:
    """Start to copy page i back, or wait for that."""
    k = i % RING

    @pl.when(r.page[i] >= 0)
    def _() -> None:
        copy = pltpu.make_async_copy(r.held.at[k], r.cache.at[r.page[i] + r.at[0]], r.done.at[2, k])
        copy.start() if start else copy.wait()
