"""A few rows times a matrix, as fast as the matrix is read.

So few rows have nothing for tensor cores to do: what counts is how many loads are in flight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

MOST = 4
"""Rows of x."""
LEAST = 256
"""Less than this, read at once, would leave threads without a load of 16 bytes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def chunk(inner: int, rows: int) -> int:
    """Entries of a row of the matrix that are read at once: the largest power of two that divides `inner`, as far as
    the sums of `rows` rows fit the registers."""
    return min(2048 // triton.next_power_of_2(rows), inner & -inner)


def supports(x: Any, w: Any) -> str:
    """Why the kernel is not for x [T, in] times w [out, in]; "" where it is."""
    if not 1 <= x.shape[0] <= MOST:
        return f"{x.shape[0]} rows, not 1 to {MOST}"
    if x.dtype != w.dtype or x.dtype not in DTYPES:
        return f"{x.dtype} times {w.dtype}"
    if chunk(w.shape[1], x.shape[0]) < LEAST:
        return f"rows of {w.shape[1]} are not in chunks of {LEAST}"
    if w.stride(1) != 1 or x.stride(1) != 1:
        return "rows whose entries do not lie side by side"
    return ""


def plain(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What `rows_times` computes, in torch."""
    return (x.double() @ w.double().t()).to(dtype or x.dtype)


def rows_times(
    x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, in] times w [out, in], summed in float32 -> [T, out] in `dtype`, x's where none is given; put into `out`,
    whose rows lie side by side, where one is given."""
    rows, (many, inner) = x.shape[0], w.shape
    if out is None:
        out = torch.empty((rows, many), dtype=dtype or x.dtype, device=x.device)
    some = 4 if many < 65536 else 8
    _rows_times[(triton.cdiv(many, some),)](
        x,
        w,
        out,
        x.stride(0),
        w.stride(0),
        many=many,
        inner=inner,
        R=rows,
        SOME=some,
        CHUNK=chunk(inner, rows),
        num_warps=8,
        num_stages=1,
    )
    return out


@triton.jit
def _rows_times(
    x,
    w,
    out,
    x_stride,
    w_stride,
    many: tl.constexpr,
    inner: tl.constexpr,
    R: tl.constexpr,
    SOME: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program: SOME rows of the matrix; sums are joined at the end, so that a turn of the loop waits for no other."""
    row = tl.program_id(0) * SOME + tl.arange(0, SOME)
    column = tl.arange(0, CHUNK)
    at = w + row.to(tl.int64)[:, None] * w_stride + column[None, :]
    inside = (row < many)[:, None]
    first = tl.zeros((SOME, CHUNK), tl.float32)
    second, third, fourth = first, first, first
    for begin in range(0, inner, CHUNK):
        part = tl.load(at + begin, mask=inside, other=0.0).to(tl.float32)
        first += part * tl.load(x + begin + column).to(tl.float32)[None, :]
        if R > 1:
            second += part * tl.load(x + x_stride + begin + column).to(tl.float32)[None, :]
        if R > 2:
            third += part * tl.load(x + 2 * x_stride + begin + column).to(tl.float32)[None, :]
        if R > 3:
            fourth += part * tl.load(x + 3 * x_stride + begin + column).to(tl.float32)[None, :]
    kind = out.dtype.element_ty
    tl.store(out + row, tl.sum(first, 1).to(kind), mask=row < many)
    if R > 1:
        tl.store(out + many + row, tl.sum(second, 1).to(kind), mask=row < many)
    if R > 2:
        tl.store(out + 2 * many + row, tl.sum(third, 1).to(kind), mask=row < many)
    if R > 3:
        tl.store(out + 3 * many + row, tl.sum(fourth, 1).to(kind), mask=row < many)
