"""Causal attention of long rows over pages on sm_90, in Gluon: a warp brings keys and values by the copy engine, two
groups of four warps multiply.

Its code is kept short, one loop for all blocks and addresses made where they are used: what processors have for
instructions holds little more than it.

What `paged` does for long rows in one part, without windows, caps and sinks, for a store in the dtype of the queries.
A program goes through tiles of queries of a kv head, each half of them a group's. While the tensor cores take the
products of one block of keys, a group makes the softmax of the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if TYPE_CHECKING:
    from kernels_cuda.attention import Array, Plan, Rows

GROUPS = gl.constexpr(2)
HALF = gl.constexpr(64)
"""Rows of a group's product, queries times heads."""
CHUNK = gl.constexpr(64)
"""Numbers of a line of shared memory, as the copy engine swizzles them."""

HOLD = gl.constexpr(
    "{.reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, 0f00000000;"
    " @p st.shared.f32 [a], $1; mov.b32 $0, $1;}"
)
"""Hands on what is never negative. The store, which never happens, keeps the assembler from moving a later wait in
front of what it would store: softmax would stand idle while products run."""


@gluon.jit
def find(first, rows, skip, tile, QUERIES: gl.constexpr):
    """Row of a tile, and the tile's first query. A row's tiles begin at its tokens before it // QUERIES + rows before
    it: never too few."""
    offset = gl.load(first + skip)
    low, high = skip, rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if (gl.load(first + middle) - offset) // QUERIES + middle - skip <= tile:
            low = middle
        else:
            high = middle - 1
    return low, (tile - (gl.load(first + low) - offset) // QUERIES - (low - skip)) * QUERIES


@gluon.jit
def seat(first, start, base, rows, skip, tiles, turn, KV_HEADS: gl.constexpr, QUERIES: gl.constexpr):
    """What a program does at a turn: head, row, the row's first token, its entries before the step and its tokens, and
    the first query of the tile, none where that is not below the tokens. The longest of a row go first, in every other
    row last, so that tiles grow and shrink by little; and back and forth, so that programs' sums are even."""
    size, at = gl.num_programs(0), gl.program_id(0)
    at = turn * size + gl.where(turn % 2 == 0, at, size - 1 - at)
    tile = tiles - 1 - at // KV_HEADS
    row, before = find(first, rows, skip, gl.maximum(tile, 0), QUERIES)
    begin = gl.load(first + row)
    count = gl.load(first + row + 1) - begin
    length = gl.load(start + row) - gl.load(base + row)
    other = gl.where((row - skip) % 2 == 1, (gl.cdiv(count, QUERIES) - 1) * QUERIES - before, before)
    before = gl.where(before < count, other, before)
    return at % KV_HEADS, row, begin, length, count, gl.where(tile < 0, count, before)


@gluon.jit
def seek(first, start, base, rows, skip, tiles, turn, KV_HEADS: gl.constexpr, QUERIES: gl.constexpr):
    """The next turn that has queries, and its seat; without queries after the last."""
    none = gl.to_tensor(0)
    head, begin, length, count, before = none, none, none, none, none
    while (before >= count) & (turn + 1 < gl.cdiv(tiles * KV_HEADS, gl.num_programs(0))):
        turn += 1
        head, _row, begin, length, count, before = seat(first, start, base, rows, skip, tiles, turn, KV_HEADS, QUERIES)
    return turn, head, begin, length, count, before


@gluon.jit
def places(line, n, last, none, PAGE: gl.constexpr, BOX: gl.constexpr, BOXES: gl.constexpr):
    """Entries that boxes of the keys from n on begin at; `none` of those past the row's last, which are zeros then."""
    out = ()
    for b in gl.static_range(BOXES):
        at = n + b * BOX
        page = gl.load(line + at // PAGE, mask=at < last, other=0)
        out = out + (gl.where(at < last, page * PAGE + at % PAGE, none),)  # noqa: RUF005 what Gluon knows
    return out


@gluon.jit
def produce(
    entries, first, start, base, table, rows, width, skip, tiles, boxes, full, empty,
    SIDE: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr,
    STEP: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warp that brings keys, SIDE 0, or values, SIDE 1."""
    BOXES: gl.constexpr = STEP // BOX
    CHUNKS: gl.constexpr = DIM // CHUNK
    BYTES: gl.constexpr = STEP * DIM * entries.dtype.primitive_bitwidth // 8
    i = 0
    for turn in range(gl.cdiv(tiles * KV_HEADS, gl.num_programs(0))):
        head, row, _begin, length, count, before = seat(first, start, base, rows, skip, tiles, turn, KV_HEADS, QUERIES)
        if before < count:
            line = table + row.to(gl.int64) * width
            last = length + count
            at = (SIDE * KV_HEADS + head) * DIM
            now = places(line, 0, last, entries.shape[0], PAGE, BOX, BOXES)
            for n in range(0, length + gl.minimum(before + QUERIES, count), STEP):
                later = places(line, n + STEP, last, entries.shape[0], PAGE, BOX, BOXES)
                stage = i % STAGES
                mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), BYTES)
                for b in gl.static_range(BOXES):
                    for c in gl.static_range(CHUNKS):
                        to = boxes.index((stage * CHUNKS + c) * BOXES + b)
                        tma.async_copy_global_to_shared(entries, [now[b], at + c * CHUNK], full.index(stage), to)
                now = later
                i += 1


@gluon.jit
def soften(s, peak, total, n, position, scale, edge):
    """Powers of a block's scores, what sums before it are worth, and the new peak and total. edge: the first key that
    some query does not see."""
    if n + s.shape[1] > edge:
        keys = n + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(keys[None, :] <= position[:, None], s, -float("inf"))
    top = gl.maximum(peak, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - top[:, None])
    fade = gl.exp2(peak - top)
    return p, fade, top, total * fade + gl.sum(p, 1)


@gluon.jit
def advance(
    q, p, acc, peak, total, i, n, position, scale, side, k_tiles, v_tiles, full_k, full_v, empty, order,
    scores: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, edge,
):  # fmt: skip
    """Scores of the first KEYS of block i, while the powers p of the block before it are multiplied by its values."""
    stage, old = i % STAGES, (i - 1) % STAGES
    mbarrier.wait(full_k.index(stage), (i // STAGES) & 1)
    mbarrier.wait(order.index(side), (i & 1) ^ (1 - side))
    none = gl.zeros([HALF, KEYS], gl.float32, layout=scores)
    keys = k_tiles.index(stage).slice(0, KEYS).permute((1, 0))
    s = warpgroup_mma(q, keys, none, use_acc=False, is_async=True)
    mbarrier.wait(full_v.index(old), ((i - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(old), acc, is_async=True)
    mbarrier.arrive(order.index(1 - side))
    s = warpgroup_mma_wait(1, deps=(s,))
    made, fade, peak, total = soften(s, peak, total, n, position, scale, edge)
    total = gl.inline_asm_elementwise(HOLD, "=f,f", [total], gl.float32, is_pure=False, pack=1)
    acc, p, made = warpgroup_mma_wait(0, deps=(acc, p, made))
    mbarrier.arrive(empty.index(old))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(made.to(p.dtype), p.type.layout), acc, peak, total


@gluon.jit
def lay(
    head, count, first, Q_HEADS: gl.constexpr, GROUP: gl.constexpr, EACH: gl.constexpr, DIM: gl.constexpr,
    lines: gl.constexpr,
):  # fmt: skip
    """Where a group's queries from the row's `first` on lie, from the row's begin on, and which of them there are."""
    m = gl.arange(0, HALF, layout=gl.SliceLayout(1, lines))
    d = gl.arange(0, DIM, layout=gl.SliceLayout(0, lines))
    query = first + m // GROUP
    real = (query < count) & (m < EACH * GROUP)
    at = (query * Q_HEADS + head * GROUP + m % GROUP)[:, None] * DIM + d[None, :]
    return at, real[:, None]


@gluon.jit
def finish(
    p, acc, i, left, v_tiles, full_v, lines: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The powers p of a tile's last block times the first KEYS of its values, of which `left` were written."""
    values = v_tiles.index(i % STAGES).slice(0, KEYS)
    mbarrier.wait(full_v.index(i % STAGES), (i // STAGES) & 1)
    if left < KEYS:  # what no row wrote may be NaN
        written = gl.arange(0, KEYS, layout=gl.SliceLayout(1, lines)) < left
        values.store(gl.where(written[:, None], values.load(lines), 0.0))
        fence_async_shared()
    return warpgroup_mma_wait(0, deps=(warpgroup_mma(p, values, acc, is_async=True),))


@gluon.jit
def consume(
    q, out, first, start, base, rows, skip, scale, tiles, side, q_half, k_tiles, v_tiles, full_k, full_v, empty, order,
    Q_HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, STEP: gl.constexpr, QUERIES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Group `side` of 4 warps: its half of the queries of each tile. The two issue their products by turns."""
    GROUP: gl.constexpr = Q_HEADS // KV_HEADS
    EACH: gl.constexpr = QUERIES // GROUPS
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    PART: gl.constexpr = STEP // 2
    halves: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    line: gl.constexpr = gl.SliceLayout(1, scores)
    half: gl.constexpr = gl.SliceLayout(1, halves)
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    i = 0
    turn, head, begin, length, count, before = seek(
        first, start, base, rows, skip, tiles, gl.to_tensor(-1), KV_HEADS, QUERIES
    )
    at, real = lay(head, count, before + side * EACH, Q_HEADS, GROUP, EACH, DIM, lines)
    asked = gl.load(q + begin.to(gl.int64) * (Q_HEADS * DIM) + at, mask=real, other=0)
    while before < count:
        q_half.store(asked)
        fence_async_shared()
        position = length + before + side * EACH + gl.arange(0, HALF, layout=line) // GROUP
        edge = length + before + 1
        end = length + gl.minimum(before + QUERIES, count)
        left = length + count - (end - 1) // STEP * STEP
        was_head, was_begin, was_count, was_before = head, begin, count, before
        mbarrier.wait(full_k.index(i % STAGES), (i // STAGES) & 1)
        mbarrier.wait(order.index(side), (i & 1) ^ (1 - side))
        none = gl.zeros([HALF, STEP], gl.float32, layout=scores)
        s = warpgroup_mma(q_half, k_tiles.index(i % STAGES).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.arrive(order.index(1 - side))
        turn, head, begin, length, count, before = seek(first, start, base, rows, skip, tiles, turn, KV_HEADS, QUERIES)
        s = warpgroup_mma_wait(0, deps=(s,))
        peak = gl.full([HALF], -float("inf"), gl.float32, layout=line)
        total = gl.zeros([HALF], gl.float32, layout=line)
        p, _fade, peak, total = soften(s, peak, total, 0, position, scale, edge)
        p = gl.convert_layout(p.to(q.dtype.element_ty), gl.DotOperandLayout(0, sums, 2))
        acc = gl.zeros([HALF, DIM], gl.float32, layout=sums)
        final = (end - 1) // STEP * STEP
        few = (final > 0) & (end - final <= PART)  # the diagonal's block: half of it is enough
        for n in range(STEP, gl.where(few, final, end), STEP):
            i += 1
            p, acc, peak, total = advance(
                q_half, p, acc, peak, total, i, n, position, scale, side, k_tiles, v_tiles, full_k, full_v, empty,
                order, scores, STEP, STAGES, edge,
            )  # fmt: skip
        at, real = lay(head, count, before + side * EACH, Q_HEADS, GROUP, EACH, DIM, lines)
        asked = gl.load(q + begin.to(gl.int64) * (Q_HEADS * DIM) + at, mask=real, other=0)
        if few:
            i += 1
            part, acc, _peak, some = advance(
                q_half, p, acc, gl.convert_layout(peak, half), gl.convert_layout(total, half), i, final,
                gl.convert_layout(position, half), scale, side, k_tiles, v_tiles, full_k, full_v, empty, order,
                halves, PART, STAGES, edge,
            )  # fmt: skip
            total = gl.convert_layout(some, line)
            acc = finish(part, acc, i, left, v_tiles, full_v, lines, PART, STAGES)
        else:
            acc = finish(p, acc, i, left, v_tiles, full_v, lines, STEP, STAGES)
        mbarrier.arrive(empty.index(i % STAGES))
        i += 1
        acc = acc * (1.0 / gl.convert_layout(total, gl.SliceLayout(1, sums)))[:, None]
        q_half.store(acc.to(q.dtype.element_ty))
        to, there = lay(was_head, was_count, was_before + side * EACH, Q_HEADS, GROUP, EACH, DIM, lines)
        gl.store(out + was_begin.to(gl.int64) * (Q_HEADS * DIM) + to, q_half.load(lines), mask=there)


FREE = ("rows", "width", "skip", "tiles")
LOOSE = ("first", "start", "base", "table")
"""What must not make another compiled kernel: numbers of a step, and where its tensors happen to lie."""


@gluon.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=LOOSE)
def prefill(
    q, entries, out, first, start, base, table, rows, width, skip, tiles, scale,
    Q_HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Any grid: programs share out KV_HEADS * tiles.

    q, out [T, Q_HEADS, DIM], DIM 64 or 128; entries: descriptor of the store as [entries, 2 * KV_HEADS * DIM] in blocks
    [BOX, 64], BOX a part of a page and of STEP. first int32[R + 1], start, base int32[R], table int32[R, width]: of
    all R = rows, of which the first `skip` are left out. scale: times log2(e). STEP: keys of a turn; STAGES: blocks of
    keys, and of values, on the way.
    """
    BOX: gl.constexpr = entries.block_shape[0]
    DTYPE: gl.constexpr = entries.dtype
    QUERIES: gl.constexpr = GROUPS * (HALF // (Q_HEADS // KV_HEADS))
    BOXES: gl.constexpr = STAGES * (STEP // BOX) * (DIM // CHUNK)
    lines: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_boxes = gl.allocate_shared_memory(DTYPE, [BOXES, BOX, CHUNK], lines)
    v_boxes = gl.allocate_shared_memory(DTYPE, [BOXES, BOX, CHUNK], lines)
    k_tiles = k_boxes._reinterpret(DTYPE, [STAGES, STEP, DIM], lines)
    v_tiles = v_boxes._reinterpret(DTYPE, [STAGES, STEP, DIM], lines)
    q_tile = gl.allocate_shared_memory(DTYPE, [GROUPS, HALF, DIM], lines)
    full_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full_k.index(i), count=1)
        mbarrier.init(full_v.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(order.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (
                q, out, first, start, base, rows, skip, scale, tiles, 0, q_tile.index(0), k_tiles, v_tiles,
                full_k, full_v, empty, order, Q_HEADS, KV_HEADS, DIM, STEP, QUERIES, STAGES,
            )),
            (consume, (
                q, out, first, start, base, rows, skip, scale, tiles, 1, q_tile.index(1), k_tiles, v_tiles,
                full_k, full_v, empty, order, Q_HEADS, KV_HEADS, DIM, STEP, QUERIES, STAGES,
            )),
            (produce, (
                entries, first, start, base, table, rows, width, skip, tiles, k_boxes, full_k, empty,
                0, KV_HEADS, DIM, PAGE, BOX, STEP, QUERIES, STAGES,
            )),
            (produce, (
                entries, first, start, base, table, rows, width, skip, tiles, v_boxes, full_v, empty,
                1, KV_HEADS, DIM, PAGE, BOX, STEP, QUERIES, STAGES,
            )),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip


LINES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
FIXED = {"STEP": 128, "STAGES": 3}


def attention(q: Array, store: Array, out: Array, rows: Rows, plan: Plan, *, page: int, scale: float) -> None:
    """The long rows of a plan, as kernels_cuda.attention.attention has them. scale: times log2(e)."""
    (_, q_heads, dim), kv_heads = q.shape, store.shape[2]
    queries = GROUPS.value * (HALF.value // (q_heads // kv_heads))
    tiles = (plan.tokens - plan.short) // queries + plan.rows - plan.short
    entries = TensorDescriptor.from_tensor(store.view(len(store), -1), [page, CHUNK.value], LINES)
    first, start, base, table = rows
    prefill[(min(plan.sms, tiles * kv_heads),)](
        q, entries, out, first, start, base, table, plan.rows, table.shape[1], plan.short, tiles, scale,
        Q_HEADS=q_heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page, **FIXED, num_warps=4,
    )  # fmt: skip
