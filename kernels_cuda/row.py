"""One row times a matrix, as fast as the matrix is read.

One row has nothing for tensor cores to do: what counts is how many loads are in flight. Two rows and more are the
library's, which reads the matrix at 0.7 to 0.9 of a copy's speed whatever their number.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LEAST = 256
"""Less than this, read at once, would leave threads without a load of 16 bytes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shape(inner: int) -> tuple[int, int, int]:
    """Rows of the matrix and entries of each that a program reads at once, and its warps."""
    chunk = inner & -inner
    return (1, 4096, 8) if chunk >= 4096 else (2, min(chunk, 2048), 4)


def supports(x: Any, w: Any) -> str:
    """Why the kernel is not for x [1, in] times w [out, in]; "" where it is."""
    if x.shape[0] != 1:
        return f"{x.shape[0]} rows, not one"
    if x.dtype != w.dtype or x.dtype not in DTYPES:
        return f"{x.dtype} times {w.dtype}"
    if shape(w.shape[1])[1] < LEAST:
        return f"rows of {w.shape[1]} are not in chunks of {LEAST}"
    if w.stride(1) != 1 or x.stride(1) != 1:
        return "rows whose entries do not lie side by side"
    return ""


def plain(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What `row_times` computes, in torch."""
    return (x.double() @ w.double().t()).to(dtype or x.dtype)


def row_times(
    x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [1, in] times w [out, in], summed in float32 -> [1, out] in `dtype`, x's where none is given; put into `out`
    where one is given."""
    many, inner = w.shape
    if out is None:
        out = torch.empty((1, many), dtype=dtype or x.dtype, device=x.device)
    some, chunk, warps = shape(inner)
    _row_times[(triton.cdiv(many, some),)](
        x, w, out, w.stride(0), many=many, inner=inner, SOME=some, CHUNK=chunk, num_warps=warps, num_stages=1
    )
    return out


@triton.jit
def _row_times(x, w, out, w_stride, many: tl.constexpr, inner: tl.constexpr, SOME: tl.constexpr, CHUNK: tl.constexpr):
    """A program: SOME rows of the matrix; sums are joined at the end, so that a turn of the loop waits for no other."""
    row = tl.program_id(0) * SOME + tl.arange(0, SOME)
    column = tl.arange(0, CHUNK)
    at = w + row.to(tl.int64)[:, None] * w_stride + column[None, :]
    total = tl.zeros((SOME, CHUNK), tl.float32)
    for begin in range(0, inner, CHUNK):
        part = tl.load(at + begin, mask=(row < many)[:, None], other=0.0).to(tl.float32)
        total += part * tl.load(x + begin + column).to(tl.float32)[None, :]
    tl.store(out + row, tl.sum(total, 1).to(out.dtype.element_ty), mask=row < many)
