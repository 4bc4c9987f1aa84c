"""Rows of one token whose prompts begin alike: what they share is read once for all of them.

A step is cut into tiles, each some rows of a group and some of the keys that the group shares, and parts of the keys
that each row has for itself. Tiles and parts leave sums and peaks behind, which are added up for each row. The numbers
of a step are on the device; shapes and grids follow from a Shape, so that a graph captured of one serves every step
that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kernels_cuda.attention import EIGHT, FLOAT8, LEAST, LOG2E, Rows, arch_of, kind, splits, supports

Array: TypeAlias = torch.Tensor
I32: TypeAlias = NDArray[np.int32]
ALIGNED = 128
"""Keys of a tile are a multiple of this, but for the last of a group."""
WAVES = 2
"""Tiles for each processor and head, where there are keys enough."""
SLOTS = 16
"""Tiles that may lie along one row. Groups further down are left to their rows."""
COST = (64, 16, 50)
"""What a group costs, and each of its rows, in positions that are read: a row's sums are written and read again in
float32, which is some 8 positions of keys and values, for each tile along it; the rest is launches and a fuller GPU.
And how many of 100 positions that rows read by themselves come from memory, since the GPU's own cache has the rest:
two rows that read the same at about the same time read it once anyway (docs/decisions/0023-shared-prefixes.md)."""
LEAST_BYTES = 8 << 20
"""Of keys and values of a layer that need not be read again, from which on a step is worth a second launch."""


class Tiles(NamedTuple):
    """On the device, int32; those past the real ones have no rows.

    tiles [N, 5]: first row, how many rows, first position, position after the last, slot of its sums. covered [R]:
    positions of each row that tiles read; used [R]: slots that they fill.
    """

    tiles: Array
    covered: Array
    used: Array


@dataclass(frozen=True)
class Shape:
    """Numbers that grids follow from. tiles, rows: of the tensors, padding included; wide: rows of a tile; slots: that
    a row may have of tiles; parts: that the keys of its own are cut into."""

    tiles: int
    rows: int
    wide: int
    slots: int
    parts: int


@dataclass(frozen=True)
class Tuning:
    """heads: queries times heads of a tile's product; keys: of a turn; warps, stages: as Triton has them."""

    heads: int
    keys: int
    warps: int
    stages: int


def tuning(group: int, head_dim: int, wide: int, hip: bool) -> Tuning:
    """group: query heads of a kv head; wide: bytes of a number that is multiplied."""
    heads = max(32, _up(group))
    if wide == 4:
        return Tuning(heads=heads, keys=32 if head_dim <= 128 else 16, warps=4, stages=1)
    return Tuning(heads=heads, keys=64 if head_dim <= 128 else 32, warps=4, stages=1 if hip else 2)


class Cut(NamedTuple):
    """Tiles of a step as numbers of the host, int32, nothing padded; wide: rows of a tile."""

    tiles: I32
    covered: I32
    used: I32
    wide: int


