"""Many rows times a matrix of float8_e4m3fn, both in 8 bits: rows are narrowed, each by its own scale."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import triton
import triton.language as tl

By: TypeAlias = Literal["row", "block"]
"""What has a scale of its own in the matrix: each row, or each SIDE x SIDE."""
SIDE = 128
MOST = tl.constexpr(448.0)
"""The largest number of float8_e4m3fn."""
GROUP = 8
"""Blocks of rows that are multiplied with one block of the matrix, one after the other, while it is in the cache."""
BLOCKS: dict[str, tuple[int, int, int, int, int]] = {"row": (128, 256, 128, 8, 3), "block": (128, 128, 128, 8, 4)}
"""Rows, columns and summed numbers of a program's block, its warps and stages."""
ROWS = 16
"""The library's product of blocks takes rows in multiples."""


def supports(x: torch.Tensor, body: torch.Tensor, by: By, library: bool = False) -> str:
    """Why x [T, in] can't be narrowed and multiplied with a matrix [out, in]; "" where it can."""
    if x.dtype != torch.bfloat16 or body.dtype != torch.float8_e4m3fn:
        return f"rows of {x.dtype}, matrices of {body.dtype}; bfloat16 and float8_e4m3fn are multiplied"
    rows, columns = (SIDE, 4 * SIDE) if library and by == "block" else (16, 16)
    if body.shape[0] % rows or body.shape[1] % columns or not body.is_contiguous():
        return f"a matrix of {list(body.shape)}; multiples of {rows} x {columns} are multiplied"
    return ""  # of other columns torch's product is not refused, and wrong (2.11 on CUDA 13.0)


def narrow(x: torch.Tensor, by: By) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] -> float8_e4m3fn [T, in] and scales, the largest number / 448: float32 [T, 1] of each row, or
    [T, in / SIDE] of each SIDE numbers of one, which lie by columns; T is then rounded up to a multiple of ROWS, and
    what is past the end is any number."""
    rows, inner = x.shape
    blocked = by == "block"
    tall = -(-rows // ROWS) * ROWS if blocked else rows
    body = torch.empty((tall, inner), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((inner // SIDE if blocked else 1, tall), dtype=torch.float32, device=x.device)
    size = triton.next_power_of_2(inner)
    warps = 4 if size <= 4096 else 8
    _narrow[(rows,)](x.contiguous(), body, scale, inner, tall, I=size, BLOCKED=blocked, num_warps=warps)
    return body, scale.t()


def scaled_matmul(
    x: torch.Tensor, body: torch.Tensor, scale: torch.Tensor, by: By, library: bool = False
) -> torch.Tensor:
    """x [T, in], narrowed, times body [out, in] and its scales, summed in float32 -> bfloat16 [T, out].

    scale: float32 [1, out], or [out / SIDE, in / SIDE] rounded up. library: torch's product, which for blocks narrows
    SIDE numbers of a row at a time and is for sm_90 alone; else a row has one scale.
    """
    if library:
        rows, own = narrow(x, by)
        columns = scale if by == "row" else scale.t()
        y = torch._scaled_mm(rows, body.t(), scale_a=own, scale_b=columns, out_dtype=torch.bfloat16)
        return y[: len(x)]
    return product(*narrow(x, "row"), body, scale, by)


def product(x: torch.Tensor, own: torch.Tensor, body: torch.Tensor, scale: torch.Tensor, by: By) -> torch.Tensor:
    """Narrowed rows x [T, in], own [T, 1], times body [out, in] and its scales -> bfloat16 [T, out]."""
    (rows, inner), columns = x.shape, body.shape[0]
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    r, c, i, warps, stages = BLOCKS[by]
    options: dict[str, Any] = {"R": r, "C": c, "I": i, "GROUP": GROUP, "num_warps": warps, "num_stages": stages}
    grid = (triton.cdiv(rows, r) * triton.cdiv(columns, c),)
    _product[grid](
        x, own, body, scale, out, rows, columns, inner, scale.shape[-1], BLOCKED=by == "block", EVEN=inner % i == 0,
        WIDE=None if x.is_cuda else tl.float32, **options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tall"])
def _narrow(x, out, scale, inner, tall, I: tl.constexpr, BLOCKED: tl.constexpr):
    """One row. scale [inner / 128, tall], or [1, tall]."""
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, I)
    wide = tl.load(x + row * inner + k, mask=k < inner, other=0.0).to(tl.float32)
    if BLOCKED:
        parts = tl.reshape(wide, (I // 128, 128))
        largest = tl.max(tl.abs(parts), 1)
        by = tl.where(largest == 0, 1.0, largest / MOST)
        number = tl.reshape(parts / by[:, None], (I,))
        block = tl.arange(0, I // 128)
        tl.store(scale + block * tall + row, by, mask=block < inner // 128)
    else:
        largest = tl.max(tl.abs(wide), 0)
        by = tl.where(largest == 0, 1.0, largest / MOST)
        number = wide / by
        tl.store(scale + row, by)
    number = tl.minimum(tl.maximum(number, -MOST), MOST)
    tl.store(out + row * inner + k, number.to(out.dtype.element_ty), mask=k < inner)


@triton.jit(do_not_specialize=["rows"])
def _product(
    x, own, w, scale, out, rows, columns, inner, width,
    BLOCKED: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, C: tl.constexpr, I: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of R x C of the product. width: of the scales; I is 128 where blocks have them, C at most."""
    at, down, across = tl.program_id(0), tl.cdiv(rows, R), tl.cdiv(columns, C)
    band = at // (GROUP * across)
    high = tl.minimum(down - band * GROUP, GROUP)
    first_row = (band * GROUP + (at % (GROUP * across)) % high) * R
    first = (at % (GROUP * across)) // high * C
    m, n = first_row + tl.arange(0, R), first + tl.arange(0, C)
    there, live = m < rows, n < columns
    k = tl.arange(0, I)
    a = x + m.to(tl.int64)[:, None] * inner + k[None, :]
    b = w + n.to(tl.int64)[None, :] * inner + k[:, None]
    acc = tl.zeros((R, C), tl.float32)
    for start in range(0, inner, I):
        if EVEN:
            left = tl.load(a + start, mask=there[:, None], other=0.0)
            right = tl.load(b + start, mask=live[None, :], other=0.0)
        else:
            inside = start + k < inner
            left = tl.load(a + start, mask=there[:, None] & inside[None, :], other=0.0)
            right = tl.load(b + start, mask=live[None, :] & inside[:, None], other=0.0)
        if WIDE is not None:  # the interpreter multiplies no float8
            left, right = left.to(WIDE), right.to(WIDE)
        if BLOCKED:
            acc += tl.dot(left, right) * tl.load(scale + (first // 128) * width + start // 128)
        else:
            acc = tl.dot(left, right, acc)
    acc *= tl.load(own + m, mask=there, other=0.0)[:, None]
    if not BLOCKED:
        acc *= tl.load(scale + n, mask=live, other=0.0)[None, :]
    where = out + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=there[:, None] & live[None, :])
