"""Causal attention of whole prompts over their own keys, which lie side by side, in Triton; the copy engine brings
them.

As `paged`, but for how keys and values are read, and that a row's first token stands at its first key.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step(
    q, acc, peak, total, keys, values, n, head, first, end, position, scale, STEP: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Add the keys n .. n + STEP - 1 of a row whose first is `first`. From `end` on nothing is seen, not even NaN."""
    DIM: tl.constexpr = q.shape[1]
    k = tl.reshape(keys.load([first + n, head, 0]), [STEP, DIM])
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        s = tl.where((n + tl.arange(0, STEP))[None, :] <= position[:, None], s, -float("inf"))
    top = tl.maximum(peak, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - top[:, None])
    fade = tl.exp2(peak - top)
    v = tl.reshape(values.load([first + n, head, 0]), [STEP, DIM])
    if MASKED:
        v = tl.where((n + tl.arange(0, STEP) < end)[:, None], v, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, top, total * fade + tl.sum(p, 1)


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("first",))
def dense(
    q, keys, values, out, first, rows, scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid KV_HEADS * tiles. q, out [T, Q_HEADS, DIM], DIM a power of two; keys, values: descriptors of [T, KV_HEADS,
    DIM] in blocks [STEP, 1, DIM]; first int32[R + 1]; scale: times log2(e)."""
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    QUERIES: tl.constexpr = ROWS // GROUP
    head = tl.program_id(0) % KV_HEADS
    tile = tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS
    low, high = 0, rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(first + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle - 1
    begin = tl.load(first + low)
    count = tl.load(first + low + 1) - begin
    before = (tile - begin // QUERIES - low) * QUERIES
    if before < count:
        m = tl.arange(0, ROWS)
        d = tl.arange(0, DIM)
        position = before + m // GROUP
        heads = head * GROUP + m % GROUP
        real = (position < count) & (m < QUERIES * GROUP)
        place = ((begin + position).to(tl.int64) * Q_HEADS + heads)[:, None] * DIM + d[None, :]
        loaded = tl.load(q + place, mask=real[:, None], other=0)
        end = tl.minimum(before + QUERIES, count)
        peak = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        whole = (before + 1) // STEP * STEP
        for n in tl.range(0, whole, STEP):
            acc, peak, total = step(
                loaded, acc, peak, total, keys, values, n, head, begin, end, position, scale, STEP, False
            )
        for n in tl.range(whole, end, STEP):
            acc, peak, total = step(
                loaded, acc, peak, total, keys, values, n, head, begin, end, position, scale, STEP, True
            )
        tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
