"""Which experts take each token: those that the router scores highest, their shares, and the choices sorted by expert.

Nothing here depends on what is chosen but the numbers: the host need not know them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

MOST = 1024
"""Experts that a program holds the scores of."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNKS = ((4096, 512, 4), (1 << 30, 4096, 8))
"""Choices up to which -> choices that are looked at in one turn, and warps."""
TILES = 64
"""Tiles that are written in one turn."""


class Plan(NamedTuple):
    """How the T * k choices of T tokens meet the experts.

    chosen int32[T, k]. order int32[T*k]: the choices by expert, those of one in the order of tokens. tiles int32[3, S]:
    expert, first row and number of rows of each tile of at most `rows` rows of one expert; some have none. One token
    needs neither.
    """

    chosen: torch.Tensor
    order: torch.Tensor | None
    tiles: torch.Tensor | None
    rows: int


def supports(scores: Any, top_k: int) -> str:
    """Why the kernels are not for scores [T, E]; "" where they are."""
    if scores.dtype not in DTYPES:
        return f"scores of {scores.dtype}"
    if not top_k <= scores.shape[1] <= MOST:
        return f"{top_k} of {scores.shape[1]} experts; at most {MOST}"
    return ""


def route(scores: torch.Tensor, top_k: int, renormalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [T, E] -> shares [T, k] of the softmax, of the chosen alone where renormalised, and int32[T, k] chosen,
    the highest first, of equal ones that of the lowest number."""
    scores, (tokens, experts) = scores.contiguous(), scores.shape
    share = torch.empty((tokens, top_k), dtype=scores.dtype, device=scores.device)
    chosen = torch.empty((tokens, top_k), dtype=torch.int32, device=scores.device)
    if tokens:
        _route[(tokens,)](
            scores, share, chosen, EXPERTS=experts, E=triton.next_power_of_2(experts), TOP=top_k,
            K=triton.next_power_of_2(top_k), RENORMALISED=renormalised, num_warps=1 if experts <= 256 else 4,
        )  # fmt: skip
    return share, chosen


def height(choices: int, experts: int) -> int:
    """Rows of a tile, where so many choices fall on so many experts: one tile is nearly always enough for an expert, up
    to what fills the tensor cores."""
    each = choices / experts
    return 16 if each <= 6 else 32 if each <= 20 else 64 if each <= 48 else 128


def chunk(choices: int) -> tuple[int, int]:
    """Of so many choices, how many are looked at in one turn, and by how many warps."""
    return next(line[1:] for line in CHUNKS if choices <= line[0])


def sort(chosen: torch.Tensor, experts: int) -> Plan:
    """Sort the choices int32[T, k] of so many experts, in one program an expert."""
    count = chosen.numel()
    rows = height(count, experts)
    if len(chosen) == 1:
        return Plan(chosen, None, None, 1)
    slots = count // rows + experts
    order = torch.empty(count, dtype=torch.int32, device=chosen.device)
    tiles = torch.empty((3, slots), dtype=torch.int32, device=chosen.device)
    some, warps = chunk(count)
    _sort[(experts,)](chosen, order, tiles, count, slots, R=rows, CHUNK=some, TILES=TILES, num_warps=warps)
    return Plan(chosen, order, tiles, rows)


@triton.jit
def _route(
    scores, share, chosen,
    EXPERTS: tl.constexpr, E: tl.constexpr, TOP: tl.constexpr, K: tl.constexpr, RENORMALISED: tl.constexpr,
):  # fmt: skip
    """One token. What is not a number is never chosen before a number; the shares tell of it."""
    row, e, j = tl.program_id(0).to(tl.int64), tl.arange(0, E), tl.arange(0, K)
    free = e < EXPERTS
    raw = tl.load(scores + row * EXPERTS + e, mask=free, other=-float("inf")).to(tl.float32)
    value = tl.where(raw == raw, raw, -float("inf"))
    total = tl.sum(tl.exp(raw - tl.max(value, 0)), 0)
    best, place = tl.full((K,), -float("inf"), tl.float32), tl.zeros((K,), tl.int32)
    for i in range(TOP):
        peak = tl.max(tl.where(free, value, -float("inf")), 0)
        at = tl.min(tl.where(free & (value == peak), e, E - 1), 0)
        best, place, free = tl.where(j == i, peak, best), tl.where(j == i, at, place), free & (e != at)
    weight = tl.exp(best - tl.max(best, 0))
    weight /= tl.sum(weight, 0) if RENORMALISED else total
    tl.store(share + row * TOP + j, weight.to(share.dtype.element_ty), mask=j < TOP)
    tl.store(chosen + row * TOP + j, place, mask=j < TOP)


@triton.jit(do_not_specialize=["count", "slots"])
def _sort(chosen, order, tiles, count, slots, R: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr):
    """The choices of one expert, behind those of lower ones. Its tiles stand from start // R + expert on: there is room
    for them before the next expert's, whatever the sizes are."""
    expert, lane = tl.program_id(0), tl.arange(0, CHUNK)
    lower, equal = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.int32)
    for at in range(0, count, CHUNK):
        who = tl.load(chosen + at + lane, mask=at + lane < count, other=1 << 30)
        lower += (who < expert).to(tl.int32)
        equal += (who == expert).to(tl.int32)
    start, size = tl.sum(lower, 0), tl.sum(equal, 0)
    done = start
    for at in range(0, count, CHUNK):
        mine = tl.load(chosen + at + lane, mask=at + lane < count, other=1 << 30) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(order + done + rank - 1, at + lane, mask=mine)
        done += tl.sum(mine.to(tl.int32), 0)
    first, last = start // R + expert, (start + size) // R + expert + 1
    for at in range(first, last, TILES):
        tile = at + tl.arange(0, TILES)
        begin = start + (tile - first) * R
        tl.store(tiles + tile, tl.zeros_like(tile) + expert, mask=tile < last)
        tl.store(tiles + slots + tile, begin, mask=tile < last)
        left = tl.minimum(tl.maximum(start + size - begin, 0), R)
        tl.store(tiles + 2 * slots + tile, left, mask=tile < last)