def cut(
    shared: Sequence[Sequence[int]],
    rows: int,
    *,
    group: int,
    kv_heads: int,
    heads: int,
    sms: int,
    tiles: int = 1 << 20,
    slots: int = SLOTS,
) -> Cut:
    """Cut groups into tiles.

    shared: (first row, last row, first position, last position), outermost first, end to end for each row. rows: of one
    token each, that lead. heads: of Tuning. tiles, slots: at most; what doesn't fit is left to the rows.
    """
    wide, longest = max(heads // group, 1), max((end + 1 - begin for _, _, begin, end in shared), default=0)
    work = sum(-(-(b + 1 - a) // wide) * (end + 1 - begin) for a, b, begin, end in shared)
    each = ALIGNED * max(1, -(-work * kv_heads // (WAVES * sms * ALIGNED)))
    while True:
        made, covered, used = _cut(shared, rows, wide, each, slots)
        whole = max(covered, default=0) == max((end + 1 for _, _, _, end in shared), default=0)
        if len(made) <= tiles and ((whole and 2 * max(used, default=0) <= slots) or each >= longest):
            return Cut(np.array(made, np.int32).reshape(-1, 5), *(np.array(x, np.int32) for x in (covered, used)), wide)
        if each < longest:
            each *= 2
        else:
            shared = shared[: len(shared) * 3 // 4]


def _cut(
    shared: Sequence[Sequence[int]], rows: int, wide: int, each: int, slots: int
) -> tuple[list[tuple[int, int, int, int, int]], list[int], list[int]]:
    """Tiles of at most `each` keys, what they cover of each row, and the slots that they fill."""
    tiles, covered, used = list[tuple[int, int, int, int, int]](), [0] * rows, [0] * rows
    for first, last, begin, end in shared:
        cuts, slot = -(-(end + 1 - begin) // each), used[first]
        if covered[first] != begin or slot + cuts > slots:
            continue  # what is within a group that is left out is left out
        for i in range(cuts):
            low, high = begin + i * each, min(begin + (i + 1) * each, end + 1)
            tiles += [(r, min(wide, last + 1 - r), low, high, slot + i) for r in range(first, last + 1, wide)]
        size = last + 1 - first
        covered[first : last + 1], used[first : last + 1] = [end + 1] * size, [slot + cuts] * size
    return tiles, covered, used


def fit(made: Cut, reach: int, *, kv_heads: int, sms: int) -> Shape:
    """The Shape of a step. reach: keys of its own that a row has at most."""
    rows = len(made.used)
    return Shape(
        tiles=max(_up(len(made.tiles)), 32),
        rows=rows,
        wide=made.wide,
        slots=max(_up(int(made.used.max(initial=1))), 4),
        parts=splits(rows * kv_heads, _up(max(reach, 1)), sms),
    )


def pad(made: Cut, shape: Shape) -> tuple[I32, I32, I32]:
    """tiles, covered and used of Tiles, for a Shape that holds them."""
    tiles, (covered, used) = np.zeros((shape.tiles, 5), np.int32), np.zeros((2, shape.rows), np.int32)
    tiles[: len(made.tiles)] = made.tiles
    covered[: len(made.used)], used[: len(made.used)] = made.covered, made.used
    return tiles, covered, used


def _up(n: int) -> int:
    """The power of two from n on."""
    return 1 << max(n - 1, 0).bit_length()


def saved(shared: I32) -> int:
    """Positions that need not be read again, of keys and values of one layer."""
    if not len(shared):
        return 0
    first, last, begin, end = shared.astype(np.int64).T
    return int(((last - first) * (end + 1 - begin)).sum())


def refuses(*, head_dim: int, group: int, dtype: torch.dtype, store: torch.dtype, arch: str, window: int | None) -> str:
    """Why rows of a layer are attended each by itself; "" where they need not be."""
    if window is not None:
        return "a window sees no shared prefix"
    return supports(head_dim, group, dtype, store, arch)


def constants(
    *,
    arch: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    store: torch.dtype,
    page: int,
    capped: bool,
    narrow: bool,
) -> tuple[dict[str, Any], Tuning]:
    """What is compiled into `tree`, and how. narrow: the store has fewer than 2**31 numbers."""
    group = q_heads // kv_heads
    tuned = tuning(group, head_dim, dtype.itemsize, arch.startswith("gfx"))
    return {
        "Q_HEADS": q_heads,
        "KV_HEADS": kv_heads,
        "DIM": head_dim,
        "WIDE": max(_up(head_dim), 16),
        "PAGE": page,
        "CAPPED": capped,
        "SCALED": store in EIGHT,
        "KIND": kind(store, arch),
        "NARROW": narrow,
        "ROWS": tuned.heads,
        "OWN": max(_up(group), LEAST),
        "STEP": tuned.keys,
    }, tuned


def attention(
    q: Array,
    store: Array,
    out: Array,
    rows: Rows,
    tiles: Tiles,
    shape: Shape,
    *,
    page: int,
    scale: float,
    cap: float | None = None,
    sinks: Array | None = None,
    scales: Array | None = None,
) -> None:
    """Attention of the first shape.rows rows, which have a token each or none, into out [T, q_heads, D]. The rest as in
    kernels_cuda.attention.attention; never waits."""
    from kernels_cuda.tree import join, tree

    (_, q_heads, dim), kv_heads = q.shape, store.shape[2]
    fixed, tuned = constants(
        arch=arch_of(q.device),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=dim,
        dtype=q.dtype,
        store=store.dtype,
        page=page,
        capped=cap is not None,
        narrow=store.numel() < 1 << 31,
    )
    assert shape.wide * (q_heads // kv_heads) <= tuned.heads, "tiles were laid out for other heads"
    places = (shape.rows, shape.slots + shape.parts, q_heads)
    sums = torch.empty((*places, dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((*places, 2), dtype=torch.float32, device=q.device)
    factor, bound = scale * LOG2E, 0.0
    if cap is not None:
        factor, bound = 2 * factor / cap, cap * LOG2E
    tree[((shape.tiles + shape.rows * shape.parts) * kv_heads,)](
        q, store.view(torch.uint8) if store.dtype == FLOAT8 else store, sums, stats,
        rows.first, rows.start, rows.table, *tiles, q if scales is None else scales,
        shape.tiles, rows.table.shape[1], shape.slots, shape.parts, factor, bound,
        **fixed, num_warps=tuned.warps, num_stages=tuned.stages,
    )  # fmt: skip
    join[(shape.rows, q_heads)](
        sums, stats, out, rows.first, rows.start, tiles.covered, tiles.used, q if sinks is None else sinks,
        shape.slots, shape.parts,
        Q_HEADS=q_heads, DIM=dim, WIDE=fixed["WIDE"], STEP=tuned.keys, SINKS=sinks is not None, num_warps=1,
    )  # fmt: skip


def plain(
    q: Array,
    store: Array,
    out: Array,
    rows: Rows,
    tiles: Tiles,
    shape: Shape,
    *,
    page: int,
    scale: float,
    cap: float | None = None,
    sinks: Array | None = None,
    scales: Array | None = None,
) -> None:
    """What `attention` does, in plain torch, tile by tile; waits for the device."""
    first, start, table = rows.first.tolist(), rows.start.tolist(), rows.table.long()
    covered, group = tiles.covered.tolist(), q.shape[1] // store.shape[2]
    parts: dict[int, list[tuple[Array, Array]]] = {r: [] for r in range(shape.rows) if first[r + 1] > first[r]}

    def read(members: list[int], low: int, high: int) -> None:
        at = torch.arange(low, high, device=q.device)
        entry = table[members[0]][at // page] * page + at % page
        held = (store.view(torch.uint8)[entry].view(FLOAT8) if store.dtype == FLOAT8 else store[entry]).float()
        held = held if scales is None else held * scales[..., None]
        k, v = held.repeat_interleave(group, 2).unbind(1)
        s = torch.einsum("rhd,khd->rhk", q[[first[r] for r in members]].float(), k) * scale
        s = s if cap is None else torch.tanh(s / cap) * cap
        whole = s.logsumexp(-1)
        made = torch.einsum("rhk,khd->rhd", (s - whole[..., None]).exp(), v)
        for r, o, w in zip(members, made, whole, strict=True):
            parts[r].append((o, w))

    for begin, size, low, high, _ in tiles.tiles.tolist():
        if size:
            read([*range(begin, begin + size)], low, high)
    for r, made in parts.items():
        read([r], covered[r], start[r] + 1)
        sums, whole = (torch.stack(x) for x in zip(*made, strict=True))
        if sinks is not None:
            whole = torch.cat([whole, sinks.float()[None]])
        weight = whole.softmax(0)[: len(sums), :, None]
        out[first[r]] = (sums * weight).sum(0).to(out.dtype)
