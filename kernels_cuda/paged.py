"""Ragged paged attention in Triton: rows of a few queries with their keys cut into parts, and tiles of longer rows.

A program owns one kv head of a tile of queries: all query heads that share the kv head are rows of one matrix product,
so keys and values are read once for all of them. Online softmax in float32, in powers of two. Lengths are read on the
device: the grid follows from numbers that bound them, and what is left over returns at once. What no query sees may
hold anything, NaN too: it is not loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels_cuda.overlap import ready, wait

PLAIN, FLOAT8, BITS8, INT8 = (tl.constexpr(i) for i in range(4))
"""How the store is read: in the dtype of the queries; bytes of float8_e4m3fn, by the hardware or by hand; int8."""


@triton.jit
def widen(x, KIND: tl.constexpr, dtype: tl.constexpr):
    """Stored numbers as the dtype of the queries, without their scale; exact."""
    if KIND == BITS8:  # e4m3 in the upper bits of float16, whose exponents begin 8 lower
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        found = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((x & 0x7F) == 0x7F, float("nan"), found).to(dtype)
    if KIND == FLOAT8:
        return x.to(tl.float8e4nv, bitcast=True).to(dtype)
    if KIND == INT8:
        return x.to(tl.float32).to(dtype)
    return x.to(dtype)


@triton.jit
def turn(
    q, acc, peak, total, line, keys, n, end, position, scale, cap,
    STEP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, KV_HEADS: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, KIND: tl.constexpr, NARROW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys n .. n + STEP - 1 of a row, n a multiple of STEP. line: its page table; keys: entry 0 of the store
    at this head; end: entries that the row has; position [M]: of each query, in entries."""
    WIDE: tl.constexpr = q.shape[1]
    LINE: tl.constexpr = 2 * KV_HEADS * DIM
    i = tl.arange(0, STEP)
    d = tl.arange(0, WIDE)
    entry = n + i
    if STEP % PAGE == 0:  # all but the pages' numbers is the same in every turn
        cell, inside = line + n // PAGE + i // PAGE, i % PAGE
    else:
        cell, inside = line + entry // PAGE, entry % PAGE
    if MASKED:
        page = tl.load(cell, mask=entry < end, other=0)
    else:
        page = tl.load(cell)
    if NARROW:
        at = keys + ((page * (PAGE * LINE))[:, None] + ((inside * LINE)[:, None] + d[None, :]))
    else:
        at = keys + (page.to(tl.int64) * (PAGE * LINE))[:, None] + ((inside * LINE)[:, None] + d[None, :])
    there = (entry < end)[:, None] & (d < DIM)[None, :]
    if MASKED:
        k = tl.load(at, mask=there, other=0)
    elif DIM < WIDE:
        k = tl.load(at, mask=(d < DIM)[None, :], other=0)
    else:
        k = tl.load(at)
    s = tl.dot(q, tl.trans(widen(k, KIND, q.dtype)), input_precision="ieee")
    if CAPPED:  # tanh by powers of two: scale comes as 2 x log2(e) / cap
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(s * scale)))
    if MASKED:
        seen = (entry[None, :] <= position[:, None]) & (entry < end)[None, :]
        if WINDOW > 0:
            seen = seen & (entry[None, :] > position[:, None] - WINDOW)
        s = tl.where(seen, s, -float("inf"))
    by = 1.0 if CAPPED else scale  # one operation with the subtraction
    top = tl.maximum(peak, tl.max(s, 1) * by)
    if MASKED:
        safe = tl.where(top == -float("inf"), 0.0, top)
    else:
        safe = top
    p = tl.exp2(s * by - safe[:, None])
    fade = tl.exp2(peak - safe)
    at += KV_HEADS * DIM
    if MASKED:
        v = tl.load(at, mask=there, other=0)
    elif DIM < WIDE:
        v = tl.load(at, mask=(d < DIM)[None, :], other=0)
    else:
        v = tl.load(at)
    v = widen(v, KIND, q.dtype)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, top, total * fade + tl.sum(p, 1)


