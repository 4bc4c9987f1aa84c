"""One row times a matrix, as fast as the matrix is read, with the gate of a feed-forward where it is asked for.

One row has nothing for tensor cores to do: what counts is how many loads are in flight, also while the kernels before
end: a program's first part of the matrix is on its way when it begins to wait for its row. Two rows and more are the
library's, or tensor cores': they read the matrix at 0.7 to 0.9 of a copy's speed whatever their number.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl

from kernels_cuda.gated import ACTS, activate
from kernels_cuda.overlap import options, ready, wait
from kernels_cuda.quantised_matmul import By, widen

LEAST = 256
"""Entries of a row: fewer would leave threads without a load of 16 bytes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDE = 128
"""Rows and columns of a block that has a scale."""


def shape(many: int, inner: int, size: int, act: bool = False) -> tuple[int, int, int]:
    """Rows of the matrix that a program multiplies, entries of each that it reads at once, and its warps. size: bytes
    of an entry."""
    if size == 1:
        some, chunk = 8 if inner > 8192 or many <= 4096 else 4, 2048
    elif inner > 8192 or many <= 4096:
        some, chunk = 4, 2048 if inner > 8192 else 1024
    else:
        some, chunk = 2, 4096 if many > 16384 and not act else 2048
    return some, min(chunk // max(size // 2, 1), triton.next_power_of_2(inner)), 8 if inner > 8192 else 4


def supports(x: Any, w: Any, scale: Any = None, act: str = "") -> str:
    """Why the kernel is not for x [1, in] times w [out, in], of 8 bits where it has scales; "" where it is."""
    if x.shape[0] != 1:
        return f"{x.shape[0]} rows, not one"
    wanted = (x.dtype,) if scale is None else (torch.int8, torch.float8_e4m3fn)
    if x.dtype not in DTYPES or w.dtype not in wanted or (scale is not None and x.dtype != torch.bfloat16):
        return f"{x.dtype} times {w.dtype}"
    if w.shape[1] < LEAST or w.shape[1] % 16 or w.stride(0) % 16:
        return f"rows of {w.shape[1]}: they are read in sixteens, {LEAST} at least"
    if w.stride(1) != 1 or x.stride(1) != 1:
        return "rows whose entries do not lie side by side"
    if act and (act not in ACTS or w.shape[0] % (2 * SIDE)):
        return f"the activation {act} of {w.shape[0]} rows"
    return ""


def plain(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What `row_times` computes, in torch."""
    return (x.double() @ w.double().t()).to(dtype or x.dtype)


def row_times(
    x: torch.Tensor,
    w: torch.Tensor,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    by: By = "row",
    native: bool = False,
    act: Literal["", "silu", "gelu_tanh"] = "",
) -> torch.Tensor:
    """x [1, in] times w [out, in], summed in float32 -> [1, out] in `dtype`, x's where none is given; put into `out`
    where one is given.

    scale, by, native: of a matrix of 8 bits, as `quantised_matmul` has them. act: of the two halves of the result
    act(first) * second, [1, out / 2]; each is rounded before.
    """
    many, inner = w.shape[0] // (2 if act else 1), w.shape[1]
    if out is None:
        out = torch.empty((1, many), dtype=dtype or x.dtype, device=x.device)
    kind = "wide" if scale is None else "int8" if w.dtype == torch.int8 else "native" if native else "bits"
    some, chunk, warps = shape(many, inner, w.itemsize, bool(act))
    _row_times[(triton.cdiv(many, some),)](
        x,
        w if scale is None else w.view(torch.uint8),
        x if scale is None else scale,
        out,
        w.stride(0),
        0 if scale is None else scale.shape[-1],
        many,
        inner=inner,
        SOME=some,
        CHUNK=chunk,
        LANE=16 // w.itemsize,
        KIND=kind,
        BLOCKED=scale is not None and by == "block",
        ACT=ACTS.index(act) + 1 if act else 0,
        num_warps=warps,
        num_stages=1,
        **options(x),
    )
    return out


@triton.jit
def _row_times(
    x, w, scale, out, w_stride, width, many,
    inner: tl.constexpr, SOME: tl.constexpr, CHUNK: tl.constexpr, LANE: tl.constexpr, KIND: tl.constexpr,
    BLOCKED: tl.constexpr, ACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program: SOME outputs, sums of groups of LANE entries apart until the end. The next part of the matrix is asked
    for before one is multiplied. many: outputs; with ACT, rows of each half."""
    ready(OVERLAP)
    first = tl.program_id(0) * SOME
    row = first + tl.arange(0, SOME)
    at = w + tl.cast(first, tl.int64) * w_stride + (tl.arange(0, SOME) * w_stride)[:, None]
    other = at + tl.cast(many, tl.int64) * w_stride
    inside = (row < many)[:, None]
    part = _load(at, 0, inside, inner, CHUNK)
    if ACT > 0:
        part_other = _load(other, 0, inside, inner, CHUNK)
    wait(OVERLAP)
    total = tl.zeros((SOME, CHUNK // LANE), tl.float32)
    total_other = tl.zeros((SOME, CHUNK // LANE), tl.float32)
    for begin in tl.static_range(0, inner, CHUNK):
        column = begin + tl.arange(0, CHUNK)
        h = tl.load(x + column, mask=column < inner, other=0.0).to(tl.float32)
        now = part
        if begin + CHUNK < inner:
            part = _load(at, begin + CHUNK, inside, inner, CHUNK)
        if ACT > 0:
            now_other = part_other
            if begin + CHUNK < inner:
                part_other = _load(other, begin + CHUNK, inside, inner, CHUNK)
            total_other += _dot(now_other, h, scale, first + many, begin, width, LANE, KIND, BLOCKED)
        total += _dot(now, h, scale, first, begin, width, LANE, KIND, BLOCKED)
    made = _whole(total, scale, row, row < many, KIND, BLOCKED).to(out.dtype.element_ty)
    if ACT > 0:
        up = _whole(total_other, scale, many + row, row < many, KIND, BLOCKED).to(out.dtype.element_ty).to(tl.float32)
        gate = activate(made.to(tl.float32), ACT == 2).to(out.dtype.element_ty).to(tl.float32)
        made = (gate * up).to(out.dtype.element_ty)
    tl.store(out + row, made, mask=row < many)


@triton.jit
def _load(at, begin, inside, inner: tl.constexpr, CHUNK: tl.constexpr):
    """Entries begin .. begin + CHUNK - 1 of the rows that begin at `at` [SOME, 1]."""
    column = begin + tl.arange(0, CHUNK)
    return tl.load(at + column[None, :], mask=inside & (column < inner)[None, :], other=0)


@triton.jit
def _dot(
    part, h, scale, first, begin, width, LANE: tl.constexpr, KIND: tl.constexpr, BLOCKED: tl.constexpr
):  # fmt: skip
    """part [SOME, CHUNK] of a matrix, from row `first` and column `begin` on, times h [CHUNK] -> float32[SOME, CHUNK //
    LANE], by the scales of blocks where they have some."""
    wide = part.to(tl.float32) if KIND == "wide" else widen(part, KIND).to(tl.float32)
    sums = tl.sum(tl.reshape(wide * h[None, :], (part.shape[0], part.shape[1] // LANE, LANE)), 2)
    if BLOCKED:
        block = (begin + tl.arange(0, part.shape[1] // LANE) * LANE) // 128
        sums *= tl.load(scale + (first // 128) * width + block, mask=block < width, other=0.0)[None, :]
    return sums


@triton.jit
def _whole(total, scale, row, live, KIND: tl.constexpr, BLOCKED: tl.constexpr):
    """Sums [SOME, groups] of rows, by the scales of rows where they have some."""
    y = tl.sum(total, 1)
    if KIND != "wide" and not BLOCKED:
        y *= tl.load(scale + row, mask=live, other=0.0)
    return y
