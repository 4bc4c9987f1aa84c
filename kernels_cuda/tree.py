"""Attention of rows that read the same pages, in Triton: tiles of shared keys, parts of each row's own, and their sum.

A program owns a kv head. Of a tile it multiplies all query heads that share the kv head, of all rows of the tile, at
once, so that keys and values are read once for them; of a part, those of one row. A tile's queries see all of its keys.
What a program makes goes to a slot of each row: values that are not divided yet, then peak and total.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels_cuda.paged import turn


@triton.jit
def scan(
    q, store, sums, stats, scales, token, heads, real, line, head, slot, slots, low, whole, end, scale, cap,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    CAPPED: tl.constexpr, SCALED: tl.constexpr, KIND: tl.constexpr, NARROW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Queries (token, heads) [M] over the keys low .. end - 1 of a table, low the begin of a page; from `whole` on
    blocks may not be full."""
    M: tl.constexpr = token.shape[0]
    d = tl.arange(0, WIDE)
    stored = real[:, None] & (d < DIM)[None, :]
    loaded = tl.load(q + (token.to(tl.int64) * Q_HEADS + heads)[:, None] * DIM + d[None, :], mask=stored, other=0)
    if SCALED:
        scale = scale * tl.load(scales + head)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDE], tl.float32)
    position = tl.zeros([M], tl.int32) + end
    keys = store + head * DIM
    for n in tl.range(low, whole, STEP):
        acc, peak, total = turn(
            loaded, acc, peak, total, line, keys, n, end, position, scale, cap,
            STEP, DIM, PAGE, KV_HEADS, 0, CAPPED, KIND, NARROW, False,
        )  # fmt: skip
    for n in tl.range(whole, end, STEP):
        acc, peak, total = turn(
            loaded, acc, peak, total, line, keys, n, end, position, scale, cap,
            STEP, DIM, PAGE, KV_HEADS, 0, CAPPED, KIND, NARROW, True,
        )  # fmt: skip
    if SCALED:
        acc = acc * tl.load(scales + KV_HEADS + head)
    at = (token.to(tl.int64) * slots + slot) * Q_HEADS + heads
    tl.store(sums + at[:, None] * DIM + d[None, :], acc, mask=stored)
    tl.store(stats + at * 2, peak, mask=real)
    tl.store(stats + at * 2 + 1, total, mask=real)


FREE = ("count", "width", "slots", "parts")
LOOSE = ("first", "start", "table", "tiles", "covered", "used", "scales", "sinks")
"""What must not make another compiled kernel: numbers of a step, and where its tensors happen to lie."""


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=LOOSE)
def tree(
    q, store, sums, stats, first, start, table, tiles, covered, used, scales,
    count, width, slots, parts, scale, cap,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    CAPPED: tl.constexpr, SCALED: tl.constexpr, KIND: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid KV_HEADS * (count + R * parts): tiles come first, then `parts` parts of each row.

    q [T, Q_HEADS, DIM]; store [entries, 2, KV_HEADS, DIM]; sums float32[R, slots + parts, Q_HEADS, DIM] and
    stats float32[R, slots + parts, Q_HEADS, 2]: by token. first int32[R + 1], start int32[R], table int32[R, width];
    tiles int32[count, 5], covered and used int32[R]: of kernels_cuda.cascade.Tiles. scale, cap: as
    kernels_cuda.paged.turn wants them. NARROW: as there. ROWS, OWN: of the products of a tile and of a part, queries
    times heads; STEP: keys of a turn.
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    item = tl.program_id(0) // KV_HEADS
    if item < count:
        tile = tiles + item * 5
        size = tl.load(tile + 1)
        if size > 0:
            r = tl.load(tile)
            low = tl.load(tile + 2)
            end = tl.load(tile + 3)
            m = tl.arange(0, ROWS)
            real = m < size * GROUP
            token = tl.load(first + r + m // GROUP, mask=real, other=0)
            scan(
                q, store, sums, stats, scales, token, head * GROUP + m % GROUP, real,
                table + r.to(tl.int64) * width, head, tl.load(tile + 4), slots + parts,
                low, low + (end - low) // STEP * STEP, end, scale, cap,
                Q_HEADS, KV_HEADS, DIM, WIDE, PAGE, CAPPED, SCALED, KIND, NARROW, STEP,
            )  # fmt: skip
    else:
        r = (item - count) // parts
        part = (item - count) % parts
        begin = tl.load(first + r)
        if tl.load(first + r + 1) > begin:
            low = tl.load(covered + r)
            end = tl.load(start + r) + 1
            each = tl.cdiv(tl.cdiv(end - low, STEP), parts) * STEP
            low += part * each
            end = tl.minimum(end, low + each)
            if low < end:
                m = tl.arange(0, OWN)
                token = tl.zeros([OWN], tl.int32) + begin
                scan(
                    q, store, sums, stats, scales, token, head * GROUP + m % GROUP, m < GROUP,
                    table + r.to(tl.int64) * width, head, slots + part, slots + parts, low, low, end, scale, cap,
                    Q_HEADS, KV_HEADS, DIM, WIDE, PAGE, CAPPED, SCALED, KIND, NARROW, STEP,
                )  # fmt: skip


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=LOOSE)
def join(
    sums, stats, out, first, start, covered, used, sinks, slots, parts,
    Q_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (R, Q_HEADS): adds up the slots of a row that `tree` filled. out [T, Q_HEADS, DIM]."""
    r = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(first + r)
    if tl.load(first + r + 1) > token:
        d = tl.arange(0, WIDE)
        own = tl.load(start + r) + 1 - tl.load(covered + r)
        filled = tl.load(used + r)
        last = tl.cdiv(own, tl.cdiv(tl.cdiv(own, STEP), parts) * STEP)
        peak, total = -float("inf"), 0.0
        if SINKS:  # seen before any key, with a value of nothing
            peak, total = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634, 1.0
        acc = tl.zeros([WIDE], tl.float32)
        for i in range(filled + last):
            slot = tl.where(i < filled, i, slots + i - filled)
            at = (token.to(tl.int64) * (slots + parts) + slot) * Q_HEADS + head
            its = tl.load(stats + at * 2)
            top = tl.maximum(peak, its)
            fade = tl.exp2(peak - top)
            weight = tl.exp2(its - top)
            acc = acc * fade + weight * tl.load(sums + at * DIM + d, mask=d < DIM, other=0)
            total = total * fade + weight * tl.load(stats + at * 2 + 1)
            peak = top
        to = out + (token.to(tl.int64) * Q_HEADS + head) * DIM + d
        tl.store(to, (acc / total).to(out.dtype.element_ty), mask=d < DIM)