FREE = ("rows", "width", "skip")
LOOSE = ("first", "start", "base", "table", "sinks", "scales")
"""What must not make another compiled kernel: numbers of a step, and where its tensors happen to lie."""


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=LOOSE)
def paged(
    q, store, out, part, stat, first, start, base, table, sinks, scales,
    rows, width, skip, scale, cap,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, SCALED: tl.constexpr, KIND: tl.constexpr,
    NARROW: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr, SHORT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid KV_HEADS * SPLITS * (rows if SHORT, else tiles).

    q, out [T, Q_HEADS, DIM]; store [entries, 2, KV_HEADS, DIM]; part float32[T, Q_HEADS, SPLITS, DIM] and
    stat float32[T, Q_HEADS, SPLITS, 2] where SPLITS > 1: sums of values that are not divided yet; peak and total.
    first int32[R + 1], start, base int32[R], table int32[R, width]. rows: SHORT: those of at most ROWS // GROUP tokens
    that lead; else all R, of which the first `skip` are left out. scale, cap: times log2(e), as `turn` wants them.
    NARROW: the store has fewer than 2**31 numbers. ROWS: of a matrix product, queries
    times heads; STEP: keys of a turn.
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    QUERIES: tl.constexpr = ROWS // GROUP
    wait(OVERLAP)
    head = tl.program_id(0) % KV_HEADS
    rest = tl.program_id(0) // KV_HEADS
    split = rest % SPLITS
    tile = tl.num_programs(0) // (KV_HEADS * SPLITS) - 1 - rest // SPLITS  # the longest come last, and go first
    if SHORT:
        r, before = tile, 0
        begin = tl.load(first + r)
    else:  # a row's tiles begin at its tokens before it // QUERIES + rows before it: never too few
        offset = tl.load(first + skip)
        low, high = skip, rows - 1
        while low < high:
            middle = (low + high + 1) // 2
            if (tl.load(first + middle) - offset) // QUERIES + middle - skip <= tile:
                low = middle
            else:
                high = middle - 1
        r = low
        begin = tl.load(first + r)
        before = (tile - (begin - offset) // QUERIES - (r - skip)) * QUERIES
    count = tl.load(first + r + 1) - begin
    if before < count:
        m = tl.arange(0, ROWS)
        d = tl.arange(0, WIDE)
        query = before + m // GROUP
        token = begin + query
        real = (query < count) & (m < QUERIES * GROUP)
        heads = head * GROUP + m % GROUP
        place = (token.to(tl.int64) * Q_HEADS + heads)[:, None] * DIM + d[None, :]
        stored = real[:, None] & (d < DIM)[None, :]
        loaded = tl.load(q + place, mask=stored, other=0)
        if KIND == FLOAT8 and loaded.dtype == tl.bfloat16:  # what float8 turns into at once; p and values fit it
            wide = loaded.to(tl.float32)
            wide = tl.where(wide > 65504.0, 65504.0, tl.where(wide < -65504.0, -65504.0, wide))
            loaded = wide.to(tl.float16)
        bottom = tl.load(base + r)
        length = tl.load(start + r) - bottom  # entries before the step
        position = length + query
        end = length + tl.minimum(before + QUERIES, count)
        low_key = 0
        if WINDOW > 0:
            low_key = tl.maximum(length + before - WINDOW + 1, 0) // STEP * STEP
        if SPLITS > 1:
            each = tl.cdiv(tl.cdiv(end - low_key, STEP), SPLITS) * STEP
            low_key += split * each
            end = tl.minimum(end, low_key + each)
        peak = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if SINKS:
            sink = tl.load(sinks + heads, mask=real, other=0).to(tl.float32) * 1.4426950408889634
            if SPLITS == 1:
                peak, total = sink, total + 1.0
            else:
                peak = tl.where(split == 0, sink, peak)
                total = tl.where(split == 0, 1.0, total)
        if SCALED:
            scale = scale * tl.load(scales + head)
        acc = tl.zeros([ROWS, WIDE], tl.float32)
        line = table + r.to(tl.int64) * width
        keys = store + head * DIM
        middle_key = low_key
        if WINDOW == 0 and not SHORT:  # blocks that every query sees whole
            whole = tl.minimum(length + before + 1, end) // STEP * STEP
            middle_key = tl.maximum(whole, low_key)
            for n in tl.range(low_key, middle_key, STEP):
                acc, peak, total = turn(
                    loaded, acc, peak, total, line, keys, n, end, position, scale, cap,
                    STEP, DIM, PAGE, KV_HEADS, WINDOW, CAPPED, KIND, NARROW, False,
                )  # fmt: skip
        for n in tl.range(middle_key, end, STEP):
            acc, peak, total = turn(
                loaded, acc, peak, total, line, keys, n, end, position, scale, cap,
                STEP, DIM, PAGE, KV_HEADS, WINDOW, CAPPED, KIND, NARROW, True,
            )  # fmt: skip
        ready(OVERLAP)  # not before: what waits would take the room of programs that are still to come
        if SCALED:
            acc = acc * tl.load(scales + KV_HEADS + head)
        if SPLITS == 1:
            tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=stored)
        else:
            flat = (token.to(tl.int64) * Q_HEADS + heads) * SPLITS + split
            some = SINKS or low_key < end  # else nothing was added up, and the peak tells
            tl.store(part + flat[:, None] * DIM + d[None, :], acc, mask=stored & some)
            tl.store(stat + flat * 2, peak, mask=real)
            tl.store(stat + flat * 2 + 1, total, mask=real)
